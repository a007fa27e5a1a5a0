from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_ai
from lepton_ai.errors import InvalidArguments, InvalidSettings, MissingPackage
from lepton_ai.kernel import DEVICE_KINDS
from lepton_ai.placement import policies
from lepton_ai.placement.demand import TYPICAL_S
from lepton_ai.scheduler import Scheduler

#: Those that look at what a task costs where. The article's example has one answer for all of them.
BY_COST = (
    "affinity",
    "auto",
    "earliest_finish",
    "externality",
    "genetic",
    "linear_program",
    "min_min",
    "priced",
    "sufferage",
)
#: CPU and GPU, as the article has them, and the other way round.
STATES = {"cpu freer": (0.4, 0.6), "gpu freer": (0.6, 0.4)}
IDLE = {"used": 0.0, "total": 1.0}

Strategy = dict[str, dict[str, str | None]]


def article(scheduler: Scheduler, third: str, state: tuple[float, float]) -> Scheduler:
    cpu, gpu = state
    scheduler.add_resource("CPU", {"used": cpu, "total": 1.0})
    scheduler.add_resource("GPU", {"used": gpu, "total": 1.0})
    scheduler.add_resource(third, {"used": 0.2, "total": 1.0})
    scheduler.add_task("TaskA", {"type": "high", "priority": 1})
    scheduler.add_task("TaskB", {"type": "medium", "priority": 2})
    scheduler.add_task("TaskC", {"type": "low", "priority": 3})
    return scheduler


def expected(third: str) -> Strategy:
    placed = {"TaskA": "GPU", "TaskB": "CPU", "TaskC": third}
    return {task: {"resource": resource, "status": "processing"} for task, resource in placed.items()}


def of(policy: str = "earliest_finish") -> Scheduler:
    return Scheduler(policy)


def one_gpu(task: dict[str, Any], **resource: Any) -> Scheduler:
    scheduler = of()
    scheduler.add_resource("GPU", IDLE | resource)
    scheduler.add_task("t", {"priority": 1} | task)
    return scheduler


# -- The article's example.


@pytest.mark.parametrize("policy", BY_COST)
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("third", ["FPGA", "TPU"])
def test_the_article_s_tasks_go_where_it_says(policy: str, state: tuple[float, float], third: str) -> None:
    options = {"seed": 1} if policy == "genetic" else {}
    scheduler = article(Scheduler(policy, **options), third, state)
    scheduler.calculate_strategy()
    assert scheduler.get_strategy() == expected(third)


def test_both_import_paths_are_the_same_class_and_the_policy_is_auto() -> None:
    assert lepton_ai.Scheduler is Scheduler
    assert article(Scheduler(), "FPGA", STATES["cpu freer"]).get_strategy() == expected("FPGA")


@pytest.mark.parametrize("policy", policies.names())
def test_every_policy_places_every_task_of_the_article(policy: str) -> None:
    strategy = article(of(policy), "FPGA", STATES["cpu freer"]).get_strategy()
    assert all(each["status"] == "processing" for each in strategy.values())


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
@pytest.mark.parametrize("third", ["FPGA", "TPU"])
def test_the_article_s_answer_is_the_optimum_and_no_other_comes_near(state: tuple[float, float], third: str) -> None:
    """So that no policy's way to break ties matters."""
    shares = {"cpu": 1 - state[0], "gpu": 1 - state[1], third.lower(): 0.8}
    best = {"high": "gpu", "medium": "cpu", "low": third.lower()}
    seconds = {(each, kind): TYPICAL_S[each][kind] / share for each in best for kind, share in shares.items()}
    makespan_s = max(seconds[pair] for pair in best.items())
    assert all(each > 1.9 * makespan_s for pair, each in seconds.items() if pair not in best.items())


