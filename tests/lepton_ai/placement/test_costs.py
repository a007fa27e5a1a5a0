from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.truth import Truth, measured
from lepton_ai.device import Peaks
from lepton_ai.event import Observation
from lepton_ai.job import Estimate
from lepton_ai.placement.costs import CostModel, Size, Sizes

PEAKS = Peaks(1e9, 1e10, 1e8, 1e-4, 1e-5)
SIZE = Size(flops=1e7, bytes=1e6)  # at the peaks: 10 ms for the flops, 0.1 ms for the bytes
FLOPS_S = 1e-2
PEAKS_S = 1.01e-2


def launch(run_s: float, kernel: str = "k", device: str = "d", **more: Any) -> Observation:
    found: dict[str, Any] = {"jobs": 1, "flops": SIZE.flops, "bytes": SIZE.bytes, "transfer_s": 0.0}
    return Observation(kernel, device, run_s=run_s, **(found | more))


def predicted(model: CostModel, size: Size = SIZE, kernel: str = "k", device: str = "d") -> Estimate:
    return model.predict(kernel, device, size, PEAKS)


def taught(*seconds: float) -> CostModel:
    model = CostModel()
    for run_s in seconds:
        model.learn(launch(run_s), PEAKS)
    return model


def test_before_anything_was_measured_a_tenth_of_the_peaks_is_expected() -> None:
    assert predicted(CostModel()).run_s == pytest.approx(PEAKS.launch_s + 10 * PEAKS_S)


def learned_from(fixed_s: float, slowness: float, noise: list[float], sizes: list[float]) -> CostModel:
    """A model that saw launches of a hidden straight line, each off by exp(noise)."""
    model = CostModel()
    for size, off in zip(sizes, noise, strict=True):
        flops = SIZE.flops * size
        model.learn(launch((fixed_s + slowness * FLOPS_S * size) * math.exp(off), flops=flops, bytes=0.0), PEAKS)
    return model


