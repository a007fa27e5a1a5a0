from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.device import Announcement, Peaks, ResourceState
from lepton_ai.kernel import KernelSpec
from pipeline.cluster import Cluster

PEAKS = Peaks(1e9, 1e9, 1e9, 0.0, 0.0)


def spec(name: str, signature: str = "float32[n]") -> KernelSpec:
    return KernelSpec(name, {"x": signature}, {"y": signature}, "n", "8*n")


def worker(name: str, device: str, *, slots: int = 1, kernels: tuple[KernelSpec, ...] = ()) -> Announcement:
    return Announcement(name, f"{name}@host", device, device.partition(".")[0], slots, False, PEAKS, kernels, 0.0)


def cluster(*workers: Announcement) -> Cluster:
    found = Cluster()
    found.refresh(workers)
    return found


def test_devices_stand_in_the_order_of_their_names() -> None:
    found = cluster(worker("1", "gpu.h100"), worker("2", "cpu.big"), worker("3", "fpga"))
    assert [device.name for device in found.devices] == ["cpu.big", "fpga", "gpu.h100"]
    assert [device.kind for device in found.devices] == ["cpu", "fpga", "gpu"]


def test_the_workers_of_a_device_are_one_device_with_all_their_slots() -> None:
    found = cluster(worker("1", "cpu", slots=2), worker("2", "gpu"), worker("3", "cpu", slots=3))
    assert [(device.name, device.slots) for device in found.devices] == [("cpu", 5), ("gpu", 1)]


def test_a_device_offers_only_what_each_of_its_workers_can_run() -> None:
    """Any of them may take the job: one without the kernel would fail it."""
    both, one = spec("test.both"), spec("test.one")
    found = cluster(worker("1", "cpu", kernels=(both, one)), worker("2", "cpu", kernels=(both,)))
    assert found.devices[0].kernels == {"test.both"}


def test_a_kernel_whose_signature_cannot_be_read_here_is_not_offered_and_the_others_are() -> None:
    found = cluster(worker("1", "cpu", kernels=(spec("test.newer", "complex512<n>"), spec("test.known"))))
    assert found.offer("test.newer") is None
    assert found.offer("test.known") is not None
    assert found.devices[0].kernels == {"test.known"}


def test_the_spec_of_a_kernel_comes_with_its_signature() -> None:
    known = cluster(worker("1", "cpu", kernels=(spec("test.one"),))).offer("test.one")
    assert known is not None
    assert known.spec == spec("test.one")
    assert known.signature.dims({"x": [5]}) == {"n": 5}


def test_a_kernel_that_nobody_announces_is_unknown() -> None:
    assert cluster(worker("1", "cpu")).offer("test.one") is None


def test_the_same_workers_again_are_no_change() -> None:
    found = cluster(worker("1", "cpu"), worker("2", "gpu"))
    assert not found.refresh([worker("2", "gpu"), worker("1", "cpu")])


@pytest.mark.parametrize("names", [(), ("1",), ("1", "2", "3"), ("1", "3")])
def test_other_workers_are_a_change(names: tuple[str, ...]) -> None:
    found = cluster(worker("1", "cpu"), worker("2", "gpu"))
    assert found.refresh([worker(name, "cpu") for name in names])


def test_a_device_without_workers_is_gone_with_its_kernels() -> None:
    found = cluster(worker("1", "cpu", kernels=(spec("test.one"),)))
    found.refresh([])
    assert found.devices == ()
    assert found.offer("test.one") is None
    assert found.device("cpu") is None


@pytest.mark.parametrize(
    ("wanted", "fits"), [(None, True), ("gpu", True), ("gpu.h100", True), ("gpu.a100", False), ("cpu", False)]
)
def test_a_pin_names_a_device_or_its_kind(wanted: str | None, fits: bool) -> None:
    assert cluster(worker("1", "gpu.h100")).devices[0].matches(wanted) is fits


def test_work_is_outstanding_from_dispatch_until_the_job_has_finished() -> None:
    found = cluster(worker("1", "cpu"))
    found.dispatched("a", "cpu", 1.5)
    found.dispatched("b", "cpu", 2.0)
    assert (found.outstanding_s("cpu"), found.outstanding_jobs("cpu")) == (3.5, 2)
    found.finished("a")
    assert (found.outstanding_s("cpu"), found.outstanding_jobs("cpu")) == (2.0, 1)


