"""Lepton: one client straight to the broker, one router, one worker."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bench import peer
from bench.load import Load
from lepton_ai import Client
from lepton_ai.handle import JobHandle

_WAIT_S = 300.0
_SAMPLE = 25


class Peer(peer.Peer):
    """The fleet itself belongs to the contest; this is the client."""

    settings = "submit_many and result() of each; one router, one worker"

    def start(self) -> None:
        own = [
            f"{name}={value}"
            for name, value in sorted(os.environ.items())
            if name.startswith("LEPTON_") and name != "LEPTON_KERNELS"
        ]
        self.settings = "; ".join([f"{self.settings}, slots {self.place.parallel}", *own])
        self._client = Client(self.place.broker_url)
        self._sample: deque[JobHandle] = deque(maxlen=_SAMPLE)

    def run(self, load: Load, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        jobs = self._client.submit_many(load.kernel, ({**row, "data": _array(row["data"])} for row in rows))
        totals = [job.result(timeout=_WAIT_S)["total"] for job in jobs]
        self._sample.extend(jobs[:: max(1, len(jobs) // _SAMPLE)])
        return totals

    def one(self, load: Load, row: Mapping[str, Any]) -> float:
        job = self._client.submit(load.kernel, {**row, "data": _array(row["data"])})
        self._sample.append(job)
        return float(job.result(timeout=_WAIT_S)["total"])

    def carry(self, arrays: Sequence[Any]) -> list[float]:
        jobs = self._client.submit_many("bench.touch", ({"a": array} for array in arrays))
        self._sample.extend(jobs)
        return [job.result(timeout=_WAIT_S)["total"] for job in jobs]

    def facts(self) -> dict[str, Any]:
        placements = [job.why() for job in self._sample]
        return {
            "conservation_difference": self._client.accounts().difference,
            "placements_looked_at": len(placements),
            "placements_recorded": sum(bool(each is not None and each.device) for each in placements),
        }

    def stop(self) -> None:
        self._client.close()


def _array(data: bytes) -> Any:
    return np.frombuffer(data, np.uint8)
