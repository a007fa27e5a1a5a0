"""The command line against a whole Lepton, straight to the broker and over HTTP alike."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import redis

from lepton_ai import Client, cli
from pipeline.supervisor import Fleet
from tasks.catalogue import load


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Run = Callable[..., Ran]


@pytest.fixture(params=["broker", "http"])
def url(fleet: Fleet, request: pytest.FixtureRequest) -> str:
    return fleet.broker_url if request.param == "broker" else fleet.http_url


@pytest.fixture
def run(url: str, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command in this process."""

    def run(*arguments: str) -> Ran:
        capsys.readouterr()
        code = cli.main([*arguments, "--url", url])
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two matrices as NumPy makes them, in float64; the kernel wants float32."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    np.save("a.npy", rng.random((20, 30)))
    np.savez("all.npz", b=rng.random((30, 10)), other=np.zeros(1))
    return tmp_path


def product() -> np.ndarray:
    with np.load("all.npz") as arrays:
        return np.load("a.npy") @ arrays["b"]


MATMUL = ("submit", "linalg.matmul", "--arg", "a=@a.npy", "--arg", "b=@all.npz:b")
ONE = ("submit", "linalg.matmul", "--arg", "a=[[2]]", "--arg", "b=[[4]]")


# -- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c.npz", "c.npy", "c.json"])
def test_files_go_out_and_come_back(run: Run, folder: Path, name: str) -> None:
    ran = run(*MATMUL, "--wait", "20", "--out", name)
    assert ran.code == 0, ran.err
    assert ran.out == f"{name}\n"
    match name.rpartition(".")[2]:
        case "npz":
            with np.load(name) as kept:
                found = kept["c"]
        case "npy":
            found = np.load(name)
        case _:
            found = np.array(json.loads(Path(name).read_text())["c"])
    np.testing.assert_allclose(found, product(), rtol=1e-4)


def test_large_outputs_are_told_by_what_they_are_like(run: Run, folder: Path) -> None:
    ran = run(*MATMUL, "--wait=20")
    assert ran.code == 0
    expected = product().astype(np.float32)
    assert ran.out.startswith(f"c  float32[20,10]  min {expected.min():g}, max {expected.max():g}, mean")


def test_small_outputs_are_printed(run: Run) -> None:
    ran = run(*ONE, "--wait")
    assert ran.code == 0
    assert ran.out == "c  float32[1,1]\n[[8.]]\n"
    assert "succeeded on cpu." in ran.err


