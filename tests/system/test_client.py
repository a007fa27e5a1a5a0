"""The Client against a whole Lepton, straight to the broker and over HTTP alike."""

from collections.abc import Iterator

import numpy as np
import pytest

from lepton_ai import Client
from lepton_ai.errors import InvalidArguments, UnknownKernel
from pipeline.supervisor import Fleet


@pytest.fixture(params=["broker", "http"])
def lepton(fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Client]:
    with Client(fleet.broker_url if request.param == "broker" else fleet.http_url) as client:
        yield client


def square(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((16, 16), dtype=np.float32)


def test_arrays_go_out_and_come_back_as_arrays(lepton: Client) -> None:
    a, b = square(1), square(2)
    result = lepton.submit("linalg.matmul", {"a": a, "b": b}).result(timeout=10)
    np.testing.assert_allclose(result["c"], a @ b, rtol=1e-4)


def test_lists_come_back_as_lists(lepton: Client) -> None:
    result = lepton.submit("linalg.matmul", {"a": [[2.0]], "b": [[4.0]]}).result(timeout=10)
    assert result == {"c": [[8.0]]}


def test_a_wrong_argument_raises_the_same_class_and_names_it(lepton: Client) -> None:
    with pytest.raises(InvalidArguments, match="argument 'b'") as raised:
        lepton.submit("linalg.matmul", {"a": square(), "b": square()[:3]}).result(timeout=10)
    assert raised.value.field == "b"


def test_every_job_is_explained(lepton: Client) -> None:
    job = lepton.submit("linalg.matmul", {"a": square(), "b": square()})
    job.result(timeout=10)
    placement = job.why()
    assert placement is not None
    assert {candidate.device for candidate in placement.candidates} == {"cpu.big", "cpu.little"}
    assert placement.device in {"cpu.big", "cpu.little"}
    assert placement.estimate is not None
    assert placement.estimate.run_s > 0
    cost = job.record().cost
    assert cost is not None
    assert cost.run_s > 0
    assert cost.device == placement.device


@pytest.mark.parametrize("device", ["cpu.big", "cpu.little"])
def test_a_pinned_job_runs_where_it_was_pinned_and_says_so(lepton: Client, device: str) -> None:
    job = lepton.submit("linalg.matmul", {"a": square(), "b": square()}, device=device)
    job.result(timeout=10)
    placement = job.why()
    assert placement is not None
    assert placement.device == device
    (other,) = [candidate for candidate in placement.candidates if candidate.device != device]
    assert other.excluded is not None
    assert device in other.excluded


def test_many_jobs_give_each_its_own_result(lepton: Client) -> None:
    rows = [{"a": np.full((1, 1), n, np.float32), "b": np.ones((1, 1), np.float32)} for n in range(500)]
    found = [float(job.result(timeout=20)["c"][0, 0]) for job in lepton.submit_many("linalg.matmul", rows)]
    assert found == [float(n) for n in range(500)]


def test_a_job_is_found_again_by_its_id(lepton: Client, client: Client) -> None:
    job = client.submit("linalg.matmul", {"a": [[3.0]], "b": [[3.0]]})
    assert lepton.job(job.id).result(timeout=10) == {"c": [[9.0]]}
    assert lepton.job(job.id).state == "succeeded"


def test_the_fleet_is_described(lepton: Client) -> None:
    assert {each.device: each.slots for each in lepton.devices()} == {"cpu.big": 2, "cpu.little": 1}
    assert all(each.peaks.flops_per_s > 1e8 and not each.emulated for each in lepton.devices())
    assert len(lepton.kernels()) == 6


def test_over_http_an_unknown_kernel_is_refused_at_once(http_client: Client) -> None:
    with pytest.raises(UnknownKernel):
        http_client.submit("no.such", {"a": 1})


def test_straight_to_the_broker_an_unknown_kernel_is_parked_and_says_so(client: Client) -> None:
    job = client.submit("no.such", {"a": 1})
    for _ in range(200):
        if (placement := job.why()) is not None:
            break
    assert placement is not None
    assert placement.state == job.state == "parked"
    assert "no live device can run no.such" in placement.reason


def test_what_is_learned_shows_in_the_estimates(client: Client) -> None:
    rows = [{"image": np.random.default_rng(n).random((96, 96), dtype=np.float32)} for n in range(60)]
    jobs = client.submit_many("medical.median_filter", rows, device="cpu.big")
    for job in jobs:
        job.result(timeout=20)
    after = client.submit("medical.median_filter", rows[0], device="cpu.big")
    after.result(timeout=10)
    record = after.record()
    assert record.placement is not None
    assert record.placement.estimate is not None
    assert record.cost is not None
    # A noisy machine: within a factor of ten, where the untaught model would be off by any.
    assert 0.1 < record.placement.estimate.run_s / record.cost.run_s < 10


def test_more_than_one_request_may_carry_is_submitted_all_the_same(lepton: Client) -> None:
    big = np.ones((512, 512), np.float32)  # a megabyte each, and the limit of a request is eight
    jobs = lepton.submit_many("vision.ndvi", [{"red": big, "nir": big}] * 12)
    assert all(float(job.result(timeout=30)["ndvi"].max()) == 0.0 for job in jobs)


def test_nothing_to_submit_is_no_mistake(lepton: Client) -> None:
    assert lepton.submit_many("vision.ndvi", []) == []
