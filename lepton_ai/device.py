"""A Device as others see it: its name, its measured peaks, and the announcement of the worker that serves it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress

import msgspec

from lepton_ai import topology
from lepton_ai.errors import InvalidSettings
from lepton_ai.kernel import DEVICE_KINDS, KernelSpec

__all__ = [
    "Announcement",
    "DeviceState",
    "Peaks",
    "ResourceState",
    "kind_of",
    "read_leases",
    "read_workers",
    "worker_keys",
]


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


class DeviceState(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a device with memory and sensors of its own says of itself; None for what it does not tell."""

    utilization: float | None = None
    """Share of the last interval in which anybody's kernel ran on it, 0 to 1."""
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    temperature_c: float | None = None
    temperature_limit_c: float | None = None
    """Where it slows itself down."""
    power_w: float | None = None
    power_limit_w: float | None = None


class ResourceState(msgspec.Struct, frozen=True, omit_defaults=True):
    """How loaded a worker, its device and its host are, and what follows from that: what a heartbeat carries."""

    busy_slots: int
    utilization: float
    """Share of the last interval in which slots were computing, 0 to 1."""
    host_cpu: float
    """Share of the host's processors in use by anybody, 0 to 1."""
    memory_used_bytes: int
    memory_total_bytes: int
    network_bytes_per_s: float = 0.0
    """Sent and received, over all interfaces but the loopback."""
    network_speed_bytes_per_s: float | None = None
    """What the busiest interface can do in one direction; None where none says so."""
    network_utilization: float | None = None
    """And how much of that was used, in its busier direction."""
    own_cpu: float = 0.0
    """Share of the processors that the worker may use, and did use, 0 to 1."""
    foreign_cpu: float = 0.0
    """Share of them in use by neither this nor another worker of its host: load that Lepton has not caused."""
    foreign_utilization: float | None = None
    """Share of the device's own time that others took at least; None where the device does not tell."""
    device: DeviceState | None = None
    speed: float = 1.0
    """How fast the device computes beside what else its host does, as a share of what it can alone."""
    share: float = 1.0
    """How much of its usual work the device may be given: 1 within its limits, 0 beyond one of them."""
    reason: str = ""
    """Why that is less than all of it."""

    def is_possible(self) -> bool:
        """Whether a device could be so: what follows from these two goes into every decision."""
        return 0 <= self.share <= 1 and 0 < self.speed < math.inf


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
    state: ResourceState | None = None
    """As of its last heartbeat, where somebody asks for it; it does not stand in the lease."""
    quarantined: dict[str, str] = {}
    """Kernels that it has and may not run, with the reason: they are not among `kernels` until that is lifted."""
    refused: dict[str, str] = {}
    """Modules and kernels that it left out when it started, with the reason."""


_ANNOUNCEMENT = msgspec.msgpack.Decoder(Announcement)
_STATE = msgspec.msgpack.Decoder(ResourceState)


def read_leases(leases: Iterable[bytes | None]) -> list[Announcement]:
    """The announcements in the values of leases, by device and worker.

    A router's lease is empty, a lapsed one is None, and one that does not decode is a worker of another release, which
    this one can neither price nor check: all three are left out.
    """
    return _sorted(each for lease in leases if (each := _read(lease)) is not None)


def worker_keys(holders: Iterable[bytes]) -> list[str]:
    """What to read (in one MGET) to know of these holders of leases which are workers, and how they are."""
    names = [each.decode(errors="replace") for each in holders]
    # Without one there is still something to read: no MGET is empty.
    return [*map(topology.lease, names), *map(topology.state, names)] or [topology.LANE]


def read_workers(values: Sequence[bytes | None]) -> list[Announcement]:
    """What stands at `worker_keys`: see `read_leases`, and each with its state."""
    half = len(values) // 2
    found = []
    for lease, state in zip(values[:half], values[half:], strict=False):
        if (each := _read(lease)) is not None:
            found.append(msgspec.structs.replace(each, state=_read_state(state)))
    return _sorted(found)


def _read(lease: bytes | None) -> Announcement | None:
    with suppress(msgspec.DecodeError, InvalidSettings):
        each = _ANNOUNCEMENT.decode(lease or b"")
        if each.slots > 0 and each.peaks.are_possible() and kind_of(each.device) == each.kind:
            return each
    return None


def _read_state(value: bytes | None) -> ResourceState | None:
    with suppress(msgspec.DecodeError):  # there is none yet, or it is another release's
        return _STATE.decode(value or b"")
    return None


def _sorted(found: Iterable[Announcement]) -> list[Announcement]:
    return sorted(found, key=lambda each: (each.device, each.worker))


def kind_of(device: str) -> str:
    """The kind of a device name (`gpu.h100` -> `gpu`); InvalidSettings where it is none."""
    kind = device.split(".", 1)[0]
    if kind not in DEVICE_KINDS:
        raise InvalidSettings(
            f"a device is named kind or kind.model, its kind one of {', '.join(DEVICE_KINDS)}: {device!r}"
        )
    return kind
