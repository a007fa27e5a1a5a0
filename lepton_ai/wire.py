"""The envelope: what kombu 5.7 and Celery's task protocol 2 put on a Redis list, written and read directly.

`tests/lepton_ai/test_wire.py` pins both directions to kombu and Celery themselves. Source: docs.celeryq.dev, "Message
Protocol", version 2; kombu's virtual transport.
"""

from __future__ import annotations

import binascii
import json
import math
import os
import socket
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec
import numpy as np

from lepton_ai import tensor
from lepton_ai.blob import Reference
from lepton_ai.errors import (
    InvalidArguments,
    Malformed,
    OptionNotSupported,
    TooLarge,
)
from lepton_ai.job import Options, Setback
from lepton_ai.signature import describe, shapes_of
from lepton_ai.topology import LANE

__all__ = [
    "Body",
    "Envelope",
    "Headers",
    "Oversize",
    "Template",
    "Value",
    "batches",
    "deadline_at",
    "decode_value",
    "due_at",
    "envelope",
    "lane_of",
    "open_body",
    "pack",
    "pack_row",
    "pack_rows",
    "read_body",
    "read_embed",
    "read_envelope",
    "read_names",
    "read_options",
    "read_places",
    "replayed",
    "retried",
    "set_back",
    "to_value",
    "typed",
]

P = TypeVar("P", bound=Sized)

MSGPACK: Final = "application/x-msgpack"
JSON: Final = "application/json"
_MOST_PARTS: Final = 512
#: Characters of a job's id and of a kernel's name: both become names of keys.
_LONGEST_NAME: Final = 255
_GZIP: Final = "application/x-gzip"
#: Stands in a template where each message has its own; random, so that it stands nowhere else.
_SLOT: Final = uuid.uuid4().hex
_NUMBERS: Final = frozenset({bool, int, float})
_NO_CALLBACKS: Final = msgspec.msgpack.encode({"callbacks": None, "errbacks": None, "chain": None, "chord": None})

#: An argument or output on the wire: a number, a tensor map, or nested lists of numbers up to six deep.
Number = bool | int | float
_L1 = list[Number]
_L2 = list[Number | _L1]
_L3 = list[Number | _L2]
_L4 = list[Number | _L3]
_L5 = list[Number | _L4]
_L6 = list[Number | _L5]
Value = Number | tensor.TensorMap | _L6


class Headers(msgspec.Struct):
    """The headers that we act on; the rest travels untouched. `lepton` is decoded by `read_options`."""

    id: str
    task: str
    lepton: msgspec.Raw = msgspec.Raw()
    eta: str | None = None
    expires: str | float | None = None
    retries: int | None = 0
    timelimit: list[float | None] | None = None
    ignore_result: bool | None = None
    compression: str | None = None
    # Where the job stands in Celery's canvas (lepton_ai/succession.py); checked only where something follows it.
    root_id: Any = None
    group: Any = None
    group_index: Any = None
    # For those who watch (Flower); nothing is done by them, so anything may stand there.
    origin: Any = None
    argsrepr: Any = None
    kwargsrepr: Any = None


class Envelope(msgspec.Struct):
    """One message. `body` is still in its transport encoding (base64 unless `properties` says otherwise)."""

    body: str
    headers: Headers
    properties: Properties
    content_type: str = msgspec.field(name="content-type", default=JSON)
    content_encoding: str | None = msgspec.field(name="content-encoding", default=None)


class Properties(msgspec.Struct):
    body_encoding: str | None = None
    priority: int | None = 0


class _DeliveryInfo(msgspec.Struct, frozen=True):
    routing_key: str = LANE


class _Sent(msgspec.Struct, frozen=True):
    delivery_info: _DeliveryInfo = _DeliveryInfo()


class _Routed(msgspec.Struct):
    properties: _Sent


class Body(msgspec.Struct, array_like=True):
    """What a message says to its kernel. `args` and `embed` are Celery's, and checked by lepton_ai/succession.py."""

    args: list[Any]
    """What the jobs before it gave."""
    kwargs: dict[str, Value]
    embed: Any = None
    """What is to follow it."""


