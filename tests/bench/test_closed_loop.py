"""A closed loop in small: real workers, one of them the stand-in, a real router, and every result checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from bench import closed_loop, routing
from bench.mixed_fleet import MixedFleet, mixed_fleet
from bench.stream import DECK, stream
from bench.turn import Delay, arrive, rush

DEVICES = ("cpu", "gpu.declared")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pins its workers to cores")


@pytest.fixture(scope="module")
def held() -> Iterator[MixedFleet]:
    with mixed_fleet("test", DEVICES) as fleet:
        yield fleet


def test_the_router_uses_every_device_and_every_job_ends(held: MixedFleet) -> None:
    cards = stream(1, 1)
    turn = rush(held.client, cards, [None] * len(cards))
    assert turn.devices.keys() == set(DEVICES)
    assert sum(turn.devices.values()) == len(turn.costs) == len(DECK)
    accounts = held.client.accounts()
    assert accounts.difference == 0
    assert accounts.terms["succeeded"] >= len(DECK)


def test_a_fixed_routing_goes_where_it_says(held: MixedFleet) -> None:
    cards = stream(2, 1)
    turn = rush(held.client, cards, routing.one_device(cards, "gpu.declared"))
    assert turn.devices == {"gpu.declared": len(DECK)}
    assert {card for card, _, _ in turn.costs} == set(DECK)


def test_jobs_that_arrive_have_latencies_from_when_they_were_due(held: MixedFleet) -> None:
    cards = stream(3, 1)[:10]
    turn = arrive(held.client, cards, [None] * len(cards), [0.02 * number for number in range(len(cards))])
    assert len(turn.latencies_s) == len(cards)
    assert turn.seconds >= 0.18
    assert all(delay.device in DEVICES and ":" not in delay.reason for delay in turn.delays)
    assert 0 < turn.p99_ms() < 60_000


def test_the_slowest_hundredth_says_where_its_time_went_and_why_it_was_there() -> None:
    quick = [Delay(0.001, 0.001, 0.001, "cpu", "finishes first of 2 able devices")] * 198
    slow = [Delay(0.010, 0.300, 0.020, "gpu", "a probe"), Delay(0.030, 0.100, 0.040, "cpu", "costs the others least")]
    assert closed_loop._slowest([*quick, *slow]) == {
        "unplaced_ms": 20.0,
        "wait_ms": 200.0,
        "rest_ms": 30.0,
        "devices": {"gpu": 1, "cpu": 1},
        "reasons": {"a probe": 1, "costs the others least": 1},
    }


def test_learning_is_the_excess_over_what_it_settles_at() -> None:
    turns = [closed_loop.Turn(seconds, {}, []) for seconds in (4.0, 2.0, 1.0, 1.5, 1.0, 1.0)]
    found = closed_loop._learning(turns)
    assert found["deck_seconds"] == [4.0, 2.0, 1.0, 1.5, 1.0, 1.0]
    assert found["seconds"] == 10.5
    assert found["settled_deck_seconds"] == 1.0
    assert found["excess_s"] == 4.5


@pytest.mark.slow
def test_the_bench_compares_learned_placement_with_every_fixed_routing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["closed-loop", "--quick", "--json"])
    assert closed_loop.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fixed"].keys() == {"all_cpu", "all_fpga", "all_gpu", "all_tpu", "round_robin", "by_kernel", "by_size"}
    for each in (found["learned"], *found["fixed"].values()):
        assert each["seconds"] > 0
        assert each["p99_ms"] > 0
    assert len(found["learned"]["jobs_by_device"]) > 1
    assert found["best_fixed"] in found["fixed"]
    assert found["ratio_best_fixed"] == pytest.approx(
        found["learned"]["seconds"] / found["fixed"][found["best_fixed"]]["seconds"], rel=0.01
    )
    assert len(found["learning"]["deck_seconds"]) > 1
    with open("/dev/null", "w") as nowhere:  # noqa: PTH123
        for table in closed_loop._tables(found):
            Console(file=nowhere).print(table)
