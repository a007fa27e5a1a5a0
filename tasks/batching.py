"""From taken messages to groups that run together, and from a group's outputs back to each job's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
import numpy as np

from lepton_ai import blob, bundle, wire
from lepton_ai.blob import Reference
from lepton_ai.carried import check_state
from lepton_ai.errors import InvalidArguments, LeptonError, OptionNotSupported, UnknownKernel
from lepton_ai.job import Options
from lepton_ai.kernel import Kernel, Work
from lepton_ai.succession import Sequel, inherit, sequel_of
from lepton_ai.tensor import MOST, TensorMap

__all__ = ["SERIES_S", "Group", "Refused", "TakenJob", "Unreadable", "groups", "read", "read_all", "split"]

_NO_OPTIONS: Final = Options()
#: As most messages have it.
_NO_LIMITS: Final[list[float | None]] = [None, None]
_ARRAYS: Final = (TensorMap, np.ndarray)
_SHAPED: Final = (np.ndarray, Reference)
#: A series takes no longer: its jobs all count as started when the first of them is.
SERIES_S: Final = 0.01


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
    noted_together: bool = False
    """One note says where all jobs of its bundle were placed."""
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
    """Jobs of one kernel that run together: in one launch, or as a series, one quick launch after the other."""

    kernel: Kernel
    jobs: list[TakenJob]
    outside_bytes: int = 0
    """Of its jobs."""
    series_s: float = 0.0
    """How long its jobs are predicted to run one after the other; of a group that is a series."""

    @property
    def is_series(self) -> bool:
        """Whether each of its jobs is a launch of its own, which the only job of a group is in any case."""
        return len(self.jobs) == 1 or self.kernel.spec.batch is None

    @property
    def inputs(self) -> dict[str, Any]:
        """The inputs of a launch of all its jobs: a single one's own, or stacked or concatenated. No References."""
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
            ids = bundle.ids_of(message, envelope.headers, options)
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
        return [*_taken(message, headers, options, ids, bodies, kernels)]
    except LeptonError as error:  # one of its jobs is at fault, or all are
        why = error
    try:
        found = [read(each, kernels, limit_bytes) for each in bundle.split(message)]
    except LeptonError:
        return [Refused(job, headers.task, options, why) for job in ids]
    noted_together = bundle.noted_as(ids[0], options) is not None
    for place, each in enumerate(found):
        if isinstance(each, TakenJob):
            each.message, each.place, each.bundled, each.noted_together = message, place, True, noted_together
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
        bundle.ids_of(message, headers, options)
        body = wire.read_body(envelope, limit_bytes=limit_bytes)
        (job,) = _taken(message, headers, options, (headers.id,), [body], kernels)
        return job
    except LeptonError as error:
        if options is _NO_OPTIONS:
            options = Options(blobs=wire.read_places(headers))
        sequel = None
        with suppress(LeptonError):  # then the job's own fault is told, and nobody can tell what should follow it
            sequel = sequel_of(headers, wire.read_embed(envelope, limit_bytes=limit_bytes))
        return Refused(headers.id, headers.task, options, error, keep, sequel)


def _taken(
    message: bytes,
    headers: wire.Headers,
    options: Options,
    ids: Sequence[str],
    bodies: Sequence[wire.Body],
    kernels: dict[str, Kernel],
) -> list[TakenJob]:
    """The jobs of a message. What is the same for all of them is read once."""
    kernel = kernels.get(headers.task)
    if kernel is None:
        raise UnknownKernel(f"this worker has no kernel {headers.task!r}; it has {', '.join(sorted(kernels))}")
    deadline_at = wire.deadline_at(headers)
    sequel = sequel_of(headers, bodies[0].embed)
    signature, work_of, bundled = kernel.signature, kernel.spec.work, len(ids) > 1
    noted_together = bundle.noted_as(ids[0], options) is not None
    keep, retries = not headers.ignore_result, max(0, headers.retries) if headers.retries else 0
    # Those of a bundle are all in shared memory: nobody has to end them.
    own = msgspec.structs.replace(options, blobs=None) if bundled and options.blobs else options
    taken: list[TakenJob] = []
    for place, (job_id, body) in enumerate(zip(ids, bodies, strict=True)):
        arguments = inherit(signature, body) if body.args else body.kwargs
        check_state(kernel.name, kernel.spec.carries, options.state_key, arguments)
        inputs, dims = signature.bind(arguments)
        forms = set(map(type, arguments.values()))
        outside_bytes = _outside_bytes(inputs, options.blobs or ()) if TensorMap in forms else 0
        tensors = not forms.isdisjoint(_ARRAYS) or (list not in forms and options.result == "msgpack")
        # Positional, as most of a worker's reading goes through here.
        taken.append(
            TakenJob(
                job_id,
                kernel,
                inputs,
                work_of(dims),
                own,
                tensors,
                keep,
                message,
                place,
                bundled,
                noted_together,
                retries,
                None,
                deadline_at,
                sequel,
                0.0,
                outside_bytes,
            )
        )
    limit_s = _limit_s(options, headers)
    if limit_s is not None:
        for job in taken:
            job.limit_s = limit_s
    return taken


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


def groups(
    jobs: Iterable[TakenJob],
    limit: int,
    most_bytes: float = math.inf,
    predicted_s: Callable[[TakenJob], float] = lambda _: math.inf,
) -> list[Group]:
    """The jobs in groups that run together, in the order in which each group's first job came.

    A group has at most `limit` jobs, and those more than one at most `most_bytes` outside their messages. Where
    a kernel takes one job at a time `predicted_s` says how long one runs, infinity where that is not known.
    """
    open_groups: dict[Any, Group] = {}
    found: list[Group] = []
    for job in jobs:
        one_by_one = job.kernel.spec.batch is None
        run_s = predicted_s(job) if one_by_one and _is_plain(job) else 0.0
        key = _key(job) if not one_by_one else _series_key(job) if 0 < run_s <= SERIES_S else None
        if job.options.state_key is not None:  # what it goes on with may be what the job before it leaves
            key = None
        group = open_groups.get(key) if key is not None else None
        if (
            group is None
            or len(group.jobs) >= limit
            or group.outside_bytes + job.outside_bytes > most_bytes
            or group.series_s + run_s > SERIES_S
        ):
            group = Group(job.kernel, [])
            found.append(group)
            if key is not None:
                open_groups[key] = group
        group.jobs.append(job)
        group.outside_bytes += job.outside_bytes
        group.series_s += run_s
    return found


def _is_plain(job: TakenJob) -> bool:
    """Whether nothing about a job asks for a launch that is looked at by itself."""
    return job.limit_s is None and job.sequel is None and not job.outside_bytes and job.options.state_key is None


def _series_key(job: TakenJob) -> tuple[Any, ...]:
    """What jobs must share to run as a series: its times are told as their mean."""
    return job.kernel.name, *magnitude(job.work)


def magnitude(work: Work) -> tuple[int, int]:
    """The orders of magnitude of its flops and bytes."""
    return math.frexp(work.flops)[1], math.frexp(work.bytes)[1]


def _key(job: TakenJob) -> tuple[Any, ...]:
    """What jobs must share to run in one launch."""
    batch = job.kernel.spec.batch
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
