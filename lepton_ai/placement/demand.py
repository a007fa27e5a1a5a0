"""A Demand: what `Scheduler.add_task` is told of a task, checked, and what it would cost on each resource."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from lepton_ai.errors import InvalidArguments
from lepton_ai.job import Candidate, Estimate
from lepton_ai.kernel import DEVICE_KINDS
from lepton_ai.placement.fields import Fields, number
from lepton_ai.placement.supply import Supply

__all__ = ["TYPICAL_S", "Demand"]

#: Seconds of a task of each type and of size 1 on an idle device of each kind. They say how many times slower a kind is
#: than the one that suits the type best, which takes 1 s. Rules of thumb and not measurements: docs/scheduler.md has
#: the reasons, and `seconds` of a task replaces them.
TYPICAL_S: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "high": MappingProxyType({"cpu": 20.0, "gpu": 1.0, "fpga": 10.0, "tpu": 5.0}),
        "medium": MappingProxyType({"cpu": 1.0, "gpu": 4.0, "fpga": 6.0, "tpu": 8.0}),
        "low": MappingProxyType({"cpu": 5.0, "gpu": 6.0, "fpga": 1.0, "tpu": 2.5}),
    }
)

_OPTIONAL = ("type", "seconds", "size", "size_bytes", "memory_bytes", "deadline_s", "device")
#: What takes longer (30 years) is taken never to end: such numbers would drown all others in a solver.
_NEVER_S = 1e9


class Demand(msgspec.Struct, frozen=True):
    """A task: how urgent it is, and what it asks of a resource."""

    name: str
    priority: int
    """1 goes first."""
    seconds: Mapping[str, float]
    """Run time on an idle resource, by the resource's name or its kind; the name goes before the kind."""
    size_bytes: float = 0.0
    """Data that have to reach the resource."""
    memory_bytes: float = 0.0
    deadline_s: float = math.inf
    """Seconds from now until it must have ended."""
    device: str | None = None
    """The only resource, or kind of resource, that may run it."""

    @classmethod
    def read(cls, name: str, given: Any) -> Demand:
        """The Demand that a dictionary describes; InvalidArguments where it describes none."""
        fields = Fields("task", name, given, ("priority",), _OPTIONAL)
        size = fields.above_zero("size", 1.0)
        return cls(
            name,
            fields.count("priority", 1),
            {each: seconds * size for each, seconds in _seconds(fields).items()},
            fields.zero_or_more("size_bytes", 0.0),
            fields.zero_or_more("memory_bytes", 0.0),
            fields.above_zero("deadline_s", math.inf),
            fields.text("device"),
        )

    def on(self, supply: Supply) -> Candidate:
        """What it would cost on a resource that has nothing else to do for us, or why it cannot run there."""
        if self.device is not None and self.device != supply.name and self.device.lower() != supply.kind:
            return Candidate(supply.name, excluded=f"the task is pinned to {self.device}")
        # What is known of the very resource was measured at its own speed.
        seconds, speed = self.seconds.get(supply.name), 1.0
        if seconds is None:
            seconds, speed = self.seconds.get(supply.kind), supply.speed
        if seconds is None:
            return Candidate(supply.name, excluded="the task's seconds name neither it nor its kind")
        if supply.share == 0:
            return Candidate(supply.name, excluded=f"full: {supply.used:g} of {supply.total:g} is used")
        if self.memory_bytes > supply.memory_bytes:
            lacking = f"the task needs {self.memory_bytes:.0f} bytes of memory, there are {supply.memory_bytes:.0f}"
            return Candidate(supply.name, excluded=lacking)
        estimate = Estimate(0.0, self.size_bytes / supply.bandwidth, seconds / supply.share / speed)
        return Candidate(supply.name, estimate, self._too_long(estimate.finish_s))

    def _too_long(self, finish_s: float) -> str | None:
        if finish_s > self.deadline_s:
            return f"it would take {finish_s:.3g} s, and the deadline is {self.deadline_s:.3g} s"
        if finish_s > _NEVER_S:
            return f"it would take {finish_s:.3g} s, which is taken as never"
        return None


def _seconds(fields: Fields) -> Mapping[str, float]:
    typical_s = TYPICAL_S[fields.one_of("type", TYPICAL_S)] if "type" in fields else None
    if "seconds" not in fields:
        if typical_s is None:
            raise InvalidArguments(f"{fields.owner}: type is missing; it is one of {', '.join(TYPICAL_S)}", "type")
        return typical_s
    given = fields["seconds"]
    if not isinstance(given, Mapping):
        return dict.fromkeys(DEVICE_KINDS, number(fields.owner, "seconds", given))
    if not given:
        raise InvalidArguments(f"{fields.owner}: seconds must name a resource or a kind, and names none", "seconds")
    found = {str(each): number(fields.owner, f"seconds[{each!r}]", value) for each, value in given.items()}
    # Kinds are known in any case, as everywhere.
    for each in given:
        if str(each).lower() in DEVICE_KINDS:
            found.setdefault(str(each).lower(), found[str(each)])
    return found
