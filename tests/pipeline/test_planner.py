from __future__ import annotations

import subprocess
import sys
import threading

import msgspec
import numpy as np
import pytest

from lepton_ai.device import Announcement, Peaks
from lepton_ai.errors import InvalidSettings
from lepton_ai.event import Observation
from lepton_ai.job import Options
from lepton_ai.kernel import KernelSpec
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.policies.earliest_finish import EarliestFinish
from lepton_ai.placement.problem import Plan, Problem, planned
from lepton_ai.settings import Settings
from pipeline.cluster import Cluster
from pipeline.planner import DEEP, Planner
from pipeline.window import Claim, ClaimedJob
from queues.broker import Kind

SPIN = KernelSpec("test.spin", {"n": "int64"}, {"y": "int64"}, "n", "0")
SETTINGS = Settings(deep_policy="")
#: The devices of the fleet.
CPU, GPU = 0, 1
CLAIM = Claim(Kind.NEW, 0, "claim")


class Mine:
    """Everything on the first device."""

    name = "mine"

    def place(self, problem: Problem) -> Plan:
        return planned(problem, np.zeros(problem.jobs, np.intp))


class Failing:
    name = "externality"

    def place(self, problem: Problem) -> Plan:
        raise ZeroDivisionError


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


def place(planner: Planner, cluster: Cluster, *window: ClaimedJob, now: float = 0.0) -> list[int]:
    """Has these placed and dispatched; the devices they go to."""
    decision = planner.decide(window, cluster, now)
    device = decision.plan.device.tolist()
    planner.placed(window, decision, device, [True] * len(window))
    return device


def test_what_is_placed_is_learned_from_and_told_to_the_policy(cluster: Cluster) -> None:
    clock = [0.0]
    seen: list[Problem] = []

    class Watching(Mine):
        def place(self, problem: Problem) -> Plan:
            seen.append(problem)
            return planned(problem, np.full(problem.jobs, GPU))

    found = Planner(SETTINGS, CostModel(), Watching(), lambda: clock[0])
    for _ in range(1000):  # 10 ms each, and one comes every 20
        clock[0] += 0.02
        place(found, cluster, *jobs(1))
    assert found.typical_s == pytest.approx(0.01, rel=1e-3)
    last = seen[-1]
    assert last.typical_s == pytest.approx(0.01, rel=1e-3)
    assert last.pressure is not None
    assert last.pressure.tolist() == pytest.approx([0.0, 50 / (1 - 0.5)], rel=0.05)
    assert last.toll is not None


def test_of_other_devices_it_is_learned_anew(cluster: Cluster) -> None:
    found = planner()
    place(found, cluster, *jobs(3))
    assert found.typical_s > 0
    cluster.refresh([])
    found.decide([], cluster, 0.0)
    assert found.typical_s == 0


def test_terms_that_nobody_sets_are_not_in_the_problem(cluster: Cluster) -> None:
    found = planner().decide(jobs(3), cluster, 0.0).problem
    assert (found.weight, found.deadline, found.tail) == (None, None, None)


def test_priorities_are_weights(cluster: Cluster) -> None:
    found = planner().decide([*jobs(1, priority=9), *jobs(1), *jobs(1, priority=1)], cluster, 0.0).problem
    assert found.weight is not None
    assert found.weight.tolist() == [9 / 5, 1.0, 1 / 5]


def test_a_deadline_sends_a_job_from_what_is_quick_on_the_mean_to_what_is_sure(cluster: Cluster) -> None:
    model = CostModel()
    for turn in range(200):  # 10 ms on the mean, but now and then three times as long
        for name, run_s in (("cpu", 0.02), ("gpu", 0.03 if turn % 4 == 0 else 0.007)):
            device = cluster.device(name)
            assert device is not None
            model.learn(Observation("test.spin", name, 1, 100.0, 0.0, 0.0, run_s, dims=(100.0,)), device.peaks)
    found = Planner(SETTINGS, model)
    assert found.decide(jobs(1), cluster, 10.0).plan.device.tolist() == [GPU]
    hurried = found.decide(jobs(1, deadline_at=10.024), cluster, 10.0)
    assert hurried.plan.device.tolist() == [CPU]
    assert hurried.problem.deadline is not None
    assert hurried.problem.deadline.tolist() == pytest.approx([0.024])


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


