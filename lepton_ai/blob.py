"""Blobs: arrays that are kept outside their message, which names each by a Reference. Without any I/O.

A reference stands in a message where the array would: `{"dtype": "<f4", "shape": [..], "blob": "<place>"}`, and the
place is one of three (decision 13):

    redis:<nonce>:<chunks>                          the keys `lepton-blob:<job>:<nonce>:<n>`; as safe as the message
    ring:<memory>:<segment>:<offset>:<generation>   memory that two processes of a host share; volatile
    s3://<bucket>/<object>, ...                     a store that fsspec knows, where it was before and stays

The keys of a blob are made of its own job's id, so no message can name another job's. What is sent to the broker and
read from it are plain commands, performed by either client, a router or a worker.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from lepton_ai import tensor
from lepton_ai.errors import BlobLost, InvalidArguments, OptionNotSupported, TooLarge

__all__ = [
    "DROPPED_S",
    "LETTER_S",
    "MOST_BLOBS",
    "WORTH_BYTES",
    "WRITTEN_S",
    "InRedis",
    "InRing",
    "InStore",
    "Reference",
    "array_of",
    "check_places",
    "drop_commands",
    "is_worth",
    "keep_commands",
    "keys",
    "layout",
    "place_of",
    "publish_commands",
    "read",
    "read_commands",
    "require_published",
    "write_commands",
]

#: Arrays above this leave the message.
WORTH_BYTES: Final = 32 * 1024
#: How long a blob lasts that is written and not published: its producer has died, or the job never came to be.
WRITTEN_S: Final = 3600
#: How long the blobs of a dead letter last: so long it can be replayed.
LETTER_S: Final = 7 * 86_400
#: How long the blobs last of a job that ends without a commit, or of a second message of one that has ended.
DROPPED_S: Final = 60
#: One write of the broker. Larger ones keep everybody else waiting longer and are no faster (decision 13).
CHUNK_BYTES: Final = 256 * 1024
#: A reference cannot ask for more reads than chunks of this would need.
_LEAST_CHUNK_BYTES: Final = 32 * 1024
_MAX_DIMS: Final = 32
#: Blobs of one message, and their chunks: each is a key that whoever ends the job has to name.
MOST_BLOBS: Final = 64
_MOST_CHUNKS: Final = 65_536
_WIRE: Final = {dtype.str: dtype for dtype in tensor.DTYPES.values()}
_REDIS: Final = re.compile(r"redis:([0-9a-f]{16}):([1-9][0-9]{0,6})", re.ASCII)
_RING: Final = re.compile(r"ring:([0-9a-f]{32}):([0-9a-f]{32}):([0-9]{1,15}):([1-9][0-9]{0,17})", re.ASCII)

#: No credentials, queries, fragments or ways up: what stands there is matched against the prefixes that are allowed.
_STORE: Final = re.compile(r"([a-z][a-z0-9+-]{0,15})://([^\s/?#@%\\:]*(/[^\s/?#@%\\:]+)+)", re.ASCII)
_LONGEST_URL: Final = 1024

Command = tuple[Any, ...]


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An array that is somewhere else, as it crosses the wire. It comes from outside: `place_of` and `layout` check."""

    dtype: str
    shape: tuple[int, ...]
    blob: str
    """Where its bytes are: little-endian and in C order, as those of a tensor map."""


class InRedis(NamedTuple):
    """The place of a blob that the broker keeps."""

    nonce: str
    chunks: int


class InRing(NamedTuple):
    """The place of a blob in memory that is shared on one host."""

    memory: str
    """Which memory: see `ring.memory`."""
    segment: str
    offset: int
    generation: int


class InStore(NamedTuple):
    """The place of a blob on a store of the user's own."""

    url: str

    def is_below(self, prefixes: Iterable[str]) -> bool:
        """Whether it is in one of these folders, such as `s3://bucket/scans`."""
        return any(self.url.startswith(prefix.rstrip("/") + "/") for prefix in prefixes)


def is_worth(array: NDArray[Any]) -> bool:
    """Whether an array is large enough to leave its message."""
    return array.nbytes > WORTH_BYTES


def place_of(reference: Reference, field: str | None = None) -> InRedis | InRing | InStore:
    """Where the bytes of a reference are; InvalidArguments where it names no place."""
    try:
        return _place(reference.blob)
    except ValueError:
        raise InvalidArguments(f"{reference.blob[:200]!r} is no place of a blob", field) from None


@lru_cache(maxsize=1024)  # of an array it is asked five times
def _place(told: str) -> InRedis | InRing | InStore:
    if match := _RING.fullmatch(told):
        return InRing(match[1], match[2], int(match[3]), int(match[4]))
    if match := _REDIS.fullmatch(told):
        return InRedis(match[1], int(match[2]))
    url = _STORE.fullmatch(told) if len(told) <= _LONGEST_URL else None
    if url is not None and not {".", ".."}.intersection(url[2].split("/")):
        return InStore(told)
    raise ValueError(told[:200])


def check_places(places: Sequence[str]) -> None:
    """Raises OptionNotSupported where these cannot be the places of one job's blobs."""
    if len(places) > MOST_BLOBS:
        raise OptionNotSupported(f"a job has at most {MOST_BLOBS} blobs, not {len(places)}", "blobs")
    chunks = 0
    for place in places:
        try:
            where = _place(place)
        except ValueError:
            raise OptionNotSupported(f"{place[:200]!r} is no place of a blob", "blobs") from None
        if isinstance(where, InRedis):
            chunks += where.chunks
    if chunks > _MOST_CHUNKS:
        raise OptionNotSupported(f"the blobs of a job have at most {_MOST_CHUNKS} chunks, not {chunks}", "blobs")


