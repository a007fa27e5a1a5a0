from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from lepton_ai.errors import Unavailable
from lepton_ai.settings import Settings
from pipeline.machine import WorkerPlan, planned
from pipeline.supervisor import Arrival, Fleet, free_port, programs, run_fleet, worker_arguments


def test_a_workers_command_line_names_its_device_queue_and_its_slots() -> None:
    line = shlex.join(worker_arguments("gpu.h100", 3))
    assert line.startswith("-m celery -q -A tasks.worker worker ")
    for part in ("-Q lepton.gpu.h100", "-c 3", "-P threads", "-n gpu.h100@%h"):
        assert part in line


def test_a_lepton_is_three_services_and_a_worker_a_device() -> None:
    found = programs({}, planned({"cpu.big": 2, "fpga": 1}))
    assert [each.name for each in found] == ["router", "telemetry", "ingest", "worker-cpu.big", "worker-fpga"]


def test_workers_have_arrived_once_each_of_a_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    here = socket.gethostname()
    online: list[SimpleNamespace] = []
    monkeypatch.setattr("pipeline.supervisor.Connection", lambda *_: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr("pipeline.supervisor.announcements", lambda _: online)
    monkeypatch.setattr("pipeline.supervisor._is_ready", lambda _: True)
    arrival = Arrival("", "", [WorkerPlan(name, "gpu.t4", 1) for name in ("gpu.t4", "gpu.t4-2")])
    for worker, complete in ((f"gpu.t4@{here}", False), ("gpu.t4-2@elsewhere", False), (f"gpu.t4-2@{here}", True)):
        online.append(SimpleNamespace(worker=worker, device="gpu.t4", started_at=time.time()))
        assert arrival.complete() is complete
    assert arrival.news() == ["gpu.t4", "gpu.t4-2"]


def test_a_free_port_can_be_listened_on() -> None:
    with socket.create_server(("127.0.0.1", free_port())):
        pass


@pytest.fixture
def fleet_of(tmp_path: Path) -> Iterator[Callable[[str], Fleet]]:
    """Makes a fleet of one process, which runs a script."""
    with ExitStack() as stack:

        def fleet_of(script: str) -> Fleet:
            with (tmp_path / "router").open("wb") as log:
                process = subprocess.Popen([sys.executable, "-c", script], stdout=log, stdin=subprocess.PIPE)
            stack.enter_context(process)  # which closes its input, and waits for it
            return Fleet("", "", {"router": process}, tmp_path)

        yield fleet_of


def test_a_process_that_ended_by_itself_is_reported_with_the_end_of_its_log(
    fleet_of: Callable[[str], Fleet],
) -> None:
    fleet = fleet_of("for line in range(100): print('line', line)\nraise SystemExit(7)")
    fleet.processes["router"].wait()
    with pytest.raises(Unavailable, match="router ended with exit code 7") as raised:
        fleet.check()
    assert "line 99" in raised.value.message
    assert "line 50" not in raised.value.message


def test_a_process_that_was_killed_is_reported_with_its_signal(fleet_of: Callable[[str], Fleet]) -> None:
    fleet = fleet_of("input()")
    fleet.processes["router"].kill()
    fleet.processes["router"].wait()
    with pytest.raises(Unavailable, match="router ended with SIGKILL"):
        fleet.check()


def test_processes_that_run_are_no_trouble(fleet_of: Callable[[str], Fleet]) -> None:
    fleet_of("input()").check()


def test_a_worker_that_cannot_start_ends_the_whole_fleet_with_its_reason(settings: Settings) -> None:
    told: list[str] = []
    with pytest.raises(Unavailable, match="abacus"), run_fleet(settings, {"abacus": 1}, told.append):
        pytest.fail("a fleet came up without its worker")
    assert told[0] == "starting the broker"
    running = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    assert "-Q lepton.abacus" not in running


def test_it_can_be_stopped_while_it_starts(settings: Settings) -> None:
    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), run_fleet(settings, {"cpu.stopped": 1}, print, check):
        pytest.fail("a fleet came up although it was stopped")
    running = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    assert "-Q lepton.cpu.stopped" not in running
