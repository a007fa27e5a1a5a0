"""What conformance, with its small inputs, does not reach of `data.group_by`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tasks.devices.cpu import open_device
from tasks.kernels import data_group_by
from tasks.kernels.data_group_by import group_by

RUN = group_by.build("cpu", open_device("cpu", slots=1))


@pytest.mark.parametrize("size", [2_999, 3_000, 3_001])
def test_values_that_are_brought_together_some_at_a_time_add_up_all_the_same(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_group_by, "_NEAR_VALUES", 1_000)
    random = np.random.default_rng(0)
    groups = data_group_by._NEAR_GROUPS + 5
    # Few keys, so that groups have values of several rounds; some outside at either end.
    keys = random.choice([-1, 0, 4_095, 4_096, groups - 1, groups], size).astype(np.int32)
    values = random.normal(0, 1, size)
    values[::97] = np.nan
    context: Any = None
    found = RUN({"keys": keys, "values": values, "groups": groups}, context)
    for name, expected in group_by.refer({"keys": keys, "values": values, "groups": groups}).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-12, atol=1e-12, err_msg=name)
