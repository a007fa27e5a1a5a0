"""Learned placement against fixed routings of the same stream, on real workers: total time, and p99 as jobs arrive.

`./lepton bench closed-loop [--quick] [--rounds N] [--decks N] [--load SHARE] [--json]`. Four devices: the CPU and the
emulated FPGA with a core each, and two stand-ins for accelerators (they wait as long as they declare). One stream of
real kernels of mixed sizes (bench/stream.py) is played in turns: placed by the router, which learns as it goes, and by
fixed routings, which pin each job to a device through the very same system.

First the learning: a router that knows nothing plays one deck after the other, and each one's seconds are shown. The
fixed routings have a fleet of their own, so whatever the learning router knows it has seen for itself. Then everybody's
turns, round after round: all jobs at once (`seconds`), and jobs that arrive at random at a share of what the best fixed
routing has done at once (`p99_ms`; a routing that cannot keep up there falls behind for as long as the turn lasts).
`ratio_best_fixed` is learned over best fixed seconds, of the same round; its median and range over the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from bench import report, routing
from bench.contest import median_and_range, rotated, say
from bench.mixed_fleet import DEVICES, MixedFleet, mixed_fleet
from bench.routing import Means, Pins
from bench.stream import DECK, Card, expected, stream
from bench.turn import Delay, Turn, arrive, rush
from lepton_ai import Client

LEARNED = "learned"
#: Decks that are played while it learns.
LEARNING_DECKS = 16
#: The arrays of all jobs of a turn are in shared memory at once.
_RING_BYTES = 2**30
#: A kernel that the stream has not, with arrays that fill that memory once.
_WARM_KERNEL, _WARM_SIDE = "vision.ndvi", 1024


def main() -> int:
    parser = report.parser(__doc__, rounds=3)
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--decks", type=int, default=5, metavar="N", help=f"of {len(DECK)} jobs, a turn (default: 5)")
    parser.add_argument("--load", type=float, default=0.75, metavar="SHARE", help="of arriving jobs (default: 0.75)")
    options = parser.parse_args()
    return report.play(lambda: _measure(options), _tables, plain=options.json)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    rounds, decks, learning_decks = options.rounds, options.decks, LEARNING_DECKS
    if options.quick:
        rounds, decks, learning_decks = 1, 1, 3
    os.environ["LEPTON_RING_BYTES"] = str(_RING_BYTES)
    for card in DECK:
        expected(card)  # before anything is timed
    with mixed_fleet("learned") as learner, mixed_fleet("fixed") as follower:
        for fleet in (learner, follower):
            _warm(fleet.client, decks)
        learning = [_told(f"deck {seed + 1}", _learned(learner, stream(seed, 1))) for seed in range(learning_decks)]
        return {
            "jobs": decks * len(DECK),
            "learning": _learning(learning),
            **_Contest(learner, follower, decks, options.load).held(rounds),
        }


class _Contest:
    """Everybody's turns."""

    def __init__(self, learner: MixedFleet, follower: MixedFleet, decks: int, load: float) -> None:
        self._learner = learner
        self._follower = follower
        self._decks = decks
        self._load = load
        self._known = self._rehearsed()
        self.names = (LEARNED, *self._routings(()))

    def held(self, rounds: int) -> dict[str, Any]:
        """The report of so many rounds."""
        rushes: dict[str, list[Turn]] = {name: [] for name in self.names}
        arrivals: dict[str, list[Turn]] = {name: [] for name in self.names}
        for number, name in rotated(self.names, rounds):
            cards = stream(2000 + number, self._decks)
            turn = self._play(name, cards, lambda client, pins, cards=cards: rush(client, cards, pins))
            rushes[name].append(_told(f"round {number + 1}/{rounds}, {name}", turn))
        rates = {name: self._decks * len(DECK) / _median_s(rushes[name]) for name in self.names if name != LEARNED}
        rate = self._load * max(rates.values())
        say(f"now as they arrive, {rate:,.0f} a second")
        for number, name in rotated(self.names, rounds):
            cards, chance = stream(3000 + number, self._decks), random.Random(4000 + number)
            at_s = list(itertools.accumulate(chance.expovariate(rate) for _ in cards))
            turn = self._play(
                name, cards, lambda client, pins, cards=cards, at_s=at_s: arrive(client, cards, pins, at_s)
            )
            arrivals[name].append(turn)
            say(f"round {number + 1}/{rounds}, {name}: p99 {turn.p99_ms():,.0f} ms")
        for fleet in (self._learner, self._follower):
            if difference := fleet.client.accounts().difference:
                raise ValueError(f"{difference} jobs are unaccounted for")
        fixed = list(rates)
        figures = {name: _figures(rushes[name], arrivals[name]) for name in self.names}
        for name in fixed:
            figures[name]["keeps_up"] = rates[name] > rate
        best = min(fixed, key=lambda name: figures[name]["seconds"])
        calmest = min(fixed, key=lambda name: figures[name]["p99_ms"])
        return {
            "arrivals_per_s": round(rate, 1),
            LEARNED: figures[LEARNED],
            "fixed": {name: figures[name] for name in fixed},
            "best_fixed": best,
            **_ratio(
                "ratio_best_fixed", [each.seconds for each in rushes[LEARNED]], [each.seconds for each in rushes[best]]
            ),
            "best_fixed_p99": calmest,
            **_ratio(
                "ratio_best_fixed_p99", *([each.p99_ms() for each in arrivals[name]] for name in (LEARNED, calmest))
            ),
        }

    def _rehearsed(self) -> Means:
        """What each card takes on each device, by a few decks on each: what fixed routings are made from."""
        cards = stream(999, 3)
        costs = []
        for device in DEVICES:
            costs += _told(
                f"measuring {device}", rush(self._follower.client, cards, routing.one_device(cards, device))
            ).costs
        return routing.means(costs)

    def _routings(self, cards: Sequence[Card]) -> dict[str, Pins]:
        devices = list(DEVICES)
        return {
            **{f"all_{device.partition('.')[0]}": routing.one_device(cards, device) for device in devices},
            "round_robin": routing.round_robin(cards, devices),
            "by_kernel": routing.by_kernel(cards, devices, self._known),
            "by_size": routing.by_size(cards, devices, self._known),
        }

    def _play(self, name: str, cards: Sequence[Card], play: Any) -> Turn:
        fleet, pins = (
            (self._learner, [None] * len(cards)) if name == LEARNED else (self._follower, self._routings(cards)[name])
        )
        fleet.settle()
        return play(fleet.client, pins)