@pytest.mark.parametrize("fixed_s", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize("slowness", [0.5, 3.0, 40.0])
def test_fixed_cost_and_slowness_are_learned_apart(fixed_s: float, slowness: float) -> None:
    sizes = [10.0 ** (-(at % 5)) for at in range(100)]
    model = learned_from(fixed_s, slowness, [0.0] * 100, sizes)
    for size in (1.0, 0.01, 0.0001):
        expected = fixed_s + slowness * FLOPS_S * size
        assert predicted(model, Size(SIZE.flops * size, 0)).run_s == pytest.approx(expected, rel=0.15)


@given(
    st.floats(1e-6, 1e-3),
    st.floats(0.1, 100),
    st.lists(st.tuples(st.floats(-0.3, 0.3), st.sampled_from([1e-4, 1e-2, 1.0])), min_size=60, max_size=80),
)
def test_a_hidden_line_is_learned_through_the_noise(
    fixed_s: float, slowness: float, seen: list[tuple[float, float]]
) -> None:
    noise, sizes = map(list, zip(*seen, strict=True))
    model = learned_from(fixed_s, slowness, noise, sizes)
    size = sizes[-1]
    found = predicted(model, Size(SIZE.flops * size, 0)).run_s
    assert 0.5 < found / (fixed_s + slowness * FLOPS_S * size) < 2


def test_one_shape_alone_is_predicted_after_a_few_launches() -> None:
    assert predicted(taught(*[0.02] * 10)).run_s == pytest.approx(0.02, rel=0.1)


def test_a_device_that_slowed_down_is_believed_after_some_launches() -> None:
    model = taught(*[FLOPS_S] * 200, *[4 * FLOPS_S] * 150)
    assert predicted(model).run_s == pytest.approx(4 * FLOPS_S, rel=0.15)


def test_the_spread_grows_with_the_noise() -> None:
    quiet, some, much = (
        predicted(taught(*(FLOPS_S * math.exp(noise * (-1) ** at) for at in range(200)))).spread
        for noise in (0.0, 0.1, 0.5)
    )
    assert quiet < 0.02 < some < 0.2 < much < 1.0


def test_the_launches_of_each_kernel_on_each_device_are_counted() -> None:
    model = taught(1.0, 2.0)
    assert model.launches("k", "d") == 2
    assert model.launches("k", "other") == model.launches("other", "d") == 0


def test_two_launches_are_enough_and_one_more_each_time_that_all_have_doubled() -> None:
    model = CostModel()
    assert model.enough("k") == 2
    for count, enough in ((2, 2), (3, 2), (4, 3), (8, 4), (1000, 10)):
        model = taught(*[0.02] * count)
        assert model.enough("k") == enough
    model.learn(launch(0.02, device="other"), PEAKS)
    assert model.enough("k") == 9


def test_memory_bounds_a_job_of_few_flops() -> None:
    assert predicted(CostModel(), Size(0, 1e9)).run_s == pytest.approx(PEAKS.launch_s + 10 * 0.1)


def test_transfer_is_learned_over_the_bytes_of_the_arguments() -> None:
    model = CostModel()
    for at in range(60):
        size = 10.0 ** (3 + at % 5)
        model.learn(launch(1.0, transfer_s=4e-4 + size * 3e-8, transfer_bytes=size), PEAKS)
    assert predicted(model, Size(0, 0, 1e6)).transfer_s == pytest.approx(4e-4 + 3e-2, rel=0.15)


def test_each_kernel_on_each_device_is_learned_apart() -> None:
    model = taught(5.0)
    fresh = predicted(CostModel()).run_s
    assert predicted(model, kernel="other").run_s == fresh
    assert predicted(model, device="other").run_s == fresh


def test_a_small_job_that_waited_for_a_busy_host_does_not_tell_what_a_byte_costs() -> None:
    model = CostModel()
    sizes = [4e3, 2e4, 4e3, 1e4, 2e4, 4e3]
    for at, size in enumerate(sizes * 10):
        busy_s = {1: 2e-3, 3: 5e-3}.get(at, 0.0)
        model.learn(launch(1.0, transfer_s=4e-4 + busy_s, transfer_bytes=size), PEAKS)
    assert 4e-4 / 1.5 < predicted(model, Size(0, 0, 1e4)).transfer_s < 4e-4 * 1.5
    assert predicted(model, Size(0, 0, 1e6)).transfer_s < 5e-3


@pytest.mark.parametrize("factor", [0.3, 3.0, 10.0])
def test_a_link_that_has_changed_for_good_is_believed(factor: float) -> None:
    model = CostModel()
    for at in range(400):
        size = 1e4 * 10 ** (at % 3)
        slower = factor if at >= 200 else 1.0
        model.learn(launch(1.0, transfer_s=slower * (4e-4 + 5e-10 * size), transfer_bytes=size), PEAKS)
    for size in (1e4, 1e5, 1e6):
        assert predicted(model, Size(0, 0, size)).transfer_s == pytest.approx(factor * (4e-4 + 5e-10 * size), rel=0.3)


def test_before_anything_was_measured_a_transfer_costs_its_latency_and_its_bytes() -> None:
    assert predicted(CostModel(), Size(0, 0, 1e8)).transfer_s == pytest.approx(1e-4 + 1.0 + 0.1)


def test_an_estimate_has_no_wait_of_its_own() -> None:
    assert predicted(CostModel()).wait_s == 0


@given(st.floats(0, 1e15), st.floats(0, 1e15), st.lists(st.floats(1e-9, 1e6), max_size=5))
def test_more_work_never_costs_less(flops: float, more: float, seconds: list[float]) -> None:
    model = taught(*seconds)
    assert predicted(model, Size(flops, 0)).run_s <= predicted(model, Size(flops + more, 0)).run_s


# -- snapshots --------------------------------------------------------------------------------------------------------

lessons = st.lists(
    st.tuples(st.sampled_from(["k", "l"]), st.sampled_from(["d", "e"]), st.floats(1e-6, 1e3)), max_size=20
)


def predictions(model: CostModel) -> list[Estimate]:
    return [predicted(model, kernel=kernel, device=device) for kernel in ("k", "l", "m") for device in ("d", "e")]


@given(lessons)
def test_a_model_restored_from_a_snapshot_predicts_the_same(lessons: list[tuple[str, str, float]]) -> None:
    model, restored = CostModel(), CostModel()
    for kernel, device, run_s in lessons:
        model.learn(launch(run_s, kernel, device), PEAKS)
    restored.restore(model.snapshot())
    assert predictions(restored) == predictions(model)


def test_what_rests_on_more_launches_is_kept_when_a_snapshot_is_restored() -> None:
    mine, theirs = taught(1.0, 1.0, 1.0), taught(9.0)
    mine.restore(theirs.snapshot())
    assert predictions(mine) == predictions(taught(1.0, 1.0, 1.0))


def test_what_rests_on_fewer_launches_is_replaced_when_a_snapshot_is_restored() -> None:
    mine, theirs = taught(1.0), taught(9.0, 9.0)
    mine.restore(theirs.snapshot())
    assert predictions(mine) == predictions(theirs)


def test_a_restored_model_goes_on_learning_where_the_other_stopped() -> None:
    model, restored = taught(1.0, 2.0), CostModel()
    restored.restore(model.snapshot())
    for each in (model, restored):
        each.learn(launch(4.0), PEAKS)
    assert predictions(restored) == predictions(model)


@pytest.mark.parametrize("snapshot", [b"", b"\xc1", b"\x90", b"\x81\xa1a\x01", b"not msgpack at all"])
def test_a_snapshot_of_another_form_is_left_out(snapshot: bytes) -> None:
    model = taught(1.0)
    model.restore(snapshot)
    assert predictions(model) == predictions(taught(1.0))


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("part", ["coefficients", "covariance", "transfer", "variance", "variance_again"])
def test_what_no_launch_could_have_taught_is_left_out_of_a_snapshot(part: str, number: float) -> None:
    poisoned = taught(*[1.0] * 9)
    learned = poisoned._book("k").learned["d"]
    if part == "coefficients":
        learned.base.coefficients[1] = number
    elif part == "covariance":
        learned.residual.covariance[0][0] = number
    elif part == "transfer":
        learned.transfer.coefficients[0] = number
    else:
        setattr(learned, part, number)
    model = taught(1.0)
    model.restore(poisoned.snapshot())
    assert predictions(model) == predictions(taught(1.0))


# -- what is no measurement -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weird",
    [
        launch(0.0),
        launch(-1.0),
        launch(math.nan),
        launch(math.inf),
        launch(-math.inf),
        launch(5e-324),
        launch(1e308, flops=0.0, bytes=0.0),
        launch(1.0, flops=math.nan),
        launch(1.0, flops=math.inf),
        launch(1.0, bytes=math.inf),
        launch(1.0, jobs=0),
    ],
    ids=repr,
)
def test_an_observation_that_is_none_teaches_nothing(weird: Observation) -> None:
    model = taught(1.0)
    model.learn(weird, PEAKS)
    assert predictions(model) == predictions(taught(1.0))


