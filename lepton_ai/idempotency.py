"""Idempotency keys: one job for each, however often, through whichever door and by whomever it is submitted.

A key makes the job's id, so whoever has the key has the id. A fingerprint says what the job is, so that a key that is
used for something else by mistake is refused and not answered with another job's result.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from lepton_ai import tensor, wire
from lepton_ai.blob import Reference
from lepton_ai.errors import InvalidArguments, KeyConflict

__all__ = ["KEPT_S", "conflict", "fingerprint", "job_id", "paired"]

R = TypeVar("R")

#: Ours for ever: another one would make other ids of the same keys.
_NAMESPACE: Final = uuid.UUID("5b1b3c5e-6a4e-5d0c-9a52-6c6570746f6e")
_LONGEST_KEY: Final = 255
#: How long the broker remembers a key whose job has not ended: a day more than the longest delay.
KEPT_S: Final = 31 * 86_400
_FORM: Final = b"lepton fingerprint 1"
#: Integers up to here are floats too; beyond, neighbours would be one and the same.
_EXACT: Final = 2**53
_AT_ONCE: Final = 1 << 16


def job_id(key: str, tenant: str | None = None) -> str:
    """The id of the one job that a tenant's key stands for; InvalidArguments where it is no key (1 to 255 characters).

    A plain Celery producer is part of it by `send_task(..., task_id=job_id("order-17"))`: its job is the same job. But
    it leaves no fingerprint, so nobody can tell a key that it uses for something else.
    """
    if not 1 <= len(key) <= _LONGEST_KEY:
        raise InvalidArguments(f"an idempotency key is 1 to {_LONGEST_KEY} characters, not {len(key)}", "key")
    try:
        return str(uuid.uuid5(_NAMESPACE, f"{tenant or ''}\x00{key}"))
    except UnicodeEncodeError as error:
        raise InvalidArguments(f"an idempotency key is text: {error}", "key") from None


def fingerprint(kernel: str, arguments: Mapping[str, Any], device: str | None = None) -> bytes:
    """What a job is, in 32 bytes (SHA-256): its kernel, its arguments by name, and the device that it is pinned to.

    Equal for the same job in whatever form it comes: nested lists, NumPy arrays of any dtype and memory order, and
    tensor maps count by their shape and values. 1 and 1.0 are the same, and so are 0.0 and -0.0, and all NaNs; true is
    not 1, and [1] is not 1. Values count as they were sent: 0.1 in JSON is another number than `np.float32(0.1)`, and
    a default that is spelt out is another job than one that is left out. When a job may run, for how long and how
    urgently is not part of it: a second try may ask for that anew, and the first one's stands.
    """
    digest = hashlib.sha256(_FORM)
    digest.update(msgspec.msgpack.encode((kernel, device, len(arguments))))
    for name in sorted(arguments):
        if isinstance(value := arguments[name], Reference):  # by where it is: nobody reads it here
            digest.update(msgspec.msgpack.encode((name, "store", value)))
            continue
        array, form = _canonical(name, arguments[name])
        digest.update(msgspec.msgpack.encode((name, form, array.shape)))
        flat = array.reshape(-1)
        for at in range(0, flat.size, _AT_ONCE):
            digest.update(_written(flat[at : at + _AT_ONCE], form))
    return digest.digest()


def paired(rows: Iterable[R], keys: Sequence[str]) -> list[tuple[R, str]]:
    """Each row with its key; InvalidArguments where there is not one for each."""
    rows = list(rows)
    if isinstance(keys, str) or len(keys) != len(rows):
        given = "one text" if isinstance(keys, str) else f"{len(keys)}"
        raise InvalidArguments(f"keys are a list, one for each of the {len(rows)} rows, not {given}", "keys")
    return list(zip(rows, keys, strict=True))


def conflict(key: str) -> KeyConflict:
    """The error of a key that stands for another job already."""
    told = f"the key {key!r} stands for another job: its kernel, arguments or device differ; use another key"
    return KeyConflict(told, "key")


def _canonical(name: str, value: Any) -> tuple[NDArray[Any], str]:
    """A value as an array, and the form in which its elements are written."""
    value = wire.decode_value(value)
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidArguments(f"argument {name!r} is no array of numbers: {error}", name) from None
    if array.size == 0:
        return array, "f8"
    match array.dtype.kind:
        case "b":
            return array, "b1"
        case "f":
            return array, "f8"
        case "i" | "u" if int(array.min()) >= -_EXACT and int(array.max()) <= _EXACT:
            return array, "f8"
        case "i" | "u":
            return array, "i8" if int(array.max()) < tensor.MOST + 1 else "u8"
    raise InvalidArguments(f"argument {name!r} is no array of numbers, but of {array.dtype}", name)


def _written(values: NDArray[Any], form: str) -> bytes:
    with np.errstate(invalid="ignore"):  # a signalling NaN is one like the others
        values = values.astype(f"<{form}")
    if form == "f8":
        values += 0.0  # -0.0 becomes 0.0
        values[np.isnan(values)] = np.nan
    return values.tobytes()