def test_a_job_that_somebody_else_dispatched_changes_nothing_when_it_finishes() -> None:
    found = cluster(worker("1", "cpu"))
    found.dispatched("a", "cpu", 1.5)
    found.finished("another router's")
    assert found.outstanding_s("cpu") == 1.5


def test_others_jobs_make_room_as_they_end_and_not_at_the_next_count_only() -> None:
    found = Cluster()
    found.reconcile("cpu", 2)
    found.finished("another router's", "cpu")
    assert found.outstanding_jobs("cpu") == 1
    for job in ("two", "three"):
        found.finished(job, "cpu")
    assert found.outstanding_jobs("cpu") == 0


def test_what_others_have_on_a_queue_is_seen_behind_our_bundles() -> None:
    found = Cluster()
    for job in range(9):
        found.dispatched(str(job), "cpu", 1e-3, 1 / 9)
    found.dispatched("single", "cpu", 1e-3)
    found.reconcile("cpu", 5)  # messages, of which two are ours
    assert found.outstanding_jobs("cpu") == 10 + 3
    for job in range(9):
        found.finished(str(job), "cpu")
    found.reconcile("cpu", 4)
    assert found.outstanding_jobs("cpu") == 1 + 3


def test_a_job_that_is_dispatched_again_counts_where_it_went_last() -> None:
    found = cluster(worker("1", "cpu"), worker("2", "gpu"))
    found.dispatched("a", "cpu", 1.5)
    found.dispatched("a", "gpu", 0.5)
    assert (found.outstanding_s("cpu"), found.outstanding_s("gpu")) == (0.0, 0.5)
    assert (found.outstanding_jobs("cpu"), found.outstanding_jobs("gpu")) == (0, 1)


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(1e-9, 1e6)), max_size=60))
def test_nothing_is_left_over_when_every_job_has_finished(jobs: list[tuple[int, float]]) -> None:
    found = Cluster()
    for job, seconds in jobs:
        found.dispatched(str(job), "cpu", seconds)
    for job in range(10):
        found.finished(str(job))
    assert (found.outstanding_s("cpu"), found.outstanding_jobs("cpu")) == (0.0, 0)


def test_old_work_of_a_device_whose_queue_is_empty_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cluster(worker("1", "cpu"), worker("2", "gpu"))
    found.dispatched("a", "cpu", 1.5)
    found.dispatched("b", "gpu", 2.5)
    monkeypatch.setattr("pipeline.cluster._FORGET_S", -1.0)
    found.reconcile("cpu", 0)
    assert (found.outstanding_s("cpu"), found.outstanding_s("gpu")) == (0.0, 2.5)


def test_old_work_of_a_device_whose_queue_is_not_empty_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cluster(worker("1", "cpu"))
    found.dispatched("a", "cpu", 1.5)
    monkeypatch.setattr("pipeline.cluster._FORGET_S", -1.0)
    found.reconcile("cpu", 1)
    assert found.outstanding_s("cpu") == 1.5


def test_young_work_of_a_device_stays_though_its_queue_is_empty() -> None:
    """It was taken a moment ago, and runs."""
    found = cluster(worker("1", "cpu"))
    found.dispatched("a", "cpu", 1.5)
    found.reconcile("cpu", 0)
    assert found.outstanding_s("cpu") == 1.5


# -- the state of devices -------------------------------------------------------------------------------------------


def state(share: float = 1.0, reason: str = "", speed: float = 1.0) -> ResourceState:
    return ResourceState(0, 0.0, 0.0, 0, 1, speed=speed, share=share, reason=reason)


def test_a_device_that_has_told_nothing_may_be_given_all_of_its_work() -> None:
    found = cluster(worker("1", "cpu"))
    assert (found.share("cpu"), found.devices[0].speed, found.devices[0].reason) == (1.0, 1.0, "")


def test_a_device_is_as_its_worker_told_last() -> None:
    found = cluster(worker("1", "cpu", slots=4), worker("2", "gpu"))
    found.heard("1", state(0.2, "memory at 94%"))
    found.heard("1", state(0.5, "memory at 93%", 0.8))
    device = found.devices[0]
    assert (device.share, device.reason, device.speed, device.capacity) == (0.5, "memory at 93%", 0.8, 2.0)
    assert found.share("gpu") == 1.0


