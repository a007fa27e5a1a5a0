from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from lepton_ai import wire
from lepton_ai.device import Announcement, Peaks
from lepton_ai.errors import InvalidArguments
from lepton_ai.event import Observation
from lepton_ai.job import Options
from lepton_ai.kernel import KernelSpec
from lepton_ai.placement.costs import CostModel, Size
from pipeline.cluster import Cluster
from pipeline.pricing import Pricing, price
from pipeline.window import ClaimedJob, Window
from queues.broker import Kind

MATMUL = KernelSpec(
    "linalg.matmul",
    {"a": "float32[m,k]", "b": "float32[k,n]"},
    {"c": "float32[m,n]"},
    "2*m*k*n",
    "4*(m*k + k*n + m*n)",
)
OTHER = KernelSpec("test.other", {"x": "float32[n]", "times": "int64 = 2"}, {"y": "float32[n]"}, "n*times", "8*n")
FAST = Peaks(1e12, 1e12, 1e10, 1e-5, 1e-5)
SLOW = Peaks(1e9, 1e9, math.inf, 0.0, 1e-6)
SHAPES = {"a": [100, 200], "b": [200, 300]}
SIZE = Size(2 * 100 * 200 * 300, 4 * (100 * 200 + 200 * 300 + 100 * 300), 4 * (100 * 200 + 200 * 300), (200, 100, 300))


@pytest.fixture
def cluster() -> Cluster:
    found = Cluster()
    found.refresh(
        [
            Announcement("1", "one", "cpu.slow", "cpu", 2, False, SLOW, (MATMUL, OTHER), 0.0),
            Announcement("2", "two", "gpu.fast", "gpu", 1, False, FAST, (MATMUL,), 0.0),
        ]
    )
    return found


def claimed(kernel: str, options: Options, message: bytes = b"") -> ClaimedJob:
    window = Window("router", 1, 2**20)
    return window.add(("job",), kernel, options, message, window.open_claim(Kind.NEW)[0])


def job(kernel: str = "linalg.matmul", **options: Any) -> ClaimedJob:
    return claimed(kernel, Options(**options))


def job_of_body(kernel: str, arguments: dict[str, Any], **options: Any) -> ClaimedJob:
    """A job whose message declares no shapes: only its body tells them."""
    message = wire.envelope("job", kernel, arguments, Options(shapes={}, **options))
    return claimed(kernel, Options(**options), message)


def unknown_work(cluster: Cluster) -> Any:
    """What a matmul of no work costs on the cluster's two devices."""
    found = [CostModel().predict("linalg.matmul", "any", Size(0.0, 0.0), peaks) for peaks in (SLOW, FAST)]
    return pytest.approx([each.transfer_s + each.run_s for each in found])


def seconds(priced: Pricing) -> list[float]:
    return priced.problem.seconds[0].tolist()


def test_a_job_costs_what_the_model_predicts_from_its_declared_shapes(cluster: Cluster) -> None:
    priced = price([job(shapes=SHAPES)], cluster, CostModel())
    expected = [
        CostModel().predict("linalg.matmul", name, SIZE, peaks)
        for name, peaks in (("cpu.slow", SLOW), ("gpu.fast", FAST))
    ]
    estimates = [candidate.estimate for candidate in priced.candidates[0]]
    assert [(each.transfer_s, each.run_s) for each in estimates if each is not None] == [
        pytest.approx((each.transfer_s, each.run_s)) for each in expected
    ]
    assert seconds(priced) == pytest.approx([each.transfer_s + each.run_s for each in expected])


def test_shapes_that_are_not_declared_are_found_in_the_body(cluster: Cluster) -> None:
    arguments = {"a": np.zeros((100, 200), "<f4"), "b": np.zeros((200, 300), "<f4")}
    in_body = price([job_of_body("linalg.matmul", arguments)], cluster, CostModel())
    declared = price([job(shapes=SHAPES)], cluster, CostModel())
    assert list(in_body.candidates) == list(declared.candidates)


def test_nested_lists_in_a_body_have_shapes_too(cluster: Cluster) -> None:
    arguments = {"a": [[0.0] * 200] * 100, "b": [[0.0] * 300] * 200}
    in_body = price([job_of_body("linalg.matmul", arguments)], cluster, CostModel())
    declared = price([job(shapes=SHAPES)], cluster, CostModel())
    assert list(in_body.candidates) == list(declared.candidates)


