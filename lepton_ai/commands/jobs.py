"""The commands about jobs: submit, status, result, why, cancel, state. Each function's docstring is its help."""

from __future__ import annotations

import difflib
import math
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from cyclopts import Parameter, validators

from lepton_ai.client import Client
from lepton_ai.commands import shown
from lepton_ai.commands.address import connected
from lepton_ai.commands.arguments import Misuse, check_out, fit, plain, read_arguments, save
from lepton_ai.errors import InvalidArguments, JobCancelled, JobExpired, LeptonError, ResultTimeout, UnknownJob
from lepton_ai.handle import JobHandle
from lepton_ai.job import Record
from lepton_ai.terms import check_tenant

if TYPE_CHECKING:
    from rich.status import Status

__all__ = ["Json", "Url", "cancel", "result", "state", "status", "submit", "why"]

Url = Annotated[
    str | None,
    Parameter(
        help="The broker (redis://, rediss://, unix://) or an ingest (http://). "
        "Default: LEPTON_REDIS_URL, else the ingest of this machine, http://127.0.0.1:8780.",
        metavar="URL",
    ),
]
Json = Annotated[bool, Parameter(name="--json", help="Print JSON and nothing else.", negative="", show_default=False)]
Wait = Annotated[
    float | bool | None,
    Parameter(
        help="Wait for the end, at most so many seconds; plain --wait has no limit.", metavar="[SECONDS]", negative=""
    ),
]
Out = Annotated[
    Path | None,
    Parameter(name="--out", help="Keep the outputs: .npz or .json has all, .npy the only one.", metavar="FILE"),
]


