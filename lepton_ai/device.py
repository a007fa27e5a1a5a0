"""A Device as others see it: its name, its measured peaks, and the announcement of the worker that serves it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress

import msgspec

from lepton_ai.errors import InvalidSettings
from lepton_ai.kernel import DEVICE_KINDS, KernelSpec

__all__ = ["Announcement", "Peaks", "ResourceState", "kind_of", "read_leases"]


class Peaks(msgspec.Struct, frozen=True):
    """What a device can do at best, measured when its worker opened it."""

    flops_per_s: float
    """Single-precision operations a second, over the whole device."""
    bytes_per_s: float
    """Bytes moved through the device's own memory a second."""
    transfer_bytes_per_s: float
    """Bytes between host and device a second; infinite where the kernel reads host memory."""
    transfer_latency_s: float
    launch_s: float
    """The fixed cost of one launch."""

    def are_possible(self) -> bool:
        """Whether a device could have been measured so."""
        rates = (self.flops_per_s, self.bytes_per_s, self.transfer_bytes_per_s)
        return all(rate > 0 for rate in rates) and all(
            0 <= s < math.inf for s in (self.transfer_latency_s, self.launch_s)
        )


class ResourceState(msgspec.Struct, frozen=True, omit_defaults=True):
    """How loaded a worker and its host are: what a heartbeat carries."""

    busy_slots: int
    utilization: float
    """Share of the last interval in which slots were computing, 0 to 1."""
    host_cpu: float
    """Share of the host's processors in use by anybody, 0 to 1."""
    memory_used_bytes: int
    memory_total_bytes: int
    network_bytes_per_s: float = 0.0


class Announcement(msgspec.Struct, frozen=True):
    """A worker, warm and ready: what it serves and what it can run. It stands in the worker's lease."""

    incarnation: str
    worker: str
    device: str
    kind: str
    slots: int
    emulated: bool
    peaks: Peaks
    kernels: tuple[KernelSpec, ...]
    started_at: float
    """Seconds since the epoch."""
    memory: str | None = None
    """The memory that its processes share with others of its host (`lepton_ai.ring.memory`)."""


_ANNOUNCEMENT = msgspec.msgpack.Decoder(Announcement)


def read_leases(leases: Iterable[bytes | None]) -> list[Announcement]:
    """The announcements in the values of leases, by device and worker.

    A router's lease is empty, a lapsed one is None, and one that does not decode is a worker of another release, which
    this one can neither price nor check: all three are left out.
    """
    found = []
    for lease in filter(None, leases):
        with suppress(msgspec.DecodeError, InvalidSettings):
            each = _ANNOUNCEMENT.decode(lease)
            if each.slots > 0 and each.peaks.are_possible() and kind_of(each.device) == each.kind:
                found.append(each)
    return sorted(found, key=lambda each: (each.device, each.worker))


def kind_of(device: str) -> str:
    """The kind of a device name (`gpu.h100` -> `gpu`); InvalidSettings where it is none."""
    kind = device.split(".", 1)[0]
    if kind not in DEVICE_KINDS:
        raise InvalidSettings(
            f"a device is named kind or kind.model, its kind one of {', '.join(DEVICE_KINDS)}: {device!r}"
        )
    return kind