anything = st.builds(
    launch,
    st.floats(),
    flops=st.floats(),
    bytes=st.floats(),
    transfer_s=st.floats(),
    transfer_bytes=st.floats(),
    dims=st.lists(st.floats(), max_size=10).map(tuple),
    jobs=st.integers(-1, 10**6),
)


@given(st.lists(anything, max_size=10))
def test_whatever_was_observed_a_prediction_is_a_time(seen: list[Observation]) -> None:
    model = CostModel()
    for each in seen:
        model.learn(each, PEAKS)
    assert predicted(model).run_s > 0


# -- sizes, and many at once ------------------------------------------------------------------------------------------


def sized(n: float, run_s: float, device: str = "d", **more: Any) -> Observation:
    """A launch of a job with one dim, its Work of the flops alone."""
    return launch(run_s, device=device, flops=1e4 * n, bytes=0.0, dims=(n,), **more)


def size_of(n: float) -> Size:
    return Size(1e4 * n, 0.0, 0.0, (n,))


def stepped_s(n: float, tile: int = 256) -> float:
    """Seconds that go up by whole tiles, which no line can follow."""
    return 1e-4 + 4e-4 * math.ceil(n / tile)


def test_a_size_that_comes_again_is_predicted_as_it_was() -> None:
    model = CostModel()
    sizes = [100.0 * at for at in range(1, 30)]
    for n in sizes * 5:
        model.learn(sized(n, stepped_s(n)), PEAKS)
    errors = [abs(predicted(model, size_of(n)).run_s / stepped_s(n) - 1) for n in sizes]
    assert max(errors) < 0.02


