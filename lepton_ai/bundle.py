"""Bundles: jobs that were submitted together and travel as one message until something sets them apart.

A bundle is a Celery protocol 2 message whose header `lepton` says how many jobs are in it (`bundle`). Its id is the
first one's, the others count up from there (lepton_ai/identity.py); where a single message's body has arguments, it has
a list of them. Kernel, options and the shapes of arrays are the same for all. Arrays may be in shared memory, and the
header names the places of all; none is beside it in the broker, where keys are made of a job's own id. Whoever has to
treat one of its jobs otherwise than the others splits it, and finds messages as if they had been submitted one by one.
"""

from __future__ import annotations

import binascii
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from lepton_ai import blob, wire
from lepton_ai.errors import LeptonError, Malformed, OptionNotSupported
from lepton_ai.identity import run_of, shared_by
from lepton_ai.job import Options
from lepton_ai.signature import describe, shapes_of
from lepton_ai.tensor import TensorMap

__all__ = [
    "Row",
    "bundled",
    "ids_of",
    "may_be",
    "note_of",
    "noted_as",
    "read_rows",
    "shared_note",
    "single",
    "singles",
    "split",
]

#: Fewer jobs than these are sent one by one, more are several bundles; so are bodies beyond these bytes.
_FEWEST: Final = 4
_MOST: Final = 128
_MOST_BYTES: Final = 128 * 1024
#: What a job's share of the headers takes on the way, for whoever counts bytes before it is a message.
_HEADERS_BYTES: Final = 64
_MSGPACK: Final = wire.MSGPACK


