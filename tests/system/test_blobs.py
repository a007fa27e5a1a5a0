"""Large arrays through a whole Lepton: both clients, through the broker and through shared memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_ai import AsyncClient, Client, blob, ring
from lepton_ai.errors import InvalidArguments, JobCancelled
from pipeline.supervisor import Fleet
from queues.connection import Connection

MIB = 1 << 20
SIZES = [MIB, 16 * MIB]

Sees = Callable[[], list[str]]


@pytest.fixture(params=["ring", "redis"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "redis":
        monkeypatch.setenv("LEPTON_RING_BYTES", "0")
    elif not ring.FOLDER.is_dir():
        pytest.skip("no /dev/shm here")
    return str(request.param)


@pytest.fixture
def went(way: str, monkeypatch: pytest.MonkeyPatch) -> Sees:
    """Where the arrays went that were sent since."""
    found: list[str] = []
    for module, name, told in ((ring.Ring, "put", "ring"), (blob, "write_commands", "redis")):
        monkeypatch.setattr(module, name, _noting(getattr(module, name), found, told))
    return lambda: found


def _noting(call: Callable[..., Any], found: list[str], told: str) -> Callable[..., Any]:
    def noted(*arguments: Any, **more: Any) -> Any:
        made = call(*arguments, **more)
        if made is not None:
            found.append(told)
        return made

    return noted


@pytest.fixture(autouse=True)
def left(fleet: Fleet) -> Iterator[None]:
    """Each test ends with nothing left, in the broker or in memory."""
    before = segments()
    yield
    connection = Connection(fleet.broker_url, "looks")
    until = time.monotonic() + 5
    while (keys := connection.call("KEYS", "lepton-blob:*")) and time.monotonic() < until:
        if all(connection.call("TTL", key) != -1 for key in keys):
            break
        time.sleep(0.05)
    assert [key for key in keys if connection.call("TTL", key) == -1] == []
    connection.close()
    assert segments() <= before


def segments() -> set[Path]:
    return {path for path in ring.FOLDER.glob("lepton-*") if "memory" not in path.name}


def row(size: int, seed: int = 0) -> tuple[dict[str, np.ndarray[Any, Any]], float]:
    """Two vectors of which one takes so many bytes, and their product."""
    one = np.random.default_rng(seed).random((1, size // 4), np.float32)
    other = np.zeros((size // 4, 1), np.float32)
    other[seed::1000] = 1.0
    return {"a": one, "b": other}, float(one[0, seed::1000].sum(dtype=np.float64))


@pytest.mark.parametrize("size", SIZES)
def test_arrays_of_any_size_come_to_the_kernel_as_they_were(fleet: Fleet, way: str, went: Sees, size: int) -> None:
    with Client(fleet.broker_url) as lepton:
        arguments, expected = row(size)
        found = lepton.submit("linalg.matmul", arguments).result(timeout=30)["c"]
        assert float(found[0, 0]) == pytest.approx(expected, rel=1e-3)
        rows = [row(size, seed) for seed in range(3 * 16 * MIB // size if size < 16 * MIB else 6)]
        jobs = list(lepton.map("linalg.matmul", (arguments for arguments, _ in rows)))
        assert sorted(job.row or 0 for job in jobs) == list(range(len(rows)))
        for job in jobs:
            product = float(job.result(timeout=0)["c"][0, 0])
            assert product == pytest.approx(rows[job.row or 0][1], rel=1e-3)
        assert set(went()) == {way}


@pytest.mark.parametrize("size", SIZES)
def test_from_an_event_loop_too(fleet: Fleet, way: str, went: Sees, size: int) -> None:
    async def main() -> None:
        async with AsyncClient(fleet.broker_url) as lepton:
            arguments, expected = row(size)
            found = await (await lepton.submit("linalg.matmul", arguments)).result(timeout=30)
            assert float(found["c"][0, 0]) == pytest.approx(expected, rel=1e-3)
            rows = [row(size, seed) for seed in range(6)]
            count = 0
            async for job in lepton.map("linalg.matmul", (arguments for arguments, _ in rows)):
                product = float((await job.result(timeout=0))["c"][0, 0])
                assert product == pytest.approx(rows[job.row or 0][1], rel=1e-3)
                count += 1
            assert count == 6
            # Who shares our memory is asked with the first, which does not wait for that.
            assert went() == ["redis"] * 2 + [way] * 12

    asyncio.run(main())


def test_a_map_of_more_than_the_ring_holds_waits_for_room(
    fleet: Fleet, went: Sees, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "ring":
        monkeypatch.setenv("LEPTON_RING_BYTES", str(16 * MIB))
    arguments, expected = row(2 * MIB)
    with Client(fleet.broker_url) as lepton:
        for job in lepton.map("linalg.matmul", (arguments for _ in range(30))):
            assert float(job.result(timeout=0)["c"][0, 0]) == pytest.approx(expected, rel=1e-3)
    assert set(went()) == {way}


def test_a_job_with_a_key_is_one_job(fleet: Fleet, way: str) -> None:
    arguments, expected = row(MIB)
    with Client(fleet.broker_url) as lepton:
        jobs = [lepton.submit("linalg.matmul", arguments, key="large") for _ in range(3)]
        found = [float(job.result(timeout=30)["c"][0, 0]) for job in jobs]
    assert len({job.id for job in jobs}) == 1
    assert found == [pytest.approx(expected, rel=1e-3)] * 3


def test_a_job_that_is_wrong_or_cancelled_leaves_nothing(fleet: Fleet, way: str) -> None:
    arguments, _ = row(MIB)
    with Client(fleet.broker_url) as lepton:
        with pytest.raises(InvalidArguments, match="argument 'b'"):
            lepton.submit("linalg.matmul", arguments | {"b": arguments["a"]}).result(timeout=30)
        with pytest.raises(InvalidArguments, match="float32"):
            lepton.submit("linalg.matmul", arguments | {"b": arguments["b"].astype(np.int32)}).result(timeout=30)
        job = lepton.submit("linalg.matmul", arguments, device="fpga")
        assert job.cancel()
        with pytest.raises(JobCancelled):
            job.result(timeout=30)


def test_over_http_they_travel_in_their_request(fleet: Fleet) -> None:
    arguments, expected = row(MIB)
    with Client(fleet.http_url) as lepton:
        found = lepton.submit("linalg.matmul", arguments).result(timeout=30)["c"]
    assert float(found[0, 0]) == pytest.approx(expected, rel=1e-3)