def test_a_new_size_goes_by_those_near_it() -> None:
    """In the middle each flop takes five times as long."""
    model = CostModel()

    def taken_s(n: float) -> float:
        return 1e-5 * n * (1 if n < 200 or n > 1200 else 5)

    for at in range(60):
        n = 20.0 * 1.1 ** (at * 7 % 60)
        model.learn(sized(n, taken_s(n)), PEAKS)
    for n in (60.0, 500.0, 4000.0):
        assert predicted(model, size_of(n)).run_s == pytest.approx(taken_s(n), rel=0.3)


def test_launches_without_dims_teach_a_model_that_has_seen_some_with_them() -> None:
    model = CostModel()
    for at in range(50):
        n = 64.0 + at
        model.learn(sized(n, 1e-5 * n), PEAKS)
        model.learn(launch(1e-5 * n, flops=1e4 * n, bytes=0.0), PEAKS)
    assert predicted(model, size_of(90.0)).run_s == pytest.approx(9e-4, rel=0.1)


def test_launches_of_more_jobs_are_learned_beside_those_of_one() -> None:
    model = CostModel()
    for at in range(120):
        jobs = (1, 8, 64)[at % 3]
        model.learn(sized(100.0, 1e-3 + 1e-4 * jobs, jobs=jobs), PEAKS)
    for jobs in (1, 8, 64):
        batch = Size(1e6, 0.0, 0.0, (100.0,), jobs)
        assert predicted(model, batch).run_s == pytest.approx(1e-3 + 1e-4 * jobs, rel=0.05)


dims = st.lists(st.floats(1, 1e4), min_size=2, max_size=2).map(tuple)
seen = st.lists(st.tuples(st.sampled_from(["d", "e"]), dims, st.floats(1e-6, 1e2), st.floats(0, 1e6)), max_size=40)


@given(seen, st.lists(dims, min_size=1, max_size=5))
def test_many_sizes_on_many_devices_are_predicted_as_each_is(
    seen: list[tuple[str, tuple[float, float], float, float]], asked: list[tuple[float, float]]
) -> None:
    model = CostModel()
    asked = [*asked, *(each for _, each, _, _ in seen[:3])]
    for device, (a, b), run_s, moved in seen:
        model.learn(Observation("k", device, 1, a * b, a + b, 1e-4, run_s, moved, (a, b)), PEAKS)
    devices = [("d", PEAKS), ("e", PEAKS), ("unknown", Peaks(1e10, 1e10, 1e9, 1e-6, 1e-3))]
    sizes = [Size(a * b, a + b, 1e3, (a, b)) for a, b in asked]
    found = model.predict_many("k", devices, Sizes.of(sizes))
    for row, size in enumerate(sizes):
        for column, (name, peaks) in enumerate(devices):
            alone, together = model.predict("k", name, size, peaks), found.one(row, column)
            assert together.run_s == pytest.approx(alone.run_s, rel=1e-6)
            assert together.transfer_s == pytest.approx(alone.transfer_s, rel=1e-6)
            assert together.spread == pytest.approx(alone.spread)
            assert found.tail_s[row, column] == pytest.approx(alone.tail_s, rel=1e-6)


def test_a_table_of_devices_follows_what_is_learned_after_it_was_made() -> None:
    model, row = CostModel(), Sizes.of([Size(1e6, 0.0, 0.0, (100.0,))])
    before = model.predict_many("k", [("d", PEAKS)], row).run_s.item()
    for _ in range(5):
        model.learn(sized(100.0, 7.0), PEAKS)
    assert before < model.predict_many("k", [("d", PEAKS)], row).run_s.item() == pytest.approx(7.0, rel=0.05)


