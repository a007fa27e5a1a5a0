"""Whether small jobs go to the CPU and large ones to the stand-in, in small, and how the crossover is found."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bench.crossover import ACCELERATOR, CPU, Run, _run, _tables, crossing, measure, right_share
from bench.mixed_fleet import MixedFleet, mixed_fleet
from bench.stream import LADDER


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pins its workers to cores")
def test_placement_learns_from_what_jobs_cost_where_the_accelerator_begins() -> None:
    with mixed_fleet("test", (CPU, ACCELERATOR)) as fleet:
        assert _jobs_until_it_knows(fleet) <= 660
        found = measure(fleet, LADDER[::2], 0, 6, 5)
    smallest, largest = found["sizes"][0], found["sizes"][-1]
    assert smallest["cpu_ms"] < smallest["accelerator_ms"]
    assert largest["cpu_ms"] > largest["accelerator_ms"]
    assert smallest["accelerator_share"] < 0.5 < largest["accelerator_share"]
    assert 144 < found["found_pixels"] < 147_456
    assert found["right_share"] >= 0.8  # of few jobs; the bench has many and holds 0.95
    with Path("/dev/null").open("w") as nowhere:
        for table in _tables(found):
            Console(file=nowhere).print(table)


def _jobs_until_it_knows(fleet: MixedFleet) -> float:
    """How many jobs it takes until two decks in a row go right, but for sizes near the crossover.

    Twenty-two do as a rule; where the first launches met a busy host, a probe finds it out after a hundred or two.
    """
    chance, in_a_row = random.Random(1), 0
    for deck in range(1, 61):
        runs = [_run(fleet.client, card) for card in chance.sample(LADDER[::2], len(LADDER[::2]))]
        clear = [run for run in runs if not 2500 < run.pixels < 30_000]
        in_a_row = in_a_row + 1 if all((run.device == ACCELERATOR) == (run.pixels >= 30_000) for run in clear) else 0
        if in_a_row == 2:
            return deck * len(runs)
    return math.inf


def test_the_crossing_is_where_the_excess_changes_its_sign() -> None:
    assert crossing([1, 10, 100, 1000], [-2.0, -1.0, 1.0, 2.0]) == pytest.approx(10**1.5)
    assert crossing([1, 10, 100, 1000], [-2.0, -3.0, 1.0, 2.0]) == pytest.approx(10**1.75)


def test_noise_that_crosses_again_moves_the_crossing_little() -> None:
    assert crossing([1, 10, 100, 1000], [0.1, -2.0, 2.0, -0.1]) == pytest.approx(10**1.5)


@pytest.mark.parametrize("excess", [[1.0, 2.0], [-2.0, -1.0]])
def test_there_is_no_crossing_where_one_device_is_always_quicker(excess: list[float]) -> None:
    assert crossing([1, 10], excess) is None


def test_jobs_near_the_crossover_are_not_judged() -> None:
    runs = [
        Run(10, CPU, 1.0, is_probe=False),
        Run(10, ACCELERATOR, 1.0, is_probe=True),
        Run(60, ACCELERATOR, 1.0, is_probe=False),  # within a factor of 2
        Run(190, CPU, 1.0, is_probe=False),  # too
        Run(1000, ACCELERATOR, 1.0, is_probe=False),
        Run(1000, CPU, 1.0, is_probe=False),
    ]
    assert right_share(runs, 100.0) == 0.5
    assert right_share(runs, None) is None
    assert right_share(runs[2:4], 100.0) is None
