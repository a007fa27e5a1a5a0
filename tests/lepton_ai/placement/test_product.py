from __future__ import annotations

import numpy as np
import pytest

from lepton_ai.placement.product import product


@pytest.mark.parametrize("rows", [0, 1, 64, 65, 1000])
@pytest.mark.parametrize("inner", [1, 10, 64])
def test_a_product_in_blocks_is_the_product(rows: int, inner: int) -> None:
    random = np.random.default_rng(rows)
    left, right = random.normal(size=(rows, inner)), random.normal(size=(inner, 64))
    np.testing.assert_allclose(product(left, right), left @ right, atol=1e-12)


def test_nothing_times_nothing_has_its_shape() -> None:
    assert product(np.ones((1000, 3)), np.ones((3, 0))).shape == (1000, 0)
