"""What follows a job, beside what a Celery worker makes of the same message: real Celery objects on a real broker."""

from __future__ import annotations

import base64
import gc
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import redis.exceptions
from celery import Celery, Signature, _state, chain, chord, group
from celery.app.trace import build_tracer
from celery.exceptions import ChordError, TaskRevokedError
from kombu import serialization
from kombu.exceptions import OperationalError

from lepton_ai import results, tensor, topology, wire
from lepton_ai.errors import BrokerUnavailable, InvalidArguments, JobCancelled, KernelFailed, TooLarge
from lepton_ai.kernel import Kernel
from lepton_ai.settings import Settings
from lepton_ai.succession import FollowUps, Sequel, sequel_of
from queues import canvas as canvas_module
from queues.app import celery_addresses
from queues.canvas import Canvas
from queues.connection import Connection
from tasks.batching import TakenJob, read

KERNELS = {"t.first", "t.kernel"}
OUTPUTS = {"y": [[1.0, 2.0]]}
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@pytest.fixture
def app(broker_url: str) -> Iterator[Celery]:
    """A plain Celery program, which is the current application of its process as such programs are."""
    broker, backend = celery_addresses(broker_url)
    app = Celery("plain", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(
        task_routes={name: {"queue": topology.LANE} for name in KERNELS}, accept_content=["json", "msgpack"]
    )
    before = _state._tls.current_app
    app.set_current()
    yield app
    gc.collect()  # a result that is forgotten later would unsubscribe, broker or no broker
    _state._set_current_app(before)
    app.close()


@pytest.fixture
def canvas(broker_url: str) -> Iterator[Canvas]:
    canvas = Canvas(Settings(redis_url=broker_url), KERNELS)
    yield canvas
    canvas._app.close()


@pytest.fixture
def pop(connection: Connection) -> Callable[[], list[tuple[str, bytes]]]:
    """Takes every message from every list of the broker, in the order of the lists' names."""

    def taken() -> list[tuple[str, bytes]]:
        found = []
        for key in sorted(connection.call("KEYS", "*")):
            if connection.call("TYPE", key) == b"list":
                found += [(key.decode(), each) for each in reversed(connection.call("LRANGE", key, 0, -1))]
                connection.call("DEL", key)
        return found

    return taken


@pytest.fixture
def send(pop: Callable[[], list[tuple[str, bytes]]]) -> Callable[[Any], list[bytes]]:
    """Sends a canvas as a producer does; returns the messages that are on the lane then."""

    def sent(what: Any) -> list[bytes]:
        what.apply_async()
        return [message for queue, message in pop() if queue == topology.LANE]

    return sent


def first(**options: Any) -> Signature:
    return Signature("t.first", kwargs={"x": [[1.0, 2.0]]}, options=options)


def sig(name: str, *args: Any, immutable: bool = False, **options: Any) -> Signature:
    return Signature(name, args=args, options=options, immutable=immutable)


def sequel(message: bytes) -> Sequel:
    envelope = wire.read_envelope(message)
    found = sequel_of(envelope.headers, wire.read_body(envelope, limit_bytes=1 << 20).embed)
    assert found is not None
    return found


def body(message: bytes) -> tuple[Any, ...]:
    """Arguments and embed of a message, as kombu reads them."""
    found = json.loads(message)
    data = base64.b64decode(found["body"])
    return tuple(
        serialization.loads(data, found["content-type"], found["content-encoding"], accept={wire.JSON, wire.MSGPACK})
    )


def headers(message: bytes) -> dict[str, Any]:
    return json.loads(message)["headers"]


def alike(pushes: Any) -> list[Any]:
    """Messages without what differs from one sending to the next: new ids get numbers, in their order.

    Celery writes `"priority": null` over the priority of a chord's body, which is no loss.
    """
    numbers: dict[str, str] = {}
    found = []
    for queue, message in sorted(pushes, key=lambda push: push[0]):
        envelope = json.loads(message) | {"body": body(message)}
        envelope["headers"].pop("origin")
        envelope["properties"].pop("delivery_tag")
        envelope["properties"].pop("reply_to")
        envelope["properties"].pop("expiration", None)  # milliseconds from now
        text = re.sub(r'"reply_to": "[^"]*"|"priority": null, ', "", json.dumps(envelope, sort_keys=True))
        found.append((queue, UUID.sub(lambda match: numbers.setdefault(match[0], f"#{len(numbers)}"), text)))
    return found


def celerys(app: Celery, message: bytes, raising: Exception | None = None) -> None:
    """Lets Celery's own worker code run a message, its task being one of the program's."""

    @app.task(name="t.first", shared=False)
    def run(**_: Any) -> Any:
        if raising is not None:
            raise raising
        return OUTPUTS

    args, kwargs, embed = body(message)
    request = headers(message) | embed | {"delivery_info": {}, "called_directly": False, "is_eager": False}
    build_tracer("t.first", run, app=app)(request["id"], args, kwargs, request)


CANVASES: dict[str, Callable[[], Signature]] = {
    "link": lambda: first(link=sig("p.add")),
    "links": lambda: first(link=[sig("p.add", 1), sig("t.kernel"), group(sig("p.a"), sig("p.b"))]),
    "immutable": lambda: first(link=sig("p.add", 7, immutable=True)),
    "options": lambda: first(
        link=sig("p.add", queue="mine", priority=7, time_limit=3, expires="2120-01-01", eta="2119-01-01")
    ),
    "stamps": lambda: first(link=sig("p.add", stamped_headers=["colour"], colour="red")),
    "next": lambda: chain(first(), sig("t.kernel")),
    "chain": lambda: chain(first(), sig("p.a", link_error=sig("p.oops")), sig("t.kernel"), sig("p.b")),
    "chain, group": lambda: chain(first(), group(sig("p.a"), sig("t.kernel"))),
    "chain, group, task": lambda: chain(first(), group(sig("p.a"), sig("t.kernel")), sig("p.sum")),
    "chain, group, task, task": lambda: chain(first(), group(sig("p.a"), sig("p.b")), sig("p.sum"), sig("p.c")),
    "chain, chord": lambda: chain(first(), chord([sig("p.a"), chain(sig("p.b"), sig("p.c"))], sig("p.sum"))),
    "chain, nested groups": lambda: chain(first(), group(group(sig("p.a"), sig("p.b")), sig("p.c")), sig("p.sum")),
    "link to a chain": lambda: first(link=chain(sig("p.a"), sig("p.b"))),
    "link to a chord": lambda: first(link=chord([sig("p.a"), sig("p.b")], sig("p.sum"))),
}  # fmt: skip


@pytest.mark.parametrize("make", CANVASES.values(), ids=CANVASES)
def test_what_follows_a_success_is_what_celery_sends(
    make: Callable[[], Signature], app: Celery, canvas: Canvas, send: Any, pop: Any
) -> None:
    (message,) = send(make())
    ours = canvas.after_success(sequel(message), OUTPUTS)
    assert pop() == []  # nothing is sent before the commit
    celerys(app, message)
    assert alike(ours.pushes) == alike(pop())
    assert len(ours.pushes) > 0


@pytest.mark.parametrize("make", CANVASES.values(), ids=CANVASES)
def test_the_children_are_those_that_celery_stores(
    make: Callable[[], Signature], app: Celery, canvas: Canvas, send: Any
) -> None:
    (message,) = send(make())
    ours = json.dumps(canvas.after_success(sequel(message), OUTPUTS).children)
    celerys(app, message)
    theirs = json.dumps(json.loads(app.backend.get(f"celery-task-meta-{sequel(message).id}"))["children"])
    assert UUID.sub("#", ours) == UUID.sub("#", theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: first(link_error=sig("p.oops")),
        lambda: first(link_error=[sig("p.oops", 1), sig("p.log", immutable=True, queue="mine")]),
        lambda: chain(first(), sig("p.a")).on_error(sig("p.oops")),
    ],
    ids=["one", "two", "chain"],
)
def test_what_follows_a_failure_is_what_celery_sends(
    make: Callable[[], Signature], app: Celery, canvas: Canvas, send: Any, pop: Any
) -> None:
    (message,) = send(make())
    found = sequel(message)
    ours = canvas.after_failure(found, results.failure(found.id, KernelFailed("broke")))
    celerys(app, message, KernelFailed("broke"))
    assert alike(ours.pushes) == alike(pop())
    assert body(ours.pushes[0][1])[0][0] == found.id