def layout(reference: Reference, limit_bytes: int, field: str | None = None) -> tuple[np.dtype[Any], int]:
    """The dtype of a reference, and how many bytes it takes.

    Raises InvalidArguments where it describes no array of at least one element, TooLarge above `limit_bytes`.
    """
    dtype = _WIRE.get(reference.dtype)
    if dtype is None:
        raise InvalidArguments(f"unknown dtype {reference.dtype[:80]!r}; use one of {', '.join(_WIRE)}", field)
    shape = reference.shape
    if len(shape) > _MAX_DIMS or any(not 1 <= size <= tensor.MOST for size in shape):
        raise InvalidArguments(f"the shape of a blob is at most {_MAX_DIMS} sizes, each 1 to 2**63 - 1", field)
    size_bytes = math.prod(shape) * dtype.itemsize
    if size_bytes > limit_bytes:
        raise TooLarge(
            f"shape {list(shape)} of {dtype.name} takes {size_bytes} bytes, the limit is {limit_bytes}", field
        )
    return dtype, size_bytes


def array_of(reference: Reference, dtype: np.dtype[Any], data: Any) -> NDArray[Any]:
    """The array over bytes that are just as many as it takes; read-only, and a view of them."""
    array = np.frombuffer(data, dtype).reshape(reference.shape)
    array.flags.writeable = False
    return array


# -- in the broker ----------------------------------------------------------------------------------------------------


def write_commands(array: NDArray[Any], job: str, kept_s: int = WRITTEN_S) -> tuple[Reference, list[Command]]:
    """What writes an array beside a job that has not been published yet: it is gone after `kept_s` where that fails.

    The commands hold views of the array, and may be sent again. Send them a few MiB at a time, and wait for the last
    answer before the job is published. InvalidArguments where its dtype cannot be sent.
    """
    wire = tensor.to_wire(array)
    nonce = secrets.token_hex(8)
    assert wire.data is not None
    data = wire.data.cast("B")
    parts = [data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
    reference = Reference(wire.dtype, tuple(wire.shape), f"redis:{nonce}:{len(parts)}")
    names = keys(job, [reference.blob])
    return reference, [("SET", name, part, "NX", "EX", kept_s) for name, part in zip(names, parts, strict=True)]


def keys(job: str, places: Iterable[str]) -> list[str]:
    """The keys of a job's blobs, by the places that its message names; those that are not in the broker have none."""
    found = []
    for place in places:
        with suppress(ValueError):
            where = _place(place)
            if isinstance(where, InRedis):
                found += [f"lepton-blob:{job}:{where.nonce}:{number}" for number in range(where.chunks)]
    return found


def publish_commands(names: Sequence[str]) -> list[Command]:
    """What keeps blobs for as long as their job is open, in the transaction that publishes the job.

    Look at the answers with `require_published`.
    """
    return [*(("PERSIST", name) for name in names), ("EXISTS", *names)] if names else []


def require_published(answers: Sequence[Any]) -> None:
    """Raises BlobLost where blobs had gone before their job was published: its producer stood still for WRITTEN_S.

    Then the job fails, and its caller must not be told that it was accepted.
    """
    if answers and answers[-1] != len(answers) - 1:
        raise BlobLost(f"more than {WRITTEN_S} s passed between writing the arguments and publishing: submit it again")


def drop_commands(names: Iterable[str]) -> list[Command]:
    """What forgets the blobs of a job that no commit ends, in the step that ends it.

    Not at once: where its message was a second one, they may be a dead letter's, which has said how long they last.
    """
    return [("EXPIRE", name, DROPPED_S, "NX") for name in names]


def keep_commands(names: Iterable[str], kept_s: int = LETTER_S) -> list[Command]:
    """What keeps the blobs of a dead letter, in the step that buries it; or those of a result, with its record."""
    return [("EXPIRE", name, kept_s) for name in names]


def read_commands(reference: Reference, job: str, limit_bytes: int, field: str | None = None) -> list[Command]:
    """What reads a blob of the broker's. Raises as `place_of` and `layout`."""
    place = place_of(reference, field)
    _, size_bytes = layout(reference, limit_bytes, field)
    if not isinstance(place, InRedis):
        raise InvalidArguments(f"{reference.blob!r} is not in the broker", field)
    if place.chunks > -(-size_bytes // _LEAST_CHUNK_BYTES):
        raise InvalidArguments(f"{size_bytes} bytes are not kept in {place.chunks} chunks", field)
    return [("GET", name) for name in keys(job, [reference.blob])]


def read(reference: Reference, answers: Sequence[bytes | None], field: str | None = None) -> NDArray[Any]:
    """The array of a blob, from the answers to `read_commands`; one of a single chunk shares its bytes.

    Raises BlobLost where some of it is gone, InvalidArguments where it is not of the size that the reference says.
    """
    dtype, size_bytes = layout(reference, tensor.MOST, field)
    if None in answers:
        raise BlobLost(f"{answers.count(None)} of {len(answers)} chunks of {reference.blob} are gone", field)
    found = sum(len(each) for each in answers if each is not None)
    if found != size_bytes:
        raise InvalidArguments(f"{reference.blob} has {found} bytes, {size_bytes} are said", field)
    if len(answers) == 1:
        return array_of(reference, dtype, answers[0])
    data = np.empty(size_bytes, np.uint8)
    at = 0
    for each in answers:
        assert each is not None
        data[at : at + len(each)] = np.frombuffer(each, np.uint8)
        at += len(each)
    return array_of(reference, dtype, data.data)
