"""Celery's canvas at the end of a job: link, link_error, chain, group and chord, as messages for its commit.

Celery itself builds every message, from the signatures that came with the job, on an application whose producer keeps
what kombu would push. So nothing is sent before the commit, and then everything is, with the result, by the commit.
Modelled on `_dispatch_callbacks_and_chain` (app/trace.py) and `mark_as_failure` (backends/base.py) of Celery 5.7.

A follow-up goes to the queue that its signature names; else to the lane where its task is a kernel of ours; else to
`celery`, Celery's default queue: the routes of the program that sent the job are not known here.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Final

import kombu
import msgspec
import structlog
from celery import Celery, _state, group, signature
from celery.app.task import Context
from celery.backends.base import SyncBackendMixin
from celery.backends.redis import RedisBackend
from kombu.exceptions import OperationalError
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.json import dumps
from redis import exceptions as redis_errors

from lepton_ai import topology
from lepton_ai.errors import (
    BrokerUnavailable,
    InvalidArguments,
    InvalidRequest,
    LeptonError,
    Overloaded,
    TooLarge,
)
from lepton_ai.job import Meta
from lepton_ai.settings import Settings
from lepton_ai.succession import FollowUps, Sequel
from lepton_ai.tensor import TensorMap
from queues import functions
from queues.app import make_app

__all__ = ["Canvas"]

#: Celery's own name of the queue for tasks that nobody routes.
_DEFAULT_QUEUE: Final = "celery"
#: All messages of one job's end together: each carries its result, and they are in memory until they are committed.
_MOST_BYTES: Final = 64 * 1024 * 1024
#: A chord whose header holds chords takes a connection of the pool for each level; a worker must not wait for ever.
_POOL_WAIT_S: Final = 10.0

log = structlog.get_logger()


class _Part(msgspec.Struct):
    """A job that has ended in the header of a chord, or before the end of a chain that it has broken."""

    sequel: Sequel
    state: str
    result: Any
    """Its outputs, or Celery's map of an exception."""
    traceback: str | None = None


_AWAY: Final = (
    ConnectionError,
    TimeoutError,
    redis_errors.ConnectionError,
    redis_errors.TimeoutError,
    redis_errors.OutOfMemoryError,
    redis_errors.ReadOnlyError,
    redis_errors.MasterDownError,
)
_PACK = msgspec.msgpack.Encoder()
_PART = msgspec.msgpack.Decoder(_Part)