def test_a_revoked_job_calls_no_errbacks_as_in_celery(canvas: Canvas, app: Celery, send: Any) -> None:
    found = sequel(send(first(link_error=sig("p.oops")))[0])
    assert canvas.after_failure(found, results.failure(found.id, JobCancelled("cancelled"))) == FollowUps()


# -- where it goes, and in what form ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("following", "queue"),
    [
        (sig("t.kernel"), topology.LANE),
        (sig("p.add"), "celery"),
        (sig("t.kernel", queue="mine"), "mine"),
        (sig("p.add", queue=topology.LANE), topology.LANE),
        (sig("p.add", queue="mine", priority=7), "mine\x06\x166"),
        # a task of Celery's own, which calls another: no kernel is called by Celery
        (Signature("celery.map", kwargs={"task": sig("t.kernel"), "it": [1]}, subtask_type="xmap"), "celery"),
    ],
)
def test_a_follow_up_goes_to_its_own_queue_or_the_lane_or_celerys_default(
    following: Signature, queue: str, canvas: Canvas
) -> None:
    found = canvas.after_success(Sequel("a", "a", callbacks=[dict(following)]), OUTPUTS)
    assert [each for each, _ in found.pushes] == [queue]


def test_an_array_goes_on_in_msgpack_and_the_next_kernel_reads_it(canvas: Canvas) -> None:
    array = np.arange(4, dtype=np.float32).reshape(2, 2)
    found = canvas.after_success(Sequel("a", "a", chain=[dict(sig("t.kernel"))]), {"y": tensor.to_wire(array)})
    kernel = Kernel("t.kernel", inputs={"x": "float32[n,k]"}, outputs={"z": "float32[n]"}, flops="n", bytes="n")
    job = read(found.pushes[0][1], {"t.kernel": kernel}, 1 << 20)
    assert isinstance(job, TakenJob)
    assert job.tensors
    np.testing.assert_array_equal(job.inputs["x"], array)


