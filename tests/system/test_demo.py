"""`lepton demo`: real jobs through every door, and nothing left behind however it ends."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from examples import workload
from pipeline.machine import look_for_devices

MARK = "DEMO_TEST_MARK"


class Demo:
    """A demo of the test's own: its temporary files and its processes can be told from everybody else's."""

    def __init__(self, folder: Path, *arguments: str, module: str = "lepton_ai.cli") -> None:
        self.folder = folder
        self.mark = secrets.token_hex(8)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "demo", *arguments],
            env=os.environ | {"TMPDIR": str(folder), MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def read_until(self, word: str) -> None:
        assert self.process.stdout is not None
        seen = []
        while line := self.process.stdout.readline():
            seen.append(line)
            if word in line:
                return
        pytest.fail(f"the demo ended without saying {word!r}: {''.join(seen)}")

    def left(self) -> list[str]:
        """What of it is still running or still on disk."""
        running = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    running.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return running + [str(path) for path in self.folder.rglob("*")]

    def left_after_a_while(self) -> list[str]:
        """The same where the kernel cleans up after it: nobody is left who could tell us when that is done."""
        deadline = time.monotonic() + 20
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    # Short, because a socket's path has at most 107 characters.
    short = Path(f"/tmp/demo-{secrets.token_hex(4)}")
    short.mkdir()
    yield short
    short.rmdir()  # fails where something was left


def test_every_job_succeeds_on_two_devices_and_nothing_is_left(folder: Path) -> None:
    demo = Demo(folder, "--json")
    output, _ = demo.process.communicate(timeout=110)
    assert demo.process.returncode == 0, output
    summary = json.loads(output.splitlines()[-1])
    assert summary["submitted"] == summary["succeeded"] >= 500
    assert summary["failed"] == 0
    fpga = next((each for each in look_for_devices() if each.kind == "fpga"), None)
    assert set(summary["by_device"]) == {"cpu", "fpga" if fpga is not None and fpga.available else "cpu.little"}
    assert min(summary["by_device"].values()) > 0
    assert set(summary["by_kernel"]) == {kernel for kernel, *_ in workload._MIX}
    assert sum(summary["by_device"].values()) == sum(summary["by_kernel"].values()) == summary["succeeded"]
    assert 0 < summary["p50_ms"] <= summary["p99_ms"]
    assert demo.left() == []


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("starting the broker", signal.SIGINT),
        ("warming", signal.SIGTERM),
        ("is online", signal.SIGINT),
        ("feeding", signal.SIGINT),
    ],
)
def test_it_can_be_stopped_at_any_moment_and_leaves_nothing(folder: Path, moment: str, number: signal.Signals) -> None:
    demo = Demo(folder, "--jobs", "5000")
    demo.read_until(moment)
    os.killpg(demo.process.pid, number)
    demo.process.communicate(timeout=40)
    assert demo.process.returncode == 130
    assert demo.left() == []


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8])
def test_an_early_ctrl_c_ends_it_without_a_traceback(folder: Path, after_s: float) -> None:
    # As `lepton` starts it: with the signals held until it can handle them.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        demo = Demo(folder, module="pipeline")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    time.sleep(after_s)
    demo.process.send_signal(signal.SIGINT)
    output, _ = demo.process.communicate(timeout=30)
    assert demo.process.returncode == 130
    assert "Traceback" not in output
    assert not demo.left_after_a_while()


def test_leaning_on_ctrl_c_ends_it_as_one_does(folder: Path) -> None:
    demo = Demo(folder, "--jobs", "5000")
    demo.read_until("is online")
    deadline = time.monotonic() + 30
    while demo.process.poll() is None and time.monotonic() < deadline:
        demo.process.send_signal(signal.SIGINT)
        time.sleep(0.005)
    output, _ = demo.process.communicate(timeout=10)
    assert demo.process.returncode == 130
    assert "Traceback" not in output
    assert demo.left() == []


def test_fewer_than_one_job_is_refused(folder: Path) -> None:
    demo = Demo(folder, "--jobs", "0")
    output, _ = demo.process.communicate(timeout=10)
    assert demo.process.returncode != 0
    assert "--jobs" in output


def test_even_sigkill_leaves_nothing_for_long(folder: Path) -> None:
    demo = Demo(folder, "--jobs", "5000")
    demo.read_until("is online")
    demo.process.kill()
    demo.process.communicate(timeout=10)
    assert not demo.left_after_a_while()
