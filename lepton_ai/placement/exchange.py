"""Moves of one job, and of a second that makes room for it, until a plan ends about as soon as its bound.

At prices in equilibrium `makespan = bound + waste + idle`: what jobs cost above their cheapest choice, and what devices
are worth while they have nothing to do. So only pairs that waste little are tried, and simulated annealing
(Kirkpatrick, Gelatt and Vecchi, Science 220, 1983) lowers waste plus the square of what each device is late, measured
from a mark between the bound and the best makespan so far. A move that makes the taker late is completed by the best
single job that leaves the taker: a swap where it goes to the giver, else an ejection chain of two (Glover, "Ejection
chains, reference structures and alternating path methods", Discrete Applied Mathematics 65, 1996). The pairs of a job
are sorted by waste and lateness only adds, so most of these scans end after a few.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lepton_ai.placement.compiled import compiled
from lepton_ai.placement.nearby import Nearby
from lepton_ai.placement.problem import Floats, Indices

__all__ = ["LONG_SEARCH", "exchanged"]

#: Without units. The first temperature is for one job a device, all of whose work is 1; with more jobs it falls as what
#: one of them can change. Found on generated instances of Braun's law and on fleets of 512 to 10,000 jobs.
_FIRST_TEMPERATURE, _COOLING = 2.5, 1 / 20
#: What the square of lateness costs beside waste. A search that is long, of so many steps a job, is made in turn with
#: each of the second: where jobs are large beside what a device does, the less it costs the better, if there is time.
_LATENESS, _LATENESS_IF_LONG = (600.0,), (150.0, 50.0, 15.0)
LONG_SEARCH = 400
#: Where the mark is between the bound, 0, and the best makespan so far, 1.
_MARK = 0.8
#: Jobs of the taker looked at for a second move.
_WIDTH = 64
#: The clock is looked at so many times.
_LOOKS = 10


def exchanged(
    near: Nearby,
    pair: Indices,
    load: Floats,
    worth: Floats,
    steps: int,
    seed: int,
    enough: float,
    until_s: float,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[Indices, float]:
    """[job] the pair of the best plan found, never a later one than that given; when it ends, in units of the bound.

    `pair` is the plan to begin with, `load` [device] when each device is then done, `worth` [device] its part of the
    value of all. Stops at a plan that ends by `enough`, and takes fewer steps where all would not be done at `until_s`.
    """
    found, soonest = pair, _ends(load, near.place[pair])
    turns = _LATENESS_IF_LONG if steps >= LONG_SEARCH * pair.size else _LATENESS
    for turn, lateness in enumerate(turns):
        if soonest <= enough or now() >= until_s:
            break
        by_s = now() + (until_s - now()) / (len(turns) - turn)
        tried, ends = _cooled(near, pair, load, worth, steps // len(turns), seed + turn, enough, by_s, now, lateness)
        if ends < soonest:
            found, soonest = tried, ends
    return found, soonest


def _cooled(
    near: Nearby,
    pair: Indices,
    load: Floats,
    worth: Floats,
    steps: int,
    seed: int,
    enough: float,
    until_s: float,
    now: Callable[[], float],
    lateness: float,
) -> tuple[Indices, float]:
    """As `exchanged`, at one cost of lateness."""
    jobs, devices = pair.size, load.size
    pair, load, best = pair.copy(), load.copy(), pair.copy()
    ends = _ends(load, near.place[pair])
    state = np.array([(seed * 0x9E3779B97F4A7C15 + 0x2545F4914F6CDD1D) % 2**64 or 1], np.uint64)
    hot = _FIRST_TEMPERATURE * devices / jobs**2
    look = math.ceil(steps / _LOOKS)
    began_s, done = now(), 0
    for turn in range(_LOOKS):
        left_s = until_s - now()
        if done and left_s > 0:
            # Late: fewer steps at each temperature, rather than none at the last ones.
            look = min(look, math.ceil(left_s / (_LOOKS - turn) * done / max(now() - began_s, 1e-9)))
        if ends <= enough or left_s <= 0 or not look:
            break
        from_, to = (hot * _COOLING ** ((turn + more) / _LOOKS) for more in (0, 1))
        ends = _annealed(
            near.first, near.job, near.place, near.waste, near.time, worth, pair, load, best, ends, enough, lateness,
            from_, to, look, state,
        )  # fmt: skip
        done += look
    return best, ends


def _ends(load: Floats, used: Indices) -> float:
    return float(load[used].max(initial=0.0))


@compiled
def _annealed(
    first: Indices,
    of: Indices,
    place: Indices,
    waste: Floats,
    time: Floats,
    worth: Floats,
    pair: Indices,
    load: Floats,
    best: Indices,
    ends: float,
    enough: float,
    lateness: float,
    hot: float,
    cold: float,
    steps: int,
    state: NDArray[np.uint64],
) -> float:
    """When the best plan ends; it is left in `best`, and the last one in `pair` and `load`."""
    devices = load.size
    most_waste = waste.max()
    head, after, before = _rings(place, pair, devices)
    pairs = np.uint64(of.size)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    temperature, cooling = hot, (cold / hot) ** (64 / steps)
    mark = 1 + _MARK * (ends - 1)
    bits = state[0]
    for step in range(steps):
        if step & 63 == 63:
            temperature *= cooling
            mark = 1 + _MARK * (ends - 1)
        # Marsaglia's xorshift (J. Stat. Software 8, 2003): the upper half for the pair, the lower for the chance.
        bits ^= bits << np.uint64(13)
        bits ^= bits >> np.uint64(7)
        bits ^= bits << np.uint64(17)
        new = np.int64(((bits >> half) * pairs) >> half)
        job = of[new]
        old = pair[job]
        giver, taker = place[old], place[new]
        if giver == taker:
            continue
        allowed = -temperature * math.log((float(bits & low) + 1) / 4294967296.0)
        late_giver, late_taker = max(0.0, load[giver] - mark), max(0.0, load[taker] - mark)
        giver_load, taker_load = load[giver] - time[old], load[taker] + time[new]
        later_giver, later_taker = max(0.0, giver_load - mark), max(0.0, taker_load - mark)
        room = allowed - (waste[new] - waste[old])
        room -= lateness * worth[giver] * (later_giver * later_giver - late_giver * late_giver)
        room -= lateness * worth[taker] * (later_taker * later_taker - late_taker * late_taker)
        second, second_to = -1, -1
        if room < 0:
            weight = lateness * worth[taker]
            other = head[taker]
            if other < 0 or weight * later_taker * later_taker + most_waste + room < 0:
                continue
            for _ in range(_WIDTH):
                leaves = pair[other]
                left = max(0.0, taker_load - time[leaves] - mark)
                gain = weight * (left * left - later_taker * later_taker) - waste[leaves]
                for to in range(first[other], first[other + 1]):
                    change = gain + waste[to]
                    if change >= room:
                        break
                    at = place[to]
                    if at != taker:
                        its = giver_load if at == giver else load[at]
                        was, becomes = max(0.0, its - mark), max(0.0, its + time[to] - mark)
                        change += lateness * worth[at] * (becomes * becomes - was * was)
                        if change < room:
                            room, second, second_to = change, other, to
                other = after[other]
                if other == head[taker]:
                    break
            head[taker] = other
            if second < 0:
                continue
        load[giver], load[taker] = giver_load, taker_load
        _moved(head, after, before, job, giver, taker)
        pair[job] = new
        highest = max(giver_load, taker_load)
        if second >= 0:
            at = place[second_to]
            load[taker] -= time[pair[second]]
            load[at] += time[second_to]
            _moved(head, after, before, second, taker, at)
            pair[second] = second_to
            highest = max(load[giver], load[taker], load[at])
        if highest < ends:
            highest = 0.0
            for at in range(devices):
                if head[at] >= 0:
                    highest = max(highest, load[at])
            if highest < ends:
                ends = highest
                best[:] = pair
                if ends <= enough:
                    break
    state[0] = bits
    return ends


@compiled
def _rings(place: Indices, pair: Indices, devices: int) -> tuple[Indices, Indices, Indices]:
    """[device] one of its jobs, -1 for none; [job] the next of the same device, and the one before."""
    head = np.full(devices, -1, np.intp)
    after = np.empty(pair.size, np.intp)
    before = np.empty(pair.size, np.intp)
    for job in range(pair.size):
        _joined(head, after, before, job, place[pair[job]])
    return head, after, before


@compiled
def _joined(head: Indices, after: Indices, before: Indices, job: int, device: int) -> None:
    one = head[device]
    if one < 0:
        head[device] = after[job] = before[job] = job
    else:
        last = before[one]
        after[last], before[job], after[job], before[one] = job, last, one, job


@compiled
def _moved(head: Indices, after: Indices, before: Indices, job: int, giver: int, taker: int) -> None:
    if after[job] == job:
        head[giver] = -1
    else:
        last, one = before[job], after[job]
        after[last], before[one] = one, last
        if head[giver] == job:
            head[giver] = one
    _joined(head, after, before, job, taker)
