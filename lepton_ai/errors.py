"""Every error that Lepton raises, and its form on the wire.

LeptonError                     anything of ours
├── InvalidSettings             a LEPTON_* variable is unknown or out of range
│   └── MissingPackage          what was asked for needs a package that an extra brings
├── InvalidRequest              the caller's mistake; the same request will fail again
│   ├── Malformed               bytes that are not what they claim to be
│   ├── InvalidArguments        arguments that do not fit the kernel's signature
│   ├── InvalidKernel           a kernel's own declaration is wrong
│   ├── OptionNotSupported      a header option that this release does not honour
│   ├── UnknownKernel           no live device announces the kernel
│   ├── UnknownJob              no job of that id is known (or its result has expired)
│   ├── UnsupportedMediaType    a body in a format that the ingest does not read
│   ├── KeyConflict             the idempotency key stands for another job already
│   └── TooLarge                a body above the limit
├── JobFailed                   the job itself ended without a result
│   ├── KernelFailed            its kernel raised
│   ├── JobCancelled            it was revoked before it finished
│   ├── JobExpired              its deadline passed before it could run
│   ├── DeadlineUnattainable    it must meet its deadline, and is estimated not to
│   ├── TimeLimitExceeded       it ran longer than it may
│   ├── JobDead                 it killed the workers that ran it, or its retries are used up
│   ├── BlobLost                an argument or result that was kept outside the message is gone
│   ├── DeviceOutOfMemory       no device that can run it has memory enough for it
│   └── RetryJob                its kernel asks to be run again later
├── Unavailable                 try again later
│   ├── BrokerUnavailable       Redis cannot be reached or refuses writes
│   ├── Overloaded              too much waits already, or the broker's memory is nearly full
│   ├── QuotaExceeded           too much of this tenant waits already
│   └── NoBroker                no broker is configured and none can be started
├── DeviceLost                  the device fails whatever it is asked, and its worker has to open it anew
├── ResultTimeout               the wait ended before the job did; the job goes on
└── Fenced                      somebody else owns what this process still holds

The `code` of a class is what crosses the wire; `from_wire` raises the same class on the other side.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final

__all__ = [
    "BlobLost",
    "BrokerUnavailable",
    "DeadlineUnattainable",
    "DeviceLost",
    "DeviceOutOfMemory",
    "Fenced",
    "InvalidArguments",
    "InvalidKernel",
    "InvalidRequest",
    "InvalidSettings",
    "JobCancelled",
    "JobDead",
    "JobExpired",
    "JobFailed",
    "KernelFailed",
    "KeyConflict",
    "LeptonError",
    "Malformed",
    "MissingPackage",
    "NoBroker",
    "OptionNotSupported",
    "Overloaded",
    "QuotaExceeded",
    "ResultTimeout",
    "RetryJob",
    "TimeLimitExceeded",
    "TooLarge",
    "Unavailable",
    "UnknownJob",
    "UnknownKernel",
    "UnsupportedMediaType",
    "from_wire",
]


#: Characters of a message and of a field: what they quote may have millions.
_LONGEST: Final = 2000
_LONGEST_FIELD: Final = 200


class LeptonError(Exception):
    """Anything that Lepton raises. `field` names the offending argument or option, where there is one."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    def __init__(self, message: str = "", field: str | None = None) -> None:
        # Text that the kernel or the file system made may hold surrogates, which no wire carries.
        message = _shortened(str(message).encode("utf-8", "backslashreplace").decode(), _LONGEST)
        super().__init__(message)
        self.message = message
        self.field = None if field is None else _shortened(field, _LONGEST_FIELD)

    def to_wire(self) -> dict[str, Any]:
        """The error as plain values, as results, events and problem+json carry it."""
        wire: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.field is not None:
            wire["field"] = self.field
        return wire


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    told = f"... ({len(text)} characters)"
    return text[: longest - len(told)] + told


class InvalidSettings(LeptonError):
    code = "invalid_settings"


class MissingPackage(InvalidSettings):
    code = "missing_package"


class InvalidRequest(LeptonError):
    code = "invalid_request"
    status = 400


class Malformed(InvalidRequest):
    code = "malformed"


class InvalidArguments(InvalidRequest):
    code = "invalid_arguments"
    status = 422


class InvalidKernel(InvalidRequest):
    code = "invalid_kernel"


class OptionNotSupported(InvalidRequest):
    code = "option_not_supported"
    status = 422


class UnknownKernel(InvalidRequest):
    code = "unknown_kernel"
    status = 404


class UnknownJob(InvalidRequest):
    code = "unknown_job"
    status = 404


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"
    status = 415


class KeyConflict(InvalidRequest):
    code = "key_conflict"
    status = 422


class TooLarge(InvalidRequest):
    code = "too_large"
    status = 413


class JobFailed(LeptonError):
    code = "job_failed"


class KernelFailed(JobFailed):
    code = "kernel_failed"


class JobCancelled(JobFailed):
    code = "cancelled"
    status = 409


class JobExpired(JobFailed):
    code = "expired"
    status = 409


class DeadlineUnattainable(JobFailed):
    """`estimate_s` is when it would end at the soonest, nineteen times in twenty: seconds from when it was asked."""

    code = "deadline_unattainable"
    status = 409

    def __init__(self, message: str = "", field: str | None = None, *, estimate_s: float | None = None) -> None:
        super().__init__(message, field)
        self.estimate_s = estimate_s

    def to_wire(self) -> dict[str, Any]:
        return super().to_wire() | ({} if self.estimate_s is None else {"estimate_s": self.estimate_s})


class TimeLimitExceeded(JobFailed):
    code = "time_limit"
    status = 409


class JobDead(JobFailed):
    code = "dead"
    status = 409


class BlobLost(JobFailed):
    code = "blob_lost"
    status = 409


class DeviceOutOfMemory(JobFailed):
    code = "device_out_of_memory"


class RetryJob(JobFailed):
    """A kernel raises it to be run again after `delay_s`, or after what its retry policy says where that is None."""

    code = "retry"

    def __init__(self, message: str = "", field: str | None = None, *, delay_s: float | None = None) -> None:
        super().__init__(message, field)
        self.delay_s = delay_s


class Unavailable(LeptonError):
    code = "unavailable"
    status = 503
    retry_after_s: float = 1.0


class BrokerUnavailable(Unavailable):
    code = "broker_unavailable"


class Overloaded(Unavailable):
    code = "overloaded"


class QuotaExceeded(Unavailable):
    code = "quota_exceeded"
    status = 429


class NoBroker(Unavailable):
    code = "no_broker"


class DeviceLost(LeptonError):
    code = "device_lost"
    status = 503


class ResultTimeout(LeptonError, TimeoutError):
    code = "result_timeout"
    status = 504


class Fenced(LeptonError):
    code = "fenced"
    status = 409


def _tree(root: type[LeptonError]) -> dict[str, type[LeptonError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


_BY_CODE = _tree(LeptonError)


def from_wire(wire: Any) -> LeptonError:
    """The error that `to_wire` described; an unknown code becomes a JobFailed that keeps the message."""
    if not isinstance(wire, dict):
        return JobFailed(str(wire))
    cls = _BY_CODE.get(str(wire.get("code")), JobFailed)
    field, estimate_s = wire.get("field"), wire.get("estimate_s")
    error = cls(str(wire.get("message", "")), None if field is None else str(field))
    if isinstance(error, DeadlineUnattainable) and isinstance(estimate_s, int | float):
        error.estimate_s = float(estimate_s)
    return error
