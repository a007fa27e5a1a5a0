from __future__ import annotations

import math
from typing import Any

import pytest

from lepton_ai.errors import InvalidArguments
from lepton_ai.job import Estimate
from lepton_ai.kernel import DEVICE_KINDS
from lepton_ai.placement.demand import TYPICAL_S, Demand
from lepton_ai.placement.supply import Supply


def supply(name: str = "GPU", used: float = 0.0, **more: Any) -> Supply:
    return Supply.read(name, {"used": used, "total": 1.0} | more)


def demand(**fields: Any) -> Demand:
    return Demand.read("t", {"priority": 1} | fields)


def estimate(found: Demand, on: Supply) -> Estimate:
    candidate = found.on(on)
    assert candidate.excluded is None
    assert candidate.estimate is not None
    return candidate.estimate


def test_each_type_is_at_home_on_one_kind_of_device_and_has_seconds_for_all() -> None:
    for seconds in TYPICAL_S.values():
        assert set(seconds) == set(DEVICE_KINDS)
        best, next_best, *_ = sorted(seconds.values())
        assert best == 1 < next_best


def test_what_others_use_of_a_resource_makes_it_slower() -> None:
    assert estimate(demand(type="high"), supply(used=0.75)).run_s == pytest.approx(4)


def test_size_and_speed_are_factors() -> None:
    assert estimate(demand(type="high", size=6), supply(speed=2)).run_s == pytest.approx(3)


def test_data_reach_a_resource_at_its_bandwidth_whatever_others_use_of_it() -> None:
    found = estimate(demand(type="high", size_bytes=1e9), supply(used=0.5, bandwidth=2e9))
    assert (found.transfer_s, found.run_s) == (0.5, 2)


def test_seconds_are_for_all_or_by_kind_or_by_resource_whose_name_goes_first() -> None:
    assert estimate(demand(seconds=3), supply("FPGA")).run_s == 3
    by_name = demand(seconds={"gpu.h100": 1, "GPU": 2, "cpu": 7})
    assert estimate(by_name, supply("gpu.h100")).run_s == 1
    assert estimate(by_name, supply("gpu.a100")).run_s == 2
    assert estimate(by_name, supply("CPU")).run_s == 7


def test_seconds_of_a_kind_are_sped_up_and_those_of_a_very_resource_are_not() -> None:
    assert estimate(demand(seconds={"gpu": 4}), supply("GPU-0", speed=2)).run_s == 2
    assert estimate(demand(seconds={"GPU-0": 4}), supply("GPU-0", speed=2)).run_s == 4


def test_where_no_seconds_are_given_the_task_cannot_run_whatever_its_type() -> None:
    assert demand(type="low", seconds={"cpu": 1}).on(supply("GPU")).excluded == (
        "the task's seconds name neither it nor its kind"
    )


def test_a_full_resource_runs_nothing() -> None:
    assert demand(type="high").on(supply(used=1.0)).excluded == "full: 1 of 1 is used"


def test_a_task_needs_room() -> None:
    small = supply(memory_bytes=100)
    assert demand(type="high", memory_bytes=100).on(small).excluded is None
    assert demand(type="high", memory_bytes=101).on(small).excluded == (
        "the task needs 101 bytes of memory, there are 100"
    )


def test_a_resource_that_could_not_make_the_deadline_at_once_is_left_out_with_its_time() -> None:
    found = demand(type="medium", deadline_s=3).on(supply("GPU"))
    assert found.excluded == "it would take 4 s, and the deadline is 3 s"
    assert found.estimate is not None
    assert demand(type="medium", deadline_s=4).on(supply("GPU")).excluded is None


@pytest.mark.parametrize(
    ("pin", "able"), [("GPU-0", True), ("gpu", True), ("GPU", True), ("GPU-1", False), ("cpu", False)]
)
def test_a_pin_is_a_resource_or_a_kind(pin: str, able: bool) -> None:
    excluded = demand(type="high", device=pin).on(supply("GPU-0")).excluded
    assert excluded == (None if able else f"the task is pinned to {pin}")


@pytest.mark.parametrize("size", [1e12, 1.7e308])
def test_what_takes_decades_is_taken_as_never(size: float) -> None:
    excluded = demand(type="high", size=size).on(supply(used=0.5, speed=1e-300 if size > 1e300 else 1)).excluded
    assert excluded is not None
    assert excluded.endswith("which is taken as never")


@pytest.mark.parametrize(
    ("wrong", "field", "right"),
    [
        ({"type": "hihg"}, "type", "no type 'hihg'; did you mean 'high'?"),
        ({"type": "x"}, "type", "no type 'x'; there are high, medium, low"),
        ({"type": None}, "type", "no type None; there are high, medium, low"),
        ({"priority": 0}, "priority", "priority must be a whole number of at least 1, not 0"),
        ({"priority": 1.0}, "priority", "priority must be a whole number of at least 1, not 1.0"),
        ({"priority": "1"}, "priority", "priority must be a whole number of at least 1, not '1'"),
        ({"priority": True}, "priority", "priority must be a whole number of at least 1, not True"),
        ({"size": 0}, "size", "size must be a number above 0, not 0"),
        ({"seconds": -1}, "seconds", "seconds must be a number above 0, not -1"),
        ({"seconds": {}}, "seconds", "seconds must name a resource or a kind, and names none"),
        ({"seconds": {"gpu": math.nan}}, "seconds['gpu']", "seconds['gpu'] must be a number above 0, not nan"),
        ({"size_bytes": -1}, "size_bytes", "size_bytes must be a number of at least 0, not -1"),
        ({"memory_bytes": "1 GB"}, "memory_bytes", "memory_bytes must be a number of at least 0, not '1 GB'"),
        ({"deadline_s": 0}, "deadline_s", "deadline_s must be a number above 0, not 0"),
        ({"device": ""}, "device", "device must be a name, not ''"),
        ({"device": None}, "device", "device must be a name, not None"),
        ({"prioritty": 1}, "prioritty", "no field 'prioritty'; did you mean 'priority'?"),
        ({3: 1}, "3", "no field 3; there are priority, type, seconds"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(wrong: dict[Any, Any], field: str, right: str) -> None:
    with pytest.raises(InvalidArguments) as refused:
        Demand.read("t", {"type": "high", "priority": 1} | wrong)
    assert refused.value.message.startswith(f"task 't': {right}")
    assert refused.value.field == field


def test_a_type_is_needed_where_no_seconds_are_given_and_a_priority_always() -> None:
    with pytest.raises(InvalidArguments, match="type is missing; it is one of high, medium, low"):
        demand()
    with pytest.raises(InvalidArguments, match="priority is missing"):
        Demand.read("t", {"type": "low"})
    assert demand(type="HIGH").seconds["gpu"] == 1
