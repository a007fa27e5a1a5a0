"""Arrays on a store through a whole Lepton: named in a job, read by the worker where it may, kept where they are."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lepton_ai import AsyncClient, Client, store
from lepton_ai.errors import BlobLost, InvalidArguments
from lepton_ai.settings import Settings
from pipeline.supervisor import Fleet, run_fleet

pytest.importorskip("fsspec", reason="needs the extra `store`")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scans")


@pytest.fixture(scope="module")
def fleet(settings: Settings, scans: Path) -> Iterator[Fleet]:
    """One whose worker may read the scans and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEPTON_STORES", f"file://{scans}")
        with run_fleet(settings, {"cpu.stored": 1}, print) as fleet:
            yield fleet


def test_a_job_may_name_arrays_on_a_store(client: Client, scans: Path) -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 300, 300), np.float32)
    named = {"a": store.put(a, f"file://{scans}/a.npy"), "b": store.put(b, f"file://{scans}/b.bin")}
    rows = [named, {"a": named["a"], "b": b}, {"a": a, "b": b}]
    jobs = [client.submit("linalg.matmul", row) for row in rows]
    for job in [*jobs, *client.map("linalg.matmul", rows)]:
        np.testing.assert_allclose(job.result(30)["c"], a @ b, rtol=1e-3, atol=1e-3)
    assert {each.name for each in scans.iterdir()} >= {"a.npy", "b.bin"}


def test_an_asynchronous_client_and_a_key_may_name_them_too(fleet: Fleet, client: Client, scans: Path) -> None:
    eye = store.put(np.eye(200, dtype=np.float32), f"file://{scans}/eye.npy")

    async def ask() -> np.ndarray:
        async with AsyncClient(fleet.broker_url) as asynchronous:
            job = await asynchronous.submit("linalg.matmul", {"a": eye, "b": eye})
            return (await job.result(30))["c"]

    np.testing.assert_array_equal(asyncio.run(ask()), np.eye(200))
    first, second = (client.submit("linalg.matmul", {"a": eye, "b": eye}, key="stored") for _ in range(2))
    assert first.id == second.id
    np.testing.assert_array_equal(second.result(30)["c"], np.eye(200))


def test_what_is_gone_or_not_for_the_worker_is_told(client: Client, scans: Path, tmp_path: Path) -> None:
    square = np.eye(4, dtype=np.float32)
    elsewhere = store.put(square, f"file://{tmp_path}/a.npy")
    with pytest.raises(InvalidArguments, match=r"not for workers to read; they read only below file://"):
        client.submit("linalg.matmul", {"a": elsewhere, "b": square}).result(30)
    gone = store.put(square, f"file://{scans}/gone.npy")
    (scans / "gone.npy").unlink()
    with pytest.raises(BlobLost, match=r"nothing is at file://.*gone.npy"):
        client.submit("linalg.matmul", {"a": gone, "b": square}).result(30)


def test_over_http_they_are_refused(http_client: Client, scans: Path) -> None:
    eye = store.put(np.eye(4, dtype=np.float32), f"file://{scans}/eye4.npy")
    with pytest.raises(InvalidArguments, match="not of HTTP"):
        http_client.submit("linalg.matmul", {"a": eye, "b": eye})