class Canvas:
    """What follows a job, for the threads of one worker. `kernels` are the names that the lane's workers know."""

    def __init__(self, settings: Settings, kernels: Collection[str]) -> None:
        self._local = threading.local()
        self._app = _make_app(settings, frozenset(kernels))
        self._shared_producers = self._app.producer_or_acquire
        self._app.producer_or_acquire = self._producer

    def after_success(self, sequel: Sequel, outputs: Mapping[str, Any]) -> FollowUps:
        """`link` and the next of the chain, with the outputs as they stand in the job's result.

        Raises InvalidArguments where a signature makes no message, TooLarge where they make too much, BrokerUnavailable
        where the size of a chord cannot be written: that goes straight to the result backend, as Celery does it; and
        Overloaded where that has no memory for it now.
        """
        try:
            result = _plain(outputs)
        except Exception as error:  # what an encoder raises depends on what is in its way
            raise _unsendable(error) from error
        binary = result is not outputs
        pushes: list[tuple[str, bytes]] = []
        children: list[Any] = []
        if sequel.callbacks or sequel.chain:
            with self._capturing(sequel) as (pushes, children):
                self._send_callbacks(sequel, result, {"serializer": "msgpack"} if binary else {})
        part = None
        if sequel.chord is not None:
            try:
                body = _in_msgpack(sequel.chord) if binary else sequel.chord
                part = _PACK.encode(_Part(_placed(sequel, body, []), "SUCCESS", result))
            except Exception as error:
                raise _unsendable(error) from error
        return FollowUps(tuple(pushes), tuple(each.as_tuple() for each in children), part)

    def after_failure(self, sequel: Sequel, failure: Meta) -> FollowUps:
        """`link_error` with the job's id, as Celery sends it to tasks that are not its own; not for a revoked job.

        What cannot be sent is logged and left out: the job has an error to tell already. Raises BrokerUnavailable.
        """
        pushes: list[tuple[str, bytes]] = []
        if sequel.errbacks and failure.status == "FAILURE":
            try:
                with self._capturing(sequel) as (found, _):
                    errbacks = [signature(each, app=self._app) for each in sequel.errbacks]
                    family = {"parent_id": sequel.id, "root_id": sequel.root_id}
                    group(errbacks, app=self._app).apply_async((sequel.id,), **family)
                pushes = found
            except InvalidRequest as error:
                log.error("errbacks_left_out", job=sequel.id, reason=error.message)
        part = None
        if sequel.chord is not None or sequel.chain:
            left = _placed(sequel, sequel.chord, sequel.chain)
            try:
                part = _PACK.encode(_Part(left, failure.status, failure.result, failure.traceback))
            except Exception:
                log.exception("chord_part_left_out", job=sequel.id)
        return FollowUps(tuple(pushes), (), part)

    def finish(self, part: bytes) -> bool:
        """After the commit: counts a job in its chord, and fails the rest of a chain that it has broken.

        False where another is sending the chord's body right now, or has died while it did: call it again, until it is
        True. To call it twice is safe, by Celery's own book-keeping: a part counts once, and a body goes out once. Only
        if this process is killed between that message and the book-keeping does it go out again (at least once); a body
        that is a kernel has one effect even so, because its id is fixed. Raises BrokerUnavailable where the broker is
        away or takes nothing now; anything else that Celery or the broker makes of a part is logged and over, so that
        it cannot be met with for ever.
        """
        try:
            found = _PART.decode(part)
            with self._standing_for(found.sequel):
                chords = self._count(_request(found.sequel), found) + self._fail_chain(found)
            return not any(map(self._is_claimed, chords))
        except (
            Exception
        ) as error:  # what Celery raises for a body that is no signature depends on what is wrong with it
            if _is_away(error):
                raise BrokerUnavailable(f"a part of a chord cannot be counted: {error}") from error
            log.exception("chord_part_failed", part=repr(part[:200]))
            return True

    # -- sending ----------------------------------------------------------------------------------------------------

    def _send_callbacks(self, sequel: Sequel, result: Any, given: dict[str, Any]) -> None:
        """As Celery: groups each by itself, other callbacks as one group, then the next of the chain."""
        family = {"parent_id": sequel.id, "root_id": sequel.root_id} | given
        callbacks = [signature(each, app=self._app) for each in sequel.callbacks]
        if len(callbacks) > 1:
            single = [each for each in callbacks if not isinstance(each, group)]
            callbacks = [each for each in callbacks if isinstance(each, group)]
            callbacks += [group(single, app=self._app)] if single else []
        for each in callbacks:
            each.apply_async((result,), **family)
        if sequel.chain:
            *rest, following = sequel.chain
            signature(following, app=self._app).apply_async((result,), chain=rest, **family)

    @contextmanager
    def _capturing(self, sequel: Sequel) -> Iterator[tuple[list[tuple[str, bytes]], list[Any]]]:
        """What this thread sends is kept: the messages, and Celery's results of those that it sends for the job."""
        producer = kombu.Connection(transport=_Transport).Producer()
        self._local.producer = producer
        try:
            with self._standing_for(sequel) as children:
                yield producer.channel.pushes, children
        except LeptonError:
            raise
        except Exception as error:
            if _is_away(error):
                kind = Overloaded if "maxmemory" in str(error) else BrokerUnavailable
                raise kind(f"what follows a job cannot be prepared: {error}") from error
            raise _unsendable(error) from error
        finally:
            self._local.producer = None

    @contextmanager
    def _standing_for(self, sequel: Sequel) -> Iterator[list[Any]]:
        """To Celery, this thread runs the job as a task of our application: what is sent has it for its parent."""
        children: list[Any] = []
        task = SimpleNamespace(request=_request(sequel), add_trail=children.append)
        before = _state._tls.current_app
        self._app.set_current()  # nested signatures ask for the current one
        _state.push_current_task(task)
        try:
            yield children
        finally:
            _state.pop_current_task()
            _state._set_current_app(before)

    def _producer(self, producer: Any = None) -> Any:
        """In the place of Celery.producer_or_acquire."""
        capturing = getattr(self._local, "producer", None)
        return self._shared_producers(producer) if capturing is None else nullcontext(capturing)

    # -- the result backend -----------------------------------------------------------------------------------------

    def _count(self, request: Context, part: _Part) -> list[str]:
        """Counts a part; returns its chord's group, none where it is in no chord, or where that takes no such part."""
        if not (request.chord and request.group):
            return []
        try:
            self._app.backend.on_chord_part_return(request, part.state, part.result)
        except Exception as error:  # one link of a chain must not keep the others from their end
            if _is_away(error):
                raise
            log.exception("chord_part_uncountable", job=request.id, chord=request.group)
            return []
        return [request.group]

    def _fail_chain(self, part: _Part) -> list[str]:
        """As Celery's Backend._fail_chain, for revoked jobs too: nobody is to wait for what will never be.

        Each is counted before its result is stored: after a kill in between it is counted again, and not left out.
        """
        chords: list[str] = []
        left = list(part.sequel.chain)
        while left:
            link = Context(left.pop())
            link.update(link.options)
            link.id, link.group = link.options.get("task_id"), link.options.get("group_id")
            chords += self._count(link, part)
            if link.id is not None and part.sequel.keep:
                request = {"traceback": part.traceback, "request": link}
                self._app.backend.store_result(link.id, part.result, part.state, **request)
            if getattr(link, "subtask_type", None) == "chord" and (body := link.kwargs.get("body")):
                left.append(body)
        return chords

    def _is_claimed(self, chord: str) -> bool:
        """Whether all parts of a chord are counted, and its body neither sent nor given up yet."""
        backend = self._app.backend
        claim, size = backend.client.mget([backend.get_key_for_group(chord, end) for end in (".c", ".s")])
        return claim not in (None, b"done") and size is not None


