"""The convention of `data.histogram` is NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tasks.devices.cpu import open_device
from tasks.kernels.data_histogram import histogram

RUN = histogram.build("cpu", open_device("cpu", slots=1))


@pytest.mark.parametrize(
    ("low", "high", "bins"), [(-1.0, 1.0, 7), (0.1, 0.3, 1_000), (-1e-3, 2.0, 65_536), (-5e5, 3e37, 12)]
)
def test_it_counts_what_numpy_counts(low: float, high: float, bins: int) -> None:
    random = np.random.default_rng(bins)
    # Many on the edges themselves, which is where conventions differ.
    edges = np.linspace(low, high, bins + 1).astype(np.float32)
    values = np.concatenate([random.uniform(low, high, 50_000).astype(np.float32), random.choice(edges, 5_000)])
    context: Any = None
    found = RUN({"values": values, "low": low, "high": high, "bins": bins}, context)
    np.testing.assert_array_equal(found["counts"], np.histogram(values, bins, (low, high))[0])
