"""A fleet file: the workers of one host, their devices, slots, limits and kernels, in TOML (examples/fleet.toml)."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lepton_ai.errors import InvalidSettings
from lepton_ai.settings import Settings
from pipeline.machine import Found, WorkerPlan, check_name, checked, default_slots, on_units
from queues.broker import LISTS_EACH

__all__ = ["FleetFile", "read_fleet"]

#: Of a variable of the environment, as every shell takes it.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: What a file may say of the environment that is not for it to say: `lepton up` does.
_OURS = ("LEPTON_REDIS_URL", "LEPTON_KERNELS_ALLOWED", "LEPTON_LOG", "LEPTON_HTTP_PORT")


class _Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Shares beyond which a device is given nothing, as docs/devices.md describes them."""

    memory: float | None = None
    network: float | None = None
    temperature: float | None = None
    utilization: float | None = None
    power: float | None = None

    def environ(self) -> dict[str, str]:
        return {f"LEPTON_{name.upper()}_LIMIT": str(value) for name, value in msgspec.to_builtins(self).items()}


class _Worker(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One `[[worker]]`."""

    device: str
    slots: int | None = None
    count: int = 1
    """Workers that are alike."""
    optional: bool = False
    """Left out on a machine without the device."""
    kernels: tuple[str, ...] = ()
    limits: _Limits = _Limits()
    environment: dict[str, str] = {}


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    worker: tuple[_Worker, ...]
    limits: _Limits = _Limits()
    environment: dict[str, str] = {}


class FleetFile(msgspec.Struct, frozen=True):
    """What a fleet file asks for, checked as far as that goes without looking at the machine."""

    path: Path
    workers: tuple[tuple[WorkerPlan, bool], ...]
    """Each with whether it is optional."""

    @property
    def devices(self) -> list[str]:
        return [plan.device for plan, _ in self.workers]

    def planned(self, found: Sequence[Found]) -> tuple[WorkerPlan, ...]:
        """The workers for a machine with these devices; InvalidSettings where one is missing that is not optional."""
        plans: list[WorkerPlan] = []
        for plan, optional in self.workers:
            try:
                checked([plan.device], found)
            except InvalidSettings as error:
                if not optional:
                    raise InvalidSettings(f"{self.path}: {error.message}; or say optional = true") from None
            else:
                plans.append(plan)
        if not plans:
            raise InvalidSettings(f"{self.path}: none of its devices is on this machine ({', '.join(self.devices)})")
        return on_units(plans, found)


def read_fleet(path: Path) -> FleetFile:
    """The fleet that a file describes; InvalidSettings names the file, and the line or field that does not fit."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSettings(f"{path} cannot be read: {error}", "--fleet") from None
    try:
        file = msgspec.convert(tomllib.loads(text), _File)
    except (tomllib.TOMLDecodeError, RecursionError) as error:  # the latter of deeply nested brackets
        raise InvalidSettings(f"{path} is no TOML: {error}", "--fleet") from None
    except msgspec.ValidationError as error:
        raise InvalidSettings(f"{path} is no fleet file: {error}", "--fleet") from None
    if not file.worker:
        raise InvalidSettings(f"{path} names no [[worker]]", "--fleet")
    seen: Counter[str] = Counter()
    named: dict[str, str] = {}
    plans: list[tuple[WorkerPlan, bool]] = []
    for number, each in enumerate(file.worker, 1):
        try:
            environ = _environ(file, each)
            slots = _slots(each)
        except InvalidSettings as error:
            raise InvalidSettings(f"{path}: worker {number}: {error.message}", error.field) from None
        for _ in range(each.count):
            seen[each.device] += 1
            nth = seen[each.device]
            name = each.device if nth == 1 else f"{each.device}-{nth}"
            this = f"worker {number} ({each.device})"
            if (other := named.setdefault(name, this)) != this:
                raise InvalidSettings(f"{path}: {other} and {this} come out with one name, {name}", "device")
            plans.append((WorkerPlan(name, each.device, slots, environ), each.optional))
    return FleetFile(path, tuple(plans))


def _slots(worker: _Worker) -> int:
    check_name(worker.device)
    slots = default_slots(worker.device) if worker.slots is None else worker.slots
    if not 1 <= slots < LISTS_EACH:
        raise InvalidSettings(f"slots is 1 to {LISTS_EACH - 1}, not {slots}", "slots")
    if not 1 <= worker.count <= 64:
        raise InvalidSettings(f"count is 1 to 64, not {worker.count}", "count")
    return slots


def _environ(file: _File, worker: _Worker) -> dict[str, str]:
    """What the worker has beside the environment of all; refused here rather than by a worker that does not start."""
    own: Mapping[str, Any] = file.environment | worker.environment
    for name in own:
        if not _NAME.fullmatch(name):
            told = f"a variable's name is letters, digits and '_', and begins with no digit, not {name!r}"
            raise InvalidSettings(told, "environment")
        if name in _OURS:
            raise InvalidSettings(f"{name} is not for a fleet file to set", "environment")
    environ = {**own, **file.limits.environ(), **worker.limits.environ()}
    if worker.kernels:
        environ["LEPTON_KERNELS_ALLOWED"] = ",".join(worker.kernels)
    Settings.read(environ)
    return environ
