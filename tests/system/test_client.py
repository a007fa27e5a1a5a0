"""The Client against a whole Lepton, straight to the broker and over HTTP alike."""

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from lepton_ai import Client, CloudEvent, topology
from lepton_ai.errors import InvalidArguments, JobCancelled, UnknownJob, UnknownKernel
from lepton_ai.event import FINAL_EVENTS
from pipeline.supervisor import Fleet
from queues.connection import Connection
from tasks.catalogue import load


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


def test_thousands_of_quick_jobs_travel_in_bundles_and_each_has_its_own_result_and_reason(
    fleet: Fleet, client: Client, http_client: Client
) -> None:
    def rows(count: int) -> list[dict[str, Any]]:
        return [{"a": np.full((1, 1), n, np.float32), "b": np.ones((1, 1), np.float32)} for n in range(count)]

    for job in client.submit_many("linalg.matmul", rows(300)):  # so that routers know how quick it is
        job.result(timeout=20)
    before = client.accounts()
    jobs, together = client.submit_many("linalg.matmul", rows(4000)), 0
    deadline = time.monotonic() + 30
    while not jobs[-1].done and time.monotonic() < deadline:
        together = max(together, client.accounts().terms["bundled"])
    assert together > before.terms["bundled"]
    assert [float(job.result(timeout=30)["c"][0, 0]) for job in jobs] == [float(n) for n in range(4000)]
    mapped = {job.row: float(job.result()["c"][0, 0]) for job in client.map("linalg.matmul", rows(2000), window=500)}
    assert mapped == {n: float(n) for n in range(2000)}
    after = client.accounts()
    assert after.accepted - before.accepted == after.terms["succeeded"] - before.terms["succeeded"] == 6000
    assert (after.difference, after.waiting - before.waiting, after.terms["bundled"]) == (0, 0, 0)
    for job in jobs[:: len(jobs) // 20]:
        for found in (job.why(), http_client.job(job.id).why()):
            assert found is not None
            assert (found.job, found.state) == (job.id, "placed")
    with closing(Connection(fleet.broker_url, "look")) as connection:
        assert {int(count) for count in connection.call("HVALS", topology.BUNDLED)} <= {0}


def test_a_job_is_found_again_by_its_id(lepton: Client, client: Client) -> None:
    job = client.submit("linalg.matmul", {"a": [[3.0]], "b": [[3.0]]})
    assert lepton.job(job.id).result(timeout=10) == {"c": [[9.0]]}
    assert lepton.job(job.id).state == "succeeded"


def test_the_fleet_is_described(lepton: Client) -> None:
    assert {each.device: each.slots for each in lepton.devices()} == {"cpu.big": 2, "cpu.little": 1}
    assert all(each.peaks.flops_per_s > 1e8 and not each.emulated for each in lepton.devices())
    assert lepton.kernels().keys() == load(()).kernels.keys()


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


# -- map --------------------------------------------------------------------------------------------------------------


def test_each_row_of_a_map_comes_back_once_with_its_own_result(lepton: Client) -> None:
    rows = ({"a": np.full((1, 1), n, np.float32), "b": np.ones((1, 1), np.float32)} for n in range(600))
    found = {job.row: float(job.result(timeout=0)["c"][0, 0]) for job in lepton.map("linalg.matmul", rows, window=150)}
    assert found == {n: float(n) for n in range(600)}


def test_a_map_of_endless_rows_may_be_left(lepton: Client) -> None:
    jobs = lepton.map("linalg.matmul", ({"a": [[float(n)]], "b": [[2.0]]} for n in itertools.count()), window=40)
    for job in itertools.islice(jobs, 200):
        assert job.row is not None
        assert job.result(timeout=0) == {"c": [[job.row * 2.0]]}
    jobs.close()


def test_rows_of_a_map_that_are_refused_are_failed_jobs_among_the_others(lepton: Client) -> None:
    wrong: dict[int, dict[str, Any]] = {
        3: {"a": [[1.0]]},
        17: {"a": [[1.0]], "b": object()},
        18: {"a": 1.0, "b": [[1.0]]},
    }
    rows = [wrong.get(n, {"a": [[float(n)]], "b": [[1.0]]}) for n in range(40)]
    jobs = {job.row: job for job in lepton.map("linalg.matmul", rows)}
    assert sorted(jobs) == list(range(40))
    for n, job in jobs.items():
        if n in wrong:
            assert job.state == "failed"
            with pytest.raises(InvalidArguments):
                job.result(timeout=0)
        else:
            assert job.result(timeout=0) == {"c": [[float(n)]]}


def test_jobs_of_a_map_that_take_long_come_back_too(lepton: Client) -> None:
    image = np.random.default_rng(1).random((700, 700), dtype=np.float32)
    jobs = list(lepton.map("medical.median_filter", ({"image": image} for _ in range(40)), device="cpu.little"))
    assert len({job.row for job in jobs}) == 40
    assert all(job.result(timeout=0) for job in jobs)


def test_what_was_mapped_explains_itself(lepton: Client) -> None:
    (job,) = lepton.map("linalg.matmul", [{"a": square(), "b": square()}])
    cost = job.record().cost
    placement = job.why()
    assert cost is not None
    assert placement is not None
    assert cost.device == placement.device


def test_over_http_a_map_of_an_unknown_kernel_is_refused_at_once(http_client: Client) -> None:
    with pytest.raises(UnknownKernel):
        list(http_client.map("no.such", [{"a": 1}] * 10))


# -- cancel -----------------------------------------------------------------------------------------------------------


def test_a_job_that_waits_is_cancelled(lepton: Client) -> None:
    job = lepton.submit("linalg.matmul", {"a": square(), "b": square()}, device="fpga")  # nobody has one: it is parked
    assert job.cancel()
    with pytest.raises(JobCancelled):
        job.result(timeout=20)
    assert (job.state, job.cancel(), lepton.cancel(job.id)) == ("cancelled", False, False)
    assert lepton.job(job.id).state == "cancelled"


def test_a_job_that_has_ended_keeps_its_result(lepton: Client) -> None:
    job = lepton.submit("linalg.matmul", {"a": [[2.0]], "b": [[4.0]]})
    job.result(timeout=10)
    assert not lepton.cancel(job.id)
    assert lepton.job(job.id).result(timeout=0) == {"c": [[8.0]]}


def test_over_http_nothing_can_be_cancelled_that_is_not_known(http_client: Client) -> None:
    with pytest.raises(UnknownJob):
        http_client.cancel("no-such-job")


# -- events -----------------------------------------------------------------------------------------------------------


def types(events: Iterable[CloudEvent]) -> list[str]:
    return [each.type.removeprefix("io.lepton.").removesuffix(".v1") for each in events]


def test_what_happens_to_a_job_after_the_call_is_told(lepton: Client, client: Client) -> None:
    events = lepton.events(timeout=20)
    job = client.submit("linalg.matmul", {"a": square(), "b": square()})
    found = list(itertools.takewhile(lambda each: each.type not in FINAL_EVENTS, events))
    events.close()
    assert "job.placed" in types(each for each in found if each.subject == job.id)


def test_a_jobs_events_are_told_from_its_first_to_its_last_whenever_they_are_asked_for(lepton: Client) -> None:
    job = lepton.submit("linalg.matmul", {"a": square(), "b": square()})
    early = list(job.events(timeout=20))
    late = list(lepton.job(job.id).events(timeout=20))
    assert early == late
    assert types(early)[-2:] == ["job.placed", "job.succeeded"]
    assert {each.subject for each in early} == {job.id}
    assert early[-1].data["run_s"] > 0


def test_events_go_on_behind_any_of_them(lepton: Client) -> None:
    job = lepton.submit("linalg.matmul", {"a": square(), "b": square()})
    every = list(job.events(timeout=20))
    for at, each in enumerate(every):
        assert list(lepton.events(each.id, job=job.id, timeout=0.2)) == every[at + 1 :]


def test_both_ways_tell_of_the_same_events_in_the_same_words(client: Client, http_client: Client) -> None:
    jobs = client.submit_many("linalg.matmul", [{"a": square(), "b": square()}] * 5)
    last = [list(job.events(timeout=20)) for job in jobs][-1][-1]
    told = []
    for each in (client, http_client):
        events = each.events("0", timeout=20)
        told.append([*itertools.takewhile(lambda one: one.id != last.id, events)])
        events.close()
    assert told[0] == told[1]
    assert len(told[0]) > 5


def test_the_end_of_a_cancelled_job_is_told(lepton: Client) -> None:
    job = lepton.submit("linalg.matmul", {"a": square(), "b": square()}, device="fpga")
    job.cancel()
    told = types(job.events(timeout=20))
    assert (told[-1], told.count("job.cancel_asked"), told.count("job.cancelled")) == ("job.cancelled", 1, 1)


# -- notebooks --------------------------------------------------------------------------------------------------------


def test_a_card_shows_where_a_job_went_and_what_it_really_cost(lepton: Client) -> None:
    job = lepton.submit("linalg.matmul", {"a": square(), "b": square()})
    job.result(timeout=10)
    for shown in (job._repr_html_(), lepton.job(job.id)._repr_html_()):
        assert all(word in shown for word in ("linalg.matmul", "succeeded", "cpu.big", "cpu.little", "really", job.id))