def test_nested_lists_go_on_in_json_which_every_celery_program_accepts(canvas: Canvas) -> None:
    ((_, message),) = canvas.after_success(Sequel("a", "a", callbacks=[dict(sig("p.add"))]), OUTPUTS).pushes
    assert json.loads(message)["content-type"] == wire.JSON
    assert body(message)[0] == [OUTPUTS]


# -- chords and broken chains, after the commit -----------------------------------------------------------------------


def chord_of(app: Celery, send: Any, header: list[Any], last: Signature) -> tuple[Any, list[bytes]]:
    result = chord(header, last, app=app).apply_async()
    return result, send(group([]))


def parts(canvas: Canvas, messages: list[bytes], outputs: Any = OUTPUTS) -> list[bytes]:
    found = [canvas.after_success(sequel(message), outputs).chord_part for message in messages]
    assert None not in found
    return found


def failed(canvas: Canvas, message: bytes, error: Exception | None = None) -> bytes:
    found = sequel(message)
    part = canvas.after_failure(found, results.failure(found.id, error or KernelFailed("broke"), "trace")).chord_part
    assert part is not None
    return part


def test_the_body_of_a_chord_goes_out_once_with_the_results_in_their_order(
    app: Celery, canvas: Canvas, send: Any, pop: Any
) -> None:
    result, messages = chord_of(app, send, [first(), first()], sig("p.sum"))
    one, two = parts(canvas, messages[:1], {"y": 1})[0], parts(canvas, messages[1:], {"y": 2})[0]
    assert canvas.finish(two)
    assert pop() == []
    assert canvas.finish(one)
    ((queue, message),) = pop()
    assert (queue, headers(message)["id"], body(message)[0]) == ("celery", result.id, [[{"y": 1}, {"y": 2}]])
    assert canvas.finish(one)
    assert canvas.finish(two)
    assert pop() == []


