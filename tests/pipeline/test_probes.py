from __future__ import annotations

import msgspec
import numpy as np
import pytest

from lepton_ai.device import Announcement, Peaks
from lepton_ai.event import Observation
from lepton_ai.job import Options
from lepton_ai.kernel import KernelSpec
from lepton_ai.placement.costs import CostModel
from lepton_ai.placement.problem import UNPLACED, Problem
from pipeline.cluster import Cluster
from pipeline.probes import Probes
from pipeline.window import Claim, ClaimedJob
from queues.broker import Kind

SPIN = KernelSpec("test.spin", {"n": "int64"}, {"y": "int64"}, "n", "0")
PEAKS = Peaks(1e4, 1e12, float("inf"), 0.0, 0.0)
CPU, GPU = 0, 1


class Bench:
    """Two devices, a model, and jobs that take a second on the cpu, which every one of them is given."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        self.cluster.refresh(
            Announcement(name, name, name, name, 1, False, PEAKS, (SPIN,), 0.0) for name in ("cpu", "gpu")
        )
        self.model = CostModel()
        self.probes = Probes(self.cluster, self.model)
        self._made = 0

    def measure(self, device: str, times: int = 2) -> None:
        for _ in range(times):
            self.model.learn(Observation("test.spin", device, 1, 1e4, 0.0, 0.0, 1.0), PEAKS)

    def job(self, kind: Kind = Kind.NEW, deadline_at: float | None = None, priority: int | None = None) -> ClaimedJob:
        self._made += 1
        options = Options(priority=priority)
        claim = Claim(kind, 0, "claim")
        line = (options.urgency, "test.spin", None)
        return ClaimedJob((str(self._made),), "test.spin", options, b"", claim, self._made, line, deadline_at)

    def choose(
        self, *jobs: ClaimedJob, gpu_s: float = 2.0, ready: float = 0.0, chosen: int = CPU, room: bool = True
    ) -> dict[int, int]:
        seconds = np.array([[1.0, gpu_s]] * len(jobs))
        problem = Problem(seconds, np.array([0.0, ready]), np.ones(2))
        return self.probes.choose(jobs, problem, [chosen] * len(jobs), 0.0, lambda _: room)


@pytest.fixture
def bench() -> Bench:
    made = Bench()
    made.measure("cpu")
    return made


def test_two_jobs_go_where_their_kernel_was_never_measured(bench: Bench) -> None:
    assert bench.choose(*[bench.job() for _ in range(5)]) == {0: GPU, 1: GPU}


def test_probes_that_are_under_way_count(bench: Bench) -> None:
    probe = bench.job()
    bench.probes.sent(probe, "gpu")
    assert bench.choose(*[bench.job() for _ in range(5)]) == {0: GPU}
    bench.probes.sent(bench.job(), "gpu")
    assert bench.choose(bench.job()) == {}
    bench.probes.ended(probe.ids)  # and taught nothing
    assert bench.choose(bench.job()) == {0: GPU}


def test_once_it_was_measured_nothing_is_forced(bench: Bench) -> None:
    bench.measure("gpu", 1)
    assert bench.choose(bench.job(), bench.job()) == {0: GPU}
    bench.measure("gpu", 1)
    assert bench.choose(bench.job(), bench.job()) == {}


def test_a_device_that_comes_later_is_probed_too(bench: Bench) -> None:
    bench.measure("gpu")
    assert bench.choose(bench.job()) == {}
    bench.cluster.refresh(
        Announcement(name, name, name, name, 1, False, PEAKS, (SPIN,), 0.0) for name in ("cpu", "tpu")
    )
    bench.probes.refresh()
    assert bench.choose(bench.job()) == {0: 1}


def test_a_job_is_no_probe_where_it_would_take_many_times_its_best(bench: Bench) -> None:
    assert bench.choose(bench.job(), gpu_s=3.9) == {0: GPU}
    assert bench.choose(bench.job(), gpu_s=4.1) == {}
    assert bench.choose(bench.job(), gpu_s=2.0, ready=2.1) == {}


def test_nor_one_that_is_urgent_or_a_suspect(bench: Bench) -> None:
    assert bench.choose(bench.job(priority=7)) == {}
    assert bench.choose(bench.job(priority=1)) == {0: GPU}
    assert bench.choose(bench.job(Kind.ALONE)) == {}


def test_nor_one_that_might_miss_its_deadline(bench: Bench) -> None:
    assert bench.choose(bench.job(deadline_at=19.0)) == {}  # it is predicted to take two seconds there, perhaps
    assert bench.choose(bench.job(deadline_at=21.0)) == {0: GPU}


def test_nor_where_the_device_has_no_room(bench: Bench) -> None:
    assert bench.choose(bench.job(), room=False) == {}


def test_nothing_is_forced_while_the_choice_itself_is_a_guess() -> None:
    assert Bench().choose(Bench().job()) == {}


def test_a_job_that_goes_nowhere_is_no_probe(bench: Bench) -> None:
    assert bench.choose(bench.job(), chosen=UNPLACED) == {}


def test_a_pinned_job_goes_where_it_is_pinned(bench: Bench) -> None:
    job = bench.job()
    pinned = msgspec.structs.replace(job, options=Options(device="cpu"))
    assert bench.choose(pinned, gpu_s=float("inf")) == {}


def test_a_device_is_probed_again_once_its_kernel_has_been_launched_often_elsewhere(bench: Bench) -> None:
    bench.measure("gpu")
    assert bench.choose(bench.job()) == {}
    bench.measure("cpu", 20)
    assert bench.choose(bench.job()) == {0: GPU}