def test_the_spread_of_new_sizes_is_told_apart_from_that_of_known_ones() -> None:
    random = np.random.default_rng(0)
    model = CostModel()
    for _ in range(300):
        n = float(random.integers(1, 20)) * 50
        model.learn(sized(n, stepped_s(n, 600) * math.exp(random.normal(0, 0.03))), PEAKS)
    known, new = predicted(model, size_of(500.0)), predicted(model, size_of(517.0))
    assert 0.02 < known.spread < 0.05 < new.spread


def test_nineteen_times_in_twenty_a_launch_stays_below_its_tail() -> None:
    random = np.random.default_rng(1)
    model, below = CostModel(), []
    for _ in range(1000):
        n = float(random.integers(64, 4096))
        run_s = stepped_s(n) * math.exp(random.normal(0, 0.05))
        below.append(run_s <= predicted(model, size_of(n)).tail_s)
        model.learn(sized(n, run_s), PEAKS)
    assert 0.93 < np.mean(below[100:]) < 0.995


# -- drift ------------------------------------------------------------------------------------------------------------


def noticed_after(slower: float, launches: int, sizes: int = 10) -> int | None:
    """How many launches after a device became slower that is noticed."""
    random = np.random.default_rng(3)
    model = CostModel()
    for at in range(200 + launches):
        n = 100.0 * random.integers(1, sizes + 1)
        factor = slower if at >= 200 else 1.0
        if model.learn(sized(n, factor * stepped_s(n) * math.exp(random.normal(0, 0.05))), PEAKS):
            return at - 199
    return None


@pytest.mark.parametrize("slower", [1.2, 3.0, 0.8])
def test_a_device_that_has_changed_is_noticed_within_twenty_launches(slower: float) -> None:
    after = noticed_after(slower, 20)
    assert after is not None
    assert 0 < after <= 20


def test_a_device_that_has_not_changed_raises_no_alarm() -> None:
    assert noticed_after(1.0, 3000) is None


def test_what_was_launched_before_a_drift_says_nothing_after_it() -> None:
    model = taught(*[FLOPS_S] * 100, *[2 * FLOPS_S] * 12)
    assert predicted(model).run_s == pytest.approx(2 * FLOPS_S, rel=0.05)


# -- public timings ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def public() -> list[Truth]:
    folder = os.environ.get("TEST_DATA")
    if not folder:
        pytest.skip("TEST_DATA names no folder with gemm_timings.csv and network_timings.csv")
    return measured(Path(folder))


def median_error(truth: Truth, launches: int, sizes: int | None) -> float:
    """Of predictions of noisy launches, after so many on each device."""
    random = np.random.default_rng(0)
    errors = []
    for device, (name, peaks) in enumerate(truth.devices):
        model, cases = CostModel(), [truth.cases[at] for at in random.permutation(len(truth.cases))[:sizes]]
        for at in range(launches + 40):
            case = cases[int(random.integers(len(cases))) if sizes else at]
            run_s = case.seconds[device] * math.exp(random.normal(0, 0.05))
            if at >= launches:
                errors.append(abs(model.predict("k", name, case.size, peaks).run_s / run_s - 1))
            else:
                size = case.size
                model.learn(Observation("k", name, 1, size.flops, size.bytes, 0.0, run_s, 0.0, size.dims), peaks)
    return float(np.median(errors))


def test_measured_matrix_products_are_predicted_after_fifty_others(public: list[Truth]) -> None:
    assert median_error(public[0], 50, None) <= 0.12


def test_measured_sizes_that_come_again_are_predicted_after_fifty_launches(public: list[Truth]) -> None:
    assert all(median_error(truth, 50, 20) <= 0.05 for truth in public)


def test_however_many_kernels_are_told_of_a_few_thousand_are_remembered() -> None:
    model = CostModel()
    for at in range(4100):
        model.learn(launch(0.5, f"k{at}"), PEAKS)
    assert model.launches("k0", "d") == 0
    assert model.launches("k4099", "d") == 1
