from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_ai.device import Announcement, Peaks, ResourceState
from lepton_ai.event import Observation
from lepton_ai.job import Options
from lepton_ai.kernel import KernelSpec
from lepton_ai.placement.costs import CostModel
from pipeline import candidates as module
from pipeline.candidates import Candidates, candidates
from pipeline.cluster import Cluster
from pipeline.sized import Sized, sized

ONE = KernelSpec("test.one", {"x": "float32[m,n]"}, {"y": "float32[m]"}, "m*n", "4*m*n")
TWO = KernelSpec("test.two", {"n": "int64"}, {"y": "int64"}, "n", "0")
SLOW, FAST = Peaks(1e9, 1e9, math.inf, 0.0, 1e-6), Peaks(1e12, 1e12, 1e10, 1e-5, 1e-5)

shapes = st.one_of(
    st.fixed_dictionaries({"x": st.lists(st.integers(0, 3000), min_size=2, max_size=2)}),
    st.fixed_dictionaries({"n": st.integers(-5, 10**6)}),
    st.just({"wrong": 1}),
)
asked = st.lists(st.tuples(shapes, st.sampled_from([None, "gpu", "cpu.one"])), min_size=1, max_size=6)
launches = st.lists(st.tuples(shapes, st.sampled_from(["cpu.one", "gpu.two"]), st.floats(1e-6, 10)), max_size=40)


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    found = Cluster()
    found.refresh(
        [
            Announcement("1", "one", "cpu.one", "cpu", 2, False, SLOW, (ONE, TWO), 0.0),
            Announcement("2", "two", "gpu.two", "gpu", 1, False, FAST, (ONE,), 0.0),
            Announcement("3", "three", "gpu.three", "gpu", 1, False, FAST, (ONE, TWO), 0.0),
        ]
    )
    found.heard("2", ResourceState(0, 0.0, 0.5, 0, 1, speed=0.4))
    return found


def of_kernel(cluster: Cluster, shapes: dict[str, object], pin: str | None = None) -> Sized:
    kernel = TWO.name if "n" in shapes else ONE.name
    return sized(kernel, Options(shapes=shapes, device=pin), b"", cluster.offer(kernel), cluster.sized)


def taught(cluster: Cluster, seen: Sequence[tuple[dict[str, object], str, float]]) -> CostModel:
    model = CostModel()
    for shapes, device, run_s in seen:
        one, served = of_kernel(cluster, shapes), cluster.device(device)
        assert served is not None
        size = one.size
        model.learn(
            Observation(one.kernel, device, 1, size.flops, size.bytes, 1e-4, run_s, size.transfer_bytes, size.dims),
            served.peaks,
        )
    return model


def both(sizes: Sequence[Sized], cluster: Cluster, model: CostModel) -> list[Candidates]:
    """Predicted one by one, and together."""
    found = []
    for few in ((1000, 1000), (-1, -1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_FEW", few)
            found.append(candidates(sizes, cluster.devices, model))
    return found


@given(seen=launches, asked=asked)
def test_few_cost_what_they_do_among_many(
    cluster: Cluster,
    seen: list[tuple[dict[str, object], str, float]],
    asked: list[tuple[dict[str, object], str | None]],
) -> None:
    sizes = list(dict.fromkeys(of_kernel(cluster, *each) for each in asked))
    few, many = both(sizes, cluster, taught(cluster, seen))
    order = [*range(len(sizes)), 0]
    assert few.seconds(order) == pytest.approx(many.seconds(order), rel=1e-6)
    assert few.tail(order) == pytest.approx(many.tail(order), rel=1e-6)
    for one, other in zip(few, many, strict=True):
        for mine, its in zip(one, other, strict=True):
            assert (mine.device, mine.excluded) == (its.device, its.excluded)
            assert (mine.estimate is None) == (its.estimate is None)
            if mine.estimate is not None and its.estimate is not None:
                assert mine.estimate.finish_s == pytest.approx(its.estimate.finish_s, rel=1e-6)
                assert mine.estimate.tail_s == pytest.approx(its.estimate.tail_s, rel=1e-6)


def test_a_candidate_takes_as_long_as_its_price_says(cluster: Cluster) -> None:
    sizes = [of_kernel(cluster, {"x": [100, at]}) for at in range(1, 4)]
    for found in both(sizes, cluster, CostModel()):
        for at, row in enumerate(found.seconds(range(3)).tolist()):
            estimates = [each.estimate for each in found[at]]
            assert [each.finish_s for each in estimates if each is not None] == pytest.approx(row)
