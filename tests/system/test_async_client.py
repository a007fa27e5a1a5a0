"""The AsyncClient against a whole Lepton, straight to the broker and over HTTP alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from lepton_ai import AsyncClient
from lepton_ai.errors import InvalidArguments, JobCancelled, ResultTimeout, UnknownJob, UnknownKernel
from pipeline.supervisor import Fleet


@pytest.fixture(params=["broker", "http"])
def url(fleet: Fleet, request: pytest.FixtureRequest) -> str:
    return fleet.broker_url if request.param == "broker" else fleet.http_url


def square(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((16, 16), dtype=np.float32)


def test_arrays_go_out_and_come_back_as_arrays_with_their_explanation(url: str) -> None:
    async def main() -> None:
        async with AsyncClient(url) as lepton:
            job = await lepton.submit("linalg.matmul", {"a": square(1), "b": square(2)}, priority=9)
            np.testing.assert_allclose((await job)["c"], square(1) @ square(2), rtol=1e-4)
            assert (await job.state(), await job.done()) == ("succeeded", True)
            placement, cost = await job.why(), (await job.record()).cost
            assert placement is not None
            assert cost is not None
            assert cost.device == placement.device
            assert "really" in job._repr_html_()

    asyncio.run(main())


def test_a_wrong_argument_raises_the_same_class_and_names_it(url: str) -> None:
    async def main() -> None:
        async with AsyncClient(url) as lepton:
            with pytest.raises(InvalidArguments, match="argument 'b'"):
                await (await lepton.submit("linalg.matmul", {"a": square(), "b": square()[:3]}))

    asyncio.run(main())


def test_hundreds_of_tasks_may_submit_and_wait_at_once(url: str) -> None:
    async def one(lepton: AsyncClient, n: int) -> Any:
        job = await lepton.submit("linalg.matmul", {"a": [[float(n)]], "b": [[1.0]]})
        return (await job.result(timeout=60))["c"]

    async def main() -> None:
        async with AsyncClient(url) as lepton:
            found = await asyncio.gather(*(one(lepton, n) for n in range(300)))
            assert found == [[[float(n)]] for n in range(300)]

    asyncio.run(main())


def test_the_fleet_is_described(url: str) -> None:
    async def main() -> None:
        async with AsyncClient(url) as lepton:
            assert {each.device for each in await lepton.devices()} == {"cpu.big", "cpu.little"}
            assert "linalg.matmul" in await lepton.kernels()

    asyncio.run(main())


def test_a_wait_that_is_cancelled_or_too_short_leaves_the_job_to_others(url: str) -> None:
    async def main() -> None:
        async with AsyncClient(url) as lepton:
            job = await lepton.submit("linalg.matmul", {"a": square(), "b": square()}, device="fpga")
            waiting = [asyncio.ensure_future(job.result(timeout=60)) for _ in range(3)]
            with pytest.raises(ResultTimeout, match=r"parked|waiting"):
                await job.result(timeout=0.2)
            waiting[0].cancel()
            assert await job.cancel()
            results = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(each) for each in results] == [asyncio.CancelledError, JobCancelled, JobCancelled]
            assert (await job.state(), await job.cancel(), await lepton.cancel(job.id)) == ("cancelled", False, False)

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["at hand", "to come"])
def test_each_row_of_a_map_comes_back_once_with_its_own_result(url: str, kind: str) -> None:
    rows = [{"a": np.full((1, 1), n, np.float32), "b": np.ones((1, 1), np.float32)} for n in range(600)]

    async def coming() -> AsyncIterator[dict[str, Any]]:
        for row in rows:
            yield row
            await asyncio.sleep(0)

    async def main() -> None:
        async with AsyncClient(url) as lepton:
            jobs = lepton.map("linalg.matmul", coming() if kind == "to come" else rows, window=150)
            found = {job.row: float((await job.result(timeout=0))["c"][0, 0]) async for job in jobs}
            assert found == {n: float(n) for n in range(600)}

    asyncio.run(main())


def test_rows_of_a_map_that_are_refused_are_failed_jobs_among_the_others(url: str) -> None:
    wrong: dict[int, dict[str, Any]] = {
        3: {"a": [[1.0]]},
        17: {"a": [[1.0]], "b": object()},
        18: {"a": 1.0, "b": [[1.0]]},
    }

    async def main() -> None:
        async with AsyncClient(url) as lepton:
            rows = [wrong.get(n, {"a": [[float(n)]], "b": [[1.0]]}) for n in range(40)]
            jobs = {job.row: job async for job in lepton.map("linalg.matmul", rows)}
            assert {row for row, job in jobs.items() if await job.state() == "failed"} == set(wrong)
            for row in wrong:
                with pytest.raises(InvalidArguments):
                    await jobs[row]

    asyncio.run(main())


def test_jobs_of_a_map_that_take_long_come_back_too(url: str) -> None:
    image = np.random.default_rng(1).random((700, 700), dtype=np.float32)

    async def main() -> None:
        async with AsyncClient(url) as lepton:
            jobs = lepton.map("medical.median_filter", ({"image": image} for _ in range(40)), device="cpu.little")
            assert {job.row async for job in jobs} == set(range(40))

    asyncio.run(main())


def test_a_map_may_be_left_and_the_client_used_on(url: str) -> None:
    async def main() -> None:
        async with AsyncClient(url) as lepton:
            rows = ({"a": [[float(n)]], "b": [[2.0]]} for n in range(10_000))
            async with aclosing(lepton.map("linalg.matmul", rows, window=40)) as jobs:
                async for job in jobs:
                    if job.row is not None and job.row > 100:
                        break
            assert await (await lepton.submit("linalg.matmul", {"a": [[1.0]], "b": [[2.0]]})) == {"c": [[2.0]]}

    asyncio.run(main())


def test_events_are_told_and_go_on_behind_any_of_them(url: str) -> None:
    async def main() -> None:
        async with AsyncClient(url) as lepton:
            async with lepton.events(timeout=20) as events:
                job = await lepton.submit("linalg.matmul", {"a": square(), "b": square()})
                async for each in events:
                    if each.subject == job.id and each.type == "io.lepton.job.placed.v1":
                        break
            every = [each async for each in job.events(timeout=20)]
            assert each in every
            assert every[-1].type == "io.lepton.job.succeeded.v1"
            for at, one in enumerate(every):
                later = [each async for each in lepton.events(one.id, job=job.id, timeout=0.2)]
                assert later == every[at + 1 :]

    asyncio.run(main())


def test_over_http_what_is_not_known_is_refused(fleet: Fleet) -> None:
    async def main() -> None:
        async with AsyncClient(fleet.http_url) as lepton:
            with pytest.raises(UnknownJob):
                await lepton.cancel("no-such-job")
            with pytest.raises(UnknownKernel):
                await lepton.submit("no.such", {"a": 1})
            with pytest.raises(UnknownKernel):
                _ = [job async for job in lepton.map("no.such", [{"a": 1}] * 10)]

    asyncio.run(main())
