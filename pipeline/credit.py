"""Credit: how much a device may have queued before the router waits, so that everything else is placed just in time."""

from __future__ import annotations

import math

from lepton_ai.settings import Settings
from pipeline.cluster import Cluster, ServedDevice

__all__ = ["Credit"]

#: A device that has been filled is filled again once it has less than this part of what it may have.
_REFILL = 0.75


class Credit:
    """What the devices of a cluster have room for. Used by the router's thread."""

    def __init__(self, cluster: Cluster, settings: Settings) -> None:
        self._cluster = cluster
        self._settings = settings
        self._filled: set[str] = set()
        """Devices that have been filled, and are drawing on it."""

    def has_room(self, device: ServedDevice) -> bool:
        """A device may have `credit_s` of predicted work a slot, but always two jobs, and never over two batches.

        One that has all of that is left to work some of it off, so that it is sent many jobs at a time.
        """
        if device.share <= 0:
            return False
        name, slots, settings = device.name, device.capacity, self._settings
        jobs = self._cluster.outstanding_jobs(name)
        if jobs < 2 * slots:
            return True
        of_jobs = jobs / (2 * settings.batch_jobs * slots)
        share = max(of_jobs, self._cluster.outstanding_s(name) / (settings.credit_s * slots))
        if share >= 1:
            self._filled.add(name)
        elif share <= _REFILL:
            self._filled.discard(name)
        return name not in self._filled

    def jobs(self) -> int:
        """How many more jobs devices may have, if they take as long as those that each has already."""
        found = 0
        for device in self._cluster.devices:
            if not self.has_room(device):
                continue
            jobs, seconds = self._cluster.outstanding_jobs(device.name), self._cluster.outstanding_s(device.name)
            room = int(2 * self._settings.batch_jobs * device.capacity) - jobs
            if jobs and seconds > 0:
                room = min(room, int((self._settings.credit_s * device.capacity - seconds) / seconds * jobs) + 1)
            found += max(room, math.ceil(2 * device.capacity) - jobs)
        return found
