"""From taken messages to groups that run together, and from a group's outputs back to each job's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
import numpy as np

from lepton_ai import blob, bundle, wire
from lepton_ai.blob import Reference
from lepton_ai.errors import InvalidArguments, LeptonError, OptionNotSupported, UnknownKernel
from lepton_ai.job import Options
from lepton_ai.kernel import Kernel, Work
from lepton_ai.succession import Sequel, inherit, sequel_of
from lepton_ai.tensor import MOST, TensorMap

__all__ = ["Group", "Refused", "TakenJob", "Unreadable", "groups", "read", "read_all", "split"]

_NO_OPTIONS: Final = Options()
#: As most messages have it.
_NO_LIMITS: Final[list[float | None]] = [None, None]
_ARRAYS: Final = (TensorMap, np.ndarray)
_SHAPED: Final = (np.ndarray, Reference)


class TakenJob(msgspec.Struct, eq=False, gc=False):
    """A job with its checked inputs, ready to run."""

    id: str
    kernel: Kernel
    inputs: dict[str, Any]
    work: Work
    options: Options
    tensors: bool
    """Its arrays came as tensor maps, so its answer goes back as tensor maps; else as nested lists."""
    keep: bool
    """False where the caller asked to ignore the result."""
    message: bytes
    """Where it has come in a bundle, that."""
    place: int = 0
    """And which of its jobs it is."""
    bundled: bool = False
    retries: int = 0
    """How often its kernel has been run again."""
    limit_s: float | None = None
    """The longest that it may run, where it says so itself."""
    deadline_at: float | None = None
    """After when it must not begin any more, in seconds since the epoch."""
    sequel: Sequel | None = None
    """What is to follow it; None where nothing is."""
    decode_s: float = 0.0
    """What reading it from its message took."""
    outside_bytes: int = 0
    """What those of its arrays take that are outside its message: References, where they have not been read yet."""
    seen: Sequence[Reference] = ()
    """Those that have been read, in memory that may become another job's."""

    def own_message(self) -> bytes:
        """A message of the job alone."""
        return bundle.single(self.message, self.place) if self.bundled else self.message


class Refused(msgspec.Struct, frozen=True):
    """A message that names a job which cannot run, and why."""

    id: str
    kernel: str
    options: Options
    error: LeptonError
    keep: bool = True
    sequel: Sequel | None = None


class Unreadable(msgspec.Struct, frozen=True):
    """A message without a job in it. A router refuses these, so only a foreign hand can have queued one here."""

    error: LeptonError
    message: bytes


class Group(msgspec.Struct, eq=False, gc=False):
    """Jobs of one kernel that run in one launch."""

    kernel: Kernel
    jobs: list[TakenJob]
    outside_bytes: int = 0
    """Of its jobs."""

    @property
    def inputs(self) -> dict[str, Any]:
        """The inputs of the launch: a single job's own, or all jobs' stacked or concatenated. No References."""
        first = self.jobs[0].inputs
        if len(self.jobs) == 1:
            return first
        join = np.stack if self.kernel.spec.batch == "stack" else np.concatenate
        return {
            name: join([job.inputs[name] for job in self.jobs]) if isinstance(value, np.ndarray) else value
            for name, value in first.items()
        }


def read_all(message: bytes, kernels: dict[str, Kernel], limit_bytes: int) -> list[TakenJob | Refused | Unreadable]:
    """The jobs of a message, one but for a bundle, or why each is none. Never raises for what a message holds."""
    if bundle.may_be(message):
        with suppress(LeptonError):  # of which it is told below
            envelope = wire.read_envelope(message)
            options = wire.read_options(envelope.headers)
            ids = bundle.ids_of(envelope.headers, options)
            if len(ids) > 1:
                return _read_bundle(message, envelope, options, ids, kernels, limit_bytes)
    return [read(message, kernels, limit_bytes)]


def _read_bundle(
    message: bytes,
    envelope: wire.Envelope,
    options: Options,
    ids: Sequence[str],
    kernels: dict[str, Kernel],
    limit_bytes: int,
) -> list[TakenJob | Refused | Unreadable]:
    headers = envelope.headers
    try:
        bodies = bundle.read_rows(envelope, len(ids), limit_bytes=limit_bytes)
        taken = [_read(message, headers, body, options, kernels, keep=True) for body in bodies]
    except LeptonError as error:  # one of its jobs is at fault, or all are
        why = error
    else:
        own = msgspec.structs.replace(options, blobs=None)  # those are all in shared memory: nobody has to end them
        for place, (job, job_id) in enumerate(zip(taken, ids, strict=True)):
            job.id, job.place, job.bundled, job.options = job_id, place, True, own
        return [*taken]
    try:
        found = [read(each, kernels, limit_bytes) for each in bundle.split(message)]
    except LeptonError:
        return [Refused(job, headers.task, options, why) for job in ids]
    for place, each in enumerate(found):
        if isinstance(each, TakenJob):
            each.message, each.place, each.bundled = message, place, True
    return found


def read(message: bytes, kernels: dict[str, Kernel], limit_bytes: int) -> TakenJob | Refused | Unreadable:
    """The job of a message that is no bundle, or why it is none. Never raises for what a message holds."""
    try:
        envelope = wire.read_envelope(message)
    except LeptonError as error:
        return Unreadable(error, message)
    headers, options = envelope.headers, _NO_OPTIONS
    keep = not headers.ignore_result
    try:
        options = wire.read_options(headers)
        bundle.ids_of(headers, options)
        body = wire.read_body(envelope, limit_bytes=limit_bytes)
        return _read(message, headers, body, options, kernels, keep)
    except LeptonError as error:
        if options is _NO_OPTIONS:
            options = Options(blobs=wire.read_places(headers))
        sequel = None
        with suppress(LeptonError):  # then the job's own fault is told, and nobody can tell what should follow it
            sequel = sequel_of(headers, wire.read_embed(envelope, limit_bytes=limit_bytes))
        return Refused(headers.id, headers.task, options, error, keep, sequel)


