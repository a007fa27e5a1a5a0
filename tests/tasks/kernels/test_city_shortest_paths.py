"""What is special to city.shortest_paths on the cpu: networks that are partly sparse, and an early end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lepton_ai.errors import JobCancelled
from lepton_ai.kernel import Run
from tasks.driver import open_device
from tasks.kernels.city_shortest_paths import shortest_paths


class Listener:
    """A context that notes progress, and is cancelled after so many looks."""

    deadline = None
    stream = None

    def __init__(self, looks: float = np.inf) -> None:
        self.looks = looks
        self.told: list[float] = []

    @property
    def cancelled(self) -> bool:
        return len(self.told) >= self.looks

    def progress(self, fraction: float) -> None:
        self.told.append(fraction)


@pytest.fixture(scope="module")
def run() -> Run:
    return shortest_paths.build("cpu", open_device("cpu", slots=1))


def town(random: np.random.Generator, dense: int, sparse: int) -> NDArray[np.float32]:
    """A middle in which each is beside each, and lanes that hang on it, or on nothing, some of them one-way."""
    n = dense + sparse
    roads: NDArray[Any] = np.full((n, n), np.inf, np.float32)
    roads[:dense, :dense] = random.uniform(1, 9, (dense, dense))
    for each in range(max(dense, 1), n):
        other = random.integers(0, each)
        if random.random() < 0.9:
            roads[each, other] = random.uniform(1, 9)
        if random.random() < 0.9:
            roads[other, each] = random.uniform(1, 9)
    order = random.permutation(n)
    return roads[np.ix_(order, order)]


@pytest.mark.parametrize(("dense", "sparse"), [(0, 200), (70, 130), (150, 20), (200, 0)])
def test_a_network_may_be_dense_here_and_sparse_there(run: Run, dense: int, sparse: int) -> None:
    roads = town(np.random.default_rng(dense), dense, sparse)
    found = run({"roads": roads}, Listener())["distance"]
    np.testing.assert_allclose(found, shortest_paths.refer({"roads": roads})["distance"], rtol=1e-5)


@pytest.mark.parametrize(("dense", "sparse"), [(0, 600), (200, 0)])
def test_it_tells_how_far_it_is_and_ends_once_it_is_cancelled(run: Run, dense: int, sparse: int) -> None:
    roads = town(np.random.default_rng(1), dense, sparse)
    quiet = Listener()
    run({"roads": roads}, quiet)
    assert len(quiet.told) > 1
    assert quiet.told == sorted(quiet.told)
    assert 0 <= quiet.told[0] <= quiet.told[-1] <= 1
    with pytest.raises(JobCancelled, match=r"city\.shortest_paths"):
        run({"roads": roads}, Listener(looks=1))