def test_a_large_body_is_not_opened_and_its_job_priced_as_no_work(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.sized._OPEN_LIMIT_BYTES", 1000)
    arguments = {"a": np.zeros((100, 200), "<f4"), "b": np.zeros((200, 300), "<f4")}
    assert seconds(price([job_of_body("linalg.matmul", arguments)], cluster, CostModel())) == unknown_work(cluster)


@pytest.mark.parametrize(
    "shapes",
    [
        {"a": [100, 200]},
        {"a": [100, 200], "b": [7, 300]},
        {"a": [100], "b": [200, 300]},
        {"a": "large", "b": None},
        {"a": [-1, 2], "b": [2, 3]},
        {"a": [1.5, 2], "b": [2, 3]},
        {"z": [1]},
        {"a": [10**200, 10**200], "b": [10**200, 10**200]},
    ],
    ids=["missing", "misfit", "rank", "no sizes", "negative", "fraction", "unknown", "beyond any float"],
)
def test_declared_shapes_that_do_not_fit_are_the_workers_to_refuse(cluster: Cluster, shapes: dict[str, Any]) -> None:
    assert seconds(price([job(shapes=shapes)], cluster, CostModel())) == unknown_work(cluster)


def test_a_body_that_cannot_be_read_is_the_workers_to_refuse(cluster: Cluster) -> None:
    broken = claimed("linalg.matmul", Options(), b"no envelope")
    assert seconds(price([broken], cluster, CostModel())) == unknown_work(cluster)


def test_a_scalar_counts_in_the_work_by_its_value_or_its_default(cluster: Cluster) -> None:
    rows = [{"x": [1000]}, {"x": [1000], "times": 2}, {"x": [1000], "times": 50}]
    priced = price([job("test.other", shapes=shapes) for shapes in rows], cluster, CostModel())
    default, same, more = priced.problem.seconds[:, 0].tolist()
    assert default == same < more


def test_a_device_that_does_not_announce_the_kernel_is_excluded_and_says_so(cluster: Cluster) -> None:
    priced = price([job("test.other", shapes={"x": [10]})], cluster, CostModel())
    assert math.isinf(seconds(priced)[1])
    assert priced.candidates[0][1].excluded == "announces no test.other"
    assert priced.candidates[0][1].estimate is None


@pytest.mark.parametrize("pin", ["gpu", "gpu.fast"])
def test_a_pinned_job_has_only_its_devices_as_candidates(cluster: Cluster, pin: str) -> None:
    priced = price([job(shapes=SHAPES, device=pin)], cluster, CostModel())
    assert math.isinf(seconds(priced)[0])
    assert math.isfinite(seconds(priced)[1])
    assert pin in (priced.candidates[0][0].excluded or "")


def test_a_device_is_ready_when_its_slots_have_worked_its_backlog_off(cluster: Cluster) -> None:
    cluster.dispatched("x", "cpu.slow", 3.0)
    problem = price([job(shapes=SHAPES)], cluster, CostModel()).problem
    assert problem.ready.tolist() == [1.5, 0.0]
    assert problem.slots.tolist() == [2.0, 1.0]


def test_the_tail_of_a_price_is_what_it_exceeds_once_in_twenty(cluster: Cluster) -> None:
    model = CostModel()
    for factor in (0.5, 2.0) * 20:
        sent_bytes = SIZE.transfer_bytes
        seen = Observation(MATMUL.name, "cpu.slow", 1, SIZE.flops, SIZE.bytes, 1e-4, factor, sent_bytes, SIZE.dims)
        model.learn(seen, SLOW)
    priced = price([job(shapes=SHAPES)], cluster, model)
    estimates = [each.estimate for each in priced.candidates[0]]
    assert priced.tail()[0] == pytest.approx([each.tail_s for each in estimates if each is not None])
    assert priced.tail()[0, 0] > 2 * priced.problem.seconds[0, 0]


def test_a_bundle_costs_what_its_jobs_cost_together(cluster: Cluster) -> None:
    window = Window("router", 4, 2**20)
    claim, _ = window.open_claim(Kind.NEW)
    jobs = [window.add(ids, "linalg.matmul", Options(shapes=SHAPES), b"", claim) for ids in (("a",), ("b", "c", "d"))]
    priced = price(jobs, cluster, CostModel())
    assert priced.problem.seconds[1] == pytest.approx(3 * priced.problem.seconds[0])
    assert priced.kinds == [0, 0]


def test_kernels_that_come_mixed_have_each_its_own_prices(cluster: Cluster) -> None:
    mixed = [job(shapes=SHAPES), job("test.other", shapes={"x": [10]}), job(shapes=SHAPES, device="gpu")]
    together = price(mixed, cluster, CostModel())
    for at, each in enumerate(mixed):
        alone = price([each], cluster, CostModel())
        assert together.problem.seconds[at].tolist() == pytest.approx(alone.problem.seconds[0].tolist(), rel=1e-12)
        for mine, its in zip(together.candidates[together.kinds[at]], alone.candidates[0], strict=True):
            assert (mine.device, mine.excluded) == (its.device, its.excluded)
            assert mine.estimate is None or mine.estimate.finish_s == pytest.approx(its.estimate.finish_s, rel=1e-12)


def test_a_job_that_waits_is_sized_anew_where_its_kernel_is_another(cluster: Cluster) -> None:
    waiting = job("test.other", shapes={"x": [10_000_000]})
    before = price([waiting], cluster, CostModel()).problem.seconds[0, 0]
    costly = msgspec.structs.replace(OTHER, flops="1000*n*times")
    cluster.refresh([Announcement("3", "one", "cpu.slow", "cpu", 2, False, SLOW, (costly,), 0.0)])
    assert price([waiting], cluster, CostModel()).problem.seconds[0, 0] > 10 * before


def test_no_jobs_have_no_prices(cluster: Cluster) -> None:
    assert price([], cluster, CostModel()).problem.seconds.shape == (0, 2)


def test_without_devices_a_problem_has_jobs_and_no_columns() -> None:
    priced = price([job(shapes=SHAPES), job(shapes=SHAPES)], Cluster(), CostModel())
    assert priced.problem.seconds.shape == (2, 0)
    assert (priced.kinds, list(priced.candidates)) == ([0, 0], [()])


def test_a_price_is_never_an_error_of_the_caller(cluster: Cluster) -> None:
    """What the body holds is the worker's to refuse: InvalidArguments never reaches the router."""
    try:
        price([job_of_body("linalg.matmul", {"a": [[1.0]], "b": 3})], cluster, CostModel())
    except InvalidArguments:
        pytest.fail("a wrong argument was raised while pricing")