def test_the_workers_of_a_device_count_by_their_slots() -> None:
    found = cluster(worker("1", "cpu", slots=3), worker("2", "cpu", slots=1))
    found.heard("2", state(0.0, "hot", 0.6))
    assert (found.devices[0].share, found.devices[0].speed) == (0.75, pytest.approx(0.9))
    found.heard("1", state(0.0, "full"))
    assert (found.devices[0].share, found.devices[0].reason) == (0.0, "full; hot")


def test_a_device_without_a_share_can_run_nothing_and_still_serves_its_kernels() -> None:
    found = cluster(worker("1", "cpu", kernels=(spec("test.one"),)))
    found.heard("1", state(0.0, "hot"))
    assert not found.devices[0].can_run("test.one", None)
    assert found.devices[0].serves("test.one", None)
    assert found.devices[0].kernels == {"test.one"}


def test_a_device_that_comes_back_is_a_change_of_what_can_run_told_once() -> None:
    workers = [worker("1", "cpu")]
    found = cluster(*workers)
    found.heard("1", state(0.0, "hot"))
    assert not found.recovered
    found.heard("1", state(0.3))
    assert found.recovered
    assert found.refresh(workers)
    assert not found.recovered
    assert not found.refresh(workers)
    assert found.share("cpu") == 0.3


def test_a_state_is_forgotten_with_its_worker() -> None:
    found = cluster(worker("1", "cpu"))
    found.heard("1", state(0.0, "hot", 0.5))
    found.refresh([])
    found.refresh([worker("1", "cpu")])
    assert (found.share("cpu"), found.speed_of("1")) == (1.0, 1.0)


def test_the_state_of_a_worker_that_nobody_has_announced_changes_nothing() -> None:
    found = cluster(worker("1", "cpu"))
    found.heard("2", state(0.0, "hot", 0.5))
    assert (found.share("cpu"), found.speed_of("2")) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("share", "speed"),
    [(math.nan, 1.0), (math.inf, 1.0), (2.0, 1.0), (-1.0, 1.0), (0.5, 0.0), (0.5, -1.0), (0.5, math.nan)],
)
def test_a_state_that_no_device_can_be_in_changes_nothing(share: float, speed: float) -> None:
    found = cluster(worker("1", "cpu"))
    found.heard("1", state(0.25, "hot", 0.5))
    found.heard("1", state(share, "", speed))
    assert (found.share("cpu"), found.speed_of("1"), found.devices[0].reason) == (0.25, 0.5, "hot")


def test_a_worker_has_the_speed_that_it_told_last() -> None:
    found = cluster(worker("1", "cpu"), worker("2", "cpu"))
    found.heard("1", state(speed=0.5))
    assert (found.speed_of("1"), found.speed_of("2")) == (0.5, 1.0)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1), st.floats(0.05, 1)), max_size=20))
def test_share_and_speed_stay_between_the_least_and_the_most_of_the_workers(
    told: list[tuple[int, float, float]],
) -> None:
    found = cluster(*(worker(str(number), "cpu", slots=number + 1) for number in range(4)))
    shares, speeds = [1.0] * 4, [1.0] * 4
    for number, share, speed in told:
        found.heard(str(number), state(share, "", speed))
        shares[number], speeds[number] = share, speed
    device = found.devices[0]
    assert min(shares) - 1e-9 <= device.share <= max(shares) + 1e-9
    assert min(speeds) - 1e-9 <= device.speed <= max(speeds) + 1e-9
    assert (device.share == 0) == (max(shares) == 0)


def test_a_job_that_declares_an_absurd_size_leaves_nothing_behind_when_it_has_ended() -> None:
    found = cluster(worker("1", "cpu"))
    found.dispatched("small", "cpu", 1e-3)
    for job in "abc":
        found.dispatched(job, "cpu", 1e308)
    assert found.outstanding_s("cpu") < math.inf
    for job in "abc":
        found.finished(job)
    assert found.outstanding_s("cpu") == pytest.approx(1e-3, rel=1e-2)


def test_jobs_whose_ends_are_never_told_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster._MOST_OUTSTANDING", 3)
    found = cluster(worker("1", "cpu"))
    for job in "abcde":
        found.dispatched(job, "cpu", 1.0)
    found.dispatched("e", "cpu", 2.0)  # is known, and so no more than there were
    assert (found.outstanding_jobs("cpu"), found.outstanding_s("cpu")) == (3, 4.0)