class _AnyBody(msgspec.Struct, array_like=True):
    """A body whose arguments may be anything."""

    args: Any
    kwargs: Any
    embed: Any = None


class _IdAndTask(msgspec.Struct):
    id: str
    task: str


class _Names(msgspec.Struct):
    headers: _IdAndTask


class _Places(msgspec.Struct):
    blobs: tuple[str, ...] | None = None


class Oversize(Exception):
    """An argument is an array that is larger than a message may hold."""


_ENVELOPE = msgspec.json.Decoder(Envelope)
_NAMES = msgspec.json.Decoder(_Names)
_ROUTED = msgspec.json.Decoder(_Routed)
_OPTIONS = msgspec.json.Decoder(Options | None)
_PLACES = msgspec.json.Decoder(_Places)
_BODY = {MSGPACK: msgspec.msgpack.Decoder(Body), JSON: msgspec.json.Decoder(Body)}
_ANY_BODY = {MSGPACK: msgspec.msgpack.Decoder(_AnyBody), JSON: msgspec.json.Decoder(_AnyBody)}
_ANYTHING = msgspec.json.Decoder()
_JSON = msgspec.json.Encoder()
_MSGPACK = msgspec.msgpack.Encoder()
_ORIGIN = f"lepton-{os.getpid()}@{socket.gethostname()}"


def to_value(value: Any, most_bytes: float = math.inf) -> Any:
    """A caller's argument as it crosses the wire: arrays as tensor maps, NumPy numbers as numbers, the rest as is.

    Raises Oversize for an array above `most_bytes`, and for one that is outside the message already.
    """
    if isinstance(value, np.ndarray):
        if value.nbytes > most_bytes:
            raise Oversize
        return tensor.to_wire(value) if value.ndim else value.item()
    if isinstance(value, Reference):
        raise Oversize
    return value.item() if isinstance(value, np.generic) else value


def decode_value(value: Any) -> Any:
    """A wire value for a caller: tensor maps as arrays, everything else as it is."""
    return tensor.from_wire(value) if isinstance(value, tensor.TensorMap) else value


def pack(value: Any) -> bytes:
    """Plain and wire values in msgpack; InvalidArguments where one cannot be sent."""
    try:
        return _MSGPACK.encode(value)
    except (TypeError, OverflowError, ValueError, RecursionError) as error:
        raise InvalidArguments(f"an argument cannot be sent: {error}") from None


def batches(parts: Iterable[P], most_bytes: int, bytes_of: Callable[[P], int] = len) -> Iterator[list[P]]:
    """Parts in their order, in lists of at most `most_bytes` (a larger part alone) and of a few hundred."""
    batch: list[P] = []
    size = 0
    for part in parts:
        own = bytes_of(part)
        if batch and (size + own > most_bytes or len(batch) >= _MOST_PARTS):
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += own
    if batch:
        yield batch


