from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import instances
from lepton_ai.errors import MissingPackage
from lepton_ai.placement import policies
from lepton_ai.placement.bounds import lower_bound
from lepton_ai.placement.prices import bound_s
from lepton_ai.placement.problem import UNPLACED, Plan, Problem

METHODS: tuple[Literal["lp", "dual"], ...] = ("lp", "dual")
SAME = 1 + 1e-9
#: Of the instances that are published, reproduced with HiGHS.
PUBLISHED = {
    "u_c_hihi.0": 7346524.18,
    "u_c_lohi.0": 238138.12,
    "u_i_hihi.0": 2909326.60,
    "u_i_lolo.0": 2529.03,
    "u_s_hilo.0": 95418.96,
    "u_s_lolo.0": 3414.81,
}


@st.composite
def tiny_problems(draw: st.DrawFn) -> Problem:
    """So few jobs and devices that all plans can be tried."""
    jobs, columns = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    needs = st.floats(0.01, 100) | st.sampled_from([1.0, math.inf])
    rows = draw(st.lists(st.lists(needs, min_size=columns, max_size=columns), min_size=jobs, max_size=jobs))
    class_of = draw(st.none() | st.lists(st.integers(0, columns - 1), min_size=1, max_size=3))
    devices = columns if class_of is None else len(class_of)
    ready = draw(st.lists(st.floats(0, 100) | st.just(0.0), min_size=devices, max_size=devices))
    slots = draw(st.lists(st.sampled_from([1.0, 1.0, 2.0, 8.0]), min_size=devices, max_size=devices))
    return Problem(
        np.array(rows, np.float64).reshape(jobs, columns),
        np.array(ready),
        np.array(slots),
        class_of=None if class_of is None else np.array(class_of),
    )


def optimum_s(problem: Problem) -> float:
    """The least makespan of all plans that leave no job out that can be run."""
    problem = problem.expanded()
    able = [[int(at) for at in np.flatnonzero(np.isfinite(row))] or [UNPLACED] for row in problem.seconds]
    nowhere = np.zeros(problem.jobs)
    return min(Plan(np.array(device, np.intp), nowhere).makespan_s(problem) for device in itertools.product(*able))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60)
@given(problem=tiny_problems())
def test_no_plan_at_all_ends_before_a_bound(method: Literal["lp", "dual"], problem: Problem) -> None:
    assert lower_bound(problem, method).seconds <= optimum_s(problem) * SAME


@settings(max_examples=60)
@given(problem=tiny_problems(), prices=st.lists(st.floats(0, 10), min_size=3, max_size=3))
def test_whatever_the_prices_they_prove_nothing_false(problem: Problem, prices: list[float]) -> None:
    problem = problem.served()
    assert bound_s(problem, np.array(prices[: problem.seconds.shape[1]])) <= optimum_s(problem) * SAME


@settings(max_examples=60)
@given(problem=tiny_problems())
def test_the_dual_is_never_above_the_linear_program(problem: Problem) -> None:
    assert lower_bound(problem, "dual").seconds <= lower_bound(problem, "lp").seconds * SAME


@settings(max_examples=60)
@given(problem=tiny_problems())
def test_a_job_alone_bounds_the_makespan(problem: Problem) -> None:
    expanded = problem.expanded()
    ends = (expanded.ready + expanded.seconds / expanded.slots).min(axis=1, initial=np.inf)
    longest_s = ends[np.isfinite(ends)].max(initial=0.0)
    if problem.class_of is None:
        assert lower_bound(problem).seconds >= longest_s


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shared", [False, True])
def test_the_dual_is_close_to_the_linear_program(seed: int, shared: bool) -> None:
    problem = instances.fleet(1_500, 24, 6, shared=shared, seed=seed).problem
    dual, lp = lower_bound(problem, "dual"), lower_bound(problem, "lp")
    assert (dual.method, lp.method) == ("dual", "lp")
    assert lp.seconds * (1 - 5e-4) <= dual.seconds <= lp.seconds * SAME


def test_a_device_that_is_ready_too_late_does_not_raise_the_bound() -> None:
    random = np.random.default_rng(1)
    seconds = random.uniform(1, 2, (40, 3))
    late = Problem(seconds, np.array([0.0, 1.0, 1e6]), np.ones(3))
    without = Problem(seconds[:, :2], late.ready[:2], np.ones(2))
    for method in METHODS:
        assert lower_bound(late, method).seconds == pytest.approx(lower_bound(without, method).seconds, rel=1e-4)


