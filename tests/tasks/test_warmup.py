from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.errors import DeviceLost
from lepton_ai.kernel import Kernel
from tasks.devices.cpu import CpuDriver
from tasks.warmup import difference, warm


def kernel(run: Callable[..., Any] | None, *, name: str = "test.double", samples: int = 2, **more: Any) -> Kernel:
    """Doubles; `run` is what its cpu variant makes of the inputs, None leaves the variant out."""
    found = Kernel(name, inputs={"x": "float64[n]"}, outputs={"y": "float64[n]"}, flops="n", bytes="8*n", **more)
    found.reference(lambda x: {"y": 2 * x})
    found.samples(lambda: [{"x": np.arange(size + 1.0)} for size in range(samples)])
    if run is not None:
        found.on("cpu")(lambda device: lambda inputs, context: run(inputs))
    return found


GOOD = kernel(lambda inputs: {"y": inputs["x"] + inputs["x"]}, name="test.good")


def refusal(broken: Kernel) -> str:
    """Why the kernel is refused; the good one beside it must serve in any case."""
    found = warm([broken, GOOD], CpuDriver(1), {})
    assert found.kernels == {"test.good": GOOD}
    assert found.runs.keys() == {"test.good"}
    assert found.refused.keys() == {broken.name}
    return found.refused[broken.name]


def test_a_kernel_whose_variant_equals_its_reference_serves() -> None:
    found = warm([GOOD], CpuDriver(1), {})
    assert found.kernels == {"test.good": GOOD}
    assert found.refused == {}


def test_a_kernel_without_a_variant_for_this_kind_is_left_out_and_not_refused() -> None:
    found = warm([kernel(None)], CpuDriver(1), {})
    assert (found.kernels, found.refused) == ({}, {})


def test_what_was_refused_before_stays_refused() -> None:
    assert warm([GOOD], CpuDriver(1), {"a.module": "ImportError: no"}).refused == {"a.module": "ImportError: no"}


def test_a_variant_that_is_built_once_serves_every_run() -> None:
    built: list[object] = []
    counted = kernel(None, name="test.counted")

    @counted.on("cpu")
    def _(device: object) -> Callable[..., Any]:
        built.append(device)
        return lambda inputs, context: {"y": 2 * inputs["x"]}

    driver = CpuDriver(1)
    warm([counted], driver, {})
    assert built == [driver]


@pytest.mark.parametrize("error", [ImportError("no toolkit"), MemoryError("full"), SystemExit(3)])
def test_a_builder_that_raises_is_refused_with_its_reason(error: BaseException) -> None:
    broken = kernel(None)

    @broken.on("cpu")
    def _(device: object) -> Any:
        raise error

    assert refusal(broken) == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda inputs: {"y": 2 * inputs["x"] + 0.1}, "differs from its reference by 0.1 on sample 0"),
        (lambda inputs: {"y": np.full_like(inputs["x"], np.nan)}, "by inf"),
        (
            lambda inputs: {"y": inputs["x"][:1] * 2},
            "on sample 1, returned 'y' of shape [1], and declares float64[n] with n = 2",
        ),
        (lambda inputs: {"z": 2 * inputs["x"]}, "on sample 0, returned ['z'], and declares ['y']"),
        (lambda inputs: {"y": 2 * inputs["x"], "z": inputs["x"]}, "returned ['y', 'z'], and declares ['y']"),
        (lambda inputs: {}, "returned [], and declares ['y']"),
        (
            lambda inputs: {"y": (2 * inputs["x"]).astype(np.float32)},
            "returned 'y' of float32, and declares float64[n]",
        ),
        (lambda inputs: {"y": 2 * inputs["x"].reshape(1, -1)}, "returned 'y' of shape [1, 1], and declares float64[n]"),
        (lambda inputs: None, "NoneType"),
        (lambda inputs: 1 / 0, "ZeroDivisionError"),
        (lambda inputs: inputs["x"].__imul__(2), "read-only"),
    ],
    ids=["value", "nan", "shape", "name", "extra", "nothing", "dtype", "dims", "none", "raises", "writes to its input"],
)
def test_a_variant_that_is_wrong_is_refused_with_its_reason(run: Callable[..., Any], reason: str) -> None:
    assert reason in refusal(kernel(run))


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (lambda x: {"z": 2 * x}, "its reference, on sample 0, returned ['z'], and declares ['y']"),
        (lambda x: {"y": (2 * x).astype(np.float32)}, "its reference, on sample 0, returned 'y' of float32"),
        (lambda x: {"y": np.append(2 * x, 0)}, "its reference, on sample 0, returned 'y' of shape [2]"),
    ],
    ids=["name", "dtype", "shape"],
)
def test_a_reference_that_is_not_as_declared_is_refused_with_its_reason(
    reference: Callable[..., Any], reason: str
) -> None:
    wrong = kernel(lambda inputs: {"y": 2 * inputs["x"]})
    wrong.reference(reference)
    assert reason in refusal(wrong)


