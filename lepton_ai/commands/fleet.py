"""The commands about the fleet: devices, kernels, events, doctor. Each is a function; its docstring is its help."""

from __future__ import annotations

import difflib
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter, validators

from lepton_ai.client import Client
from lepton_ai.commands import shown
from lepton_ai.commands.address import check_address, connected
from lepton_ai.commands.arguments import Misuse
from lepton_ai.commands.jobs import Json, Url
from lepton_ai.device import Announcement
from lepton_ai.errors import UnknownKernel
from lepton_ai.event import TYPES, CloudEvent, Cursor
from lepton_ai.kernel import KernelSpec

__all__ = ["devices", "doctor", "events", "kernels", "quarantine"]

_HEARTBEAT = "device.heartbeat"
#: What a reader is told where earlier events are no longer kept is an event too.
_ASKABLE = (*TYPES, "events.missed")
#: Without --follow, `events` ends once nothing has come for so long.
_SILENCE_S = 1.0


def devices(*, url: Url = None, json: Json = False) -> int:
    """List the workers that are alive: device, slots, measured peaks, state.

    `speed` is how fast it computes beside what else its host does, `share` how
    much of its usual work it is given: less near one of its limits, nothing
    beyond it (LEPTON_MEMORY_LIMIT and its kin, in the worker's environment).

    For example:

      lepton devices
      lepton devices --json | jq '.[] | [.device, .state.share]'
    """
    with connected(url) as client:
        found = client.devices()
    if json:
        shown.as_json([_announced(each) for each in found])
    elif found:
        shown.console().print(shown.devices(found))
    if not found:
        shown.tell("no worker is online; `lepton up` starts one for each device of this machine")
    return 0


def kernels(
    name: Annotated[str | None, Parameter(help="Everything about this one.")] = None,
    /,
    *,
    check: Annotated[
        list[str] | None,
        Parameter(help="Whether a worker here would serve this module's.", metavar="MODULE", negative=""),
    ] = None,
    url: Url = None,
    json: Json = False,
) -> int:
    """List the kernels that live workers announce, or show one: signature, formulas, limits, devices.

    With --check, for authors, no worker is asked: each variant of the module's
    kernels is built on each device of this machine and compared with its
    reference on its samples, as when a worker starts. 1 where one is refused.

    For example:

      lepton kernels
      lepton kernels linalg.matmul
      lepton kernels --check mypackage.kernels
    """
    if check:
        return _checked(check, as_json=json)
    with connected(url) as client:
        found = _by_kernel(client.devices())
    if name is not None and name not in found:
        raise UnknownKernel(f"no live worker announces {name!r}; known: {', '.join(found) or 'none'}", "kernel")
    if name is not None:
        if json:
            shown.as_json(_described(*found[name]))
        else:
            shown.console().print(shown.kernel(*found[name]))
    elif json:
        shown.as_json([_described(*each) for each in found.values()])
    elif found:
        shown.console().print(shown.kernels(found.values()))
    if not found:
        shown.tell("no worker is online; `lepton up` starts one for each device of this machine")
    return 0


def _checked(modules: list[str], *, as_json: bool) -> int:
    from lepton_ai.commands import facts

    found = facts.examined(modules, os.environ)
    if as_json:
        shown.as_json(found)
    else:
        shown.console().print(shown.examined(found))
    return int(not found or any(each.status == "refused" for each in found))


def quarantine(
    *,
    clear: Annotated[
        tuple[str, str] | None,
        Parameter(help="Let DEVICE, or all devices of a kind, run KERNEL again.", metavar="KERNEL DEVICE", negative=""),
    ] = None,
    url: Url = None,
    json: Json = False,
) -> int:
    """List the kernels that devices may not run, or lift one of these quarantines.

    A worker computes a share of its jobs once more, by another variant
    (LEPTON_PARITY_SHARE). Where the two differ by more than the kernel's
    tolerance, its device runs that kernel no more, in the whole fleet and until
    somebody lifts that here. The address must be the broker's.

    For example:

      lepton quarantine
      lepton quarantine --clear linalg.matmul gpu.h100
    """
    with connected(url) as client:
        found = client.quarantined()
        if clear is not None and not client.lift(*clear):
            known = ", ".join(f"{each.kernel} {each.device}" for each in found) or "nothing is"
            raise UnknownKernel(f"{clear[0]} is not quarantined on {clear[1]}; known: {known}", "clear")
    if clear is not None:
        found = [each for each in found if (each.kernel, each.device) == clear]
        shown.tell(f"{clear[1]} runs {clear[0]} again, from its workers' next heartbeat on")
    if json:
        shown.as_json(found)
    elif found and clear is None:
        shown.console().print(shown.quarantined(found))
    if not found:
        shown.tell("no kernel is quarantined")
    return 0


