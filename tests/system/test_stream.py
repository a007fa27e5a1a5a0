"""Windows over event time through a whole Lepton: the example, and two workers that share a key."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_ai import AsyncClient, Client, cli, services
from lepton_ai.errors import OptionNotSupported
from pipeline.supervisor import Fleet
from tests.system.test_examples import run

EXAMPLE = services.root() / "examples" / "stream.py"


def test_the_example_counts_each_event_once(fleet: Fleet) -> None:
    output = run(fleet, EXAMPLE, "--batch", "500")
    assert "196 windows of 5844 events, 0 late, of 5844 sent" in output


def test_jobs_of_one_key_on_two_workers_at_once_are_all_in_its_windows(client: Client) -> None:
    random = np.random.default_rng(1)
    times, values = random.uniform(0, 100, (40, 50)), random.integers(0, 100, (40, 50)).astype(np.float64)
    keys = random.integers(0, 3, (40, 50))
    rows = [
        {"times": t, "keys": k, "values": v, "width": 10.0, "lateness": 1e6}
        for t, k, v in zip(times, keys, values, strict=True)
    ]
    jobs = client.submit_many("stream.window", rows, state_key="two-workers")
    assert all(len(job.result(30)["closed"]) == 0 for job in jobs)
    end = {"times": [1e9], "keys": [0], "values": [0.0], "width": 10.0}
    closed = np.array(client.submit("stream.window", end, state_key="two-workers").result(30)["closed"])
    windows = np.floor(times / 10) * 10
    expected = {
        (key, start): (np.count_nonzero(chosen), values[chosen].sum(), values[chosen].min(), values[chosen].max())
        for key in range(3)
        for start in np.unique(windows)
        if (chosen := (keys == key) & (windows == start)).any()
    }
    assert {(row[0], row[1]): tuple(row[2:]) for row in closed.tolist()} == expected


def test_another_tenant_s_key_is_another_state(fleet: Fleet, client: Client) -> None:
    row = {"times": [1.0], "keys": [1], "values": [2.0], "width": 10.0}
    end = {"times": [100.0], "keys": [1], "values": [2.0], "width": 10.0}
    with Client(fleet.broker_url, tenant="other") as other:
        other.submit("stream.window", row, state_key="tenants").result(30)
    assert len(client.submit("stream.window", end, state_key="tenants").result(30)["closed"]) == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_a_state_can_be_looked_at_and_forgotten(fleet: Fleet, is_async: bool) -> None:
    key, row = f"forgotten-{is_async}", {"times": [1.0], "keys": [1], "values": [2.0], "width": 10.0}
    end = {"times": [100.0], "keys": [1], "values": [3.0], "width": 10.0}
    with Client(fleet.broker_url, tenant="curious") as client:

        def state() -> dict[str, Any] | None:
            return asyncio.run(_state(fleet, key)) if is_async else client.state("stream.window", key)

        assert state() is None
        client.submit("stream.window", row, state_key=key).result(30)
        found = state()
        assert found is not None
        assert found.keys() == {"state", "watermark"}
        np.testing.assert_array_equal(found["state"], [[1, 0, 1, 2, 2, 2]])
        assert (asyncio.run(_forget(fleet, key)) if is_async else client.forget("stream.window", key)) is True
        assert state() is None
        assert not client.forget("stream.window", key)
        assert len(client.submit("stream.window", end, state_key=key).result(30)["closed"]) == 0
    with Client(fleet.broker_url) as other:
        assert other.state("stream.window", key) is None
        with pytest.raises(OptionNotSupported, match="a state key is 1 to"):
            other.forget("stream.window", "")


async def _state(fleet: Fleet, key: str) -> dict[str, Any] | None:
    async with AsyncClient(fleet.broker_url, tenant="curious") as client:
        return await client.state("stream.window", key)


async def _forget(fleet: Fleet, key: str) -> bool:
    async with AsyncClient(fleet.broker_url, tenant="curious") as client:
        return await client.forget("stream.window", key)


def test_the_command_line_shows_and_drops_it(
    fleet: Fleet, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"times": [1.0], "keys": [1], "values": [2.0], "width": 10.0}
    client.submit("stream.window", row, state_key="told").result(30)
    command = ["state", "stream.window", "told", "--url", fleet.broker_url]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("state  float64[1,6]\n[[1. 0. 1. 2. 2. 2.]]\nwatermark  float64[1]\n")
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"]["state"] == [[1, 0, 1, 2, 2, 2]]
    assert cli.main([*command, "--forget", "--out", str(tmp_path / "state.npy")]) == 2
    assert "an .npy file holds one array" in capsys.readouterr().err  # and nothing is dropped
    kept = tmp_path / "state.npz"
    assert cli.main([*command, "--forget", "--out", str(kept), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"kernel": "stream.window", "state_key": "told", "forgotten": True, "saved": str(kept)}
    with np.load(kept) as arrays:
        assert arrays["state"].shape == (1, 6)
    assert cli.main(command) == 1
    assert capsys.readouterr() == ("", "lepton: stream.window has no state of the key 'told'\n")
    assert cli.main(["state", "stream.window", "told", "--url", fleet.http_url]) == 1
    assert "name its address, not an ingest's" in capsys.readouterr().err
