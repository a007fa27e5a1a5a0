"""What a router does with bundles (lepton_ai/bundle.py): which jobs stay together, and how the others are split."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from typing import Final

import structlog

from lepton_ai import bundle, wire
from lepton_ai.errors import LeptonError
from lepton_ai.placement.costs import CostModel
from pipeline.cluster import Cluster
from pipeline.intake import Incoming
from pipeline.node import Narrator
from pipeline.pricing import quickest_s
from pipeline.window import Claim, ClaimedJob, Window, exchanged
from queues.broker import Broker, Kind
from queues.steps import Dispatch

__all__ = ["Bundles", "counted"]

#: Jobs of a bundle stay together that keep a slot busy for so long at most; where that is more than the second, each
#: slot may have some of them.
_TOGETHER_S: Final = 0.025
_WORTH_S: Final = 0.002

log = structlog.get_logger()


class Bundles:
    """Keeps together and splits what a router has claimed. Used by the router's thread."""

    def __init__(self, broker: Broker, window: Window, cluster: Cluster, model: CostModel, narrator: Narrator) -> None:
        self._broker = broker
        self._window = window
        self._cluster = cluster
        self._model = model
        self._narrator = narrator

    def most_together(self, kind: Kind, found: Incoming, marked: Container[str], singly: int) -> int:
        """How many jobs of a bundle may stay together: few enough that no slot is busy for long while others are not.

        One, where somebody looks at each: suspects, jobs that are shown, parked or cancelled, or of unknown cost;
        `singly` is how many that would be by now.
        """
        if kind is Kind.ALONE or self._narrator.shows(singly) or any(job in marked for job in found.ids):
            return 1
        each_s = quickest_s(found.headers.task, found.options, self._cluster, self._model)
        if each_s is None:
            return 1
        kernel, pin, count = found.headers.task, found.options.pin, len(found.ids)
        slots = sum(device.slots for device in self._cluster.devices if device.can_run(kernel, pin))
        parts = max(math.ceil(count * each_s / _TOGETHER_S), min(slots, int(count * each_s / _WORTH_S)))
        return max(1, count // parts)

    def split(self, claim: Claim, bundles: Sequence[tuple[bytes, int]]) -> dict[int, list[bytes]]:
        """Splits bundles of a claim, each into parts of so many jobs at most; their parts by the `id()` of each.

        What cannot be split stays as it is: none of its jobs is ended on its own.
        """
        parts: dict[int, list[bytes]] = {}
        for message, most in bundles:
            try:
                found = bundle.split(message, most)
            except LeptonError as error:  # the worker that takes it says so of each of its jobs
                log.warning("bundle_unreadable", reason=error.message)
                continue
            if len(found) > 1:
                parts[id(message)] = found
        if not parts:
            return parts
        step = Dispatch({claim.key: len(claim.messages)}, {claim.key: exchanged(claim.messages, parts)})
        for message, _ in bundles:
            more = len(parts.get(id(message), ())) - 1
            if more <= 0:
                continue
            if claim.kind is Kind.NEW:
                lane = wire.lane_of(message)
                step.bundled[lane] = step.bundled.get(lane, 0) + more
            else:
                step.counts["bundled"] = step.counts.get("bundled", 0) - more
        self._broker.dispatch(step)
        self._window.exchange(claim, parts)
        return parts


def counted(step: Dispatch, job: ClaimedJob) -> None:
    """A bundle leaves its first claim: from here on its jobs are counted among those that were accepted."""
    extra, lane = len(job.ids) - 1, wire.lane_of(job.message)
    for name in ("accepted", "bundled"):
        step.counts[name] = step.counts.get(name, 0) + extra
    step.bundled[lane] = step.bundled.get(lane, 0) + extra
