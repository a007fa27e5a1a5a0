"""The choices of each job that cost little more than its cheapest: all that a search needs to look at."""

from __future__ import annotations

import msgspec
import numpy as np

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.problem import Floats, Indices

__all__ = ["Nearby", "nearby"]


class Nearby(msgspec.Struct, frozen=True):
    """Pairs of a job and a column (or a device), sorted by job, and for each job the cheapest first."""

    first: Indices
    """[job + 1]: where the pairs of each job begin; the last ends the last job's."""
    job: Indices
    """[pair], as the next three."""
    place: Indices
    """The column, or the device."""
    waste: Floats
    """What the pair costs more than the job's cheapest, as a part of all that the devices are worth until the bound."""
    time: Floats
    """Seconds there, as a part of the bound."""

    def on_devices(self, column: Indices, slots: Floats, usable: Indices) -> Nearby:
        """With a pair for each usable device of the column; time is then what the device's backlog grows by."""
        usable = usable[np.argsort(column[usable], kind="stable")]
        of_column = column[usable]
        begins = np.searchsorted(of_column, np.arange(int(column.max()) + 2))
        count = np.diff(begins)[self.place]
        pair = np.repeat(np.arange(self.job.size), count)
        ends = np.cumsum(count)
        device = usable[begins[self.place][pair] + np.arange(pair.size) - (ends - count)[pair]]
        first = np.append(0, ends)[self.first]
        return Nearby(first, self.job[pair], device, self.waste[pair], self.time[pair] / slots[device])

    def pairs_of(self, place: Indices) -> Indices:
        """[job]: the pair of the job with its place."""
        pair = self.first[:-1].copy()
        found = np.flatnonzero(self.place == place[self.job])
        pair[self.job[found]] = found
        return pair


#: A job that takes this part of the bound is long: it has pairs whatever they waste.
_LONG = 0.02
#: What differs by less than a part in so many costs the same.
_GRAINS = 1_024


def nearby(
    seconds: Floats, most: Floats, prices: Floats, bound_s: float, most_waste: float, few: int, chosen: Indices
) -> Nearby:
    """Where each job is, which is `chosen` [job], its column, and where else it costs least: so `few` pairs at most.

    Others take no more than `most` [column] seconds, and those of short jobs waste no more than `most_waste`.
    """
    return Nearby(*_nearby(seconds, most, prices / bound_s, bound_s, most_waste, few, chosen))


@compiled
def _nearby(
    seconds: Floats, most: Floats, prices: Floats, bound_s: float, most_waste: float, few: int, chosen: Indices
) -> tuple[Indices, Indices, Indices, Floats, Floats]:
    jobs, columns = seconds.shape
    first = np.zeros(jobs + 1, np.intp)
    cheapest = np.empty(jobs)
    dear = np.empty(jobs)
    for job in range(jobs):
        least, shortest = np.inf, 0.0
        for at in range(columns):
            if seconds[job, at] <= most[at] and prices[at] * seconds[job, at] < least:
                least, shortest = prices[at] * seconds[job, at], seconds[job, at]
        cheapest[job] = least
        is_long = shortest > _LONG * bound_s
        dear[job] = np.inf if is_long else least + most_waste
        pairs = 0
        for at in range(columns):
            if at == chosen[job] or (prices[at] * seconds[job, at] <= dear[job] and seconds[job, at] <= most[at]):
                pairs += 1
        first[job + 1] = first[job] + min(pairs, few)
    of = np.empty(first[jobs], np.intp)
    place = np.empty(first[jobs], np.intp)
    waste = np.empty(first[jobs])
    time = np.empty(first[jobs])
    for job in range(jobs):
        begin, end, pair = first[job], first[job + 1], first[job]
        of[begin:end] = job
        for turn in range(columns):
            # Each job begins at another column: where many cost the same, not all jobs are to have the same few.
            at = (turn + job) % columns
            cost = prices[at] * seconds[job, at]
            if at == chosen[job] or (cost <= dear[job] and seconds[job, at] <= most[at]):
                grain = np.floor((cost / cheapest[job] - 1) * _GRAINS) if cheapest[job] > 0 else 0.0
                grain = -1.0 if at == chosen[job] else grain
                if pair == end and grain >= waste[end - 1]:
                    continue
                here = min(pair, end - 1)
                while here > begin and waste[here - 1] > grain:
                    place[here], waste[here] = place[here - 1], waste[here - 1]
                    here -= 1
                place[here], waste[here] = at, grain
                pair = min(pair + 1, end)
        for pair in range(begin, end):
            at = place[pair]
            more = prices[at] * seconds[job, at] - cheapest[job]
            here = pair
            while here > begin and waste[here - 1] > more:
                place[here], waste[here], time[here] = place[here - 1], waste[here - 1], time[here - 1]
                here -= 1
            place[here], waste[here], time[here] = at, more, seconds[job, at] / bound_s
    return first, of, place, waste, time
