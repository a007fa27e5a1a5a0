from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from lepton_ai.errors import InvalidArguments, InvalidKernel
from lepton_ai.kernel import Kernel, KernelSpec, Work


def a_kernel(**changes: Any) -> Kernel:
    options: dict[str, Any] = {
        "inputs": {"x": "float32[n]", "factor": "float32 = 2"},
        "outputs": {"y": "float32[n]"},
        "flops": "n",
        "bytes": "8*n",
    }
    return Kernel(**({"name": "test.scale"} | options | changes))


def test_a_kernel_knows_its_variants_by_kind() -> None:
    kernel = a_kernel()

    @kernel.on("cpu")
    def build(device: Any) -> Any:
        return lambda inputs, context: {"y": inputs["x"] * device}

    assert kernel.kinds == ("cpu",)
    assert kernel.build("cpu", 3)({"x": 2}, None) == {"y": 6}


def test_the_reference_is_called_with_inputs_by_name() -> None:
    kernel = a_kernel()

    @kernel.reference
    def reference(x: Any, factor: float) -> dict[str, Any]:
        return {"y": x * factor}

    assert kernel.refer({"x": 2, "factor": 5}) == {"y": 10}


def test_samples_get_their_defaults_and_are_checked_against_the_signature() -> None:
    kernel = a_kernel()
    kernel.samples(lambda: [{"x": [1.0, 2.0]}])
    (sample,) = kernel.sample_inputs()
    assert sample["factor"] == 2.0
    assert sample["x"].dtype == np.float32
    kernel.samples(lambda: [{"y": 1}])
    with pytest.raises(InvalidArguments, match="'y'"):
        kernel.sample_inputs()


def test_a_kernel_without_reference_or_samples_says_how_to_add_one() -> None:
    with pytest.raises(InvalidKernel, match=r"test\.scale.*kernel\.reference"):
        a_kernel().refer({})
    with pytest.raises(InvalidKernel, match=r"test\.scale.*kernel\.samples"):
        a_kernel().sample_inputs()


@pytest.mark.parametrize(
    "name", ["", "scale", "Test.scale", "test.", ".scale", "test scale.x", "test.1", "test.scale\n"]
)
def test_a_name_that_is_not_area_dot_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidKernel):
        a_kernel(name=name)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"flops": "n*z"}, "flops"),
        ({"bytes": "z"}, "bytes"),
        ({"flops": "n +"}, None),
        ({"inputs": {"x": "float99[n]"}}, "x"),
        ({"outputs": {"y": "float32[N]"}}, "y"),
        ({"limits": {"z": "n > 0"}}, "z"),
        ({"limits": {"factor": "z > 0"}}, "factor"),
    ],
)
def test_a_wrong_declaration_is_refused_when_it_is_made(changes: dict[str, Any], field: str | None) -> None:
    with pytest.raises(InvalidKernel) as info:
        a_kernel(**changes)
    assert info.value.field == field


def test_a_device_kind_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidKernel, match="'abacus'"):
        a_kernel().on("abacus")


def test_work_is_what_the_formulas_say() -> None:
    assert a_kernel().spec.work({"n": 10, "factor": 2}) == Work(10.0, 80.0, (10,))


@pytest.mark.parametrize("flops", ["n / factor", "0 - n", "log2(factor)", "n**4"])
def test_work_that_is_not_defined_counts_as_nought(flops: str) -> None:
    assert a_kernel(flops=flops).spec.work({"n": 1e200, "factor": 0}).flops == 0.0


def test_a_spec_crosses_the_wire_as_data() -> None:
    spec = a_kernel(limits={"x": "n > 0"}, batch="concat", tolerance=1e-3, summary="Scales.").spec
    assert msgspec.json.decode(msgspec.json.encode(spec), type=KernelSpec) == spec
    assert set(spec.signature().inputs) == {"x", "factor"}