def test_a_body_that_is_a_kernel_goes_to_the_lane_and_gets_arrays_stacked(
    app: Celery, canvas: Canvas, send: Any, pop: Any
) -> None:
    _, messages = chord_of(app, send, [first(), first()], sig("t.kernel"))
    for part in parts(canvas, messages, {"y": tensor.to_wire(np.float32([1, 2]))}):
        canvas.finish(part)
    ((queue, message),) = pop()
    kernel = Kernel("t.kernel", inputs={"x": "float32[n,k]"}, outputs={"z": "float32[n]"}, flops="n", bytes="n")
    job = read(message, {"t.kernel": kernel}, 1 << 20)
    assert queue == topology.LANE
    assert isinstance(job, TakenJob)
    np.testing.assert_array_equal(job.inputs["x"], np.float32([[1, 2], [1, 2]]))


def test_a_chord_with_a_failed_part_fails_and_calls_its_errbacks(
    app: Celery, canvas: Canvas, send: Any, pop: Any
) -> None:
    result, messages = chord_of(app, send, [first(), first()], sig("p.sum", link_error=[sig("p.oops")]))
    assert canvas.finish(parts(canvas, messages[:1])[0])
    assert canvas.finish(failed(canvas, messages[1]))
    with pytest.raises(ChordError, match="broke"):
        result.get(timeout=5)
    ((queue, message),) = pop()
    assert (queue, headers(message)["task"], body(message)[0]) == ("celery", "p.oops", [result.id])


def test_a_chord_with_a_revoked_part_fails(app: Celery, canvas: Canvas, send: Any) -> None:
    result, messages = chord_of(app, send, [first(), first()], sig("p.sum"))
    canvas.finish(parts(canvas, messages[:1])[0])
    canvas.finish(failed(canvas, messages[1], JobCancelled("cancelled")))
    with pytest.raises(ChordError, match="cancelled"):
        result.get(timeout=5)


def test_a_chord_counts_parts_of_celerys_own_tasks_with_ours(app: Celery, canvas: Canvas, send: Any, pop: Any) -> None:
    _, (ours, theirs) = chord_of(app, send, [first(), first()], sig("p.sum"))
    canvas.finish(parts(canvas, [ours])[0])
    celerys(app, theirs)
    ((_, message),) = pop()
    assert body(message)[0] == [[OUTPUTS, OUTPUTS]]


def test_the_results_of_a_nested_group_keep_their_form(app: Celery, canvas: Canvas, send: Any, pop: Any) -> None:
    nested = chain(first(), group(first(), first()))
    _, messages = chord_of(app, send, [nested, first()], sig("p.sum"))
    pushes = [push for each in messages for push in canvas.after_success(sequel(each), OUTPUTS).pushes]
    assert len(pushes) == 2
    for message in [*messages, *(message for _, message in pushes)]:
        found = sequel(message)
        app.backend.store_result(found.id, OUTPUTS, "SUCCESS")
        if part := canvas.after_success(found, OUTPUTS).chord_part:
            canvas.finish(part)
    ((_, message),) = pop()
    assert body(message)[0] == [[[OUTPUTS, OUTPUTS], OUTPUTS]]


def test_while_another_sends_the_body_a_part_is_to_be_asked_for_again(
    app: Celery, canvas: Canvas, send: Any, pop: Any, connection: Connection
) -> None:
    _, (message,) = chord_of(app, send, [first()], sig("p.sum"))
    (part,) = parts(canvas, [message])
    claim = f"celery-taskset-meta-{sequel(message).group}.c"
    connection.call("SET", claim, "somebody who was killed")
    assert not canvas.finish(part)
    assert pop() == []
    connection.call("DEL", claim)  # as it expires
    assert canvas.finish(part)
    assert len(pop()) == 1


def test_the_rest_of_a_broken_chain_fails_with_the_same_error(app: Celery, canvas: Canvas, send: Any, pop: Any) -> None:
    result = chain(first(), sig("p.a"), sig("p.b")).apply_async()
    ((_, message),) = pop()
    assert canvas.finish(failed(canvas, message))
    for each in (result, result.parent):
        assert type(each.result).__name__ == "KernelFailed"
        assert (each.state, each.traceback) == ("FAILURE", "trace")


def test_the_rest_of_a_revoked_chain_is_revoked(app: Celery, canvas: Canvas, pop: Any) -> None:
    result = chain(first(), sig("p.a")).apply_async()
    ((_, message),) = pop()
    assert canvas.finish(failed(canvas, message, JobCancelled("cancelled")))
    with pytest.raises(TaskRevokedError):
        result.get(timeout=5)


