"""Keys, tenants, times, dead letters and accounts with a whole Lepton behind every door."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lepton_ai import Client, cli, job_id, topology
from lepton_ai.accounts import ENDS
from lepton_ai.dead import DeadLetter
from lepton_ai.errors import JobDead, JobExpired, KernelFailed, KeyConflict, LeptonError
from lepton_ai.event import FINAL_EVENTS
from lepton_ai.identity import new_id
from lepton_ai.settings import Settings
from pipeline.supervisor import Fleet, run_fleet
from queues.connection import Connection

ONE = {"a": [[2.0]], "b": [[4.0]]}
DOORS = ["broker", "http"]


def door(fleet: Fleet, name: str, **more: Any) -> Client:
    return Client(fleet.broker_url if name == "broker" else fleet.http_url, **more)


@pytest.fixture(params=DOORS)
def lepton(fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Client]:
    with door(fleet, request.param) as client:
        yield client


def test_a_key_has_one_result_through_every_door(fleet: Fleet) -> None:
    key = new_id()

    def submit(number: int) -> Any:
        with door(fleet, DOORS[number % 2]) as client:
            job = client.submit("linalg.matmul", {"a": np.full((1, 1), 2.0, np.float32), "b": [[4]]}, key=key)
            return job.id, np.asarray(job.result(timeout=30)["c"]).tolist()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(submit, range(16)))
    assert found == [(job_id(key), [[8.0]])] * 16
    with Client(fleet.broker_url) as client:
        ends = [each for each in client.job(job_id(key)).events(timeout=5) if each.type in FINAL_EVENTS]
    assert len(ends) == 1
    for name in DOORS:  # and long after it has ended
        assert submit(DOORS.index(name)) == found[0]
        with door(fleet, name) as client, pytest.raises(KeyConflict):
            client.submit("linalg.matmul", ONE | {"b": [[5.0]]}, key=key)


def test_a_tenants_job_runs(fleet: Fleet) -> None:
    for name in DOORS:
        with door(fleet, name, tenant=f"team-{name}") as client:
            assert client.submit("linalg.matmul", ONE, key="k", priority=9).result(timeout=30) == {"c": [[8.0]]}


def test_a_job_waits_until_it_is_due(lepton: Client) -> None:
    start = time.time()
    job = lepton.submit("linalg.matmul", ONE, delay_s=1.5)
    states = set()
    while not job.done:
        states.add(job.state)
        time.sleep(0.02)
    assert 1.5 <= time.time() - start < 10
    assert "scheduled" in states
    assert job.result(timeout=5) == {"c": [[8.0]]}


def test_a_job_that_cannot_run_before_its_deadline_expires(lepton: Client) -> None:
    job = lepton.submit("linalg.matmul", ONE, device="fpga", deadline_s=1)
    with pytest.raises(JobExpired, match=job.id):
        job.result(timeout=30)
    assert job.state == "expired"
    (other,) = lepton.map("linalg.matmul", [ONE], device="fpga", deadline_s=1)
    with pytest.raises(JobExpired):
        other.result(timeout=0)


def test_the_command_line_submits_once(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    key = new_id()
    for url in (fleet.broker_url, fleet.http_url):
        arguments = ["submit", "linalg.matmul", "--arg", "a=[[2]]", "--arg", "b=[[4.0]]", "--key", key, "--url", url]
        assert cli.main([*arguments, "--delay", "0.1", "--deadline", "60", "--limit", "30", "--wait=30"]) == 0
        assert cli.main(["status", job_id(key), "--url", url]) == 0
    assert capsys.readouterr().out.count("succeeded") == 2


def test_what_nobody_can_read_is_a_dead_letter(fleet: Fleet, lepton: Client) -> None:
    connection = Connection(fleet.broker_url, "odd")
    connection.call("LPUSH", topology.LANE, "no message")
    found: list[DeadLetter] = []
    for _ in range(200):
        if found := [each for each in lepton.dead() if each.code == "unreadable"]:
            break
        time.sleep(0.05)
    (letter,) = found
    assert letter.size_bytes == len("no message")
    assert "nobody can read" in lepton.replay([letter.entry]).left[letter.entry]
    assert lepton.purge([letter.entry]).count == 1
    connection.close()


def test_the_accounts_add_up(fleet: Fleet, lepton: Client) -> None:
    before = lepton.accounts()
    assert sum(job.state == "succeeded" for job in lepton.map("linalg.matmul", [ONE] * 200)) == 200
    found = lepton.accounts()
    assert before.difference == found.difference == 0
    assert found.accepted == sum(found.terms[name] for name in ENDS) + found.waiting + found.in_flight
    assert found.terms["succeeded"] >= before.terms["succeeded"] + 200
    told = httpx.get(f"{fleet.http_url}/metrics").text
    assert "lepton_conservation_difference 0.0" in told
    assert cli.main(["doctor", "--url", fleet.http_url]) in (0, 1)


@pytest.fixture(scope="module")
def flaky(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A Lepton whose kernels fail until a file is there."""
    own = {
        "LEPTON_KERNELS": "flaky_kernels",
        "TEST_FLAKY": str(tmp_path_factory.mktemp("flaky")),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        with run_fleet(settings, {"cpu": 1}, print) as fleet:
            yield fleet


@pytest.mark.parametrize("name", DOORS)
def test_a_job_whose_retries_are_used_up_is_replayed(flaky: Fleet, name: str) -> None:
    with door(flaky, name) as client:
        job = client.submit("test.hopeless", {"n": 1}, key=f"hopeless-{name}")
        with pytest.raises(LeptonError) as raised:
            job.result(timeout=30)
        assert isinstance(raised.value, JobDead | KernelFailed)
        (letter,) = client.dead(job=job.id)
        assert (letter.kernel, letter.code, letter.arguments) == ("test.hopeless", "retries", {"n": 1})
        assert "will never be there" in f"{letter.trace} {letter.reason}"
        assert client.replay([job.id]).count == 1
        for _ in range(400):
            if client.dead(job=job.id):
                break
            time.sleep(0.05)
        with pytest.raises(type(raised.value)):
            client.job(job.id).result(timeout=30)
        accounts = client.accounts()
        assert (accounts.difference, accounts.terms["replayed"] >= 1) == (0, True)
