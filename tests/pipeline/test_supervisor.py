from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lepton_ai.errors import Unavailable
from lepton_ai.settings import Settings
from pipeline.supervisor import Fleet, run_fleet, worker_arguments


def test_a_workers_command_line_names_its_device_queue_and_its_slots() -> None:
    line = shlex.join(worker_arguments("gpu.h100", 3))
    assert line.startswith("-m celery -A tasks.worker worker ")
    for part in ("-Q lepton.gpu.h100", "-c 3", "-P threads", "-n gpu.h100@%h"):
        assert part in line


def fleet_of(script: str, logs: Path) -> Fleet:
    with (logs / "router").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=log, stdin=subprocess.PIPE)
    return Fleet("", "", {"router": process}, logs)


def test_a_process_that_ended_by_itself_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    fleet = fleet_of("for line in range(100): print('line', line)\nraise SystemExit(7)", tmp_path)
    fleet.processes["router"].wait()
    with pytest.raises(Unavailable, match="router ended with exit code 7") as raised:
        fleet.check()
    assert "line 99" in raised.value.message
    assert "line 50" not in raised.value.message


def test_a_process_that_was_killed_is_reported_with_its_signal(tmp_path: Path) -> None:
    fleet = fleet_of("input()", tmp_path)
    fleet.processes["router"].kill()
    fleet.processes["router"].wait()
    with pytest.raises(Unavailable, match="router ended with exit code -9"):
        fleet.check()


def test_processes_that_run_are_no_trouble(tmp_path: Path) -> None:
    fleet = fleet_of("input()", tmp_path)
    try:
        fleet.check()
    finally:
        fleet.processes["router"].communicate(b"\n")


def test_a_worker_that_cannot_start_ends_the_whole_fleet_with_its_reason(settings: Settings) -> None:
    told: list[str] = []
    with pytest.raises(Unavailable, match="abacus"), run_fleet(settings, {"abacus": 1}, told.append):
        pytest.fail("a fleet came up without its worker")
    assert told[0] == "starting the broker"
    running = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    assert "-Q lepton.abacus" not in running
