"""A Supply: what `Scheduler.add_resource` is told of a resource, checked."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

from lepton_ai.errors import InvalidArguments
from lepton_ai.kernel import DEVICE_KINDS
from lepton_ai.placement.fields import Fields

__all__ = ["Supply"]

_REQUIRED = ("used", "total")
_OPTIONAL = ("kind", "speed", "slots", "memory_bytes", "bandwidth", "rate")
#: Each is a device of the Problem.
_MOST_SLOTS = 1024
# A kind that stands in a name as a word of its own: GPU, gpu.h100, GPU-0, cpu1, but not cpuset.
_KIND = re.compile(rf"(?<![a-z])({'|'.join(DEVICE_KINDS)})(?![a-z])")


class Supply(msgspec.Struct, frozen=True):
    """A resource: its kind, and what it has to give."""

    name: str
    kind: str
    used: float
    """Of `total`, in whatever unit both are: what others have of it already."""
    total: float
    speed: float = 1.0
    """How many times as fast it is as its kind is taken to be."""
    slots: int = 1
    """Tasks that it runs at once."""
    memory_bytes: float = math.inf
    """What a task that it runs may need."""
    bandwidth: float = math.inf
    """Bytes a second by which a task's data reach it."""
    rate: float = 0.0
    """What a second of it costs, in money or joules, with all its slots at work; a slot costs its part."""

    @property
    def share(self) -> float:
        """What is left of it, 0 (full) to 1 (idle)."""
        return (self.total - self.used) / self.total

    @classmethod
    def read(cls, name: str, given: Any) -> Supply:
        """The Supply that a dictionary describes; InvalidArguments where it describes none."""
        fields = Fields("resource", name, given, _REQUIRED, _OPTIONAL)
        total, used = fields.above_zero("total", 1.0), fields.zero_or_more("used", 0.0)
        if used > total:
            raise InvalidArguments(f"{fields.owner}: used must be at most the total {total}, not {used}", "used")
        return cls(
            name,
            fields.one_of("kind", DEVICE_KINDS) if "kind" in fields else _kind_in(name),
            used,
            total,
            fields.above_zero("speed", 1.0),
            fields.count("slots", 1, _MOST_SLOTS),
            fields.zero_or_more("memory_bytes", math.inf),
            fields.above_zero("bandwidth", math.inf),
            fields.zero_or_more("rate", 0.0),
        )


def _kind_in(name: str) -> str:
    found: set[str] = set(_KIND.findall(name.lower()))
    if len(found) != 1:
        known = ", ".join(DEVICE_KINDS)
        raise InvalidArguments(
            f"resource {name!r}: its name must have one kind in it ({known}), as in 'GPU' or 'gpu.h100', "
            "or its field 'kind' must say which it is",
            "kind",
        )
    return found.pop()
