from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline import output as module
from pipeline.output import Output


class Terminal:
    """A pipe in place of a terminal, which is read only when a test reads."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def read_all(self, output: Output) -> list[str]:
        """Everything up to the end of the output."""
        found = bytearray()

        def read() -> None:
            while part := os.read(self.reading, 65536):
                found.extend(part)

        reader = threading.Thread(target=read)
        reader.start()
        output.close(10)
        os.close(self.writing)
        reader.join()
        return found.decode().splitlines()


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    found = Terminal()
    yield found
    os.close(found.reading)


def say(output: Output, name: str, *lines: bytes) -> None:
    with output.of(name) as stream:
        stream.write(b"".join(lines))


def settled(check: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines_of(output: Output, terminal: Terminal, count: int) -> list[str]:
    found = b""
    while found.count(b"\n") < count:
        found += os.read(terminal.reading, 65536)
    return [*found.decode().splitlines(), *terminal.read_all(output)]


def test_people_see_the_name_of_a_process_before_each_of_its_lines(terminal: Terminal) -> None:
    output = Output(terminal.writing, ["router", "worker-cpu"], as_json=False)
    say(output, "router", b"one\n", b"\n", b"two\r\n", b"three")
    assert lines_of(output, terminal, 3) == ["router     | one", "router     | two", "router     | three"]


def test_machines_see_each_line_as_json_with_the_name_of_its_process(terminal: Terminal) -> None:
    output = Output(terminal.writing, ["worker-cpu"], as_json=True)
    say(
        output, "worker-cpu", b'{"event": "job_ended", "service": "worker"}\n', b"Traceback: [1]\n", b"[1]\n", b"\xff\n"
    )
    ours, *others = map(json.loads, lines_of(output, terminal, 4))
    assert ours == {"event": "job_ended", "service": "worker", "process": "worker-cpu"}
    assert [each["event"] for each in others] == ["Traceback: [1]", "[1]", "\ufffd"]
    assert all(each["process"] == each["service"] == "worker-cpu" and each["level"] for each in others)


def test_our_own_lines_stay_whole_however_they_are_written(terminal: Terminal) -> None:
    output = Output(terminal.writing, ["up"], as_json=False)
    stream = output.ours("up")
    stream.write("be")
    say(output, "up", b"between\n")
    settled(lambda: os.read(terminal.reading, 100) == b"up | between\n")
    stream.write("gun\nand ")
    stream.write("done\n")
    output.ours().write("plain\n")
    assert terminal.read_all(output) == ["up | begun", "up | and done", "plain"]


def test_a_line_without_an_end_is_cut(terminal: Terminal) -> None:
    output = Output(terminal.writing, ["router"], as_json=False)
    say(output, "router", b"x" * 100_000, b"\n")
    assert sorted(map(len, lines_of(output, terminal, 2))) == [100_000 - 65_536 + 9, 65_536 + 9]


def test_a_terminal_that_stands_still_holds_no_process_up(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAITING_BYTES", 200_000)
    output = Output(terminal.writing, ["router", "up"], as_json=False)
    for number in range(20):  # far more than fits into the pipe and may wait
        say(output, "router", *[b"%d %b\n" % (number, b"x" * 98)] * 500)
    settled(lambda: output._left_out > 0)
    output.ours("up").write("we are heard\n")
    settled(lambda: threading.active_count() and not [t for t in threading.enumerate() if t.name == "output-router"])
    lines = terminal.read_all(output)
    assert "up     | we are heard" in lines
    (confession,) = [line for line in lines if "left out" in line]
    assert len(lines) - 2 + int(confession.split()[0]) == 20 * 500


def test_a_terminal_that_is_gone_is_forgotten() -> None:
    terminal = Terminal()
    output = Output(terminal.writing, ["router"], as_json=False)
    os.close(terminal.reading)
    for _ in range(3):
        say(output, "router", b"hello\n")
    settled(lambda: not output._lines)
    output.close(10)
    assert not output._writer.is_alive()
    os.close(terminal.writing)


def test_the_end_does_not_wait_for_a_terminal_that_stands_still(terminal: Terminal) -> None:
    output = Output(terminal.writing, ["router"], as_json=False)
    output.ours().write("x" * 1_000_000 + "\n")
    start = time.monotonic()
    output.close(0.2)
    assert time.monotonic() - start < 5
    terminal.read_all(output)
