"""The body of `POST /v1/jobs`: bytes within the limit, then jobs, in the format that the content type names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Annotated, Any, Final, NamedTuple

import msgpack
import msgspec
from litestar import Request
from litestar.exceptions import InternalServerException

from lepton_ai import wire
from lepton_ai.dead import those
from lepton_ai.errors import InvalidArguments, LeptonError, Malformed, TooLarge, UnsupportedMediaType
from lepton_ai.remote import JobRequest
from lepton_ai.remote_protocol import Chosen
from lepton_ai.tensor import TensorMap

__all__ = ["NDJSON", "Body", "decode", "decode_chosen", "read", "with_key"]

NDJSON: Final = "application/x-ndjson"
#: Jobs of one request: checking and publishing them is one step, in which nobody else is served.
MOST_JOBS: Final = 10_000
#: Arguments of one job; no kernel has so many.
_MOST_ARGUMENTS: Final = 1000
#: Lists in one argument. An empty one is a byte of msgpack and 56 of memory: 8 MiB of them took 3.4 s and 900 MB.
_MOST_LISTS: Final = 200_000
#: The bytes with which a list may begin in msgpack; within numbers they are other things.
_OPENS: Final = bytes(range(0x90, 0xA0)) + b"\xdc\xdd"
#: Where msgspec says that a value did not fit (`$[3].kernel`), and which field it misses or does not know.
_PATH = re.compile(r"`\$(?:\[(?:\d+|\.\.\.)\])?\.?(?P<field>[^`]*)`")
_FIELD = re.compile(r"(?:required|unknown) field `(\w+)`")
#: The header Idempotency-Key is a structured string ("8e03-97ac", RFC 9651); its text alone is taken too.
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')


class Body(NamedTuple):
    """What was sent. `single`: one job by itself, not a list; `lines`: one job a line."""

    requests: list[JobRequest]
    single: bool = False
    lines: bool = False


class _Incoming(msgspec.Struct, forbid_unknown_fields=True):
    """A JobRequest whose arguments are still bytes, so that one which does not fit is named."""

    kernel: str
    arguments: dict[str, msgspec.Raw]
    priority: int | None = None
    device: str | None = None
    key: str | None = None
    delay_s: float | None = None
    deadline_s: float | None = None
    limit_s: float | None = None
    must_meet: bool | None = None
    state_key: str | None = None


_ASKED = [name for name in _Incoming.__struct_fields__ if name not in ("kernel", "arguments")]


class _Format:
    """Decoders of one media type, and whether there are more lists in a value than so many."""

    def __init__(self, decoder: Any, holds_more_lists: Callable[[bytes, int], bool]) -> None:
        self.holds_more_lists = holds_more_lists
        self.body: Any = decoder(_Incoming | Annotated[list[_Incoming], msgspec.Meta(max_length=MOST_JOBS)])
        self.job: Any = decoder(_Incoming)
        self.value: Any = decoder(wire.Value)
        self.chosen: Any = decoder(Chosen)


def _json_holds_more_lists(value: bytes, most: int) -> bool:
    return value.count(b"[") > most


def _msgpack_holds_more_lists(value: bytes, most: int) -> bool:
    if value[:1] not in _OPENS or len(value) - len(value.translate(None, _OPENS)) <= most:
        return False
    found = itertools.count(1)

    def seen(_: object) -> None:
        if next(found) > most:
            raise OverflowError

    try:
        msgpack.unpackb(value, list_hook=seen, raw=True, strict_map_key=False)
    except OverflowError:
        return True
    except ValueError:  # not msgpack: the decoder says so better
        return False
    return False


_JSON = _Format(msgspec.json.Decoder, _json_holds_more_lists)
_MSGPACK = _Format(msgspec.msgpack.Decoder, _msgpack_holds_more_lists)
_FORMATS = {
    "application/json": _JSON,
    NDJSON: _JSON,
    wire.MSGPACK: _MSGPACK,
    "application/msgpack": _MSGPACK,
    "application/vnd.msgpack": _MSGPACK,
}


async def read(request: Request[Any, Any, Any], limit_bytes: int) -> bytes:
    """The body, refused before it is buffered where its length is announced, and as soon as it is over otherwise."""
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit_bytes:
        raise TooLarge(f"the body has {announced} bytes, the limit is {limit_bytes}")
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit_bytes:
                raise TooLarge(f"the body is over the limit of {limit_bytes} bytes")
            parts.append(part)
    except InternalServerException as error:  # so litestar tells of a body that ends early or has a broken chunk
        raise Malformed("the body breaks off, or its chunks are not well formed") from error
    return b"".join(parts)


def decode(body: bytes, content_type: str) -> Body:
    """The jobs in a body. Raises what is wrong with the first that is none, with its `index` where there are lines."""
    media = content_type.split(";", maxsplit=1)[0].strip().lower()
    known = _FORMATS.get(media)
    if known is None:
        raise UnsupportedMediaType(
            f"content type {media!r} is not understood; use application/json, {NDJSON} or {wire.MSGPACK}"
        )
    if media == NDJSON:
        return Body(_lines(body), lines=True)
    found = _decoded(known.body, body, f"the body is not valid {media}")
    if isinstance(found, list):
        return Body([_request(each, known) for each in found])
    return Body([_request(found, known)], single=True)


def decode_chosen(body: bytes, content_type: str) -> list[str] | None:
    """The dead letters that a body names; None for all."""
    media = content_type.split(";", maxsplit=1)[0].strip().lower()
    if (known := _FORMATS.get(media)) is None or media == NDJSON:
        raise UnsupportedMediaType(f"content type {media!r} is not understood; use application/json or {wire.MSGPACK}")
    found = _decoded(known.chosen, body, f"the body is not valid {media}")
    return those(found.entries or (), found.all)


def with_key(sent: Body, header: str | None) -> Body:
    """A body whose one job has the key that the header Idempotency-Key names.

    InvalidArguments where there are many jobs, or the job names another key itself; Malformed where it is no string.
    """
    if header is None:
        return sent
    if not sent.single:
        raise InvalidArguments("Idempotency-Key is for one job by itself; of many, each has its own `key`", "key")
    key = header.strip()
    if key.startswith('"'):
        if (match := _QUOTED.fullmatch(key)) is None:
            raise Malformed(f"Idempotency-Key {header[:80]} is no string in quotes", "Idempotency-Key")
        key = re.sub(r"\\(.)", r"\1", match[1])
    (request,) = sent.requests
    if request.key not in (None, key):
        raise InvalidArguments(f"the job's key is {request.key!r}, and Idempotency-Key says {key!r}", "key")
    return sent._replace(requests=[msgspec.structs.replace(request, key=key)])


def _lines(body: bytes) -> list[JobRequest]:
    requests: list[JobRequest] = []
    for line in body.split(b"\n"):
        if not line.strip():
            continue
        try:
            if len(requests) == MOST_JOBS:
                raise _too_many()
            requests.append(_request(_decoded(_JSON.job, line, "the line is not valid JSON"), _JSON))
        except LeptonError as error:
            error.index = len(requests)  # type: ignore[attr-defined]
            raise
    return requests


def _decoded(decoder: Any, data: bytes, otherwise: str) -> Any:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _too_many() if "`array` of length" in str(error) else _invalid(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"{otherwise}: {str(error) or type(error).__name__}") from None


def _request(incoming: _Incoming, known: _Format) -> JobRequest:
    if len(incoming.arguments) > _MOST_ARGUMENTS:
        raise InvalidArguments(f"{len(incoming.arguments)} arguments are more than a kernel can have", "arguments")
    arguments = {}
    for name, raw in incoming.arguments.items():
        _check_lists(name, raw, known)
        try:
            value = arguments[name] = known.value.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidArguments(
                f"argument {name!r} is no number, list of numbers or tensor: {error}", name
            ) from None
        if isinstance(value, TensorMap) and value.blob is not None:  # who may write to the broker names places in it
            raise InvalidArguments(f"argument {name!r} must have its data in it: no blob is taken over HTTP", name)
    asked = {name: getattr(incoming, name) for name in _ASKED}
    return JobRequest(incoming.kernel, arguments, **asked)


def _check_lists(name: str, raw: msgspec.Raw, known: _Format) -> None:
    """Refuses an argument of so many small lists that they alone would fill the memory."""
    data = bytes(raw)
    if len(data) > _MOST_LISTS and known.holds_more_lists(data, _MOST_LISTS):
        raise InvalidArguments(f"argument {name!r} holds more than {_MOST_LISTS} lists: send it as a tensor", name)


def _too_many() -> TooLarge:
    return TooLarge(f"one request takes at most {MOST_JOBS} jobs")


def _invalid(error: msgspec.ValidationError) -> InvalidArguments:
    """What did not fit the shape of a request, with the field that msgspec names."""
    text = str(error)
    named = _FIELD.search(text)
    path = _PATH.search(text)
    field = named[1] if named else path["field"] if path else None
    return InvalidArguments(f"not a valid request: {text}", field or None)