def _figures(rushes: Sequence[Turn], arrivals: Sequence[Turn]) -> dict[str, Any]:
    seconds = median_and_range([each.seconds for each in rushes], 3)
    p99_ms = median_and_range([each.p99_ms() for each in arrivals], 1)
    delays = list(itertools.chain.from_iterable(each.delays for each in arrivals))
    return {
        "seconds": seconds["median"],
        "seconds_range": seconds["range"],
        "p99_ms": p99_ms["median"],
        "p99_ms_range": p99_ms["range"],
        "mean_ms": round(statistics.fmean(each.total_s for each in delays) * 1e3, 1),
        "slowest": _slowest(delays),
        "jobs_by_device": dict(sum((Counter(each.devices) for each in rushes), Counter())),
    }


def _slowest(delays: Sequence[Delay]) -> dict[str, Any]:
    """Where the time of the slowest hundredth of the jobs went, on the mean, and why they were where they were."""
    slowest = sorted(delays, key=lambda each: -each.total_s)[: max(1, len(delays) // 100)]
    parts = ("unplaced", "wait", "rest")
    return {
        **{
            f"{part}_ms": round(statistics.fmean(getattr(each, f"{part}_s") for each in slowest) * 1e3, 1)
            for part in parts
        },
        "devices": dict(Counter(each.device for each in slowest)),
        "reasons": dict(Counter(each.reason for each in slowest)),
    }


def _median_s(turns: Sequence[Turn]) -> float:
    return statistics.median(each.seconds for each in turns)


def _learned(fleet: MixedFleet, cards: Sequence[Card]) -> Turn:
    return rush(fleet.client, cards, [None] * len(cards))


def _learning(turns: Sequence[Turn]) -> dict[str, Any]:
    """Seconds of each deck, and what they took more than if each had been as quick as the last third's median."""
    seconds = [each.seconds for each in turns]
    settled = statistics.median(seconds[-max(1, len(seconds) // 3) :])
    return {
        "jobs_per_deck": len(DECK),
        "deck_seconds": [round(each, 3) for each in seconds],
        "seconds": round(sum(seconds), 3),
        "settled_deck_seconds": round(settled, 3),
        "excess_s": round(sum(seconds) - len(seconds) * settled, 3),
    }


def _warm(client: Client, decks: int) -> None:
    """Fills the shared memory once, which the first to write to it pays for, with jobs that teach nothing of ours."""
    band = np.ones((_WARM_SIDE, _WARM_SIDE), np.float32)
    turn_bytes = decks * sum(
        value.nbytes for card in DECK for value in card.arguments().values() if hasattr(value, "nbytes")
    )
    rows = [{"red": band, "nir": band}] * (turn_bytes // (4 * band.nbytes) + 1)
    jobs = [job for device in ("cpu", "fpga") for job in client.submit_many(_WARM_KERNEL, rows, device=device)]
    for job in jobs:
        job.result(timeout=60)


def _told(what: str, turn: Turn) -> Turn:
    where = ", ".join(f"{device} {count}" for device, count in sorted(turn.devices.items()))
    say(f"{what}: {turn.seconds:.2f} s ({where})")
    return turn


def _ratio(name: str, own: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    found = median_and_range([one / other for one, other in zip(own, others, strict=True)], 3)
    return {name: found["median"], f"{name}_range": found["range"]}


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    columns = ("", "seconds", "range", "p99 ms", "range", "mean ms", "keeps up", "jobs by device")
    keys = ("seconds", "seconds_range", "p99_ms", "p99_ms_range", "mean_ms", "keeps_up", "jobs_by_device")
    figures = {LEARNED: found[LEARNED], **found["fixed"]}
    rows = [
        (name, *(str(each.get(key, "")) if key in keys[-2:] else each[key] for key in keys))
        for name, each in figures.items()
    ]
    title = f"{found['jobs']} jobs at once; arriving, {found['arrivals_per_s']:,.0f} a second"
    yield report.table(title, columns, rows)
    ratios = [(name, found[name], found[f"{name}_range"]) for name in ("ratio_best_fixed", "ratio_best_fixed_p99")]
    yield report.table(
        f"learned over {found['best_fixed']}, {found['best_fixed_p99']}", ("", "median", "range"), ratios
    )
    parts = ("unplaced_ms", "wait_ms", "rest_ms", "devices", "reasons")
    yield report.table(
        "where the time of the slowest hundredth of the arriving jobs went",
        ("", *parts),
        [
            (name, *(each["slowest"][key] if key.endswith("_ms") else str(each["slowest"][key]) for key in parts))
            for name, each in figures.items()
        ],
    )
    learning = found["learning"]
    decks = enumerate(learning["deck_seconds"], 1)
    yield report.table("learning, from nothing", ("deck", "seconds"), [(str(number), each) for number, each in decks])
