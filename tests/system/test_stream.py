"""Windows over event time through a whole Lepton: the example, and two workers that share a key."""

from __future__ import annotations

import numpy as np

from lepton_ai import Client, services
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
