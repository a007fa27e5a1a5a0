from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from lepton_ai.errors import InvalidArguments
from lepton_ai.placement.supply import Supply

STATE = {"used": 0.25, "total": 1.0}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("CPU", "cpu"),
        ("gpu.h100", "gpu"),
        ("GPU-0", "gpu"),
        ("cpu1", "cpu"),
        ("rack 3 FPGA", "fpga"),
        ("my_tpu", "tpu"),
    ],
)
def test_a_kind_is_read_from_the_name(name: str, kind: str) -> None:
    assert Supply.read(name, STATE).kind == kind


@pytest.mark.parametrize("name", ["H100", "cpuset", "CPU or GPU", "outputs"])
def test_a_name_without_one_kind_asks_for_it(name: str) -> None:
    with pytest.raises(InvalidArguments, match=r"must have one kind in it .*cpu, gpu, fpga, tpu") as refused:
        Supply.read(name, STATE)
    assert refused.value.field == "kind"
    assert Supply.read(name, STATE | {"kind": "GPU"}).kind == "gpu"


@pytest.mark.parametrize(("used", "total", "share"), [(0, 1, 1), (0.6, 1.0, 0.4), (24, 32, 0.25), (5, 5, 0)])
def test_what_is_left_is_a_share_in_any_unit(used: float, total: float, share: float) -> None:
    assert Supply.read("CPU", {"used": used, "total": total}).share == pytest.approx(share)


def test_numbers_of_numpy_are_numbers() -> None:
    found = Supply.read("CPU", {"used": np.float32(0.5), "total": np.int64(1), "slots": np.int32(2)})
    assert (found.share, found.slots) == (0.5, 2)


@pytest.mark.parametrize(
    ("wrong", "field", "right"),
    [
        ({"used": 1.5}, "used", "used must be at most the total 1.0, not 1.5"),
        ({"used": -0.1}, "used", "used must be a number of at least 0, not -0.1"),
        ({"used": math.nan}, "used", "used must be a number of at least 0, not nan"),
        ({"used": "0.4"}, "used", "used must be a number of at least 0, not '0.4'"),
        ({"used": True}, "used", "used must be a number of at least 0, not True"),
        ({"used": None}, "used", "used must be a number of at least 0, not None"),
        ({"total": 0}, "total", "total must be a number above 0, not 0"),
        ({"total": math.inf}, "total", "total must be a number above 0, not inf"),
        ({"total": 10**400}, "total", "total must be a number above 0, not 1000"),
        ({"total": 1j}, "total", "total must be a number above 0, not 1j"),
        ({"kind": "asic"}, "kind", "no kind 'asic'; there are cpu, gpu, fpga, tpu"),
        ({"kind": "gpus"}, "kind", "no kind 'gpus'; did you mean 'gpu'?"),
        ({"kind": 3}, "kind", "no kind 3; there are cpu, gpu, fpga, tpu"),
        ({"speed": 0}, "speed", "speed must be a number above 0, not 0"),
        ({"slots": 1.5}, "slots", "slots must be a whole number from 1 to 1024, not 1.5"),
        ({"slots": 10**9}, "slots", "slots must be a whole number from 1 to 1024, not 1000000000"),
        ({"memory_bytes": -1}, "memory_bytes", "memory_bytes must be a number of at least 0, not -1"),
        ({"bandwidth": 0}, "bandwidth", "bandwidth must be a number above 0, not 0"),
        ({"memory": 1}, "memory", "no field 'memory'; did you mean 'memory_bytes'?"),
        ({"Used": 1}, "Used", "no field 'Used'; did you mean 'used'?"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(wrong: dict[str, Any], field: str, right: str) -> None:
    with pytest.raises(InvalidArguments) as refused:
        Supply.read("GPU", STATE | wrong)
    assert refused.value.message.startswith(f"resource 'GPU': {right}")
    assert refused.value.field == field


@pytest.mark.parametrize(("given", "missing"), [({"used": 0.1}, "total"), ({"total": 1}, "used"), ({}, "used")])
def test_used_and_total_are_needed(given: dict[str, Any], missing: str) -> None:
    with pytest.raises(InvalidArguments, match=f"{missing} is missing; it needs used and total"):
        Supply.read("GPU", given)


@pytest.mark.parametrize("given", [None, 0.4, "used", [("used", 0.1)]])
def test_a_resource_is_a_dictionary(given: Any) -> None:
    with pytest.raises(InvalidArguments, match="must be a dictionary with used and total") as refused:
        Supply.read("GPU", given)
    assert refused.value.field == "resource"
