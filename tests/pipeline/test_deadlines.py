from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai import wire
from lepton_ai.device import Announcement, Peaks, ResourceState
from lepton_ai.errors import DeadlineUnattainable
from lepton_ai.event import Observation
from lepton_ai.job import Options
from lepton_ai.kernel import KernelSpec
from lepton_ai.placement.costs import CostModel
from pipeline import intake
from pipeline.cluster import Cluster
from pipeline.deadlines import Backlog, backlog_of, combined, judged, list_number, unattainable
from pipeline.intake import Incoming, Refused
from pipeline.pricing import price
from pipeline.window import Window
from queues.broker import Kind

SPIN = KernelSpec("test.spin", {"n": "int64"}, {"y": "int64"}, "n", "0")
PEAKS = Peaks(1e6, 1e12, math.inf, 0.0, 0.0)
NOTHING = Backlog()
#: A job of so many operations takes about a second on the device that has been measured.
SECOND = 1_000_000


@pytest.fixture
def cluster() -> Cluster:
    found = Cluster()
    found.refresh([Announcement("1", "one", "cpu", "cpu", 2, False, PEAKS, (SPIN,), 0.0)])
    return found


def seen(n: int, run_s: float) -> Observation:
    return Observation("test.spin", "cpu", 1, n, 0.0, 1e-9, run_s, dims=(float(n),))


@pytest.fixture
def model() -> CostModel:
    """One that knows the cpu, without a doubt: a second for each million operations."""
    found = CostModel()
    for n in (1, 2, 3, 5, 8) * 60:
        found.learn(seen(n * SECOND, float(n)), PEAKS)
    return found


def options(n: int = SECOND, **asked: object) -> Options:
    return msgspec.structs.replace(Options(shapes={"n": n}, must_meet=True), **asked)


def refusal(cluster: Cluster, model: CostModel, left_s: float, backlog: Backlog = NOTHING, **asked: object) -> object:
    return unattainable("test.spin", options(**asked), left_s, backlog, cluster, model)


def test_a_deadline_that_is_far_enough_away_is_met(cluster: Cluster, model: CostModel) -> None:
    assert refusal(cluster, model, 2.0) is None


def test_one_that_is_shorter_than_the_job_is_refused_with_the_estimate(cluster: Cluster, model: CostModel) -> None:
    error = refusal(cluster, model, 0.5)
    assert isinstance(error, DeadlineUnattainable)
    assert error.estimate_s == pytest.approx(1.0, rel=0.2)
    assert error.field == "deadline_s"
    assert "it cannot end within 0.5 s: cpu" in error.message


def test_what_the_device_has_to_do_before_counts(cluster: Cluster, model: CostModel) -> None:
    assert refusal(cluster, model, 2.0, Backlog({"cpu": 1.0})) is None
    assert refusal(cluster, model, 2.0, Backlog({"cpu": 4.0})) is not None


def test_what_waits_and_is_as_urgent_counts_and_what_is_less_urgent_does_not(
    cluster: Cluster, model: CostModel
) -> None:
    backlog = Backlog(waiting=(0, 100, 0, 0, 0), typical_s=0.1)
    assert refusal(cluster, model, 2.0, backlog) is not None
    assert refusal(cluster, model, 2.0, backlog, priority=9) is None
    assert refusal(cluster, model, 2.0, backlog, priority=1) is not None


def test_the_spread_of_what_was_measured_counts(cluster: Cluster, model: CostModel) -> None:
    """A deadline is met nineteen times in twenty, not every other time."""
    for factor in (0.3, 3.0) * 20:
        model.learn(seen(SECOND, factor), PEAKS)
    assert refusal(cluster, model, 2.0) is not None


def test_the_device_where_it_ends_soonest_decides(cluster: Cluster, model: CostModel) -> None:
    cluster.refresh(
        [
            Announcement("1", "one", "cpu", "cpu", 2, False, PEAKS, (SPIN,), 0.0),
            Announcement("2", "two", "gpu", "gpu", 1, False, PEAKS, (SPIN,), 0.0),
        ]
    )
    for n in (1, 2, 3, 5, 8) * 60:
        model.learn(Observation("test.spin", "gpu", 1, n * SECOND, 0.0, 1e-9, n / 10), PEAKS)
    assert refusal(cluster, model, 0.5) is None
    assert refusal(cluster, model, 0.5, device="cpu") is not None
    assert refusal(cluster, model, 0.5, Backlog({"gpu": 3.0})) is not None


@pytest.mark.parametrize(("launches", "is_known"), [(0, False), (1, False), (2, True)])
def test_without_some_measurements_nobody_can_say(cluster: Cluster, launches: int, is_known: bool) -> None:
    model = CostModel()
    for _ in range(launches):
        model.learn(Observation("test.spin", "cpu", 1, SECOND, 0.0, 1e-9, 1.0), PEAKS)
    assert (refusal(cluster, model, 1e-9) is not None) is is_known


def test_a_device_that_was_only_probed_settles_nothing_by_how_far_out_the_first_guess_was(cluster: Cluster) -> None:
    """Ten times as slow as announced: that is an error of the announcement, and no spread."""
    model = CostModel()
    for _ in range(2):
        model.learn(Observation("test.spin", "cpu", 1, SECOND, 0.0, 1e-9, 100.0), PEAKS)
    window = Window("router", 1, 2**20)
    job = window.add(("job",), "test.spin", options(), b"", window.open_claim(Kind.NEW)[0])
    estimate = price([job], cluster, model).candidates[0][0].estimate
    assert estimate is not None
    assert refusal(cluster, model, 1.01 * estimate.finish_s) is None
    assert refusal(cluster, model, 0.99 * estimate.finish_s) is not None