class Row(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A job on its way that may share its message with those beside it."""

    id: str
    packed: bytes
    """Its arguments, in msgpack."""
    shapes: dict[str, Any]
    template: wire.Template
    places: tuple[str, ...] = ()
    """Where its arrays are that are in shared memory."""
    beside_bytes: int = 0
    """What these count for."""

    def __len__(self) -> int:
        """What it takes on the way, in bytes: base64 of its arguments, and its share of the headers."""
        return len(self.packed) * 4 // 3 + _HEADERS_BYTES + self.beside_bytes


class _Rows(msgspec.Struct, array_like=True):
    """The body of a bundle, its arguments unread."""

    args: Any
    rows: list[msgspec.Raw]
    embed: Any = None


class _Bodies(msgspec.Struct, array_like=True):
    """The body of a bundle, read."""

    args: list[Any]
    rows: list[dict[str, wire.Value]]
    embed: Any = None


_ROWS = {_MSGPACK: msgspec.msgpack.Decoder(_Rows)}
_BODIES = {_MSGPACK: msgspec.msgpack.Decoder(_Bodies)}
_ARGUMENTS = msgspec.msgpack.Decoder(dict[str, wire.Value])
_ANYTHING = msgspec.json.Decoder()
_JSON = msgspec.json.Encoder()


def bundled(rows: Sequence[Row]) -> list[tuple[bytes, int]]:
    """Messages for these jobs, in their order, each with how many it holds: neighbours that are alike share one."""
    found: list[tuple[bytes, int]] = []
    start = 0
    while start < len(rows):
        end = _end(rows, start)
        here = rows[start:end]
        if len(here) < _FEWEST:
            found += [(each.template.single(each.id, each.packed, each.shapes, each.places), 1) for each in here]
        else:
            places = [place for each in here for place in each.places]
            message = here[0].template.bundle(here[0].id, [each.packed for each in here], _largest(here), places)
            found.append((message, len(here)))
        start = end
    return found


def _end(rows: Sequence[Row], start: int) -> int:
    """Up to which row those from `start` on fit into one message."""
    first, size, places = rows[start], 0, 0
    head, number, form = shared_by(first.id), int(first.id[-3:], 16), _form(first.shapes)
    end = start
    for each in rows[start : start + _MOST]:
        size += len(each.packed)
        places += len(each.places)
        follows = each.id[:-3] == head and int(each.id[-3:], 16) == number + end - start
        fits = size <= _MOST_BYTES and places <= blob.MOST_BLOBS
        if end > start and not (follows and fits and _form(each.shapes) == form):
            break
        end += 1
    return end


def _form(shapes: Mapping[str, Any]) -> list[Any]:
    """What rows must share: the names, which of them are numbers, and the sizes of arrays."""
    return [(name, value if type(value) is list else None) for name, value in shapes.items()]


def _largest(rows: Sequence[Row]) -> dict[str, Any]:
    """The shapes of all these rows, of numbers the largest: what they cost is not underrated."""
    shapes = dict(rows[0].shapes)
    for name, value in shapes.items():
        if type(value) is not list:
            shapes[name] = max(each.shapes[name] for each in rows)
    return shapes


def may_be(message: bytes) -> bool:
    """Whether a message may be a bundle: False is certain, and takes no decoding."""
    return b'"bundle"' in message or b"\\u" in message  # JSON may write any letter as a number


def noted_as(first: str, options: Options) -> str | None:
    """Under which name one note says where all jobs of a message were placed; None where each has a note of its own.

    A run of ids may be in several messages (a push ends, or a row differs); the name is that of the first of them.
    """
    is_whole = options.bundle is not None and not options.split and first.endswith("000")
    return shared_by(first) if is_whole else None


def shared_note(note: bytes, count: int) -> bytes:
    """The note of the first so many jobs of a run."""
    return bytes((count - 1,)) + note


def note_of(job_id: str, shared: bytes) -> bytes | None:
    """What the note of a run says of a job; None where it is not one of those."""
    return shared[1:] if shared and int(job_id[-3:], 16) <= shared[0] else None


def ids_of(message: bytes, headers: wire.Headers, options: Options) -> tuple[str, ...]:
    """The ids of the jobs in a message.

    Malformed, InvalidArguments or OptionNotSupported where it says that it is a bundle, and cannot be one. Nobody runs
    what could not be split afterwards: its jobs could not be told apart where one ends its worker.
    """
    if options.bundle is None:
        return (headers.id,)
    wire.typed(_ANYTHING, message)
    return _ids(headers, options.bundle, options)


def _ids(headers: wire.Headers, count: int, options: Options) -> tuple[str, ...]:
    single_only = {
        "eta": headers.eta,
        "expires": headers.expires,
        "retries": headers.retries or None,
        "limit_s": options.limit_s,
        "blobs in the broker": blob.keys(headers.id, options.blobs or ()) or None,
        "ignore_result": headers.ignore_result or None,
        "compression": headers.compression,
    }
    for name, value in single_only.items():
        if value is not None:
            raise OptionNotSupported(f"a bundle of {count} jobs cannot have {name}", "bundle")
    try:
        return run_of(headers.id, count)
    except ValueError as error:
        raise OptionNotSupported(f"a bundle: {error}", "bundle") from None


def read_rows(envelope: wire.Envelope, count: int, *, limit_bytes: int) -> list[wire.Body]:
    """The bodies of the jobs in a bundle. Raises as `wire.read_body`, for all of them."""
    found: _Bodies = wire.open_body(envelope, limit_bytes, _BODIES)
    if len(found.rows) != count:
        raise Malformed(f"a bundle of {count} jobs has the arguments of {len(found.rows)}")
    return [wire.Body(found.args, row, found.embed) for row in found.rows]


def split(message: bytes, most: int = 1) -> list[bytes]:
    """The messages of the jobs in a bundle: bundles of at most `most`, or single ones. Malformed where it is none."""
    found = _opened(message)
    return [found.part(at, most) for at in range(0, len(found.ids), max(1, most))]


def singles(message: bytes) -> list[bytes]:
    """The messages of its jobs one by one: itself where it is no bundle. Raises as `split` where it says it is one."""
    is_one = may_be(message) and wire.read_options(wire.read_envelope(message).headers).bundle is not None
    return split(message) if is_one else [message]


def single(message: bytes, at: int) -> bytes:
    """The message of one job of a bundle, by its place in it. Raises as `split`."""
    return _opened(message).part(at, 1)


class _Opened(msgspec.Struct, frozen=True):
    """A bundle, ready to be split."""

    shared: Mapping[str, Any]
    """Its envelope, without the body."""
    options: Options
    ids: tuple[str, ...]
    rows: list[msgspec.Raw]

    def part(self, at: int, count: int) -> bytes:
        """The message of so many of its jobs, which shares with it what is not said here."""
        ids, packed = self.ids[at : at + count], list(map(bytes, self.rows[at : at + count]))
        places = _places(packed, self.options.blobs) if self.options.blobs else None
        headers = self.shared["headers"] | {"id": ids[0], "root_id": ids[0]}
        if len(ids) > 1:
            headers["lepton"] = msgspec.structs.replace(self.options, bundle=len(ids), split=True, blobs=places)
            body = wire.pack_rows(packed)
        else:
            shapes = _shapes(packed[0])
            headers["kwargsrepr"] = describe(shapes or {})
            headers["lepton"] = msgspec.structs.replace(
                self.options, bundle=None, split=False, shapes=shapes, blobs=places
            )
            body = wire.pack_row(packed[0])
        properties = self.shared["properties"] | {"correlation_id": ids[0], "delivery_tag": str(uuid.uuid4())}
        text = binascii.b2a_base64(body, newline=False).decode()
        return _JSON.encode({**self.shared, "body": text, "headers": headers, "properties": properties})


def _opened(message: bytes) -> _Opened:
    envelope = wire.read_envelope(message)
    options = wire.read_options(envelope.headers)
    ids = _ids(envelope.headers, options.bundle or 1, options)
    body: _Rows = wire.open_body(envelope, len(message), _ROWS)
    if len(body.rows) != len(ids):
        raise Malformed(f"a bundle of {len(ids)} jobs has the arguments of {len(body.rows)}")
    return _Opened(wire.typed(_ANYTHING, message) | {"body": ""}, options, ids, body.rows)


def _shapes(packed: bytes) -> dict[str, Any] | None:
    """The shapes of arguments; None where they are none, which their kernel is told by its worker."""
    try:
        return shapes_of(wire.typed(_ARGUMENTS, packed))
    except LeptonError:
        return None


def _places(rows: Sequence[bytes], named: Sequence[str]) -> tuple[str, ...] | None:
    """Which of the places that a bundle names are those of these rows; None where none are."""
    found: list[str] = []
    for packed in rows:
        with suppress(LeptonError):  # which their worker tells of
            values = wire.typed(_ARGUMENTS, packed).values()
            told = (each.blob for each in values if isinstance(each, TensorMap))
            found += [place for place in told if place is not None and place in named]
    return tuple(found) or None
