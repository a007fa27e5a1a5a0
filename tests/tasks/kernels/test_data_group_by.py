"""What conformance, with its small inputs, does not reach of `data.group_by`."""

from __future__ import annotations

from typing import Any

import numpy as np

from tasks.devices.cpu import open_device
from tasks.kernels.data_group_by import _NEAR_GROUPS, _NEAR_VALUES, group_by

RUN = group_by.build("cpu", open_device("cpu", slots=1))


def test_more_values_than_are_brought_together_at_a_time_add_up_all_the_same() -> None:
    random = np.random.default_rng(0)
    n, groups = 2 * _NEAR_VALUES + 1_000, _NEAR_GROUPS + 5
    keys, values = random.integers(-9, groups + 9, n).astype(np.int32), random.normal(0, 1, n)
    values[::97] = np.nan
    context: Any = None
    found = RUN({"keys": keys, "values": values, "groups": groups}, context)
    kept = (keys >= 0) & (keys < groups) & ~np.isnan(values)
    np.testing.assert_array_equal(found["count"], np.bincount(keys[kept], minlength=groups))
    np.testing.assert_allclose(found["total"], np.bincount(keys[kept], values[kept], groups), rtol=1e-9, atol=1e-9)
    order = np.lexsort((values[kept], keys[kept]))
    ends = np.cumsum(found["count"])
    np.testing.assert_array_equal(found["least"], values[kept][order][ends - found["count"]])
    np.testing.assert_array_equal(found["most"], values[kept][order][ends - 1])
