"""What `lepton up` says before it starts anything. What it does afterwards: tests/system/test_up.py."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import up

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workers", "abacus:2"], "'abacus'"),
        (["--workers", "cpu:0"], "1 to 63 slots"),
        (["--workers", "cpu:1", "--http-port", "70000"], "70000"),
        (["--workers", "cpu:1", "--http-port", "0", "--broker", "unix:///nowhere"], "no broker at /nowhere"),
    ],
)
def test_what_cannot_be_started_as_asked_is_told_in_one_line_with_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert up.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lepton up: ")
    assert says in line


def test_a_wrong_option_is_told_with_exit_code_2() -> None:
    with pytest.raises(SystemExit) as ended:
        up.main(["--worker", "cpu"])
    assert ended.value.code == 2


def run(data: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "up", "--workers", "cpu:1", "--http-port", "0", "--data", str(data)],
        cwd=ROOT,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_broker_that_does_not_start_ends_it_with_the_reason(tmp_path: Path) -> None:
    server = tmp_path / "server"
    server.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Valkey server v=9.0.0" && exit 0\nexit 7\n')
    server.chmod(0o755)
    ran = run(tmp_path / "data", LEPTON_REDIS_SERVER=str(server), LEPTON_LOG="json")
    assert ran.returncode == 1
    assert '"up_failed"' in ran.stdout
    assert "exit code 7" in ran.stdout


def test_a_guardian_that_is_killed_while_the_broker_starts_is_started_again_a_few_times(tmp_path: Path) -> None:
    server = tmp_path / "server"
    server.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Valkey server v=9.0.0" && exit 0\nkill -9 $PPID\n')
    server.chmod(0o755)
    ran = run(tmp_path / "data", LEPTON_REDIS_SERVER=str(server), LEPTON_LOG="json")
    assert ran.returncode == 1
    assert ran.stdout.count('"process_lost"') == 3
    assert "the broker did not start: SIGKILL" in ran.stdout


def test_without_an_output_it_runs_all_the_same(tmp_path: Path) -> None:
    arguments = f"-m pipeline up --workers cpu:1 --http-port 0 --data {shlex.quote(str(tmp_path))} >&-"
    ran = subprocess.run(
        ["sh", "-c", f"exec {shlex.quote(sys.executable)} {arguments}"],
        cwd=ROOT,
        env=os.environ | {"LEPTON_HTTP_HOST": "0.0.0.0"},  # it ends once it has run
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (2, "")


@pytest.mark.parametrize("service", ["up", "ingest"])
def test_what_is_not_installed_is_named_with_what_installs_it(service: str) -> None:
    program = (
        "import sys; sys.modules['structlog'] = None; from pipeline.__main__ import main\n"
        f"sys.exit(main(['{service}']))"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == f"lepton: {service} needs structlog: pip install 'lepton-ai[all]'\n"


def test_a_service_that_cannot_run_as_asked_ends_it_with_exit_code_2(tmp_path: Path) -> None:
    ran = run(tmp_path / "data", LEPTON_HTTP_HOST="0.0.0.0")
    assert ran.returncode == 2
    assert "there is no authentication yet" in ran.stdout
    assert "ingest cannot be started as asked" in ran.stdout


def test_people_see_where_everything_is_and_who_says_what(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", "up", "--workers", "cpu:1", "--http-port", "0", "--data", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        said = ""
        while "twice quits" not in said:
            line = running.stdout.readline()
            assert line, said
            said += line
        running.send_signal(signal.SIGINT)
        said += running.communicate(timeout=30)[0]
    assert running.returncode == 0
    url = (tmp_path / "broker" / "broker.url").read_text().strip()
    for words in ("http://127.0.0.1:", "/openapi/openapi.json", f"LEPTON_REDIS_URL={url}", "redis+socket://"):
        assert words in said
    for line in (r"  data +\S*", "Ctrl-C drains, twice quits.", r"router +\| .*router_online", r"up +\| .*up_stopped"):
        assert re.search(f"^{line}", said, re.MULTILINE), said
    assert said.index("up_ready") < said.index("HTTP  ")  # it answers now, and the lines of the start are above
    assert re.search(r"'redis\+socket://\S*\?\S*'", said)  # a shell would take `?` for a pattern
    assert "Flower" not in said


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:6379/0", "redis://host:6379/0"),
        ("rediss://user:p@ss@host/1", "rediss://host/1"),
        ("unix://:secret@/run/broker.sock", "unix:///run/broker.sock"),
        ("redis://host", "redis://host"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert up.without_password(url) == shown
