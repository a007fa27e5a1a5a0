"""Small jobs to the CPU, large ones to the accelerator: whether placement finds the size between them by itself.

`./lepton bench crossover [--quick] [--rounds N] [--json]`. One kernel, medical.median_filter, in images of three
decades of pixels, in random order, one job at a time, through a real broker, router and workers. The CPU computes
them; the accelerator is a stand-in that waits as long as it declares (bench/declared.py), as an emulator would need the
CPU's own cores. It announces better figures than it keeps, so only what jobs cost can tell where the two cross.

First the learning: decks of one job a size, from nothing. Then the decks that count: of each size, which share went to
the accelerator. Last each size is measured, pinned to either device: where their times cross is the true crossover. A
job is on the right side where the true crossover says so; sizes within a factor of 2 of it are not judged.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from rich.table import Table

from bench import report
from bench.contest import say
from bench.mixed_fleet import MixedFleet, mixed_fleet
from bench.stream import LADDER, Card, check
from lepton_ai import Client

__all__ = ["Run", "crossing", "main", "measure", "right_share"]

CPU, ACCELERATOR = "cpu", "gpu.declared"
LEARNING_DECKS, MEASURING_ROUNDS = 10, 9
#: Sizes so near to the crossover are not judged: there either device is right.
BAND = 2.0
_BAR = 0.95
_WAIT_S = 120.0


class Run(msgspec.Struct, frozen=True):
    """One job: where it ran, and what it cost there."""

    pixels: int
    device: str
    seconds: float
    """Transfer and run, as its worker told it."""
    is_probe: bool


def main() -> int:
    parser = report.parser(__doc__, rounds=30)
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    options = parser.parse_args()
    return report.play(lambda: _measure(options), _tables, plain=options.json)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    with mixed_fleet("crossover", (CPU, ACCELERATOR)) as fleet:
        if options.quick:
            return measure(fleet, LADDER[::2], 4, 4, 3)
        return measure(fleet, LADDER, LEARNING_DECKS, options.rounds, MEASURING_ROUNDS)


def measure(fleet: MixedFleet, ladder: Sequence[Card], learning: int, counted: int, rounds: int) -> dict[str, Any]:
    """The report: so many decks to learn from, so many that count, so many rounds of measuring."""
    client, chance = fleet.client, random.Random(1)
    learnt = [_run(client, card) for card in _decks(ladder, learning, chance)]
    say(f"learned from {len(learnt)} jobs")
    runs = [_run(client, card) for card in _decks(ladder, counted, chance)]
    say(f"placed {len(runs)} jobs")
    pinned = [(card, device) for card in _decks(ladder, rounds, chance) for device in (CPU, ACCELERATOR)]
    measured = [_run(client, card, device) for card, device in pinned]
    if difference := client.accounts().difference:
        raise ValueError(f"{difference} jobs are unaccounted for")
    sizes = [card.size**2 for card in ladder]
    cpu_s, accelerator_s = ([_median_s(measured, pixels, each) for pixels in sizes] for each in (CPU, ACCELERATOR))
    shares = [_share(runs, pixels) for pixels in sizes]
    crossover = crossing(sizes, [math.log(cpu / its) for cpu, its in zip(cpu_s, accelerator_s, strict=True)])
    right = right_share(runs, crossover)
    return {
        "kernel": ladder[0].kernel,
        "devices": [CPU, ACCELERATOR],
        "jobs": {"learning": len(learnt), "counted": len(runs), "measuring": len(measured)},
        "sizes": [
            {"pixels": pixels, "accelerator_share": share, "cpu_ms": cpu * 1e3, "accelerator_ms": its * 1e3}
            for pixels, share, cpu, its in zip(sizes, shares, cpu_s, accelerator_s, strict=True)
        ],
        "crossover_pixels": crossover,
        "found_pixels": crossing(sizes, [share - 0.5 for share in shares]),
        "probes": sum(each.is_probe for each in runs),
        "right_share": right,
        "right_share_of_learning": right_share(learnt, crossover),
        "bars": [
            {
                "bar": f"jobs on the right side, beyond a factor of {BAND:g} of the crossover",
                "at_least": _BAR,
                "value": right,
                "held": right is not None and right >= _BAR,
            }
        ],
    }


def crossing(sizes: Sequence[float], excess: Sequence[float]) -> float | None:
    """Where a rising function of the logarithm of the size passes through 0, by what it is at these sizes.

    Noise may make it cross more than once: the split with the least excess on its wrong sides counts. None where it has
    one sign throughout.
    """
    below = [0.0]
    for each in excess:
        below.append(below[-1] + each)
    # Splitting before `at`: what lies below should be negative in sum, and what lies above positive.
    at = min(range(len(excess) + 1), key=lambda at: below[at])
    if at in (0, len(excess)):
        return None
    low, high = excess[at - 1], excess[at]
    share = low / (low - high) if low < 0 < high else 0.5
    return float(sizes[at - 1] * (sizes[at] / sizes[at - 1]) ** share)


def right_share(runs: Sequence[Run], crossover: float | None) -> float | None:
    """Of the jobs clear of the crossover, the share that ran where it says; None where there is none."""
    if crossover is None:
        return None
    judged = [run for run in runs if max(run.pixels / crossover, crossover / run.pixels) > BAND]
    if not judged:
        return None
    return sum((run.device == ACCELERATOR) == (run.pixels > crossover) for run in judged) / len(judged)


def _decks(ladder: Sequence[Card], count: int, chance: random.Random) -> Iterator[Card]:
    for _ in range(count):
        yield from chance.sample(ladder, len(ladder))


def _run(client: Client, card: Card, device: str | None = None) -> Run:
    """One job, alone in the fleet, its result checked."""
    job = client.submit(card.kernel, card.arguments(), device=device)
    check(card, job.result(timeout=_WAIT_S))
    record = job.meta.record if job.meta is not None else None
    assert record is not None
    assert record.cost is not None
    placement = job.why() if device is None else None
    is_probe = placement is not None and placement.reason.startswith("a probe")
    return Run(card.size**2, record.cost.device, record.cost.transfer_s + record.cost.run_s, is_probe)


def _median_s(runs: Sequence[Run], pixels: int, device: str) -> float:
    return statistics.median(run.seconds for run in runs if (run.pixels, run.device) == (pixels, device))


def _share(runs: Sequence[Run], pixels: int) -> float:
    return statistics.fmean(run.device == ACCELERATOR for run in runs if run.pixels == pixels)


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    rows = [
        (f"{each['pixels']:,}", each["cpu_ms"], each["accelerator_ms"], f"{each['accelerator_share']:.0%}")
        for each in found["sizes"]
    ]
    cpu, accelerator = found["devices"]
    columns = ("pixels", f"{cpu} ms", f"{accelerator} ms", f"share on {accelerator}")
    yield report.table(f"{found['kernel']}, {found['jobs']['counted']} jobs one at a time", columns, rows)
    keys = ("crossover_pixels", "found_pixels", "probes", "right_share", "right_share_of_learning")
    yield report.table("the crossover", ("", ""), [(key, found[key]) for key in keys])
    bars = [(bar["bar"], bar["at_least"], bar["value"], "held" if bar["held"] else "NOT held") for bar in found["bars"]]
    yield report.table("the bar", ("", "to be at least", "is", ""), bars)
