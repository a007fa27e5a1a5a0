from __future__ import annotations

import math

import pytest

from lepton_ai.device import Announcement, Peaks
from lepton_ai.event import Event, Observation
from lepton_ai.kernel import KernelSpec
from lepton_ai.placement.costs import CostModel
from pipeline.cluster import Cluster
from pipeline.regret import Regret

SPIN = KernelSpec("test.spin", {"n": "int64"}, {"y": "int64"}, "n", "0")
PEAKS = Peaks(1e4, 1e12, float("inf"), 0.0, 0.0)
INFINITE = float("inf")


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def regret(clock: Clock) -> Regret:
    cluster = Cluster()
    cluster.refresh(Announcement(name, name, name, name, 1, False, PEAKS, (SPIN,), 0.0) for name in ("cpu", "gpu"))
    return Regret(cluster, CostModel(), clock)


def told(regret: Regret) -> dict[str, float]:
    return {str(name): float(value) for _, _, name, value in regret.told()}


def succeeded(job: str, run_s: float | None = None) -> Event:
    seen = None if run_s is None else Observation("test.spin", "cpu", 1, 1000.0, 0.0, 0.0, run_s)
    return Event("job.succeeded", "worker", "test.spin", "cpu", (job,), seen)


def test_a_job_that_ended_later_than_it_would_have_elsewhere_is_regretted(regret: Regret, clock: Clock) -> None:
    regret.watch("a", 0, [0.0, 1.0], [2.0, 2.0])  # 3 s on the other
    clock.now_s = 5.0
    regret.ended(succeeded("a"))
    assert told(regret) == {"jobs": 1.0, "real_s": 5.0, "regret_s": 2.0}


def test_one_that_ended_sooner_is_not(regret: Regret, clock: Clock) -> None:
    regret.watch("a", 0, [0.0, 1.0], [2.0, 2.0])
    clock.now_s = 2.0
    regret.ended(succeeded("a"))
    assert told(regret) == {"jobs": 1.0, "real_s": 2.0}


def test_a_launch_is_held_against_what_is_known_now_of_the_others(regret: Regret) -> None:
    regret.watch("a", 0, [0.0, 0.0], [1.0, 1.0])
    regret.ended(succeeded("a", run_s=3.0))  # the other is predicted to take 1 s, as nothing was learned of it
    found = told(regret)
    assert found["hindsight_s"] == pytest.approx(2.0, rel=1e-6)
    assert found["ratio_4"] == 1.0
    assert found["ratios"] == pytest.approx(3.0, rel=1e-6)


def test_what_is_told_once_is_not_told_again(regret: Regret) -> None:
    regret.watch("a", 0, [0.0, 0.0], [1.0, 1.0])
    regret.ended(succeeded("a"))
    assert told(regret)
    assert told(regret) == {}
    regret.ended(succeeded("a"))
    assert told(regret) == {}


def test_a_job_without_a_choice_or_without_an_end_is_not_counted(regret: Regret) -> None:
    regret.watch("a", 0, [0.0, 0.0], [1.0, INFINITE])
    regret.watch("b", 0, [0.0, 0.0], [1.0, 1.0])
    regret.ended(succeeded("a"))
    regret.ended(Event("job.cancelled", "worker", jobs=("b",)))
    regret.ended(succeeded("b"))
    assert told(regret) == {}


def test_so_many_jobs_are_watched_and_no_more(regret: Regret, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.regret._MOST", 2)
    for job in "abc":
        regret.watch(job, 0, [0.0, 0.0], [1.0, 1.0])
    for job in "abc":
        regret.ended(succeeded(job))
    assert told(regret)["jobs"] == 2.0


@pytest.mark.parametrize("run_s", [math.nan, math.inf, -1.0])
def test_a_launch_that_cannot_have_been_is_held_against_nothing(regret: Regret, run_s: float) -> None:
    regret.watch("a", 0, [0.0, 0.0], [1.0, 1.0])
    regret.ended(succeeded("a", run_s))
    assert told(regret) == {"jobs": 1.0}