def test_an_output_may_be_as_long_as_the_data_make_it() -> None:
    found = Kernel("test.found", inputs={"x": "float64[n]"}, outputs={"y": "float64[k]"}, flops="n", bytes="n")
    found.reference(lambda x: {"y": x[x > 1]})
    found.samples(lambda: [{"x": np.arange(5.0)}])
    found.on("cpu")(lambda device: lambda inputs, context: {"y": inputs["x"][2:]})
    assert "test.found" in warm([found], CpuDriver(1), {}).kernels


def test_a_kernel_whose_samples_are_none_is_refused() -> None:
    bare = kernel(lambda inputs: {"y": 2 * inputs["x"]}, samples=0)
    assert "nobody can tell" in refusal(bare)


def test_a_device_that_is_lost_while_it_warms_up_is_no_kernels_fault() -> None:
    def lost(inputs: Any) -> Any:
        raise DeviceLost("gone")

    with pytest.raises(DeviceLost):
        warm([kernel(lost), GOOD], CpuDriver(1), {})


def test_a_difference_within_the_tolerance_serves() -> None:
    close = kernel(lambda inputs: {"y": 2 * inputs["x"] + 0.1}, tolerance=0.2)
    assert "test.double" in warm([close], CpuDriver(1), {}).kernels


def test_a_kernel_without_samples_is_refused_for_nobody_could_tell_that_it_is_right() -> None:
    bare = Kernel("test.bare", inputs={"x": "float64[n]"}, outputs={"y": "float64[n]"}, flops="n", bytes="n")
    bare.on("cpu")(lambda device: lambda inputs, context: {"y": inputs["x"]})
    assert "samples" in refusal(bare)


def test_a_sample_that_does_not_fit_the_signature_is_refused() -> None:
    wrong = kernel(lambda inputs: {"y": inputs["x"]}, name="test.wrong")
    wrong.samples(lambda: [{"x": np.zeros((2, 2))}])
    assert "dimensions" in refusal(wrong)


ARRAYS = st.lists(st.floats(width=64), max_size=8).map(np.array)


@given(ARRAYS)
def test_equal_outputs_have_no_difference_whatever_stands_in_them(array: np.ndarray) -> None:
    assert difference({"y": array}, {"y": array.copy()}) == 0.0


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=8).map(np.array), st.data())
def test_a_difference_is_relative_to_the_larger_of_one_and_what_was_expected(expected: np.ndarray, data: Any) -> None:
    at = data.draw(st.integers(0, len(expected) - 1))
    found = expected.copy()
    found[at] += 0.5 * max(1.0, abs(expected[at]))
    assert difference({"y": found}, {"y": expected}) == pytest.approx(0.5, rel=1e-6)


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=8).map(np.array), st.data())
def test_a_single_value_that_is_not_finite_is_infinitely_different(expected: np.ndarray, data: Any) -> None:
    found = expected.copy()
    found[data.draw(st.integers(0, len(expected) - 1))] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    assert difference({"y": found}, {"y": expected}) == np.inf
    assert difference({"y": expected}, {"y": found}) == np.inf


def test_infinities_of_other_signs_differ() -> None:
    assert difference({"y": np.array([np.inf])}, {"y": np.array([-np.inf])}) == np.inf


@pytest.mark.parametrize("found", [{}, {"z": np.zeros(2)}, {"y": np.zeros(3)}, {"y": np.zeros((2, 1))}])
def test_other_names_or_shapes_are_infinitely_different(found: dict[str, np.ndarray]) -> None:
    assert difference(found, {"y": np.zeros(2)}) == np.inf


def test_booleans_and_whole_numbers_are_compared_as_numbers() -> None:
    assert difference({"y": np.array([True, False])}, {"y": np.array([True, True])}) == 1.0
    assert difference({"y": np.array([10])}, {"y": np.array([20])}) == 0.5


def test_empty_outputs_of_equal_shape_are_equal() -> None:
    assert difference({"y": np.zeros((0, 3))}, {"y": np.zeros((0, 3))}) == 0.0


def test_other_dtypes_are_infinitely_different() -> None:
    assert difference({"y": np.zeros(2, np.float32)}, {"y": np.zeros(2)}) == np.inf


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_whole_numbers_that_are_equal_as_floats_are_told_apart(dtype: type) -> None:
    large = np.array([2**62], dtype)
    assert difference({"y": large}, {"y": large}) == 0.0
    assert difference({"y": large + dtype(1)}, {"y": large}) > 0.0
    assert difference({"y": large}, {"y": large + dtype(1)}) > 0.0


def test_the_extremes_of_whole_numbers_differ_by_twice_themselves() -> None:
    least, most = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    assert difference({"y": np.array([least])}, {"y": np.array([most])}) == pytest.approx(2.0)