def submit(
    kernel: Annotated[str, Parameter(help="Its name, such as linalg.matmul: see `lepton kernels`.")],
    /,
    *loose: Annotated[str, Parameter(show=False)],
    arg: Annotated[
        list[str] | None, Parameter(help="An argument; once for each.", metavar="NAME=VALUE", negative="")
    ] = None,
    priority: Annotated[
        int | None, Parameter(help="1 (low) to 9 (high).", validator=validators.Number(gte=1, lte=9))
    ] = None,
    device: Annotated[str | None, Parameter(help="The only device (gpu.h100) or kind (gpu) that may run it.")] = None,
    key: Annotated[
        str | None, Parameter(help="The same job with the same key is one job, however often it is submitted.")
    ] = None,
    delay: Annotated[
        float | None,
        Parameter(
            help="Not to be run before so many seconds are over.",
            metavar="SECONDS",
            validator=validators.Number(gte=0, lte=2_592_000),
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        Parameter(
            help="Expires unless it has begun to run within so many seconds.",
            metavar="SECONDS",
            validator=validators.Number(gt=0),
        ),
    ] = None,
    limit: Annotated[
        float | None,
        Parameter(help="The longest that it may run.", metavar="SECONDS", validator=validators.Number(gt=0)),
    ] = None,
    must_meet: Annotated[
        bool,
        Parameter(help="Refused where it is estimated not to end by its deadline.", negative="", show_default=False),
    ] = False,
    state_key: Annotated[
        str | None, Parameter(help="Goes on with what the last job of this key left, for kernels that carry state.")
    ] = None,
    tenant: Annotated[str | None, Parameter(help="For whom: jobs of a tenant wait in a lane of its own.")] = None,
    wait: Wait = None,
    out: Out = None,
    url: Url = None,
    json: Json = False,
) -> int:
    r"""Submit one job and print its id, or with --wait its outputs.

    A VALUE is JSON (a number, true, false, nested lists) or a file: @a.npy,
    an array of several as @all.npz:name, @rows.json, @table.csv; @- is JSON
    from standard input. Where a live worker announces the kernel, an array
    is cast to the declared dtype if its values keep their meaning (float64
    to float32, any integers that fit), and a wrong argument is refused
    before it is sent.

    Exits with 0 once the job is accepted, with --wait once it has succeeded;
    with 1 where it failed, expired, was cancelled or did not end in time, or
    where too much waits already. With --key it may just be submitted again.

    For example:

      lepton submit linalg.matmul --arg a=@a.npy --arg b=@b.npy --wait
      lepton submit retrieval.top_k --arg items=@all.npz:items \
             --arg queries=@q.npy --arg k=3 --wait=10 --out found.npz
      id=$(lepton submit vision.ndvi --arg red=@r.csv --arg nir=@n.csv)
    """
    if loose:
        meant = " ".join(f"--arg {each}" for each in loose)
        raise Misuse(f"each argument of a kernel follows --arg; did you mean {meant}?")
    check_out(out)
    wait_s = _seconds(wait)
    if out is not None and wait_s is None:
        raise Misuse("--out keeps outputs, so it needs --wait")
    try:
        check_tenant(tenant)
    except InvalidArguments as error:
        raise Misuse(error.message) from None
    arguments = read_arguments(arg or [])
    with connected(url, tenant) as client:
        kernels = client.kernels()
        spec = kernels.get(kernel)
        job = client.submit(
            kernel,
            fit(arguments, spec),
            priority=priority,
            device=device,
            key=key,
            delay_s=delay,
            deadline_s=deadline,
            limit_s=limit,
            must_meet=must_meet,
            state_key=state_key,
        )
        if spec is None:
            near = difflib.get_close_matches(kernel, kernels, 1)
            hint = f"; did you mean {near[0]}? Then: lepton cancel {job.id}" if near else ""
            shown.tell(f"no live worker announces {kernel!r}: the job is parked until one does{hint}")
        if wait_s is not None:
            return _finish(job, wait_s, out, json)
        if json:
            shown.as_json({"id": job.id, "kernel": kernel})
        else:
            sys.stdout.write(f"{job.id}\n")
    return 0


def status(*id: Annotated[str, Parameter(help="Ids of jobs.")], url: Url = None, json: Json = False) -> int:
    """Say how jobs stand: waiting, scheduled, placed, parked, succeeded, failed, cancelled or expired.

    A job that nobody knows counts as waiting: its id is wrong, its result has
    expired, or no router has seen it yet.

    For example:

      lepton status 01a208c9-72e5-74d8-bb78-baba0091b291
    """
    with connected(url) as client:
        rows = [_status(client, each) for each in _given(id)]
    if json:
        shown.as_json(rows)
    else:
        shown.console().print(shown.jobs(rows))
    return 0


def result(
    id: Annotated[str, Parameter(help="The id of a job, whoever submitted it.")],
    /,
    *,
    wait: Wait = None,
    out: Out = None,
    url: Url = None,
    json: Json = False,
) -> int:
    """Print the outputs of a job, or the error that it ended with.

    Exits with 1 where it failed, expired, was cancelled or has not ended (yet).

    For example:

      lepton result 01a208c9-72e5-74d8-bb78-baba0091b291 --wait=5 --out c.npy
    """
    check_out(out)
    wait_s = _seconds(wait)
    with connected(url) as client:
        return _finish(client.job(id), wait_s or 0.0, out, json)


def state(
    kernel: Annotated[str, Parameter(help="A kernel that carries state from job to job, such as stream.window.")],
    state_key: Annotated[str, Parameter(help="The state key of its jobs.")],
    /,
    *,
    forget: Annotated[
        bool, Parameter(help="Drop it: the next job begins anew.", negative="", show_default=False)
    ] = False,
    tenant: Annotated[str | None, Parameter(help="Whose it is.")] = None,
    out: Out = None,
    url: Url = None,
    json: Json = False,
) -> int:
    """Print what the last job of a state key has left, or drop it.

    The address must be the broker's. Exits with 1 where nothing is there: no
    job of that key has succeeded, it was forgotten, or nobody has used it for
    LEPTON_STATE_TTL_S. A job that is under way while its state is dropped runs
    once more, from nothing; one that ends between --out and --forget is in no
    file.

    For example:

      lepton state stream.window sensor-7 --url redis://127.0.0.1:6379
      lepton state stream.window sensor-7 --forget
    """
    check_out(out)
    try:
        check_tenant(tenant)
    except InvalidArguments as error:
        raise Misuse(error.message) from None
    with connected(url, tenant) as client:
        found = client.state(kernel, state_key) if out is not None or not forget else None
        if found is not None and out is not None:
            save(found, out)  # before it is dropped
        gone = client.forget(kernel, state_key) if forget else found is not None
    if json:
        shown.as_json(
            {"kernel": kernel, "state_key": state_key}
            | ({"forgotten": gone} if forget else {})
            | ({"saved": str(out)} if found is not None and out is not None else {})
            | ({"state": None if found is None else plain(found)} if not forget and out is None else {})
        )
    elif found is not None:
        lines = shown.outputs(found) if out is None else [str(out)]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    if not gone:
        shown.tell(f"{kernel} has no state of the key {state_key!r}")
    elif forget:
        shown.tell(f"{kernel} has forgotten {state_key!r}")
    return 0 if gone else 1


def why(
    id: Annotated[str, Parameter(help="The id of a job, whoever submitted it.")],
    /,
    *,
    url: Url = None,
    json: Json = False,
) -> int:
    """Explain where a job went, device by device, and what it really cost.

    Every device that was looked at, with what the job was predicted to cost
    there, or why it could not run there.

    For example:

      lepton why 01a208c9-72e5-74d8-bb78-baba0091b291
    """
    from rich.text import Text

    with connected(url) as client:
        job = client.job(id)
        record, state = job.record(), job.state
    if json:
        shown.as_json({"id": id, "state": state, **_written(record)})
    else:
        for each in shown.why(record):
            shown.console().print(each, soft_wrap=isinstance(each, str | Text))
    if record == Record():
        shown.tell(f"nothing is known of job {id}: {_UNSEEN}")
        return 1
    return 0


def cancel(*id: Annotated[str, Parameter(help="Ids of jobs.")], url: Url = None, json: Json = False) -> int:
    """Ask that jobs be ended before they run, or while they run.

    A running job ends where its kernel looks. Straight to a broker, an id of
    which nothing is known is asked all the same: a router may not have seen
    the job yet. An ingest refuses such an id.

    Exits with 1 where one of them could not be asked to end, most often
    because it had ended already.

    For example:

      lepton cancel 01a208c9-72e5-74d8-bb78-baba0091b291
    """
    with connected(url) as client:
        rows = [_cancel(client, each) for each in _given(id)]
    if json:
        shown.as_json(rows)
    else:
        for each in rows:
            sys.stdout.write(f"{each['id']} {shown.cancelled(each)}\n")
    return 0 if all(each["asked"] for each in rows) else 1


# -- behind them ------------------------------------------------------------------------------------------------------

_UNSEEN = "no router has placed it yet, or its id is wrong, or its result has expired"


def _given(ids: tuple[str, ...]) -> tuple[str, ...]:
    if not ids:
        raise Misuse("name at least one job by its id")
    return ids


def _seconds(wait: float | bool | None) -> float | None:
    """How long to wait; None is not at all."""
    if wait is None or wait is False:
        return None
    seconds = math.inf if wait is True else float(wait)
    if not seconds >= 0:
        raise Misuse(f"--wait takes seconds, not {wait}")
    return seconds


def _cancel(client: Client, job_id: str) -> dict[str, Any]:
    """Whether the job was asked to end, whether it had ended already, and whether anything is known of it."""
    try:
        asked = client.cancel(job_id)
    except UnknownJob:
        return {"id": job_id, "asked": False, "ended": False, "known": False}
    if not asked:
        return {"id": job_id, "asked": False, "ended": True, "known": True}
    job = client.job(job_id)
    known = job.record() != Record() or job.state != "waiting"
    return {"id": job_id, "asked": True, "ended": False, "known": known}


def _status(client: Client, job_id: str) -> dict[str, Any]:
    job = client.job(job_id)
    state, record = job.state, job.record()
    placement = record.placement
    found: dict[str, Any] = {
        "id": job_id,
        "state": state,
        "kernel": placement.kernel if placement else None,
        "device": record.cost.device if record.cost else placement.device if placement else None,
        "reason": placement.reason if placement else _UNSEEN if state == "waiting" else None,
    }
    return found | ({"error": record.error} if record.error else {})


def _written(record: Record) -> dict[str, Any]:
    return {"placement": record.placement, "cost": record.cost, "error": record.error}


def _finish(job: JobHandle, wait_s: float, out: Path | None, json: bool) -> int:
    """Waits for a job and shows or keeps what came of it; returns the exit code."""
    outputs: Mapping[str, Any] | None = None
    failure: LeptonError | None = None
    try:
        found = _wait(job, wait_s)
        # Another's Celery task on the same broker may have returned anything.
        outputs = found if isinstance(found, Mapping) else {"result": found}
    except KeyboardInterrupt:
        shown.tell(f"the job goes on: lepton result {job.id} --wait")
        raise
    except ResultTimeout:
        return _unfinished(job, wait_s, json)
    except LeptonError as error:
        if job.meta is None:  # not the job's own
            raise
        failure = error
    record, state = job.record(), job.state
    if outputs is not None and out is not None:
        save(outputs, out)
    if json:
        told: dict[str, Any] = {"id": job.id, "state": state}
        if outputs is not None:
            told |= {"result": plain(outputs)} if out is None else {"saved": str(out)}
        if failure is not None:
            told["error"] = failure.to_wire()
        shown.as_json(told | {"placement": record.placement, "cost": record.cost})
    elif outputs is not None:
        shown.tell(f"job {job.id} succeeded{_told(record)}")
        lines = shown.outputs(outputs) if out is None else [str(out)]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    if failure is not None:
        ended_by_others = isinstance(failure, JobCancelled | JobExpired)
        shown.tell(failure.message if ended_by_others else f"job {job.id} {state}{_told(record)}: {failure.message}")
    return 0 if failure is None else 1


def _unfinished(job: JobHandle, wait_s: float, json: bool) -> int:
    state, record = job.state, job.record()
    told = record.placement.reason if record.placement else _UNSEEN
    if json:
        shown.as_json({"id": job.id, "state": state, "placement": record.placement})
    after = f" after {wait_s:g} s" if wait_s else ""
    shown.tell(f"job {job.id} is {state}{after} ({told}); to wait for it: lepton result {job.id} --wait")
    return 1


def _told(record: Record) -> str:
    if record.cost is None:
        return ""
    return f" on {record.cost.device} (waited {record.cost.wait_s * 1e3:.1f} ms, ran {record.cost.run_s * 1e3:.2f} ms)"


def _wait(job: JobHandle, wait_s: float) -> Any:
    """The job's outputs; a terminal is told meanwhile how far it has come."""
    limit = None if math.isinf(wait_s) else wait_s
    if not sys.stderr.isatty() or wait_s == 0:
        return job.result(timeout=limit)
    with shown.console(stderr=True).status(f"job {job.id} is on its way") as spinner:
        threading.Thread(target=_watch, args=(job, spinner), daemon=True).start()
        return job.result(timeout=limit)


def _watch(job: JobHandle, spinner: Status) -> None:
    with suppress(LeptonError, msgspec.MsgspecError):  # whoever waits for the result hears of it
        for each in job.events():
            fraction = each.data.get("fraction")
            device = f" on {each.data['device']}" if "device" in each.data else ""
            done = f", {fraction:.0%} done" if isinstance(fraction, float) else ""
            spinner.update(f"job {job.id}: {shown.short_type(each).removeprefix('job.')}{device}{done}")