def _make_app(settings: Settings, kernels: frozenset[str]) -> Celery:
    app = make_app(settings)

    def route(name: Any, args: Any, kwargs: Any, options: Any, task: Any = None) -> dict[str, str] | None:
        # celery.map and its like come under the name or the signature of what they call; they call no kernel of ours.
        return {"queue": topology.LANE} if task is None and name in kernels else None

    backend = app.conf.result_backend.removeprefix("redis+")
    app.conf.update(
        task_default_queue=_DEFAULT_QUEUE,
        task_routes=(route,),
        task_send_sent_event=False,  # it would be told before the commit
        broker_pool_acquire_timeout=_POOL_WAIT_S,
        result_backend=f"{__name__}:_Backend+{backend}",
        result_backend_thread_safe=True,
    )
    return app


class _Backend(SyncBackendMixin, RedisBackend):
    """Celery's Redis backend without its subscriptions: nobody waits for a result here."""

    def on_task_call(self, producer: Any, task_id: str) -> None: ...


class _Channel(virtual.Channel):
    """Keeps what kombu's Redis channel would push, under the names of the lists that it would push it to."""

    sep = kombu_redis.Channel.sep
    priority_steps = kombu_redis.PRIORITY_STEPS
    priority = kombu_redis.Channel.priority
    _q_for_pri = kombu_redis.Channel._q_for_pri

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pushes: list[tuple[str, bytes]] = []
        self._left_bytes = _MOST_BYTES

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        data = dumps(message).encode()
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise TooLarge(f"the messages that follow the job take more than {_MOST_BYTES} bytes", "callbacks")
        priority = self._get_message_priority(message, reverse=False)
        self.pushes.append((self._q_for_pri(queue, priority), data))

    def _size(self, queue: str) -> int:
        return 0


class _Transport(virtual.Transport):
    Channel = _Channel
    driver_type = "redis"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.state = virtual.BrokerState()  # else all would share one, which remembers every queue for ever


def _unsendable(error: Exception) -> InvalidArguments:
    return InvalidArguments(f"what should follow the job makes no message: {error!r:.300}", "callbacks")


def _is_away(error: BaseException) -> bool:
    """Whether the broker cannot be reached or takes nothing now; what it says of the data itself is another matter."""
    if isinstance(error, OperationalError):  # kombu's, for either
        return error.__cause__ is None or _is_away(error.__cause__)
    # A command in a transaction has its error's own words last.
    return isinstance(error, _AWAY) or (
        isinstance(error, redis_errors.ResponseError)
        and str(error).rpartition("caused error: ")[2].startswith(functions.NOT_NOW)
    )


def _request(sequel: Sequel) -> Context:
    return Context(
        id=sequel.id,
        root_id=sequel.root_id,
        group=sequel.group,
        group_index=sequel.group_index,
        chord=sequel.chord,
        called_directly=False,
        delivery_info={},
    )


def _plain(outputs: Mapping[str, Any]) -> Any:
    """Outputs as Celery's serializers take them: tensor maps as maps with bytes; the same object where none are."""
    if not any(isinstance(each, TensorMap) for each in outputs.values()):
        return outputs
    return msgspec.msgpack.decode(_PACK.encode(outputs))


def _placed(sequel: Sequel, chord: dict[str, Any] | None, chain: list[dict[str, Any]]) -> Sequel:
    """Where a job stands in the canvas, with no more of what follows it than is left for `finish`."""
    return Sequel(sequel.id, sequel.root_id, sequel.group, sequel.group_index, sequel.keep, [], [], chain, chord)


def _in_msgpack(body: dict[str, Any]) -> dict[str, Any]:
    """A signature whose message is in msgpack, unless it names a serializer itself."""
    return body | {"options": {"serializer": "msgpack"} | body.get("options", {})}