class Template:
    """Messages that are the same in all but their job's id, its arguments and its times."""

    __slots__ = ("_before_body", "_behind_body", "_most_bytes", "_shapes")

    def __init__(self, kernel: str, options: Options, lane: str = LANE, most_bytes: float = math.inf) -> None:
        """`most_bytes` is the largest array that a message holds."""
        slot: Any = _SLOT
        self._most_bytes = most_bytes
        self._shapes = None if options.shapes is None else _JSON.encode(options.shapes)
        message = _JSON.encode(
            {
                "body": slot,
                "content-encoding": "binary",
                "content-type": MSGPACK,
                "headers": {
                    "lang": "py",
                    "task": kernel,
                    "id": slot,
                    "shadow": None,
                    "eta": slot,
                    "expires": slot,
                    "group": None,
                    "group_index": None,
                    "retries": 0,
                    "timelimit": (None, None),
                    "root_id": slot,
                    "parent_id": None,
                    "argsrepr": "()",
                    "kwargsrepr": slot,
                    "origin": _ORIGIN,
                    # null and not false: an explicit value would override the task's own setting (Celery >= 5.6.3).
                    "ignore_result": None,
                    "replaced_task_nesting": 0,
                    "stamped_headers": None,
                    "stamps": {},
                    "lepton": msgspec.structs.replace(options, shapes=slot),
                },
                "properties": {
                    "correlation_id": slot,
                    "reply_to": "",
                    "delivery_mode": 2,
                    "delivery_info": {"exchange": "", "routing_key": lane},
                    "priority": 0,
                    "body_encoding": "base64",
                    # kombu wants it to be the message's own, and so is the id: one that is sent again gets another.
                    "delivery_tag": slot,
                },
            }
        )
        before, *behind = message.replace(b"%", b"%%").split(_JSON.encode(slot))
        self._before_body = before + b'"'
        self._behind_body = b'"' + b"%b".join(behind)

    def envelope(
        self,
        job_id: str,
        arguments: Mapping[str, Any],
        *,
        eta: str | None = None,
        expires: str | None = None,
        blobs: Sequence[str] = (),
    ) -> bytes:
        """The message of a job, ready for LPUSH. Shapes are filled into the options where they are missing.

        `eta` and `expires` are ISO 8601: not before, and not after. `blobs` are the places of the arguments that are
        outside it, which stand in `arguments` as tensor maps without data. Raises Oversize for an array that is too
        large to stand in it.
        """
        values = self._values(arguments)
        shapes = shapes_of(values)
        return self._filled(job_id, pack_row(pack(values)), shapes, self._told(shapes, blobs), eta, expires)

    def row(self, arguments: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """The arguments of a job that may travel in a bundle, in msgpack, and their shapes. Raises as `envelope`."""
        values = self._values(arguments)
        return pack(values), shapes_of(values)

    def single(self, job_id: str, packed: bytes, shapes: Mapping[str, Any], blobs: Sequence[str] = ()) -> bytes:
        """The message of one job, by what `row` gave for it."""
        return self._filled(job_id, pack_row(packed), shapes, self._told(shapes, blobs))

    def bundle(self, first: str, rows: Sequence[bytes], shapes: Mapping[str, Any], blobs: Sequence[str] = ()) -> bytes:
        """The message of jobs whose ids follow one another, by what `row` gave for each, and the shapes of all."""
        told = self._told(shapes, blobs) + b',"bundle":%d' % len(rows)
        return self._filled(first, pack_rows(rows), shapes, told)

    def _told(self, shapes: Mapping[str, Any], blobs: Sequence[str]) -> bytes:
        """The field `shapes` of the header `lepton`, and behind it `blobs`, where there are some."""
        told = self._shapes or _JSON.encode(shapes)
        return told + b',"blobs":' + _JSON.encode(blobs) if blobs else told

    def _values(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        most_bytes = self._most_bytes
        return {
            name: value if type(value) in _NUMBERS else to_value(value, most_bytes) for name, value in arguments.items()
        }

    def _filled(
        self,
        job_id: str,
        body: bytes,
        shapes: Mapping[str, Any],
        told_shapes: bytes,
        eta: str | None = None,
        expires: str | None = None,
    ) -> bytes:
        its_id = _JSON.encode(job_id)
        behind = self._behind_body % (
            its_id,
            b"null" if eta is None else _JSON.encode(eta),
            b"null" if expires is None else _JSON.encode(expires),
            its_id,
            _JSON.encode(describe(shapes)),
            told_shapes,
            its_id,
            its_id,
        )
        return b"".join((self._before_body, binascii.b2a_base64(body, newline=False), behind))


def pack_row(packed: bytes) -> bytes:
    """The body of a single message, by its arguments in msgpack."""
    return b"\x93\x90" + packed + _NO_CALLBACKS


def pack_rows(rows: Sequence[bytes]) -> bytes:
    """The body of a bundle: as a single message's, with a list of arguments in their place."""
    return b"".join((b"\x93\x90\xdc", len(rows).to_bytes(2, "big"), *rows, _NO_CALLBACKS))


def envelope(
    job_id: str,
    kernel: str,
    arguments: Mapping[str, Any],
    options: Options,
    *,
    lane: str = LANE,
    eta: str | None = None,
    expires: str | None = None,
) -> bytes:
    """The message of one job: see Template."""
    return Template(kernel, options, lane).envelope(job_id, arguments, eta=eta, expires=expires)


def read_envelope(raw: bytes) -> Envelope:
    """The envelope of a message; Malformed where it is not a Celery protocol 2 message."""
    try:
        envelope: Envelope = typed(_ENVELOPE, raw)
    except InvalidArguments as error:
        raise Malformed(f"not a Celery protocol 2 message: {error.message}") from None
    headers = envelope.headers
    if 0 < len(headers.id) <= _LONGEST_NAME and 0 < len(headers.task) <= _LONGEST_NAME:
        return envelope
    for what, name in (("id", headers.id), ("task", headers.task)):
        if not 0 < len(name) <= _LONGEST_NAME:
            raise Malformed(
                f"not a Celery protocol 2 message: {what} has {len(name)} characters, not 1 to {_LONGEST_NAME}"
            )
    return envelope


def lane_of(raw: bytes) -> str:
    """The lane that a message says it was sent to; the default one where it names none of ours."""
    try:
        name = _ROUTED.decode(raw).properties.delivery_info.routing_key
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return LANE
    return name if name.startswith(f"{LANE}.") else LANE


def read_names(raw: bytes) -> Headers | None:
    """Id and kernel of a message whose other headers cannot be read, so that its waiter is told; None without them."""
    try:
        names: _Names = _NAMES.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    found = (names.headers.id, names.headers.task)
    return Headers(*found) if all(0 < len(each) <= _LONGEST_NAME for each in found) else None


def read_options(headers: Headers) -> Options:
    """The options of a job; OptionNotSupported names one that is unknown or out of range."""
    if not headers.lepton:
        return Options()
    try:
        options: Options | None = _OPTIONS.decode(headers.lepton)
    except msgspec.ValidationError as error:
        raise OptionNotSupported(f"header lepton: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # the envelope's decoder skipped it
        raise Malformed(f"header lepton cannot be decoded: {error}") from None
    return (options or Options()).checked()


def read_places(headers: Headers) -> tuple[str, ...] | None:
    """Where the blobs of a job are whose other options cannot be read; None where it has none, or nobody can tell."""
    try:
        return Options(blobs=_PLACES.decode(headers.lepton).blobs).checked().blobs if headers.lepton else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OptionNotSupported):
        return None


def due_at(headers: Headers) -> float | None:
    """Not before when a job is to run (`eta`), in seconds since the epoch; InvalidArguments where that is no time."""
    return None if headers.eta is None else _seconds(headers.eta, "eta")


def deadline_at(headers: Headers) -> float | None:
    """After when a job is not to run any more (`expires`), as `due_at`."""
    return None if headers.expires is None else _seconds(headers.expires, "expires")


def _seconds(value: str | float, field: str) -> float:
    try:
        at = datetime.fromisoformat(value) if isinstance(value, str) else datetime.fromtimestamp(value, UTC)
        return at.replace(tzinfo=at.tzinfo or UTC).timestamp()
    except (ValueError, OverflowError, OSError):
        raise InvalidArguments(f"{field} is not a time: {value!r}", field) from None


def read_body(envelope: Envelope, *, limit_bytes: int) -> Body:
    """The body of a message.

    Raises TooLarge where it unpacks to more than `limit_bytes`, InvalidArguments naming a value that is no argument,
    Malformed where it is not what its headers say.
    """
    try:
        return open_body(envelope, limit_bytes, _BODY)  # type: ignore[no-any-return]
    except InvalidArguments as error:
        raise _named(error, open_body(envelope, limit_bytes, _ANY_BODY).kwargs) from None


def _named(error: InvalidArguments, arguments: Any) -> InvalidArguments:
    """The error of arguments that cannot be read, with the name of the first that is at fault."""
    for name, value in arguments.items() if isinstance(arguments, dict) else ():
        try:
            msgspec.convert(value, Value)
        except msgspec.ValidationError as why:
            return InvalidArguments(f"argument {name!r} is not a valid value: {why}", str(name))
    return error


def read_embed(envelope: Envelope, *, limit_bytes: int) -> Any:
    """What is to follow a job whose arguments are wrong. Raises as `read_body`, but never for the arguments."""
    return open_body(envelope, limit_bytes, _ANY_BODY).embed


def open_body(envelope: Envelope, limit_bytes: int, decoders: Mapping[str, Any]) -> Any:
    """What the decoder of a message's content type makes of its body. Raises as `read_body`."""
    data: bytes
    if envelope.properties.body_encoding == "base64":
        try:
            data = binascii.a2b_base64(envelope.body)
        except (binascii.Error, ValueError) as error:
            raise Malformed(f"the body is not base64: {error}") from None
    else:
        data = envelope.body.encode()
    if envelope.headers.compression == _GZIP:
        data = _inflate(data, limit_bytes)
    elif envelope.headers.compression is not None:
        raise Malformed(f"compression {envelope.headers.compression!r} is not understood; use gzip or none")
    if len(data) > limit_bytes:
        raise TooLarge(f"the body has {len(data)} bytes, the limit is {limit_bytes}")
    decoder = decoders.get(envelope.content_type)
    if decoder is None:
        raise Malformed(f"content type {envelope.content_type!r} is refused; use {MSGPACK} or {JSON}")
    return typed(decoder, data)


def _inflate(data: bytes, limit_bytes: int) -> bytes:
    inflater = zlib.decompressobj()
    try:
        found = inflater.decompress(data, limit_bytes + 1)
    except zlib.error as error:
        raise Malformed(f"the body is not zlib data: {error}") from None
    if len(found) > limit_bytes:
        raise TooLarge(f"the body inflates to more than {limit_bytes} bytes")
    if not inflater.eof:
        raise Malformed("the body's zlib data end too early")
    return found


def typed(decoder: Any, data: bytes) -> Any:
    """What a msgspec decoder makes of bytes: InvalidArguments where a value is of a wrong type, Malformed otherwise."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise InvalidArguments(f"not a valid value: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if isinstance(decoder, msgspec.json.Decoder) and (b"NaN" in data or b"Infinity" in data):
            return _python_json(decoder, data)
        raise Malformed(f"cannot be decoded: {str(error) or type(error).__name__}") from None


def _python_json(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    """JSON with Python's NaN and Infinity, which Celery's own JSON serializer writes and msgspec refuses."""
    try:
        found = json.loads(data)
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate, which msgspec refuses too, is no text
        return msgspec.convert(found, decoder.type)
    except msgspec.ValidationError as error:
        raise InvalidArguments(f"not a valid value: {error}") from None
    except (ValueError, RecursionError) as error:
        raise Malformed(f"cannot be decoded: {error}") from None


def retried(message: bytes) -> bytes:
    """The message of a job for its next try: the same, with one retry more. Malformed where it cannot be decoded."""
    return _again(message, lambda headers: {"retries": max(0, headers.get("retries") or 0) + 1})


def set_back(message: bytes, setback: Setback) -> bytes:
    """The message of a job for another device than that of the setback. Raises as `retried`."""

    def changes(headers: dict[str, Any]) -> dict[str, Any]:
        options = headers.get("lepton") or {}
        before = [each for each in options.get("setbacks") or () if each.get("device") != setback.device]
        return {"lepton": {**options, "setbacks": [*before, msgspec.to_builtins(setback)]}}

    return _again(message, changes)


def replayed(message: bytes) -> bytes:
    """The message of a job that begins anew: no retry is used up, no deadline ends it. Raises as `retried`."""
    return _again(message, lambda headers: {"retries": 0, "expires": None, **_without_setbacks(headers)})


def _without_setbacks(headers: Mapping[str, Any]) -> dict[str, Any]:
    options = headers.get("lepton")
    if not isinstance(options, dict) or "setbacks" not in options:
        return {}
    return {"lepton": {name: value for name, value in options.items() if name != "setbacks"}}


def _again(message: bytes, changes: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    """A message that is sent once more: with changes of its headers, without `eta`, with a delivery tag of its own."""
    found: Any = typed(_ANYTHING, message)
    headers = found["headers"]
    headers.update(changes(headers), eta=None)
    found["properties"]["delivery_tag"] = str(uuid.uuid4())
    try:
        return _JSON.encode(found)
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed(f"cannot be written again: {error}") from None
