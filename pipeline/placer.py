"""The placer: jobs of the window get their devices, and those for which there is room go there in one step."""

from __future__ import annotations

from collections.abc import Sequence

from lepton_ai.job import Candidate, Placement
from lepton_ai.placement.problem import UNPLACED
from pipeline.cluster import Cluster
from pipeline.credit import Credit
from pipeline.node import Narrator
from pipeline.notes import Note, packed
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
        outgoing = self._fill(jobs, decision, now)
        if outgoing.left:
            self._broker.dispatch(outgoing.dispatch(self._broker.incarnation, self._narrator))
        return outgoing.left

    def _fill(self, jobs: Sequence[ClaimedJob], decision: Decision, now: float) -> Outgoing:
        pricing, problem, devices = decision.pricing, decision.problem, self._cluster.devices
        chosen_by_policy = decision.plan.device.tolist()
        outgoing = Outgoing([device.name for device in devices], now)
        probes = self._probes.choose(
            jobs, pricing, chosen_by_policy, now, lambda at: self._credit.has_room(devices[at])
        )
        notes: dict[tuple[str, int, int, bool, Reason], Note] = {}
        ready = problem.ready.tolist()
        waits = [packed(each) for each in ready]
        tail = None if problem.tail is None else problem.tail.tolist()
        rows = pricing.problem.seconds.tolist()
        for at, (job, kind, planned) in enumerate(zip(jobs, pricing.kinds, chosen_by_policy, strict=True)):
            chosen, row = probes.get(at, planned), rows[at]
            if chosen == UNPLACED:
                self._cluster.finished(job.id)  # it may have come back from a device that died
                alike = (job.kernel, kind, chosen, False, Reason())
                if (note := notes.get(alike)) is None:
                    note = notes[alike] = Note(self._parked(job, pricing.candidates[kind], now))
                outgoing.note(job, note, b"", waits)
                outgoing.park(job)
                continue
            device, need_s = devices[chosen], row[chosen]
            if not self._credit.has_room(device):
                ready[chosen] += need_s / device.capacity
                waits[chosen] = packed(ready[chosen])
                continue
            is_in_time = None
            if job.deadline_at is not None:
                late_s = need_s if tail is None else tail[at][chosen]
                is_in_time = ready[chosen] + late_s <= job.deadline_at - now
            why = reason(chosen, ready, row, is_probe=at in probes, makes_deadline=is_in_time)
            alike = (job.kernel, kind, chosen, job.sent_at > 0, why)
            if (note := notes.get(alike)) is None:
                self._regret.watch(job.id, chosen, ready, row)
                note = notes[alike] = Note(self._placed(job, pricing.candidates[kind], chosen, now, why, decision))
            outgoing.note(job, note, waits[chosen], waits)
            each_s = need_s / len(job.ids)
            outgoing.give(job, chosen, each_s)
            ready[chosen] += need_s / device.capacity
            waits[chosen] = packed(ready[chosen])
            for its_id in job.ids:
                self._cluster.dispatched(its_id, device.name, each_s, 1 / len(job.ids))
            if at in probes:
                self._probes.sent(job, device.name)
        return outgoing

    def _placed(
        self,
        job: ClaimedJob,
        candidates: tuple[Candidate, ...],
        chosen: int,
        now: float,
        why: Reason,
        decision: Decision,
    ) -> Placement:
        """Where a job goes and why, as if it had not to wait there."""
        best = candidates[chosen]
        able = sum(candidate.estimate is not None for candidate in candidates)
        names = [candidate.device for candidate in candidates]
        return Placement(
            job.id,
            job.kernel,
            "placed",
            why.text(names, job.kernel, chosen, able, decision.policy),
            now,
            self._broker.incarnation,
            best.device,
            best.estimate,
            candidates,
            decision.policy,
            job.sent_at > 0,
        )

    def _parked(self, job: ClaimedJob, candidates: tuple[Candidate, ...], now: float) -> Placement:
        pinned = f" on {job.options.device}" if job.options.device else ""
        text = f"no live device can run {job.kernel}{pinned}; it waits for one that announces it"
        if beyond := [each for each in self._cluster.devices if each.serves(job.kernel, job.options.device)]:
            told = "; ".join(f"{each.name}: {each.reason}" for each in beyond)
            text = f"every device that can run it is beyond its limits, and it waits for one to come back ({told})"
        return Placement(job.id, job.kernel, "parked", text, now, self._broker.incarnation, candidates=candidates)
