"""Result records, as Celery's backend keeps them under `celery-task-meta-<id>`, and our Record beside the result.

Source: docs.celeryq.dev, "Result Backends"; `tests/lepton_ai/test_results.py` pins both directions to Celery itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import msgspec

from lepton_ai import tensor
from lepton_ai.errors import InvalidArguments, JobCancelled, JobExpired, LeptonError
from lepton_ai.job import Meta, Record
from lepton_ai.wire import typed

__all__ = ["encode", "failure", "read", "reply", "retrying", "success"]

_ERRORS: Final = LeptonError.__module__
_JSON = msgspec.json.Encoder()
_MSGPACK = msgspec.msgpack.Encoder()
_FROM_JSON = msgspec.json.Decoder(Meta)
_FROM_MSGPACK = msgspec.msgpack.Decoder(Meta)


def encode(meta: Meta, encoding: str) -> bytes:
    """A result record as Celery's backend stores it, in `json` or `msgpack`.

    The status comes first, because the commit function looks for it there; non-finite
    floats in JSON are Python's NaN and Infinity, as Celery writes them.
    """
    if encoding == "msgpack":
        return _MSGPACK.encode(meta)
    if not _has_non_finite(meta.result):
        return _JSON.encode(meta)
    return json.dumps(msgspec.to_builtins(meta)).encode()


def success(job_id: str, outputs: Mapping[str, Any], record: Record | None) -> Meta:
    """The record of a job that succeeded; `outputs` are wire values by name."""
    return Meta("SUCCESS", outputs, None, [], _now(), job_id, record)


def failure(job_id: str, error: LeptonError, trace: str | None = None, record: Record | None = None) -> Meta:
    """The record of a job that ended with an error: Celery's clients raise it by name, ours by its code."""
    revoked = isinstance(error, JobCancelled | JobExpired)
    # Celery's clients expect their own class for a task that never ran, whoever stopped it.
    module, name = ("celery.exceptions", "TaskRevokedError") if revoked else (_ERRORS, type(error).__name__)
    result = {"exc_type": name, "exc_message": [error.message], "exc_module": module}
    record = msgspec.structs.replace(record or Record(), error=error.to_wire())
    status = "REVOKED" if revoked else "FAILURE"
    trace = None if trace is None else trace.encode("utf-8", "backslashreplace").decode()  # a path may hold surrogates
    return Meta(status, result, trace, date_done=_now(), task_id=job_id, lepton=record)


def retrying(job_id: str, error: LeptonError, trace: str | None) -> Meta:
    """The record of a job whose kernel raised and that runs again later: Celery's RETRY, which ends nothing."""
    return msgspec.structs.replace(failure(job_id, error, trace), status="RETRY", date_done=None)


def _now() -> str:
    return _iso(int(time.time() * 1000))


@lru_cache(maxsize=1)  # jobs end many to a millisecond
def _iso(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


def _has_non_finite(value: Any) -> bool:
    if isinstance(value, float):
        return value != value or value in (float("inf"), float("-inf"))
    if isinstance(value, dict):
        return any(map(_has_non_finite, value.values()))
    return isinstance(value, list) and any(map(_has_non_finite, value))


class _Reply(Meta, frozen=True, gc=False):
    """A result record whose `record` is decoded when somebody asks for it: most never do, and it is the larger half.

    (Measured with 20,000 of them at hand: 1.2 us each, 6.3 decoded whole, most of it the garbage collector's.)
    """

    lepton: msgspec.Raw = msgspec.Raw()  # type: ignore[assignment]

    @property
    def record(self) -> Record | None:
        return typed(_RECORD, bytes(self.lepton)) if self.lepton else None


_REPLY = msgspec.msgpack.Decoder(_Reply)
_RECORD = msgspec.msgpack.Decoder(Record | None)


def read(data: bytes) -> Meta:
    """A result record in whichever of the two encodings it was stored; array outputs come back as NumPy arrays."""
    return _with_arrays(typed(_FROM_JSON if data[:1] == b"{" else _FROM_MSGPACK, data))


def reply(data: bytes) -> Meta:
    """As `read`, for many at once; of what Lepton keeps beside the result only `record` tells, and may raise."""
    return _with_arrays(typed(_REPLY, data)) if data[:1] != b"{" else read(data)


def _with_arrays(meta: Meta) -> Meta:
    if meta.status == "SUCCESS" and isinstance(meta.result, dict):
        for name, value in meta.result.items():
            if isinstance(value, dict):
                meta.result[name] = _output(value)
    return meta


def _output(value: dict[Any, Any]) -> Any:
    if value.keys() != {"dtype", "shape", "data"}:
        return value
    try:
        return tensor.from_wire(msgspec.convert(value, tensor.TensorMap))
    except msgspec.ValidationError as error:
        raise InvalidArguments(f"not a valid tensor map: {error}") from None