def events(
    *,
    since: Annotated[str | None, Parameter(help="Only what came after this event's id; 0 is all that is kept.")] = None,
    job: Annotated[str | None, Parameter(help="Only this job's.", metavar="ID")] = None,
    types: Annotated[
        list[str] | None,
        Parameter(help="Only these, such as job.failed or device.", metavar="TYPE,...", negative=""),
    ] = None,
    follow: Annotated[
        bool, Parameter(name=("--follow", "-f"), help="Go on until Ctrl-C.", negative="", show_default=False)
    ] = False,
    limit: Annotated[
        int | None,
        Parameter(help="The last so many; with --follow, end after so many.", validator=validators.Number(gte=1)),
    ] = None,
    url: Url = None,
    json: Json = False,
) -> int:
    """Print what happened to jobs, devices and routers.

    Without --follow, what the broker still keeps; with it, what happens from
    now on (of a job: from its first to its last). Heartbeats are shown only
    where --types names device.heartbeat. --json prints a CloudEvent a line;
    the id of the last one is where --since goes on.

    For example:

      lepton events --types job.failed --limit 20
      lepton events --follow --json | jq .data
    """
    asked = [each.strip() for given in types or () for each in given.split(",") if each.strip()]
    _check_types(asked)
    with connected(url) as client:
        found: Iterable[CloudEvent] = _stream(client, since, job, follow)
        found = (each for each in found if _is_asked(each, asked))
        if follow:
            found = islice(found, limit)
        elif limit is not None:
            found = deque(found, limit)
        for each in found:
            if json:
                shown.as_json(each)
            else:
                sys.stdout.write(f"{shown.event_line(each)}\n")
            if follow:
                sys.stdout.flush()
    return 0


def doctor(*, url: Url = None, json: Json = False) -> int:
    """Look at everything that Lepton needs, and name the fix for what is wrong or missing.

    Python, packages, settings, the broker (version, persistence, memory),
    routers, workers, queues, accelerators and the HTTP ingest. Exits with 1
    where something is a problem; a warning or an absence is none.

    For example:

      lepton doctor --url redis://localhost:6379/0
    """
    from lepton_ai.commands import doctor as checks
    from lepton_ai.commands.facts import gather

    check_address(url)
    found = checks.examine(gather(url))
    well = all(each.status != "problem" for each in found)
    if json:
        shown.as_json({"ok": well, "findings": found})
    else:
        shown.console().print(shown.findings(found))
    return 0 if well else 1


# -- behind them ------------------------------------------------------------------------------------------------------


def _announced(each: Announcement) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(each)
    return found | {"kernels": [spec.name for spec in each.kernels]}


def _by_kernel(found: Iterable[Announcement]) -> dict[str, tuple[KernelSpec, list[str]]]:
    kernels: dict[str, tuple[KernelSpec, list[str]]] = {}
    for each in found:
        for spec in each.kernels:
            _, runs_on = kernels.setdefault(spec.name, (spec, []))
            if each.device not in runs_on:
                runs_on.append(each.device)
    return dict(sorted(kernels.items()))


def _described(spec: KernelSpec, runs_on: list[str]) -> dict[str, Any]:
    return {**{name: getattr(spec, name) for name in spec.__struct_fields__}, "devices": runs_on}


def _check_types(asked: Iterable[str]) -> None:
    """Misuse for the first that is neither a type of event nor the beginning of one."""
    families = sorted({each.partition(".")[0] for each in _ASKABLE})
    for each in asked:
        kind = each.removeprefix("io.lepton.").removesuffix(".v1")
        if kind in _ASKABLE or each in families:
            continue
        near = difflib.get_close_matches(kind, (*_ASKABLE, *families), 3) or [
            name for name in _ASKABLE if kind and kind in name
        ]
        hint = f"did you mean {' or '.join(near)}?" if near else f"they are {', '.join(_ASKABLE)}"
        raise Misuse(f"--types: no event is of the type {each!r}; {hint}")


def _is_asked(event: CloudEvent, asked: list[str]) -> bool:
    kind = shown.short_type(event)
    if kind in asked or event.type in asked:
        return True
    return kind != _HEARTBEAT and (not asked or any(kind.startswith(f"{each}.") for each in asked))


def _stream(client: Client, since: str | None, job: str | None, follow: bool) -> Iterator[CloudEvent]:
    """The events that were asked for; without `follow` it ends behind what had happened when it began."""
    timeout_s = None if follow else _SILENCE_S
    if job is not None and since is None:
        yield from client.job(job).events(timeout=timeout_s)
        return
    if job is not None or follow:
        yield from client.events(since, job=job, timeout=timeout_s)
        return
    # Heartbeats never cease, so silence alone would not end it. Not the clock: ours and the broker's may differ.
    with closing(client.events(timeout=_SILENCE_S)) as live:
        first = next(live, None)
    end = None if first is None else Cursor.parse(first.id)
    with closing(client.events(since or "0", timeout=_SILENCE_S)) as stream:
        for each in stream:
            if end is not None and Cursor.parse(each.id) >= end:
                return
            yield each
