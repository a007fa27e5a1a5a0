"""The placer: jobs of the window get their devices, and those for which there is room go there in one step."""

from __future__ import annotations

from collections.abc import Sequence

from lepton_ai.job import Candidate, Elsewhere, Placement
from lepton_ai.placement.problem import UNPLACED
from pipeline.cluster import Cluster
from pipeline.credit import Credit
from pipeline.node import Narrator
from pipeline.notes import Note, packed, written
from pipeline.outgoing import Outgoing
from pipeline.planner import Decision, Planner
from pipeline.probes import Probes
from pipeline.reasons import Reason, reason
from pipeline.regret import Regret
from pipeline.window import ClaimedJob
from queues.broker import Broker

__all__ = ["Placer"]


class Placer:
    """Used by the router's thread."""

    def __init__(
        self,
        broker: Broker,
        cluster: Cluster,
        planner: Planner,
        credit: Credit,
        probes: Probes,
        regret: Regret,
        narrator: Narrator,
    ) -> None:
        self._broker = broker
        self._cluster = cluster
        self._planner = planner
        self._credit = credit
        self._probes = probes
        self._regret = regret
        self._narrator = narrator

    def place(self, jobs: Sequence[ClaimedJob], *, is_deep: bool = False) -> list[ClaimedJob]:
        """Dispatches those of these jobs whose devices have room, and parks those that have none; returns them all."""
        now = self._broker.now()
        decision = self._planner.decide(jobs, self._cluster, now, is_deep=is_deep)
        outgoing, chosen, gone = self._fill(jobs, decision, now)
        if outgoing.left:
            self._broker.dispatch(outgoing.dispatch(self._broker.incarnation, self._narrator))
        self._planner.placed(jobs, decision, chosen, gone)
        return outgoing.left

    def _fill(
        self, jobs: Sequence[ClaimedJob], decision: Decision, now: float
    ) -> tuple[Outgoing, list[int], list[bool]]:
        """What is to be sent, the device of each job, and whether it goes."""
        pricing, problem, devices = decision.pricing, decision.problem, self._cluster.devices
        planned, has_room = decision.plan.device.tolist(), self._credit.has_room
        names, capacity = [device.name for device in devices], [device.capacity for device in devices]
        outgoing = Outgoing(names, now)
        probes = self._probes.choose(jobs, pricing.problem, planned, now, lambda at: has_room(devices[at]))
        notes: dict[tuple[int, int, bool], Note] = {}
        reasons: dict[tuple[Reason, int, int], bytes] = {}
        ready = problem.ready.tolist()
        waits = [packed(each) for each in ready]
        tail = None if problem.tail is None else problem.tail.tolist()
        rows, together = decision.seconds.tolist(), decision.together
        found, gone = [probes.get(at, device) for at, device in enumerate(planned)], [True] * len(jobs)
        for at, (job, kind, chosen) in enumerate(zip(jobs, pricing.kinds, found, strict=True)):
            row = rows[at]
            if chosen == UNPLACED:
                if (note := notes.get((kind, chosen, False))) is None:
                    note = notes[kind, chosen, False] = self._parked(job, pricing.candidates[kind], now)
                outgoing.note(job, note, written(self._nowhere(job)), b"", waits)
                outgoing.park(job)
                self._cluster.finished(job.id)  # it may have come back from a device that died
                continue
            device, need_s = devices[chosen], row[chosen]
            if has_room(device):
                is_in_time = None
                if job.deadline_at is not None:
                    late_s = need_s if tail is None else tail[at][chosen]
                    is_in_time = ready[chosen] + late_s <= job.deadline_at - now
                why = reason(chosen, ready, row, together[at], is_probe=at in probes, makes_deadline=is_in_time)
                alike = (kind, chosen, job.sent_at > 0)
                if (note := notes.get(alike)) is None:
                    self._regret.watch(job.id, chosen, ready, row)
                    note = notes[alike] = self._note(job, pricing.candidates[kind], chosen, now, decision.policy)
                if (text := reasons.get((why, kind, chosen))) is None:
                    told = why.text(names, job.kernel, chosen, _able(pricing.candidates[kind]), decision.policy)
                    text = reasons[why, kind, chosen] = written(told)
                outgoing.note(job, note, text, waits[chosen], waits)
                each_s = need_s / len(job.ids)
                outgoing.give(job, chosen, each_s)
                for its_id in job.ids:
                    self._cluster.dispatched(its_id, device.name, each_s, 1 / len(job.ids))
                if at in probes:
                    self._probes.sent(job, device.name)
            else:
                gone[at] = False
            ready[chosen] += need_s / capacity[chosen]
            waits[chosen] = packed(ready[chosen])
        return outgoing, found, gone

    def _note(self, job: ClaimedJob, candidates: tuple[Candidate, ...], chosen: int, now: float, policy: str) -> Note:
        """Where a job goes, as if it had not to wait there."""
        best = candidates[chosen]
        placement = Placement(
            job.id,
            job.kernel,
            "placed",
            "",
            now,
            self._broker.incarnation,
            best.device,
            best.estimate,
            candidates,
            policy,
            job.sent_at > 0,
        )
        return Note(placement)

    def _parked(self, job: ClaimedJob, candidates: tuple[Candidate, ...], now: float) -> Note:
        router = self._broker.incarnation
        return Note(Placement(job.id, job.kernel, "parked", "", now, router, candidates=candidates))

    def _nowhere(self, job: ClaimedJob) -> str:
        pin = job.options.pin
        if beyond := [each for each in self._cluster.devices if each.serves(job.kernel, pin)]:
            told = "; ".join(f"{each.name}: {each.reason}" for each in beyond)
            return f"every device that can run it is beyond its limits, and it waits for one to come back ({told})"
        if barred := [each for each in self._cluster.devices if each.matches(pin) and job.kernel in each.quarantined]:
            told = "; ".join(f"{each.name}: {each.excludes(job.kernel, pin)}" for each in barred)
            return f"no live device may run {job.kernel}, and it waits for one ({told})"
        pinned = f" {pin}" if isinstance(pin, Elsewhere) else f" on {pin}" if pin else ""
        return f"no live device can run {job.kernel}{pinned}; it waits for one that announces it"


def _able(candidates: Sequence[Candidate]) -> int:
    return sum(candidate.estimate is not None for candidate in candidates)
