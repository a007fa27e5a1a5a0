"""The stream's law: every deck has the same jobs, a seed tells their order, and a wrong result is found."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bench.stream import DECK, KERNELS, SIZES, Card, check, expected, stream

_MOST_BYTES = 2**20


def test_every_deck_has_the_same_jobs_in_an_order_of_its_own() -> None:
    found = stream(7, 2)
    first, second = found[: len(DECK)], found[len(DECK) :]
    assert Counter(first) == Counter(second) == Counter(DECK)
    assert first != second
    assert stream(7, 2) == found != stream(8, 2)


def test_each_kernel_is_a_third_and_each_size_comes_as_often() -> None:
    assert set(Counter(card.kernel for card in DECK).values()) == {len(DECK) // 3}
    assert set(Counter(card.size for card in DECK).values()) == {len(DECK) // len(SIZES)}
    steps = np.diff(np.log2(SIZES))
    assert np.allclose(steps, 0.5, atol=0.02)


def test_no_result_is_larger_than_the_law_says() -> None:
    for card in set(DECK):
        assert sum(value.nbytes for value in expected(card).values()) <= _MOST_BYTES


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_expected_is_what_the_reference_gives(kernel: str) -> None:
    card = next(card for card in DECK if card.kernel == kernel)
    check(card, KERNELS[kernel].refer(card.arguments()))


def test_a_result_of_another_job_is_found() -> None:
    small, large = (Card("finance.black_scholes", size) for size in SIZES[:2])
    with pytest.raises(ValueError, match="gave"):
        check(small, expected(large))
    wrong = {name: value + 1 for name, value in expected(small).items()}
    with pytest.raises(ValueError, match="from what it should be"):
        check(small, wrong)
