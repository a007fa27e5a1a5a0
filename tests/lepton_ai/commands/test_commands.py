"""The command line without a fleet: what it says of itself, of wrong usage, and where nothing or nobody answers."""

import json
import math
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lepton_ai import Announcement, Peaks, cli, topology, wire
from lepton_ai.commands import app, shown
from lepton_ai.commands.address import address, http_address, masked
from lepton_ai.device import DeviceState, ResourceState
from lepton_ai.job import Candidate, Estimate, Placement, Record
from queues.connection import Connection

COMMANDS = (
    "submit",
    "status",
    "result",
    "why",
    "cancel",
    "state",
    "devices",
    "kernels",
    "events",
    "quarantine",
    "doctor",
)
#: Port 1 is nobody's.
NOWHERE = "redis://:s3cret@127.0.0.1:1/0"
AN_ID = "01a208c9-72e5-74d8-bb78-baba0091b291"


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("LEPTON_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LEPTON_HTTP_PORT", "1")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command in this process."""

    def run(*arguments: str) -> Ran:
        capsys.readouterr()
        try:
            code = cli.main(arguments)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return run


def start(*arguments: str, **more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lepton_ai.cli", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        **more,  # type: ignore[call-overload]
    )


# -- help and completion ----------------------------------------------------------------------------------------------


def test_the_help_names_every_command(run: Run) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        ran = run(*arguments)
        assert ran.code == 0
        assert all(f" {command} " in ran.out for command in (*COMMANDS, "demo", "serve"))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_has_a_purpose_an_example_and_where_to_ask(run: Run, command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0
    assert ran.out.startswith(f"Usage: lepton {command}")
    assert f"For example:\n\n  lepton {command}" in ran.out
    assert "--url" in ran.out
    assert "--json" in ran.out
    assert "--no-" not in ran.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_commands_and_their_options(shell: str) -> None:
    script = app.generate_completion(shell=shell)  # type: ignore[arg-type]
    assert all(word in script for word in (*COMMANDS, "follow", "priority"))


@pytest.mark.parametrize("output", [None, "lepton.bash"])
def test_a_completion_script_is_written_and_nothing_else(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str | None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".bashrc").write_text("mine")
    named = ["--output", str(tmp_path / output)] if output else []
    assert run("--install-completion", "--shell", "bash", *named).code == 0
    (script,) = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".bashrc"]
    assert (tmp_path / ".bashrc").read_text() == "mine"
    subprocess.run(["bash", "-n", script], check=True)


# -- wrong usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["sumbit"], "sumbit"),
        (["submit"], "KERNEL"),
        (["submit", "a.b", "--prio", "3"], "--prio"),
        (["submit", "a.b", "--delay", "-1"], "--delay"),
        (["submit", "a.b", "--delay", "2592001"], "--delay"),
        (["submit", "a.b", "--deadline", "0"], "--deadline"),
        (["submit", "a.b", "--limit", "0"], "--limit"),
        (["submit", "a.b", "x=@a.npy"], "did you mean --arg x=@a.npy?"),
        (["events", "--types", "job.fialed"], "did you mean job.failed"),
        (["events", "--types", "job,nonsense"], "no event is of the type 'nonsense'; they are job.accepted"),
        (["devices", "--url", "localhost:8780"], "did you mean http://localhost:8780?"),
        (["devices", "--url", "localhost:6379/1"], "did you mean redis://localhost:6379/1?"),
        (["doctor", "--url", "ftp://x"], "an address begins with one of"),
        (["submit", "a.b", "--priority", "10"], "priority"),
        (["submit", "a.b", "--arg", "x"], "--arg takes name=VALUE"),
        (["submit", "a.b", "--arg", "x=@none.npy"], "'x': '@none.npy' does not read: No such file"),
        (["submit", "a.b", "--out", "c.npz"], "--out keeps outputs, so it needs --wait"),
        (["submit", "a.b", "--wait", "--out", "c.txt"], "--out takes a file that ends in"),
        (["submit", "a.b", "--tenant", "Team A"], "a tenant's name is"),
        (["submit", "a.b", "--wait=-1"], "--wait takes seconds"),
        (["submit", "a.b", "--wait=nan"], "--wait takes seconds"),
        (["submit", "a.b", "--wait=soon"], "--wait"),
        (["result"], "ID"),
        (["result", AN_ID, "--wait", "1", "2"], "2"),
        (["status"], "at least one job"),
        (["cancel"], "at least one job"),
        (["events", "--limit", "0"], "limit"),
    ],
)
def test_wrong_usage_is_told_and_ends_with_two(run: Run, arguments: list[str], told: str) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert told in " ".join(ran.err.replace("│", " ").split())
    assert ran.out == ""


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("submit --wait linalg.matmul", "submit --wait=true linalg.matmul"),
        ("submit k --wait", "submit k --wait=true"),
        ("result i --wait 5", "result i --wait=5"),
        ("result i --wait .5 --json", "result i --wait=.5 --json"),
        ("result --wait=5 i", "result --wait=5 i"),
        ("submit k --wait --json", "submit k --wait=true --json"),
    ],
)
def test_wait_may_stand_alone_or_have_its_seconds(given: str, meant: str) -> None:
    assert cli._joined(given.split()) == meant.split()


def test_the_command_line_says_what_must_be_installed_to_have_it() -> None:
    program = "import sys; sys.modules['cyclopts'] = None; from lepton_ai.cli import main; sys.exit(main([]))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith(
        f"lepton: the command line needs cyclopts: {shlex.quote(sys.executable)} -m pip install -e "
    )
    assert ran.stderr.endswith("[cli]'\n")


# -- where to ask -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "environ", "expected"),
    [
        ("unix:///s", {"LEPTON_REDIS_URL": "redis://h"}, "unix:///s"),
        (None, {"LEPTON_REDIS_URL": "redis://h"}, "redis://h"),
        (None, {}, "http://127.0.0.1:8780"),
        (None, {"LEPTON_HTTP_PORT": "9000"}, "http://127.0.0.1:9000"),
        (None, {"LEPTON_HTTP_HOST": "0.0.0.0"}, "http://127.0.0.1:8780"),
        (None, {"LEPTON_HTTP_HOST": "::1"}, "http://[::1]:8780"),
    ],
)
def test_the_address_is_the_named_one_or_the_broker_or_this_machine(
    url: str | None, environ: dict[str, str], expected: str
) -> None:
    assert address(url, environ) == expected
    assert http_address({"LEPTON_HTTP_HOST": "::"}) == "http://[::1]:8780"


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://:s3cret@h/0", "redis://:***@h/0"),
        ("redis://joe:s3@cr/et@h/0", "redis://joe:***@h/0"),
        ("unix://:s3cret@/run/b.sock", "unix://:***@/run/b.sock"),
        ("redis://h/0?password=s3cret&db=2", "redis://h/0?password=***&db=2"),
        ("redis://h/0?password=s3@cret", "redis://:***@cret"),
        ("s3cret@h", "***"),
    ],
)
def test_an_address_is_shown_without_its_secret(url: str, safe: str) -> None:
    assert masked(url) == safe


@pytest.mark.parametrize(
    "command", ["devices", "kernels", "status " + AN_ID, "result " + AN_ID, "submit a.b", "events"]
)
@pytest.mark.parametrize(
    ("url", "fix"),
    [
        (None, "start a Lepton here with `lepton up`, or name another with --url or LEPTON_REDIS_URL"),
        (NOWHERE, "start it, or name another with --url or LEPTON_REDIS_URL"),
        ("unix:///nowhere.sock", "start it, or name another with --url or LEPTON_REDIS_URL"),
    ],
)
def test_where_nothing_answers_one_line_names_address_and_fix(
    run: Run, command: str, url: str | None, fix: str
) -> None:
    ran = run(*command.split(), *(["--url", url] if url else []))
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err.startswith("lepton: nothing answers at ")
    assert masked(url or "http://127.0.0.1:1") in ran.err
    assert fix in ran.err
    assert ran.err.count("\n") == 1
    assert "s3cret" not in ran.err


@pytest.mark.parametrize("command", ["devices", "kernels", f"status {AN_ID}", f"cancel {AN_ID}", "events"])
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("LEPTON_REDIS_UR", "redis://h", "did you mean LEPTON_REDIS_URL?"),
        ("LEPTON_HTTP_PORT", "abc", "LEPTON_HTTP_PORT does not fit"),
    ],
)
def test_a_setting_that_is_wrong_is_refused_before_anybody_is_asked(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, name: str, value: str, told: str
) -> None:
    monkeypatch.setenv(name, value)
    ran = run(*command.split())
    assert ran.code == 2
    assert told in ran.err


@pytest.mark.parametrize("command", ["devices", "submit a.b", f"cancel {AN_ID}", f"why {AN_ID}", "events"])
def test_programs_are_told_an_error_as_json(run: Run, command: str) -> None:
    ran = run(*command.split(), "--url", NOWHERE, "--json")
    assert ran.code == 1
    error = json.loads(ran.out)["error"]
    assert error["code"] == "unavailable"
    assert ran.err == f"lepton: {error['message']}\n"


@pytest.mark.parametrize(
    ("url", "code"),
    # Whether a host's name can be one is for the resolver to say.
    [("ftp://h", 2), ("redis://h:port", 2), ("http://h:port", 2), ("h:6379", 2), ("http://exa mple", 1)],
)
def test_what_is_no_address_is_told(run: Run, url: str, code: int) -> None:
    ran = run("devices", "--url", url)
    assert ran.code == code
    assert ran.err.startswith("lepton: ")
    assert ran.err.count("\n") == 1


@pytest.fixture
def stranger() -> Iterator[str]:
    """Some other HTTP server: /v1/devices is a page to it, and everything else is not there."""

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/v1/devices" else 404)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Stranger)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("command", [["devices"], ["status", AN_ID]])
def test_another_service_at_the_address_is_told_apart(run: Run, stranger: str, command: list[str]) -> None:
    ran = run(*command, "--url", stranger)
    assert ran.code == 1
    assert f"{stranger} does not answer as Lepton does" in ran.err


def test_a_wrong_password_is_told_apart_from_silence(run: Run, broker_url: str) -> None:
    socket = broker_url.rpartition("@")[2]
    ran = run("devices", "--url", f"unix://:wrong@{socket}")
    assert ran.code == 1
    assert f"unix://:***@{socket} answers and refuses" in ran.err


# -- what is shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "lines"),
    [
        (3, ["x = 3"]),
        ([1.5, 2.5], ["x  float64[2]", "[1.5 2.5]"]),
        (np.zeros((0, 4), np.float32), ["x  float32[0,4]", "[]"]),
        (np.arange(100, dtype=np.uint8), ["x  uint8[100]  min 0, max 99, mean 49.5"]),
        (np.arange(100) % 2 == 0, ["x  bool[100]  50 of 100 true"]),
        (np.array([np.nan, np.inf, 1] * 40), ["x  float64[120]  min 1, max 1, mean 1, 80 not finite"]),
        (np.full(100, np.nan), ["x  float64[100]  nothing finite"]),
    ],
)
def test_a_small_output_is_shown_whole_and_a_large_one_by_what_it_is_like(value: Any, lines: list[str]) -> None:
    assert shown.outputs({"x": value}) == lines


def test_a_transfer_without_limit_is_shown_as_none(capsys: pytest.CaptureFixture[str]) -> None:
    peaks = Peaks(1e9, 1e9, math.inf, 0.0, 1e-6)
    found = Announcement("worker-1", "cpu@here", "cpu", "cpu", 1, False, peaks, (), 0.0)
    shown.console().print(shown.devices([found]))
    out = capsys.readouterr().out
    assert "inf" not in out
    assert "–" in out


def shown_devices(capsys: pytest.CaptureFixture[str], state: ResourceState | None) -> str:
    peaks = Peaks(1e9, 1e9, 1e9, 0.0, 1e-6)
    found = Announcement("worker-1", "gpu@here", "gpu", "gpu", 4, False, peaks, (), 0.0, state=state)
    shown.console().print(shown.devices([found]))
    return capsys.readouterr().out


def test_a_device_is_shown_with_its_state_and_first_why_it_is_given_less(capsys: pytest.CaptureFixture[str]) -> None:
    state = ResourceState(
        *(3, 0.7, 0.5, 2 * 2**30, 4 * 2**30, 1e6, 125e6, 0.008, 0.1, 0.25),
        device=DeviceState(0.9, 2**30, 8 * 2**30, 91.0, 90.0, 300.0, 400.0),
        speed=0.8,
        share=0.0,
        reason="temperature at 101%, over its limit of 100%",
    )
    out = shown_devices(capsys, state)
    told = (
        "cpu 50% (25% others'), memory 2.0 of 4.0 GiB, network 1.0 MB/s of 125, device 90%, its memory 1.0 of 8.0 GiB"
    )
    assert f"{state.reason}, {told}, 91 °C, 300 W" in out
    assert all(each in out for each in (" 3/4 ", " 80% ", " 0% "))


def test_a_device_whose_state_is_not_known_is_shown_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert "its state is not known yet" in shown_devices(capsys, None)


def test_the_spread_is_explained_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    candidates = (Candidate("cpu", Estimate(0.0, 0.0, 1.0, 0.1)),)
    placement = Placement("j", "a.b", "placed", "the soonest", 0.0, "router-1", "cpu", None, candidates)
    for each in shown.why(Record(placement)):
        shown.console().print(each)
    assert "spread: the standard deviation of log(real / predicted run time)" in capsys.readouterr().out


# -- a broker, and nobody else ----------------------------------------------------------------------------------------


def test_an_id_and_nothing_else_goes_to_standard_output(run: Run, broker_url: str) -> None:
    ran = run("submit", "a.b", "--arg", "x=1", "--url", broker_url)
    assert ran.code == 0
    assert ran.out.strip().count("-") == 4
    assert ran.out.count("\n") == 1
    assert "no live worker announces 'a.b'" in ran.err
    status = run("status", ran.out.strip(), "--url", broker_url, "--json")
    assert [(each["id"], each["state"]) for each in json.loads(status.out)] == [(ran.out.strip(), "waiting")]


def test_a_job_of_a_tenant_waits_in_its_lane(run: Run, broker_url: str, connection: Connection) -> None:
    ran = run("submit", "a.b", "--arg", "k=3", "--tenant", "team-a", "--url", broker_url)
    assert ran.code == 0
    (message,) = connection.call("LRANGE", topology.lane("team-a"), 0, -1)
    assert wire.read_envelope(message).headers.id == ran.out.strip()
    assert connection.call("SMEMBERS", topology.LANES) == [topology.lane("team-a").encode()]


@pytest.mark.parametrize(
    "arguments", [["status", "\udcff"], ["submit", "\udcff.x"], ["submit", "a.b", "--device", "\udcff"]]
)
def test_bytes_that_are_no_text_are_told(run: Run, broker_url: str, arguments: list[str]) -> None:
    ran = run(*arguments, "--url", broker_url)
    assert ran.code == 2
    assert ran.err.startswith("lepton: an argument is no text")


def test_a_job_that_nobody_knows_is_asked_to_end_all_the_same(run: Run, broker_url: str) -> None:
    ran = run("cancel", "nope", "--url", broker_url)
    assert (ran.code, ran.out) == (0, "nope nothing is known of it (yet); asked all the same\n")
    (found,) = json.loads(run("cancel", "nope", "--url", broker_url, "--json").out)
    assert found == {"id": "nope", "asked": True, "ended": False, "known": False}


def test_the_broker_of_the_environment_is_asked(run: Run, broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEPTON_REDIS_URL", broker_url)
    ran = run("submit", "a.b", "--arg", "x=1", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["kernel"] == "a.b"


def test_a_job_that_does_not_end_in_time_goes_on_and_its_id_is_told(run: Run, broker_url: str) -> None:
    ran = run("submit", "a.b", "--wait", "0.1", "--url", broker_url, "--json")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert found["state"] == "waiting"
    assert f"to wait for it: lepton result {found['id']} --wait" in ran.err
    again = run("result", found["id"], "--url", broker_url)
    assert again.code == 1
    assert again.out == ""
    assert "is waiting (no router has placed it yet" in again.err


def test_what_another_celery_task_returned_is_shown_too(run: Run, connection: Connection, broker_url: str) -> None:
    meta = {"status": "SUCCESS", "result": "anything", "task_id": "t1", "traceback": None, "children": []}
    connection.call("SET", "celery-task-meta-t1", json.dumps(meta))
    ran = run("result", "t1", "--url", broker_url)
    assert (ran.code, ran.out) == (0, "result = anything\n")


def test_nothing_is_known_of_a_job_that_nobody_placed(run: Run, broker_url: str) -> None:
    ran = run("why", AN_ID, "--url", broker_url, "--json")
    assert ran.code == 1
    assert json.loads(ran.out) == {"id": AN_ID, "state": "waiting", "placement": None, "cost": None, "error": None}
    assert "nothing is known" in ran.err


@pytest.mark.parametrize("command", ["devices", "kernels"])
def test_without_a_worker_lists_are_empty_and_say_so(run: Run, broker_url: str, command: str) -> None:
    ran = run(command, "--url", broker_url, "--json")
    assert ran.code == 0
    assert json.loads(ran.out) == []
    assert "no worker is online" in ran.err


def test_an_unknown_kernel_is_told(run: Run, broker_url: str) -> None:
    ran = run("kernels", "no.such", "--url", broker_url)
    assert ran.code == 1
    assert ran.err == "lepton: no live worker announces 'no.such'; known: none\n"


def test_a_reader_who_has_seen_enough_is_no_error(broker_url: str) -> None:
    process = start("status", *[AN_ID] * 100, "--json", "--url", broker_url, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, told = process.communicate(timeout=20)
    assert told == ""
    assert process.returncode == 1
