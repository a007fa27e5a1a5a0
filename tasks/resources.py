"""The state of a worker, its device and its host, put together for a heartbeat and judged by the limits."""

from __future__ import annotations

import time

from lepton_ai.device import Announcement, DeviceState, ResourceState
from lepton_ai.settings import Settings
from tasks.driver import cores
from tasks.host import Contention, Memory, Network, Processors, Traffic, Usage
from tasks.sensors import Sensor, SlowSensor, opened
from tasks.share import Judge
from tasks.slots import Slots

__all__ = ["Resources"]

_UNKNOWN = Usage(0.0, 0.0, 0.0)


class Resources:
    """Reads the sensors of one worker, from one heartbeat to the next."""

    def __init__(self, settings: Settings, announcement: Announcement, slots: Slots) -> None:
        self._slots = slots
        self._judge = Judge(settings)
        self._processors = Sensor("processors", opened(Processors))
        self.processors = cores()
        self._contention = Contention()
        self._memory = Sensor("memory", Memory.read)
        self._network = Sensor("network", opened(Network))
        self._device = SlowSensor(announcement.kind, slots.driver.state, settings.lease_s)
        #: What computes on the host's processors shares them with everybody.
        self._uses_processors = announcement.kind == "cpu" or announcement.emulated
        self._seen = (time.monotonic(), slots.busy_s)

    def read(self, siblings: float = 0.0) -> ResourceState:
        """The state now; `siblings` is how many processors other workers of the host use."""
        now, busy_s = time.monotonic(), self._slots.busy_s
        then, before_s = self._seen
        self._seen = (now, busy_s)
        busy = (busy_s - before_s) / max(1e-6, now - then)
        usage = self._processors.read() or _UNKNOWN
        memory = self._memory.read() or Memory(0, 0)
        traffic = self._network.read() or Traffic()
        device = self._device.read()
        others = max(0.0, usage.here - usage.own)
        state = ResourceState(
            busy_slots=self._slots.busy,
            utilization=min(1.0, busy / self._slots.count),
            host_cpu=usage.host,
            memory_used_bytes=memory.used,
            memory_total_bytes=memory.total,
            network_bytes_per_s=traffic.bytes_per_s,
            network_speed_bytes_per_s=traffic.speed_bytes_per_s,
            network_utilization=traffic.utilization,
            own_cpu=usage.own,
            foreign_cpu=max(0.0, others - siblings / self.processors),
            foreign_utilization=_foreign(device, busy),
            device=device,
            speed=self._speed(others),
        )
        return self._judge.judged(state)

    def _speed(self, others: float) -> float:
        if not self._uses_processors:
            return 1.0
        return self._contention.speed(self._slots.threads, self.processors, others * self.processors)


def _foreign(device: DeviceState | None, busy: float) -> float | None:
    """What a device did beyond the time in which a slot of ours had it: that much at least was somebody else's."""
    if device is None or device.utilization is None:
        return None
    return max(0.0, device.utilization - min(1.0, busy))