def test_a_class_of_devices_has_the_bound_of_its_devices() -> None:
    problem = instances.fleet(300, 12, 4, shared=True).problem
    for method in METHODS:
        one, other = lower_bound(problem, method).seconds, lower_bound(problem.expanded(), method).seconds
        assert one == pytest.approx(other, rel=1e-3)


def test_slots_divide_what_a_job_adds() -> None:
    problem = Problem(np.array([[8.0]]), np.array([1.0]), np.array([4.0]))
    assert lower_bound(problem).seconds == 3.0


def test_the_prices_of_a_bound_prove_it() -> None:
    problem = instances.braun("i", "hi", "hi", (64, 8)).problem
    for method in METHODS:
        bound = lower_bound(problem, method)
        assert bound.prices is not None
        assert bound_s(problem, bound.prices) == bound.seconds


@pytest.mark.parametrize("shape", [(0, 0), (0, 2), (2, 0)])
def test_where_nothing_is_to_be_done_the_bound_is_0(shape: tuple[int, int]) -> None:
    problem = Problem(np.ones(shape), np.zeros(shape[1]), np.ones(shape[1]))
    assert [lower_bound(problem, method).seconds for method in METHODS] == [0.0, 0.0]


def test_jobs_that_nobody_can_run_are_left_out() -> None:
    seconds = np.array([[1.0, 2.0], [np.inf, np.inf], [3.0, np.inf]])
    problem = Problem(seconds, np.zeros(2), np.ones(2))
    able = msgspec.structs.replace(problem, seconds=seconds[[0, 2]])
    assert lower_bound(problem).seconds == lower_bound(able).seconds


def test_without_highs_auto_takes_the_dual_and_lp_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = instances.braun("i", "lo", "lo", (64, 8)).problem
    monkeypatch.delitem(sys.modules, "lepton_ai.placement.relaxation", raising=False)
    monkeypatch.setitem(sys.modules, "highspy", None)
    assert lower_bound(problem).method == "dual"
    with pytest.raises(MissingPackage, match=r"highspy: .*lepton-ai\[solvers\]"):
        lower_bound(problem, "lp")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_bounds_of_the_published_instances_are_found(name: str) -> None:
    if (folder := os.environ.get("TEST_DATA")) is None:
        pytest.skip("TEST_DATA names no folder with the published instances (braun/u_*)")
    found = {instance.name: instance.problem for instance in instances.read(Path(folder) / "braun")}
    lp, dual = (lower_bound(found[name], method).seconds for method in METHODS)
    assert lp == pytest.approx(PUBLISHED[name], rel=3e-6)
    assert dual == pytest.approx(PUBLISHED[name], rel=3e-5)


@pytest.mark.parametrize("lowest", [-3, -30, -300])
def test_costs_that_are_many_powers_of_ten_apart_stop_neither_the_bound_nor_the_program(lowest: int) -> None:
    program = policies.load("linear_program")
    for seed in range(25):
        random = np.random.default_rng(seed)
        jobs, devices = int(random.integers(1, 12)), int(random.integers(1, 5))
        seconds = 10.0 ** random.uniform(lowest, -lowest * 2 / 3, (jobs, devices))
        problem = Problem(seconds, random.uniform(0, 10, devices), np.ones(devices))
        assert lower_bound(problem).seconds <= program.place(problem).makespan_s(problem) * (1 + 1e-9)


_OTHERS = """
import highspy, numpy
from bench import instances
from lepton_ai.placement.relaxation import relaxed
other = highspy.highs._Highs()
other.setOptionValue("output_flag", False)
other.setOptionValue("threads", {threads})
program = highspy.HighsLp()
program.num_col_, program.col_cost_ = 1, numpy.ones(1)
program.col_lower_, program.col_upper_ = numpy.zeros(1), numpy.ones(1)
other.passModel(program)
other.run()
print(relaxed(instances.braun("i", "lo", "lo", (64, 8)).problem).share.size)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_whoever_else_solves_in_the_process_with_however_many_threads_the_program_is_solved(threads: int) -> None:
    shared = int(subprocess.check_output([sys.executable, "-c", _OTHERS.format(threads=threads)]))
    assert shared > 64