def test_a_broken_chain_in_the_header_of_a_chord_fails_the_chord(app: Celery, canvas: Canvas, send: Any) -> None:
    result, messages = chord_of(app, send, [chain(first(), sig("p.a")), first()], sig("p.sum"))
    canvas.finish(failed(canvas, messages[0]))
    assert result.state == "PENDING"
    canvas.finish(parts(canvas, messages[1:])[0])
    assert isinstance(result.result, ChordError)


def test_a_broken_chain_fails_through_a_chord_that_comes_later(app: Celery, canvas: Canvas, pop: Any) -> None:
    result = chain(first(), group(sig("p.a"), sig("p.b")), sig("p.sum")).apply_async()
    ((_, message),) = pop()
    canvas.finish(failed(canvas, message))
    assert result.state == "FAILURE"


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [{}, {"task": 7}, {"task": "a", "options": {"queue": 7}}, {"task": "a", "subtask_type": "chain"}], ids=str
)
def test_a_signature_that_is_none_fails_the_job_and_says_so(bad: dict[str, Any], canvas: Canvas) -> None:
    with pytest.raises(InvalidArguments, match="follow") as info:
        canvas.after_success(Sequel("a", "a", callbacks=[bad]), OUTPUTS)
    assert info.value.field == "callbacks"


def test_an_errback_that_is_none_is_left_out_and_the_failure_stands(canvas: Canvas) -> None:
    failure = results.failure("a", KernelFailed("broke"))
    assert canvas.after_failure(Sequel("a", "a", errbacks=[{}]), failure) == FollowUps()


@pytest.mark.parametrize("part", [b"", b"rubbish", b"\x80"])
def test_a_part_that_is_none_is_over_and_not_met_with_for_ever(part: bytes, canvas: Canvas) -> None:
    assert canvas.finish(part)


def test_a_chord_whose_body_is_none_is_over(canvas: Canvas, connection: Connection) -> None:
    part = canvas.after_success(Sequel("a", "a", "g", 0, chord={"nothing": 1}), OUTPUTS).chord_part
    assert part is not None
    connection.call("SET", "celery-taskset-meta-g.s", 1)
    assert canvas.finish(part)


def test_follow_ups_that_would_fill_the_memory_are_refused(canvas: Canvas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvas_module, "_MOST_BYTES", 100_000)
    large = {"y": [float(at) for at in range(1000)]}
    callbacks = [dict(sig("p.add"))] * 50
    with pytest.raises(TooLarge):
        canvas.after_success(Sequel("a", "a", callbacks=callbacks), large)


def test_chords_nested_deeper_than_celerys_pool_do_not_wait_for_ever(canvas: Canvas) -> None:
    deep: Any = sig("p.a")
    for _ in range(14):
        deep = chord([deep, sig("p.b")], sig("p.sum"))
    found = canvas.after_success(Sequel("a", "a", callbacks=[json.loads(json.dumps(deep))]), OUTPUTS)
    assert len(found.pushes) == 15


def test_a_broker_that_is_away_is_said_to_be(canvas: Canvas) -> None:
    lost = Canvas(Settings(redis_url="redis://127.0.0.1:1/0"), KERNELS)
    lost._app.backend.retry_policy = {"max_retries": 0, "interval_start": 0, "interval_step": 0, "interval_max": 0}
    part = canvas.after_success(Sequel("a", "a", "g", 0, chord=dict(sig("p.sum"))), OUTPUTS).chord_part
    assert part is not None
    with pytest.raises(BrokerUnavailable):
        lost.finish(part)
    with pytest.raises(BrokerUnavailable):
        lost.after_success(Sequel("a", "a", chain=[dict(chord([sig("p.a"), sig("p.b")], sig("p.sum")))]), OUTPUTS)


