from __future__ import annotations

import pytest

from lepton_ai.placement import gantt, policies
from lepton_ai.placement.demand import Demand
from lepton_ai.placement.schedule import Schedule
from lepton_ai.placement.supply import Supply

NASTY = "<script>alert('x')</script>"


def schedule() -> Schedule:
    supplies = [
        Supply.read("CPU", {"used": 0, "total": 1, "slots": 2}),
        Supply.read(f"GPU {NASTY}", {"used": 0, "total": 1}),
    ]
    tasks = {"a": {"type": "high"}, NASTY: {"type": "medium"}, "stuck": {"type": "low", "device": "fpga"}}
    demands = [Demand.read(name, {"priority": 1} | each) for name, each in tasks.items()]
    return Schedule(supplies, demands, policies.load("earliest_finish"))


def test_the_table_has_a_row_a_task_and_takes_no_name_for_markup() -> None:
    html = gantt.table(schedule())
    assert html.count("<tr>") == 4
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "<td>waiting</td>" in html
    assert "policy earliest_finish, makespan 1 s, at least 1 s" in html


def test_tasks_too_short_for_any_number_are_shown_all_the_same() -> None:
    shortest = Demand.read("a", {"priority": 1, "seconds": 5e-324, "size": 0.1})
    found = Schedule([Supply.read("CPU", {"used": 0, "total": 1})], [shortest], policies.load("earliest_finish"))
    assert "makespan 0 s" in gantt.table(found)


def test_the_chart_has_a_bar_a_placed_task_and_a_row_a_slot() -> None:
    pytest.importorskip("altair", reason="the chart needs the extra plot")
    found = gantt.chart(schedule()).to_dict()
    (values,) = found["datasets"].values()
    assert [(each["task"], each["start"], each["end"]) for each in values] == [("a", 0, 1), (NASTY, 0, 1)]
    assert found["encoding"]["y"]["scale"]["domain"] == ["CPU #1", "CPU #2", f"GPU {NASTY}"]