def test_a_terminal_is_told_meanwhile_how_far_it_has_come(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ran = run(*ONE, "--wait")
    assert ran.code == 0
    assert ran.out == "c  float32[1,1]\n[[8.]]\n"
    assert "\x1b[?25l" in ran.err  # the cursor is hidden while it turns


def test_a_kernel_that_is_misspelt_is_told_of_the_one_that_is_near(run: Run, url: str) -> None:
    ran = run("submit", "linalg.matmull", "--arg", "a=[[2]]", "--arg", "b=[[4]]")
    if url.startswith("http"):  # the ingest knows the kernels, and refuses what none runs
        assert (ran.code, ran.out) == (1, "")
        assert "known: city.shortest_paths" in ran.err
        return
    job = ran.out.strip()
    assert (ran.code, ran.out) == (0, f"{job}\n")
    assert f"is parked until one does; did you mean linalg.matmul? Then: lepton cancel {job}\n" in ran.err
    assert run("cancel", job).code == 0


def test_an_id_of_one_command_is_what_the_others_take(run: Run, folder: Path) -> None:
    submitted = run(*MATMUL, "--priority", "7", "--device", "cpu.big")
    assert submitted.code == 0
    job = submitted.out.strip()
    assert submitted.out == f"{job}\n"
    result = run("result", job, "--wait", "20", "--json")
    assert result.code == 0
    assert result.err == ""
    found = json.loads(result.out)
    assert (found["id"], found["state"]) == (job, "succeeded")
    assert found["cost"]["device"] == "cpu.big"
    np.testing.assert_allclose(found["result"]["c"], product(), rtol=1e-4)

    (status,) = json.loads(run("status", job, "--json").out)
    assert (status["state"], status["kernel"], status["device"]) == ("succeeded", "linalg.matmul", "cpu.big")
    table = run("status", job, job)
    assert table.out.count(job) == 2

    why = json.loads(run("why", job, "--json").out)
    assert {each["device"] for each in why["placement"]["candidates"]} == {"cpu.big", "cpu.little"}
    assert why["cost"]["run_s"] > 0
    shown = run("why", job)
    assert shown.code == 0
    assert f"linalg.matmul {job} was placed on cpu.big" in shown.out
    assert all(word in shown.out for word in ("cpu.little", "finish ms", "really", "policy"))

    cancelled = run("cancel", job, "--json")
    assert cancelled.code == 1
    assert json.loads(cancelled.out) == [{"id": job, "asked": False, "ended": True, "known": True}]


def test_a_job_that_fails_ends_with_one_and_says_why(run: Run, client: Client) -> None:
    # Past the command line's own check: the worker is who refuses.
    job = client.submit("linalg.matmul", {"a": [[1.0]], "b": [[1.0], [2.0]]})
    ran = run("result", job.id, "--wait", "20", "--json")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert found["state"] == "failed"
    assert found["error"]["code"] == "invalid_arguments"
    assert found["error"]["field"] == "b"
    assert f"job {job.id} failed" in ran.err
    assert "invalid_arguments" in run("why", job.id).out
    assert "argument 'b'" in run("status", job.id).out


def test_what_nobody_knows_is_never_said_to_be_cancelled(run: Run, url: str) -> None:
    ran = run("cancel", "nope", "--json")
    straight = not url.startswith("http")
    assert json.loads(ran.out) == [{"id": "nope", "asked": straight, "ended": False, "known": False}]
    assert ran.code == (0 if straight else 1)


def test_a_wrong_argument_is_refused_before_it_is_sent(run: Run) -> None:
    ran = run("submit", "linalg.matmul", "--arg", "a=[[1]]", "--arg", "b=[[1], [2]]")
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err.startswith("lepton: argument 'b' must be float32[k,n]")


def test_a_job_that_no_device_can_run_is_cancelled(run: Run, client: Client) -> None:
    job = client.submit("no.such", {"x": 1})
    deadline = time.monotonic() + 20
    while job.state != "parked":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "no live device can run no.such" in run("result", job.id).err
    ran = run("cancel", job.id)
    assert ran.code == 0
    assert ran.out == f"{job.id} is asked to end\n"
    ended = run("result", job.id, "--wait", "20", "--json")
    assert ended.code == 1
    assert json.loads(ended.out)["state"] == "cancelled"
    assert ended.err == f"lepton: job {job.id} was cancelled\n"


# -- the fleet --------------------------------------------------------------------------------------------------------


def test_the_devices_are_listed(run: Run) -> None:
    found = json.loads(run("devices", "--json").out)
    assert {each["device"]: each["slots"] for each in found} == {"cpu.big": 2, "cpu.little": 1}
    assert all("linalg.matmul" in each["kernels"] and each["peaks"]["flops_per_s"] > 0 for each in found)
    assert all(name in run("devices").out for name in ("cpu.big", "cpu.little", "GFLOP/s"))


def test_the_kernels_are_listed_and_each_is_described(run: Run) -> None:
    found = {each["name"]: each for each in json.loads(run("kernels", "--json").out)}
    assert found.keys() == load(()).kernels.keys()
    assert found["linalg.matmul"]["devices"] == ["cpu.big", "cpu.little"]
    assert json.loads(run("kernels", "linalg.matmul", "--json").out) == found["linalg.matmul"]
    shown = run("kernels", "linalg.matmul").out
    assert all(text in shown for text in ("a: float32[m,k]", "stack", "cpu.little"))
    assert "linalg.matmul" in run("kernels").out


def test_events_end_where_they_had_come_to_and_go_on_from_an_id(run: Run, client: Client) -> None:
    job = client.submit("linalg.matmul", {"a": [[2.0]], "b": [[4.0]]})
    job.result(timeout=20)
    ran = run("events", "--json")
    assert ran.code == 0
    found = [json.loads(line) for line in ran.out.splitlines()]
    mine = [each for each in found if each["subject"] == job.id]
    assert [each["type"] for each in mine] == ["io.lepton.job.placed.v1", "io.lepton.job.succeeded.v1"]
    assert not any("heartbeat" in each["type"] for each in found)
    after = run("events", "--json", "--since", mine[0]["id"], "--types", "job.succeeded,job.failed", "--limit", "500")
    assert mine[1] in [json.loads(line) for line in after.out.splitlines()]
    assert mine[0]["id"] not in after.out
    last = run("events", "--types", "job", "--limit", "1")
    assert last.out.count("\n") == 1
    assert "device.online" in run("events", "--types", "device").out
    assert "heartbeat" not in run("events", "--types", "device").out


def test_a_jobs_own_events_are_told_to_its_end(run: Run, client: Client) -> None:
    job = client.submit("linalg.matmul", {"a": [[2.0]], "b": [[4.0]]})
    ran = run("events", "--job", job.id, "--follow")
    assert ran.code == 0
    assert [line.split()[2] for line in ran.out.splitlines()] == ["job.placed", "job.succeeded"]
    assert all(job.id in line for line in ran.out.splitlines())


def test_heartbeats_are_shown_to_those_who_ask(run: Run) -> None:
    ran = run("events", "--follow", "--types", "device.heartbeat", "--limit", "2", "--json")
    assert ran.code == 0
    assert [json.loads(line)["type"] for line in ran.out.splitlines()] == ["io.lepton.device.heartbeat.v1"] * 2


def test_doctor_finds_nothing_wrong_with_a_whole_lepton(run: Run, url: str, fleet: Fleet) -> None:
    ran = run("doctor", "--json")
    found = json.loads(ran.out)
    assert ran.code == 0, [each for each in found["findings"] if each["status"] == "problem"]
    assert found["ok"]
    workers = {each["text"].split()[2].rstrip(":") for each in found["findings"] if each["check"] == "worker"}
    assert workers == {"cpu.big", "cpu.little"}
    checks = {each["check"]: each["status"] for each in found["findings"]}
    if url == fleet.broker_url:
        expected = ("broker", "durability", "memory", "functions", "routers", "queues")
        assert {checks[name] for name in expected} == {"ok"}
    else:
        assert checks["ingest"] == "ok"


# -- as a process -----------------------------------------------------------------------------------------------------


def start(*arguments: str, url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lepton_ai.cli", *arguments],
        env=os.environ | {"LEPTON_REDIS_URL": url},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_json_comes_through_a_pipe(fleet: Fleet) -> None:
    process = start("submit", "linalg.matmul", "--arg", "a=@-", "--arg", "b=[[4]]", "--wait", url=fleet.broker_url)
    out, err = process.communicate("[[2.5]]", timeout=30)
    assert process.returncode == 0, err
    assert out == "c  float32[1,1]\n[[10.]]\n"


def test_ctrl_c_ends_the_wait_and_not_the_job(fleet: Fleet, client: Client) -> None:
    job = client.submit("no.such", {"x": 1})
    with redis.Redis.from_url(fleet.broker_url) as broker:
        before = {each["id"] for each in broker.client_list()}
        process = start("result", job.id, "--wait", url=fleet.broker_url)
        while not any(each["id"] not in before and each["cmd"] == "get" for each in broker.client_list()):
            time.sleep(0.05)  # until it looks for the result
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert out == ""
    assert err == f"lepton: the job goes on: lepton result {job.id} --wait\n"


def test_following_ends_with_ctrl_c_and_no_word(fleet: Fleet) -> None:
    process = start("events", "--follow", "--types", "device.heartbeat", url=fleet.broker_url)
    assert process.stdout is not None
    assert "device.heartbeat" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == ""