def test_threads_do_not_mix_what_they_send(canvas: Canvas) -> None:
    mixed: list[str] = []

    def work(name: str) -> None:
        for at in range(30):
            job = f"{name}-{at}"
            found = canvas.after_success(Sequel(job, job, callbacks=[dict(sig("p.a")), dict(sig("p.b"))]), {"y": at})
            mixed.extend(job for _, each in found.pushes if headers(each)["parent_id"] != job or len(found.pushes) != 2)

    threads = [threading.Thread(target=work, args=(f"thread{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert mixed == []


# -- what cannot be written, and what the broker refuses --------------------------------------------------------------

#: JSON decodes it; msgpack has no such number.
BEYOND = {"task": "x", "n": 2**70}


def test_a_chord_that_cannot_be_written_fails_the_job(canvas: Canvas) -> None:
    array = {"y": tensor.to_wire(np.float32([1, 2]))}
    for body, outputs in ((BEYOND, OUTPUTS), ({"task": "x", "options": 7}, array)):
        with pytest.raises(InvalidArguments, match="follow"):
            canvas.after_success(Sequel("a", "a", "g", 0, chord=body), outputs)


def test_a_part_that_cannot_be_written_is_left_out_and_the_failure_stands(canvas: Canvas) -> None:
    failure = results.failure("a", KernelFailed("broke"))
    assert canvas.after_failure(Sequel("a", "a", "g", 0, chain=[BEYOND], chord=BEYOND), failure) == FollowUps()


def test_a_chord_of_a_size_that_is_none_fails_the_job_and_is_not_tried_for_ever(canvas: Canvas) -> None:
    following = dict(chord([sig("p.a"), sig("p.b")], sig("p.sum")))
    following["options"] = {"group_id": "g"}
    with pytest.MonkeyPatch.context() as patch:
        refused = redis.exceptions.DataError("Invalid input of type: 'dict'")
        patch.setattr(canvas._app.backend, "set_chord_size", lambda *_: (_ for _ in ()).throw(refused))
        with pytest.raises(InvalidArguments, match="follow"):
            canvas.after_success(Sequel("a", "a", chain=[following]), OUTPUTS)


def test_what_the_broker_says_of_a_part_is_over_and_the_rest_of_its_chain_ends(canvas: Canvas, app: Celery) -> None:
    placed = {"group_id": "g", "group_index": "abc", "chord": {"task": "y"}}  # a place that is no number
    links = [{"task": "x", "options": {"task_id": name} | place} for name, place in (("last", {}), ("next", placed))]
    part = canvas.after_failure(Sequel("a", "a", chain=links), results.failure("a", KernelFailed("broke"))).chord_part
    assert part is not None
    assert canvas.finish(part)
    assert [app.AsyncResult(name).state for name in ("next", "last")] == ["FAILURE", "FAILURE"]


@pytest.mark.parametrize(
    ("error", "is_away"),
    [
        (redis.exceptions.ConnectionError("reset"), True),
        (redis.exceptions.TimeoutError("late"), True),
        (redis.exceptions.BusyLoadingError("loading"), True),
        (redis.exceptions.OutOfMemoryError("Command # 1 (ZADD a 1 b) of pipeline caused error: full"), True),
        (redis.exceptions.ReadOnlyError("a replica"), True),
        (redis.exceptions.ResponseError("MISCONF cannot persist"), True),
        (redis.exceptions.ResponseError("Command # 1 (ZADD a 1 b) of pipeline caused error: MISCONF no"), True),
        (ConnectionResetError(), True),
        (redis.exceptions.ResponseError("Command # 1 (ZADD OOM) of pipeline caused error: not a float"), False),
        (redis.exceptions.ResponseError("WRONGTYPE"), False),
        (redis.exceptions.DataError("Invalid input of type: 'dict'"), False),
    ],
    ids=repr,
)
@pytest.mark.parametrize("by_kombu", [False, True])
def test_only_a_broker_that_takes_nothing_now_is_asked_again(
    canvas: Canvas, monkeypatch: pytest.MonkeyPatch, error: Exception, is_away: bool, by_kombu: bool
) -> None:
    def refuse(*_: Any) -> None:
        if by_kombu:
            raise OperationalError(str(error)) from error
        raise error

    monkeypatch.setattr(canvas._app.backend, "on_chord_part_return", refuse)
    part = canvas.after_success(Sequel("a", "a", "g", 0, chord=dict(sig("p.sum"))), OUTPUTS).chord_part
    assert part is not None
    if is_away:
        with pytest.raises(BrokerUnavailable):
            canvas.finish(part)
    else:
        assert canvas.finish(part)
