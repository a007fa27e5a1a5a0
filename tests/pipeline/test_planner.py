from __future__ import annotations

import subprocess
import sys
import threading

import msgspec
import numpy as np
import pytest

from lepton_ai.device import Announcement, Peaks
from lepton_ai.job import Options
from lepton_ai.kernel import KernelSpec
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.problem import Plan, Problem, planned
from lepton_ai.settings import Settings
from pipeline.cluster import Cluster
from pipeline.planner import DEEP, Planner
from pipeline.window import Claim, ClaimedJob
from queues.broker import Kind

SPIN = KernelSpec("test.spin", {"n": "int64"}, {"y": "int64"}, "n", "0")
SETTINGS = Settings(deep_policy="")
CLAIM = Claim(Kind.NEW, 0, "claim")


@pytest.fixture
def cluster() -> Cluster:
    found = Cluster()
    peaks = {"cpu": Peaks(1e4, 1e12, float("inf"), 0.0, 0.0), "gpu": Peaks(1e5, 1e12, float("inf"), 0.0, 0.0)}
    found.refresh(Announcement(name, name, name, name, 1, False, peaks[name], (SPIN,), 0.0) for name in peaks)
    return found


def planner(**settings: object) -> Planner:
    return Planner(msgspec.structs.replace(SETTINGS, **settings), CostModel())


def jobs(
    count: int, *, ms: int = 100, deadline_at: float | None = None, priority: int | None = None
) -> list[ClaimedJob]:
    options = Options(shapes={"n": ms}, priority=priority)
    line = (options.urgency, "test.spin", None)
    return [ClaimedJob((str(at),), "test.spin", options, b"", CLAIM, at, line, deadline_at) for at in range(count)]


def loaded() -> None:
    """Returns once everything that was begun in the background is there."""
    for thread in threading.enumerate():
        if thread.name == "compile":
            thread.join(60)


def test_the_default_is_externality(cluster: Cluster) -> None:
    assert Planner(Settings(), CostModel()).decide(jobs(3), cluster, 0.0).policy == "externality"


def test_the_mean_of_the_best_times_runs_on_from_window_to_window(cluster: Cluster) -> None:
    found = planner()
    assert found.decide(jobs(1, ms=100), cluster, 0.0).problem.typical_s == pytest.approx(0.01, rel=1e-6)
    second = found.decide(jobs(500, ms=1000), cluster, 0.0).problem.typical_s
    assert second == pytest.approx(0.1 + (0.01 - 0.1) * np.exp(-0.5), rel=1e-6)
    third = found.decide(jobs(5000, ms=1000), cluster, 0.0).problem.typical_s
    assert third == pytest.approx(0.1, rel=0.01)


def test_terms_that_nobody_sets_are_not_in_the_problem(cluster: Cluster) -> None:
    found = planner().decide(jobs(3), cluster, 0.0).problem
    assert (found.weight, found.deadline, found.tail) == (None, None, None)


def test_priorities_are_weights(cluster: Cluster) -> None:
    found = planner().decide([*jobs(1, priority=9), *jobs(1), *jobs(1, priority=1)], cluster, 0.0).problem
    assert found.weight is not None
    assert found.weight.tolist() == [9 / 5, 1.0, 1 / 5]


def test_a_deadline_sends_a_job_where_it_makes_it(cluster: Cluster) -> None:
    cluster.dispatched("long", "gpu", 0.5)
    late, early = jobs(1, ms=1000, deadline_at=100.0), jobs(1, ms=300, deadline_at=10.4)
    found = planner().decide([*late, *early], cluster, 10.0)
    assert found.plan.device.tolist() == [1, 0]
    assert found.problem.deadline is not None
    assert found.problem.deadline.tolist() == pytest.approx([90.0, 0.4])


def test_a_large_window_is_placed_plain_until_it_is_compiled_and_no_otherwise_then(cluster: Cluster) -> None:
    found = planner()
    window = jobs(400)
    plain = found.decide(window, cluster, 0.0).plan
    loaded()
    compiled = found.decide(window, cluster, 0.0).plan
    assert plain.device.tolist() == compiled.device.tolist()
    assert plain.wait.tolist() == pytest.approx(compiled.wait.tolist())


def test_a_router_of_small_windows_loads_no_numba() -> None:
    program = (
        "import sys, numpy as np; from pipeline.planner import Planner; from pipeline.cluster import Cluster;"
        "from lepton_ai.settings import Settings; from lepton_ai.placement.costs import CostModel;"
        "import pipeline.router;"
        "Planner(Settings(), CostModel()).decide([], Cluster(), 0.0); print('numba' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "False\n"


def test_the_deep_policy_is_asked_where_jobs_of_several_kinds_wait_for_room(cluster: Cluster) -> None:
    found = planner(deep_policy="earliest_finish")
    mixed = [*jobs(4, ms=10), *jobs(4, ms=100)]
    assert not found.wants(DEEP - 1, 10)
    assert not found.wants(DEEP, DEEP)
    found.wants(DEEP, 10)
    loaded()
    assert found.wants(DEEP, 10)
    assert found.decide(mixed, cluster, 0.0).policy == "externality"
    assert found.decide(jobs(8), cluster, 0.0, is_deep=True).policy == "externality"
    assert found.decide([*mixed, *jobs(1, deadline_at=9.0)], cluster, 0.0, is_deep=True).policy == "externality"
    assert found.decide(mixed, cluster, 0.0, is_deep=True).policy == "earliest_finish"


def test_the_deep_policy_rests_so_that_it_takes_a_part_of_the_time_only(cluster: Cluster) -> None:
    times = iter([0.0, 3.0, 5.0, 12.9, 13.1])  # it takes two seconds, so it is not asked again for eight
    found = Planner(msgspec.structs.replace(SETTINGS, deep_policy="earliest_finish"), CostModel(), None, times.__next__)
    found.wants(DEEP, 10)
    loaded()
    assert found.wants(DEEP, 10)
    found.decide([*jobs(4, ms=10), *jobs(4)], cluster, 0.0, is_deep=True)
    assert not found.wants(DEEP, 10)
    assert found.wants(DEEP, 10)


class Mine:
    """Everything on the first device."""

    name = "mine"

    def place(self, problem: Problem) -> Plan:
        return planned(problem, np.zeros(problem.jobs, np.intp))


def test_a_policy_of_ones_own_is_the_only_one(cluster: Cluster) -> None:
    found = Planner(Settings(), CostModel(), Mine())
    found.wants(DEEP, 1)
    assert found.decide([*jobs(400), *jobs(400, ms=1)], cluster, 0.0, is_deep=True).policy == "mine"