def _read(
    message: bytes, headers: wire.Headers, body: wire.Body, options: Options, kernels: dict[str, Kernel], keep: bool
) -> TakenJob:
    kernel = kernels.get(headers.task)
    if kernel is None:
        raise UnknownKernel(f"this worker has no kernel {headers.task!r}; it has {', '.join(sorted(kernels))}")
    deadline_at = wire.deadline_at(headers)
    sequel = sequel_of(headers, body.embed)
    arguments = inherit(kernel.signature, body)
    inputs, dims = kernel.signature.bind(arguments)
    forms = set(map(type, arguments.values()))
    outside_bytes = _outside_bytes(inputs, options.blobs or ()) if TensorMap in forms else 0
    return TakenJob(
        headers.id,
        kernel,
        inputs,
        kernel.spec.work(dims),
        options,
        not forms.isdisjoint(_ARRAYS) or (list not in forms and options.result == "msgpack"),
        keep,
        message,
        retries=max(0, headers.retries) if headers.retries else 0,
        limit_s=_limit_s(options, headers),
        deadline_at=deadline_at,
        sequel=sequel,
        outside_bytes=outside_bytes,
    )


def _outside_bytes(inputs: Mapping[str, Any], places: Sequence[str]) -> int:
    """What the References among inputs take; InvalidArguments where the header, which ends them, does not name one."""
    found = 0
    for name, value in inputs.items():
        if type(value) is Reference:
            found += blob.layout(value, MOST, name)[1]
            if value.blob not in places:
                raise InvalidArguments(f"{value.blob[:200]!r} is not among the blobs that the header names", name)
    return found


def _limit_s(options: Options, headers: wire.Headers) -> float | None:
    """The job's own limit: ours, or the shorter of Celery's two (time_limit, soft_time_limit)."""
    if options.limit_s is not None:
        return options.limit_s
    if headers.timelimit is None or headers.timelimit == _NO_LIMITS:
        return None
    limits = [limit for limit in headers.timelimit if limit is not None]
    if not limits:
        return None
    if any(not 0 < limit < math.inf for limit in limits):
        raise OptionNotSupported(f"a time limit must be above 0 and finite, not {limits}", "timelimit")
    return min(limits)


def groups(jobs: Iterable[TakenJob], limit: int, most_bytes: float = math.inf) -> list[Group]:
    """The jobs in groups of one launch each, in the order in which each group's first job came.

    A group has at most `limit` jobs, and those more than one at most `most_bytes` outside their messages.
    """
    open_groups: dict[Any, Group] = {}
    found: list[Group] = []
    for job in jobs:
        key = _key(job)
        group = open_groups.get(key) if key is not None else None
        if group is None or len(group.jobs) >= limit or group.outside_bytes + job.outside_bytes > most_bytes:
            group = Group(job.kernel, [])
            found.append(group)
            if key is not None:
                open_groups[key] = group
        group.jobs.append(job)
        group.outside_bytes += job.outside_bytes
    return found


def _key(job: TakenJob) -> tuple[Any, ...] | None:
    """What jobs must share to run in one launch; None where the kernel runs one at a time."""
    batch = job.kernel.spec.batch
    if batch is None:
        return None
    parts: list[Any] = [job.kernel.name]
    for name, value in job.inputs.items():
        if not isinstance(value, _SHAPED):
            parts.append((name, value))
        elif batch == "stack":
            parts.append((name, value.shape))
        else:
            parts.append((name, value.shape[1:]))
    return tuple(parts)


def split(group: Group, outputs: dict[str, np.ndarray[Any, Any]]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Each job's own outputs. Raises InvalidArguments (the kernel's fault) where they cannot be told apart."""
    if len(group.jobs) == 1:
        return [outputs]
    if group.kernel.spec.batch == "stack":
        _check_lengths(group, outputs, len(group.jobs))
        return [{name: value[at] for name, value in outputs.items()} for at in range(len(group.jobs))]
    sizes = [_first_size(job) for job in group.jobs]
    _check_lengths(group, outputs, sum(sizes))
    ends = np.cumsum(sizes).tolist()
    return [
        {name: value[end - size : end] for name, value in outputs.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]


def _first_size(job: TakenJob) -> int:
    return next(len(value) for value in job.inputs.values() if isinstance(value, np.ndarray))


def _check_lengths(group: Group, outputs: dict[str, np.ndarray[Any, Any]], expected: int) -> None:
    for name, value in outputs.items():
        if not value.ndim or len(value) != expected:
            raise InvalidArguments(f"{group.kernel.name}: output {name!r} of a batch has shape {value.shape}", name)


def answer(job: TakenJob, outputs: dict[str, Any]) -> dict[str, Any]:
    """A job's outputs in the form in which it was asked."""
    if job.tensors:
        return {name: wire.to_value(value) for name, value in outputs.items()}
    return {name: value.tolist() for name, value in outputs.items()}


def names(jobs: Sequence[TakenJob]) -> tuple[str, ...]:
    return tuple([job.id for job in jobs])
