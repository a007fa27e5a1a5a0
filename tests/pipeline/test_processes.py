from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import processes as module
from pipeline.processes import Processes, Program, ending, environment, pause_s

ROOT = Path(__file__).parents[2]
SLEEP = "import time; print('here', flush=True); time.sleep(60)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


class Children:
    """Processes of a test, their logs and what was noted of them."""

    def __init__(self, folder: Path, *, restart: bool = True) -> None:
        self.folder = folder
        self.notes: list[tuple[str, dict[str, Any]]] = []
        self.processes = Processes(lambda name: (folder / name).open("ab"), self._note, restart=restart)

    def _note(self, event: str, **fields: Any) -> None:
        self.notes.append((event, fields))

    def start(self, name: str, script: str, hears: Callable[[bytes], None] | None = None) -> int:
        self.processes.start(Program(name, ("-c", script), environment({}), hears))
        until(lambda: not script.endswith(SLEEP) or "here" in (self.folder / name).read_text())
        return self.processes.running[name].pid

    def noted(self, event: str) -> list[dict[str, Any]]:
        return [fields for each, fields in self.notes if each == event]


def until(check: Callable[[], Any], timeout_s: float = 10) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    found = Children(tmp_path)
    yield found
    found.processes.kill(list(found.processes.running))


def test_one_that_was_killed_is_started_again_at_once(children: Children) -> None:
    pid = children.start("router", SLEEP)
    os.kill(pid, signal.SIGKILL)
    assert until(children.processes.look) == {"router": -9}
    assert "router" not in children.processes.running
    assert 0 < children.processes.due_s <= 0.2
    until(lambda: children.processes.look() or children.processes.running)
    assert children.processes.running["router"].pid != pid
    (lost,) = children.noted("process_lost")
    assert (lost["name"], lost["pid"], lost["how"], lost["restarts"]) == ("router", pid, "SIGKILL", 1)
    assert [each["pid"] for each in children.noted("process_started")] == [
        pid,
        children.processes.running["router"].pid,
    ]


def test_one_that_keeps_ending_is_waited_for_longer_each_time(children: Children) -> None:
    children.start("ingest", "raise SystemExit(3)")
    until(lambda: children.processes.look() and len(children.noted("process_lost")) >= 3)
    assert [each["how"] for each in children.noted("process_lost")] == ["exit code 3"] * 3
    waits = [each["restart_in_s"] for each in children.noted("process_lost")]
    assert waits[0] <= 0.2 < waits[2] <= 0.8


def test_one_that_had_run_well_is_started_again_as_if_for_the_first_time(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STEADY_S", 0.0)
    children.start("ingest", "raise SystemExit(3)")
    until(lambda: children.processes.look() and len(children.noted("process_lost")) >= 4)
    assert all(each["restart_in_s"] <= 0.2 for each in children.noted("process_lost"))
    assert [each["restarts"] for each in children.noted("process_lost")] == [1, 2, 3, 4]


def test_one_that_cannot_be_started_just_now_is_tried_again(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    children.start("ingest", "raise SystemExit(3)")
    until(children.processes.look)
    with monkeypatch.context() as patched:
        patched.setattr(module, "start", refuse)
        until(lambda: children.processes.look() or children.noted("process_not_started"))
    until(lambda: children.processes.look() or children.processes.running)


def test_without_restarts_one_that_ended_stays_ended(tmp_path: Path) -> None:
    children = Children(tmp_path, restart=False)
    children.start("router", "raise SystemExit(3)")
    assert until(children.processes.look) == {"router": 3}
    assert children.processes.due_s == float("inf")


def test_one_that_was_told_to_end_is_not_started_again(children: Children) -> None:
    children.start("router", SLEEP)
    children.processes.end(["router"])
    until(lambda: children.processes.look() or not children.processes.running)
    assert children.processes.due_s == float("inf")
    assert children.noted("process_lost") == []
    assert [each["how"] for each in children.noted("process_ended")] == ["SIGTERM"]


def test_one_that_is_due_can_still_be_left_where_it_is(children: Children) -> None:
    children.start("router", "raise SystemExit(3)")
    until(children.processes.look)
    children.processes.leave(["router"])
    time.sleep(0.25)
    assert children.processes.look() == {}
    assert children.processes.running == {}


def test_one_that_is_due_when_all_are_killed_is_not_started_again(children: Children) -> None:
    children.start("router", "raise SystemExit(3)")
    until(children.processes.look)
    children.start("broker", SLEEP)
    children.processes.leave_all()
    assert children.processes.due_s == float("inf")
    children.processes.stop(["broker"], 10)
    assert [each["name"] for each in children.noted("process_started")] == ["router", "broker"]


def test_stop_kills_those_alone_that_do_not_end(children: Children) -> None:
    children.start("deaf", DEAF)
    children.start("router", SLEEP)
    children.processes.stop(["deaf", "router"], 0.5)
    assert {each["name"]: each["how"] for each in children.noted("process_ended")} == {
        "deaf": "SIGKILL",
        "router": "SIGTERM",
    }
    assert children.processes.running == {}


def test_a_program_that_is_heard_says_its_lines_and_ends_with_its_input(children: Children) -> None:
    heard: list[bytes] = []
    children.start("broker", "import sys; print('one'); print('two', flush=True); sys.stdin.read()", heard.append)
    until(lambda: heard == [b"one\n", b"two\n"])
    children.processes.stop(["broker"], 10)
    assert [each["how"] for each in children.noted("process_ended")] == ["exit code 0"]


def test_ctrl_c_in_our_terminal_does_not_reach_them(children: Children) -> None:
    assert os.getsid(children.start("router", SLEEP)) != os.getsid(0)


def test_modules_of_the_folder_we_are_in_come_last(
    children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tasks", "kernels_of_mine"):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.chdir(tmp_path)
    program = "import tasks, kernels_of_mine; print(tasks.__file__); print(kernels_of_mine.__file__)"
    children.start("worker", program)
    found = (ROOT / "tasks" / "__init__.py", tmp_path / "kernels_of_mine.py")
    assert until(lambda: len(lines := (tmp_path / "worker").read_text().splitlines()) == 2 and lines) == [
        *map(str, found)
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
def test_sigkill_of_the_parent_ends_them_even_if_they_are_deaf() -> None:
    program = (
        "import os, sys; from pipeline.processes import Program, start\n"
        f"child = start(Program('deaf', ('-c', {DEAF!r}), dict(os.environ)), sys.stdout.buffer)\n"
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    said = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
    (pid,) = said - {"here"}
    descriptor = os.pidfd_open(int(pid))
    parent.kill()
    parent.communicate()
    assert select.select([descriptor], [], [], 10)[0]
    os.close(descriptor)


def test_pauses_grow_from_a_fifth_of_a_second_to_ten() -> None:
    longest = [pause_s(failures, 1.0) for failures in range(1, 40)]
    assert longest[:4] == [0.2, 0.4, 0.8, 1.6]
    assert max(longest) == 10
    assert pause_s(3, 0.0) == longest[2] / 2


@pytest.mark.parametrize(
    ("code", "words"),
    [(0, "exit code 0"), (7, "exit code 7"), (-9, "SIGKILL"), (-11, "SIGSEGV"), (-40, "signal 40")],
)
def test_an_end_is_told_by_the_signals_name(code: int, words: str) -> None:
    assert ending(code) == words
