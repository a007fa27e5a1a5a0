"""A contest is fair: everybody's turn comes once a round, results are checked, and CPU is counted by process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import cpu, synthetic
from bench.contest import Arena, Contender, Missing, Turn, rotated
from bench.load import NOOP, Load
from bench.peer import Place
from bench.throughput import summary


def test_each_comes_once_a_round_and_another_begins_each() -> None:
    found = list(rotated(["a", "b", "c"], 2))
    assert found == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a")]


def test_a_result_that_is_not_its_jobs_is_found() -> None:
    totals = [synthetic.noop(**row) for row in NOOP.rows(3)]
    NOOP.check(totals)
    with pytest.raises(ValueError, match="job 1 of noop"):
        NOOP.check([totals[0], totals[2], totals[1]])


def test_a_kernel_that_computes_gives_what_its_steps_give() -> None:
    load = Load("some", "bench.spin", 1000)
    totals = [synthetic.spin(**row) for row in load.rows(3)]
    load.check(totals)
    assert synthetic.loop(1000) != synthetic.loop(1001)


def test_a_kernel_takes_about_as_long_as_it_is_to() -> None:
    loops = synthetic.loops_of(0.002)
    assert 0.0005 < min(synthetic.cpu_s(loops) for _ in range(5)) < 0.008


def test_a_contender_whose_library_is_not_there_is_missing(tmp_path: Path) -> None:
    contender = Contender("nobody", Place("unix:///nowhere", str(tmp_path), 1), {})
    with contender, pytest.raises(Missing, match="not installed"):
        contender.start()


def test_ratios_are_taken_within_each_round() -> None:
    entered = {name: SimpleNamespace(settings="") for name in ("lepton", "celery", "huey", "raw_redis")}
    held: Any = SimpleNamespace(contenders=entered, missing={"dramatiq": "dramatiq is not installed"})

    def turns(*rates: float) -> list[Turn]:
        return [Turn(100, 100 / rate, {"client": 0.001}, {}, 1.0) for rate in rates]

    found = summary(
        held,
        {
            "lepton": turns(100, 300, 900),
            "celery": turns(10, 10, 10),
            "huey": turns(50, 100, 100),
            "raw_redis": turns(200, 400, 1000),
        },
    )
    assert found["best_peer"] == "huey"
    assert found["ratio_best_peer"] == 3
    assert found["ratio_best_peer_range"] == [2, 9]
    assert found["share_of_floor"] == 0.75
    assert found["lepton"]["cpu_us_per_job"] == 10
    assert found["lepton"]["idle_cpu_share"] is None
    assert found["dramatiq"] == {"missing": "dramatiq is not installed"}
    assert "ratio_two_hop" not in found


@pytest.mark.parametrize(
    "facts",
    [
        {"conservation_difference": 1, "placements_looked_at": 3, "placements_recorded": 3},
        {"conservation_difference": 0, "placements_looked_at": 3, "placements_recorded": 2},
    ],
)
def test_a_broken_promise_is_no_figure(facts: dict[str, int], broker_url: str) -> None:
    lepton: Any = SimpleNamespace(name="lepton", ask=lambda _: facts)
    fleet: Any = SimpleNamespace(broker_url=broker_url)
    with pytest.raises(ValueError, match="lepton broke a promise"):
        Arena(fleet, [lepton], {}).facts()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_cpu_is_counted_by_role_with_what_each_has_started() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        try:
            roles = {"mine": [os.getpid()], "other": [process.pid]}
            deadline = time.monotonic() + 30
            while len(cpu.families(roles)["other"]) < 2 or cpu.used_s(roles)["other"] < 0.3:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert cpu.families(roles)["mine"].isdisjoint(cpu.families(roles)["other"])
        finally:
            cpu.kill(cpu.families({"other": [process.pid]})["other"])
