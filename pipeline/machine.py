"""What this machine has: its devices, as `python -m tasks` finds them, and which workers they are worth."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from tempfile import TemporaryFile

import msgspec

from lepton_ai.device import kind_of
from lepton_ai.errors import InvalidSettings
from pipeline.processes import Program, environment, start
from queues.broker import LISTS_EACH

__all__ = [
    "CPU",
    "Found",
    "Unit",
    "WorkerPlan",
    "check_name",
    "checked",
    "cores",
    "default_slots",
    "default_workers",
    "look_for_devices",
    "on_units",
    "parse_workers",
    "planned",
]

_PROBE_S = 60.0


class Unit(msgspec.Struct, frozen=True):
    """One of several devices of a kind, which take a worker each."""

    device: str
    """Its name with its model, as in `gpu.h100`."""
    environ: dict[str, str]
    """What leaves a worker this one alone."""

    def serves(self, device: str) -> bool:
        """Whether a worker for `device`, which may be a kind alone, is one for this."""
        return device in (self.device, kind_of(self.device))


class Found(msgspec.Struct, frozen=True):
    """One kind of device, as the probe found it."""

    kind: str
    available: bool
    what: str | None = None
    """The device, or what is missing."""
    fix: str | None = None
    emulated: bool = False
    units: tuple[Unit, ...] = ()
    """Those that there are, where there may be several."""

    @property
    def missing(self) -> str:
        """Why it is not there, and how to have it."""
        return "; ".join(filter(None, (self.what, self.fix)))


#: What every machine has.
CPU = Found("cpu", available=True, what="this machine's processor")


class WorkerPlan(msgspec.Struct, frozen=True):
    """A worker that is to be started."""

    name: str
    """Its own on this machine: the device's, with a number where several workers serve that."""
    device: str
    slots: int
    environ: dict[str, str] = {}
    """What it has beside the environment of all."""

    @property
    def process(self) -> str:
        """The name of its process here."""
        return f"worker-{self.name}"


def planned(workers: Mapping[str, int], found: Sequence[Found] = ()) -> tuple[WorkerPlan, ...]:
    """A worker for each device, which `workers` maps to its slots, or for each unit that goes by its name."""
    plans = [
        WorkerPlan(device if number == 0 else f"{device}-{number + 1}", device, slots)
        for device, slots in workers.items()
        for number in range(max(1, len(_units(device, found))))
    ]
    return on_units(plans, found)


def on_units(plans: Sequence[WorkerPlan], found: Sequence[Found]) -> tuple[WorkerPlan, ...]:
    """The workers, each left one unit alone: in turn, where several are for the same."""
    seen: Counter[str] = Counter()
    placed: list[WorkerPlan] = []
    for plan in plans:
        if units := _units(plan.device, found):
            unit = units[seen[plan.device] % len(units)]
            seen[plan.device] += 1
            placed.append(msgspec.structs.replace(plan, environ=unit.environ | plan.environ))
        else:
            placed.append(plan)
    return tuple(placed)


def _units(device: str, found: Sequence[Found]) -> list[Unit]:
    return [unit for each in found for unit in each.units if unit.serves(device)]


def look_for_devices() -> tuple[Found, ...]:
    """What `python -m tasks` reports; where it cannot, the processor, which every machine has, is all that is known."""
    # A child like the others, so that it does not outlive a Ctrl-C.
    with TemporaryFile() as output:
        probe = start(Program("probe", ("-m", "tasks"), environment({})), output)
        try:
            probe.wait(_PROBE_S)
        except subprocess.TimeoutExpired:
            probe.kill()
            probe.wait()
        output.seek(0)
        lines = output.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        try:
            return msgspec.json.decode(line, type=tuple[Found, ...])
        except msgspec.DecodeError:
            continue
    return (CPU,)


def default_workers(found: Sequence[Found]) -> dict[str, int]:
    """A worker for each device that is there, with its slots. Each other device's needs a core beside the cpu's.

    Emulated ones compute on those cores too, so there are no more of them than the cpu can spare, and one in any case.
    """
    kinds = [each for each in found if each.available and each.kind != "cpu"]
    others = [device for each in kinds if not each.emulated for device in _devices(each)]
    room = max(1, cores() - 1) - len(others)
    others += [device for each in kinds if each.emulated for device in _devices(each)][: max(0, room)]
    return {"cpu": max(1, cores() - len(others)), **dict.fromkeys(others, 1)}


def _devices(found: Found) -> list[str]:
    return [unit.device for unit in found.units] or [found.kind]


def parse_workers(text: str) -> dict[str, int]:
    """`cpu:2,fpga` as devices and their slots; InvalidSettings where it does not fit."""
    workers: dict[str, int] = {}
    for part in text.split(","):
        device, colon, slots = part.strip().partition(":")
        check_name(device)
        if device in workers:
            raise InvalidSettings(f"{device} is named twice; one worker has several slots: {device}:2")
        if colon and not (slots.isdecimal() and 1 <= int(slots) < LISTS_EACH):
            raise InvalidSettings(f"a worker has 1 to {LISTS_EACH - 1} slots, as in cpu:2, not {part.strip()!r}")
        workers[device] = int(slots) if colon else default_slots(device)
    return workers


def check_name(device: str) -> None:
    """InvalidSettings where no device may have this name."""
    kind_of(device)
    if not all(each.isalnum() or each in "._-" for each in device):
        raise InvalidSettings(f"a device's name is letters, digits, '.', '_' and '-', not {device!r}")


def default_slots(device: str) -> int:
    """The slots of a worker that is told of none."""
    return cores() if device == "cpu" else 1


def checked(workers: Iterable[str], found: Sequence[Found]) -> None:
    """Raises InvalidSettings for a device that is not there, with what is missing and the fix."""
    by_kind = {each.kind: each for each in found}
    for device in workers:
        known = by_kind.get(kind_of(device))
        if known is None or not known.available:
            why = "no driver for it was found" if known is None else known.missing
            raise InvalidSettings(f"there is no {device} on this machine: {why}")
        if known.units and not _units(device, [known]):
            raise InvalidSettings(f"there is no {device} on this machine, only {known.what}")


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1