def test_without_solvers_and_compiler_the_article_s_program_prints_the_same() -> None:
    program = """
import sys
for name in ("numba", "highspy", "pymoo", "altair", "river", "celery", "scipy", "pandas"):
    sys.modules[name] = None
from lepton_ai import Scheduler
for policy in ("auto", "externality"):
    scheduler = Scheduler(policy)
    scheduler.add_resource('CPU', {'used': 0.4, 'total': 1.0})
    scheduler.add_resource('GPU', {'used': 0.6, 'total': 1.0})
    scheduler.add_resource('FPGA', {'used': 0.2, 'total': 1.0})
    scheduler.add_task('TaskA', {'type': 'high', 'priority': 1})
    scheduler.add_task('TaskB', {'type': 'medium', 'priority': 2})
    scheduler.add_task('TaskC', {'type': 'low', 'priority': 3})
    scheduler.calculate_strategy()
    assert 0 < scheduler.lower_bound_s <= scheduler.makespan_s + 1e-9
    assert "<table>" in scheduler._repr_html_()
    print(scheduler.get_strategy())
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{expected('FPGA')}\n" * 2


def test_the_programs_in_the_docs_print_what_they_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scheduler.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    found = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert len(found) >= 3
    for program, output in found:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, names)
        assert printed.getvalue() == output


# -- When it is worked out.


def test_whoever_asks_first_has_it_worked_out() -> None:
    assert article(of(), "TPU", STATES["cpu freer"]).get_strategy() == expected("TPU")


def test_what_came_after_the_calculation_is_in_the_next_answer() -> None:
    scheduler = article(of(), "FPGA", STATES["cpu freer"])
    scheduler.calculate_strategy()
    scheduler.add_task("TaskD", {"type": "high", "priority": 4})
    assert set(scheduler.get_strategy()) == {"TaskA", "TaskB", "TaskC", "TaskD"}
    scheduler.remove_task("TaskA")
    scheduler.remove_resource("FPGA")
    scheduler.add_resource("FPGA", {"used": 1.0, "total": 1.0})
    strategy = scheduler.get_strategy()
    assert set(strategy) == {"TaskB", "TaskC", "TaskD"}
    assert strategy["TaskC"]["resource"] != "FPGA"


def test_a_strategy_in_hand_is_the_caller_s_own() -> None:
    scheduler = article(of(), "FPGA", STATES["cpu freer"])
    scheduler.get_strategy()["TaskA"]["resource"] = "mine"
    assert scheduler.get_strategy() == expected("FPGA")


def test_without_tasks_the_strategy_is_empty() -> None:
    scheduler = of()
    scheduler.calculate_strategy()
    assert (scheduler.get_strategy(), scheduler.explain(), scheduler.utilization()) == ({}, {}, {})
    assert scheduler.makespan_s == scheduler.lower_bound_s == 0
    scheduler.add_resource("GPU", IDLE)
    assert (scheduler.get_strategy(), scheduler.utilization()) == ({}, {"GPU": 0.0})


def test_tasks_without_a_resource_are_refused() -> None:
    scheduler = of()
    scheduler.add_task("t", {"type": "low", "priority": 1})
    for ask in (scheduler.calculate_strategy, scheduler.get_strategy, scheduler.explain, scheduler.utilization):
        with pytest.raises(InvalidArguments, match=r"no resource to run them: add_resource\(\) first"):
            ask()


# -- What it says of a strategy.


def test_a_task_that_no_resource_can_run_waits_and_says_why() -> None:
    scheduler = one_gpu({"type": "high", "memory_bytes": 9e9}, memory_bytes=8e9)
    scheduler.add_resource("CPU", {"used": 4, "total": 4})
    scheduler.add_task("fits", {"type": "high", "priority": 2})
    assert scheduler.get_strategy() == {
        "t": {"resource": None, "status": "waiting"},
        "fits": {"resource": "GPU", "status": "processing"},
    }
    why = scheduler.explain("t")
    assert why.resource is None
    assert why.reason == (
        "no resource can run it: GPU: the task needs 9000000000 bytes of memory, there are 8000000000; "
        "CPU: full: 4 of 4 is used"
    )


def test_an_explanation_has_what_each_resource_would_have_cost() -> None:
    scheduler = article(of(), "FPGA", STATES["cpu freer"])
    why = scheduler.explain("TaskC")
    found = {each.device: each.estimate for each in why.candidates}
    assert set(found) == {"CPU", "GPU", "FPGA"}
    assert all(found.values())
    cpu, fpga = found["CPU"], found["FPGA"]
    assert cpu is not None
    assert fpga is not None
    assert (fpga.wait_s, fpga.run_s) == (0, pytest.approx(1 / 0.8))
    assert (cpu.wait_s, cpu.run_s) == pytest.approx((1 / 0.6, 5 / 0.6))  # behind TaskB
    assert why.reason == "FPGA ends it first: 1.25 s against 10 s on CPU"
    assert scheduler.explain() == {task: scheduler.explain(task) for task in ("TaskA", "TaskB", "TaskC")}


def test_utilization_is_the_busy_share_of_the_makespan() -> None:
    scheduler = of()
    for name in ("GPU-0", "GPU-1", "TPU"):
        scheduler.add_resource(name, IDLE)
    scheduler.add_task("long", {"seconds": {"GPU-0": 4}, "priority": 1})
    scheduler.add_task("short", {"seconds": {"GPU-1": 1}, "priority": 1})
    assert scheduler.makespan_s == pytest.approx(4)
    assert scheduler.utilization() == pytest.approx({"GPU-0": 1, "GPU-1": 0.25, "TPU": 0})


def test_the_cheapest_strategy_uses_the_time_that_it_is_given() -> None:
    def cost(**options: Any) -> float:
        scheduler = Scheduler("linear_program", **options)
        scheduler.add_resource("GPU", IDLE | {"rate": 10})
        scheduler.add_resource("CPU", IDLE | {"rate": 1, "slots": 2})
        for at in range(4):
            scheduler.add_task(str(at), {"seconds": {"gpu": 1, "cpu": 2}, "priority": 1})
        return scheduler.cost

    # Two at 10 and two at 2 * 1/2; with twice the time, the GPU may stay idle.
    assert cost(objective="makespan") == pytest.approx(22)
    assert cost(objective="cost", slack=1) == pytest.approx(4)


def test_unknown_tasks_and_resources_are_refused_with_the_one_that_was_meant() -> None:
    scheduler = article(of(), "FPGA", STATES["cpu freer"])
    with pytest.raises(InvalidArguments, match=r"no task 'taskA'; did you mean 'TaskA'\?"):
        scheduler.explain("taskA")
    with pytest.raises(InvalidArguments, match="no task 'x'; there are TaskA, TaskB, TaskC"):
        scheduler.remove_task("x")
    with pytest.raises(InvalidArguments, match=r"no resource 'gpu'; did you mean 'GPU'\?"):
        scheduler.remove_resource("gpu")


# -- What is refused.


def test_an_unknown_policy_is_refused_at_once() -> None:
    with pytest.raises(InvalidSettings, match=r"no policy 'fastest'; there are .*earliest_finish"):
        Scheduler("fastest")


def test_a_name_that_is_taken_is_refused_and_what_had_it_stays() -> None:
    scheduler = article(of(), "FPGA", STATES["cpu freer"])
    with pytest.raises(InvalidArguments, match=r"there is a task 'TaskA' already: .* remove_task\('TaskA'\)"):
        scheduler.add_task("TaskA", {"type": "low", "priority": 9})
    with pytest.raises(InvalidArguments, match=r"there is a resource 'CPU' already"):
        scheduler.add_resource("CPU", IDLE)
    assert scheduler.get_strategy() == expected("FPGA")


@pytest.mark.parametrize("name", ["", None, 3, ("GPU",), b"GPU"])
def test_a_name_is_a_text(name: Any) -> None:
    for add in (of().add_resource, of().add_task):
        with pytest.raises(InvalidArguments, match="must be a text with something in it") as refused:
            add(name, {})
        assert refused.value.field == "name"


def test_what_is_refused_is_not_added() -> None:
    scheduler = article(of(), "FPGA", STATES["cpu freer"])
    with pytest.raises(InvalidArguments):
        scheduler.add_task("TaskD", {"type": "huge", "priority": 1})
    with pytest.raises(InvalidArguments):
        scheduler.add_resource("TPU", {"used": 2, "total": 1})
    assert scheduler.get_strategy() == expected("FPGA")
    assert set(scheduler.utilization()) == {"CPU", "GPU", "FPGA"}


# -- In a notebook.


def test_a_notebook_shows_a_table_also_before_there_is_anything_to_place() -> None:
    scheduler = of()
    assert "<table>" in scheduler._repr_html_()
    scheduler.add_task("t", {"type": "low", "priority": 1})
    assert "no resource" in scheduler._repr_html_()
    scheduler.add_resource("GPU", IDLE)
    assert "<td>GPU</td><td>processing</td>" in scheduler._repr_html_()


def test_a_plot_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(MissingPackage, match=r"altair: pip install 'lepton-ai\[plot\]'"):
        article(of(), "FPGA", STATES["cpu freer"]).plot()


# -- For all inputs.

shares = st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0])
resources = st.fixed_dictionaries(
    {"used": shares, "total": st.just(1.0), "kind": st.sampled_from(DEVICE_KINDS)},
    optional={
        "speed": st.floats(0.1, 10),
        "slots": st.integers(1, 4),
        "memory_bytes": st.floats(0, 1e10),
        "bandwidth": st.floats(1e6, 1e11),
    },
)
kinds_seconds = st.dictionaries(st.sampled_from([*DEVICE_KINDS, "r0", "R1"]), st.floats(1e-4, 1e3), min_size=1)
tasks = st.fixed_dictionaries(
    {"type": st.sampled_from(sorted(TYPICAL_S)), "priority": st.integers(1, 5)},
    optional={
        "seconds": st.floats(1e-4, 1e3) | kinds_seconds,
        "size": st.floats(0.01, 100),
        "size_bytes": st.floats(0, 1e10),
        "memory_bytes": st.floats(0, 1e10),
        "deadline_s": st.floats(1e-3, 1e3),
        "device": st.sampled_from([*DEVICE_KINDS, "r0"]),
    },
)
FAST = [name for name in policies.names() if name not in {"genetic", "linear_program", "auto"}]


@settings(max_examples=60, deadline=None)
@given(
    policy=st.sampled_from(FAST),
    given_resources=st.lists(resources, min_size=1, max_size=4),
    given_tasks=st.lists(tasks, max_size=8),
)
def test_every_task_is_answered_and_runs_where_it_can_or_waits_where_nobody_can(
    policy: str, given_resources: list[dict[str, Any]], given_tasks: list[dict[str, Any]]
) -> None:
    scheduler = Scheduler(policy)
    for at, resource in enumerate(given_resources):
        scheduler.add_resource(f"r{at}", resource)
    for at, task in enumerate(given_tasks):
        scheduler.add_task(f"t{at}", task)
    strategy = scheduler.get_strategy()
    assert list(strategy) == [f"t{at}" for at in range(len(given_tasks))]
    for task, found in strategy.items():
        able = {each.device for each in scheduler.explain(task).candidates if each.excluded is None}
        if found["status"] == "waiting":
            assert (found["resource"], able) == (None, set())
        else:
            assert found["status"] == "processing"
            assert found["resource"] in able
    assert all(0 <= share <= 1 + 1e-9 for share in scheduler.utilization().values())
    assert scheduler.lower_bound_s <= scheduler.makespan_s * (1 + 1e-6)
    assert scheduler._repr_html_().count("<tr>") == 1 + len(given_tasks)


anything = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5) | st.lists(st.none())


@given(
    fields=st.dictionaries(
        st.sampled_from(["used", "total", "kind", "slots", "type", "priority", "seconds", "size", "device", "?"]),
        anything,
    )
)
def test_whatever_it_is_told_it_takes_or_refuses_by_name(fields: dict[str, Any]) -> None:
    refusals = []
    for add in (of().add_resource, of().add_task):
        try:
            add("gpu", fields)
        except InvalidArguments as refused:
            refusals.append(refused)
    assert all(refused.field for refused in refusals)