def test_all_of_the_deep_policy_is_compiled_before_it_is_asked() -> None:
    """Its search takes seconds to compile, in which a router would lose its lease."""
    program = (
        "import threading; from pipeline.planner import DEEP, Planner; from lepton_ai.settings import Settings;"
        "from lepton_ai.placement.costs import CostModel;"
        "Planner(Settings(), CostModel()).wants(DEEP, 1);"
        "[each.join() for each in threading.enumerate() if each.name == 'compile'];"
        "from lepton_ai.placement import exchange; print(len(exchange._annealed.signatures))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.splitlines()[-1] == "1"


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


def test_the_default_for_a_deep_window_ends_it_sooner_than_job_by_job(cluster: Cluster) -> None:
    found = Planner(Settings(), CostModel())
    mixed = [*jobs(150, ms=10), *jobs(150, ms=1000)]
    found.wants(len(mixed), 10)
    loaded()
    by_job = found.decide(mixed, cluster, 0.0)
    together = found.decide(mixed, cluster, 0.0, is_deep=True)
    assert (by_job.policy, together.policy) == ("externality", "priced")
    assert together.plan.makespan_s(together.problem) <= by_job.plan.makespan_s(by_job.problem)


def test_a_deep_policy_that_there_is_not_is_refused_at_the_start() -> None:
    with pytest.raises(InvalidSettings, match=r"no policy 'prised'; there are .*priced"):
        planner(deep_policy="prised")


def test_the_deep_policy_rests_so_that_it_takes_a_part_of_the_time_only(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    found = Planner(
        msgspec.structs.replace(SETTINGS, deep_policy="earliest_finish"), CostModel(), None, lambda: clock[0]
    )
    found.wants(DEEP, 10)
    loaded()
    quickly = EarliestFinish.place

    def slowly(self: EarliestFinish, problem: Problem) -> Plan:
        clock[0] += 2.0
        return quickly(self, problem)

    monkeypatch.setattr(EarliestFinish, "place", slowly)
    assert found.wants(DEEP, 10)
    found.decide([*jobs(4, ms=10), *jobs(4)], cluster, 0.0, is_deep=True)
    clock[0] += 7.9  # it took two seconds, so it is not asked again for eight
    assert not found.wants(DEEP, 10)
    clock[0] += 0.2
    assert found.wants(DEEP, 10)


def test_a_deep_policy_that_takes_half_the_lease_is_not_asked_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    found = Planner(
        msgspec.structs.replace(SETTINGS, deep_policy="earliest_finish"), CostModel(), None, lambda: clock[0]
    )
    found.wants(DEEP, 10)
    loaded()
    quickly = EarliestFinish.place

    def slowly(self: EarliestFinish, problem: Problem) -> Plan:
        clock[0] += SETTINGS.lease_s * 0.6
        return quickly(self, problem)

    monkeypatch.setattr(EarliestFinish, "place", slowly)
    decision = found.decide([*jobs(4, ms=10), *jobs(4)], cluster, 0.0, is_deep=True)
    assert decision.policy == "earliest_finish"
    clock[0] += 1000.0
    assert not found.wants(DEEP, 10)


def test_a_deep_policy_that_fails_is_left_out_and_the_window_placed_as_ever(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = planner(deep_policy="earliest_finish")
    found.wants(DEEP, 10)
    loaded()
    assert found.wants(DEEP, 10)

    def fails(self: EarliestFinish, problem: Problem) -> Plan:
        raise ZeroDivisionError

    monkeypatch.setattr(EarliestFinish, "place", fails)
    decision = found.decide([*jobs(4, ms=10), *jobs(4)], cluster, 0.0, is_deep=True)
    assert (decision.policy, len(decision.plan.device)) == ("externality", 8)
    assert not found.wants(DEEP, 10)


def test_a_compiled_policy_that_fails_is_left_out_for_the_plain_one(cluster: Cluster) -> None:
    found = planner()
    window = jobs(400)
    plain = found.decide(window, cluster, 0.0).plan
    loaded()
    found._compiled = Failing()
    assert found.decide(window, cluster, 0.0).plan.device.tolist() == plain.device.tolist()
    assert found._compiled is None


def test_a_policy_of_ones_own_is_the_only_one(cluster: Cluster) -> None:
    found = Planner(Settings(), CostModel(), Mine())
    found.wants(DEEP, 1)
    assert found.decide([*jobs(400), *jobs(400, ms=1)], cluster, 0.0, is_deep=True).policy == "mine"