def test_where_no_device_can_run_it_now_nobody_can_say(cluster: Cluster, model: CostModel) -> None:
    assert refusal(cluster, model, 1e-9, device="gpu") is None
    cluster.heard("1", ResourceState(0, 0.0, 0.0, 0, 1, share=0.0, reason="hot"))
    assert refusal(cluster, model, 1e-9) is None


def test_a_slower_device_is_reckoned_with_its_speed(cluster: Cluster, model: CostModel) -> None:
    cluster.heard("1", ResourceState(0, 0.0, 0.0, 0, 1, speed=0.25))
    assert refusal(cluster, model, 2.0) is not None


def test_a_job_that_is_not_due_yet_waits_anyway(cluster: Cluster, model: CostModel) -> None:
    backlog = Backlog({"cpu": 20.0})
    found = [
        unattainable("test.spin", options(), left_s, backlog, cluster, model, due_in_s=10.0) for left_s in (10.5, 12.0)
    ]
    assert found[0] is not None
    assert found[1] is None


@given(st.floats(0.01, 100.0), st.floats(0.0, 100.0), st.floats(0.0, 100.0))
def test_a_later_deadline_is_never_harder_and_more_work_never_easier(left_s: float, more_s: float, work: float) -> None:
    cluster = Cluster()
    cluster.refresh([Announcement("1", "one", "cpu", "cpu", 2, False, PEAKS, (SPIN,), 0.0)])
    model = CostModel()
    for _ in range(10):
        model.learn(Observation("test.spin", "cpu", 1, SECOND, 0.0, 1e-9, 1.0), PEAKS)
    if refusal(cluster, model, left_s, Backlog({"cpu": work})) is None:
        assert refusal(cluster, model, left_s + more_s, Backlog({"cpu": work})) is None
    else:
        assert refusal(cluster, model, left_s, Backlog({"cpu": work + more_s})) is not None


# -- at claim -------------------------------------------------------------------------------------------------------


def incoming(deadline_at: float | None, due_at: float | None = None) -> Incoming:
    message = wire.envelope("job", "test.spin", {"n": SECOND}, options())
    found = intake.read(message, 0.0)
    assert isinstance(found, Incoming)
    return msgspec.structs.replace(found, deadline_at=deadline_at, due_at=due_at)


@pytest.mark.parametrize(("deadline_at", "is_refused"), [(100.5, True), (102.0, False), (None, False), (99.0, False)])
def test_at_claim_it_is_what_is_left_that_counts(
    cluster: Cluster, model: CostModel, deadline_at: float | None, is_refused: bool
) -> None:
    """One that has expired already is left to expire."""
    found = judged(incoming(deadline_at), b"", 100.0, NOTHING, cluster, model)
    assert isinstance(found, Refused) is is_refused
    if isinstance(found, Refused):
        assert (found.outcome.job, found.outcome.status) == ("job", "failed")
        assert isinstance(found.error, DeadlineUnattainable)


def test_a_job_that_declares_no_shapes_is_opened_for_them(cluster: Cluster, model: CostModel) -> None:
    message = wire.envelope("job", "test.spin", {"n": SECOND}, Options(shapes={}))
    bare = msgspec.structs.replace(options(), shapes=None)
    assert unattainable("test.spin", bare, 0.5, NOTHING, cluster, model, message=message) is not None


# -- the backlog ----------------------------------------------------------------------------------------------------


def test_a_router_tells_what_devices_have_to_do_and_what_waits_by_its_urgency(cluster: Cluster) -> None:
    cluster.dispatched("job", "cpu", 1.5)
    window = Window("router", 10, 2**20)
    claim = window.open_claim(Kind.NEW)[0]
    for priority in (9, 7, None, 1):
        window.add(("x",), "test.spin", Options(priority=priority), b"", claim)
    assert backlog_of(cluster, window, 0.25) == Backlog({"cpu": 1.5}, (2, 1, 0, 0, 1), 0.25)


def test_of_several_routers_the_fullest_picture_of_a_device_counts_and_all_that_waits() -> None:
    told = [Backlog({"cpu": 1.0, "gpu": 5.0}, (1, 0, 0, 0, 0), 0.1), Backlog({"cpu": 2.0}, (0, 2, 0, 0, 0), 0.2)]
    assert combined(told, [0, 10, 0, 0, 3]) == Backlog({"cpu": 2.0, "gpu": 5.0}, (1, 12, 0, 0, 3), 0.2)


def test_without_a_router_only_the_lanes_are_known() -> None:
    assert combined([], [0, 4, 0, 0, 0]) == Backlog({}, (0, 4, 0, 0, 0), 0.0)


@pytest.mark.parametrize(
    "told",
    [
        Backlog(waiting=(1, 2)),
        Backlog(waiting=(1, 0, 0, 0, -1)),
        Backlog({"cpu": math.nan}),
        Backlog({"cpu": -1.0}),
        Backlog(typical_s=math.inf),
    ],
)
def test_what_no_router_of_this_release_could_have_told_is_seen(told: Backlog) -> None:
    assert not told.is_possible()
    assert NOTHING.is_possible()


def test_jobs_of_one_request_wait_behind_one_another() -> None:
    assert NOTHING.behind(3, 9) == Backlog(waiting=(3, 0, 0, 0, 0))


@pytest.mark.parametrize(("urgency", "number"), [(9, 0), (7, 0), (6, 1), (4, 1), (3, 2), (2, 3), (1, 4)])
def test_the_lists_of_a_lane_are_told_by_their_urgency(urgency: int, number: int) -> None:
    assert list_number(urgency) == number
