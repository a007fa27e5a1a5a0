"""Child processes by name, each of which ends when we do, however we end: started, watched, started again, ended."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from lepton_ai import services

__all__ = ["Processes", "Program", "ending", "environment", "pause_s", "start"]

_SHORTEST_S, _LONGEST_S = 0.2, 10.0
#: Who has run for so long has started well: its next failure is its first.
_STEADY_S = 10.0
#: On Linux a child asks to be killed when the thread that started it ends, and only then becomes the program. It asks
#: in a program of its own, because nothing may run between fork and exec where there are threads (see preexec_fn).
_LEASH = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class Program(msgspec.Struct, frozen=True):
    """What one child runs."""

    name: str
    arguments: tuple[str, ...]
    """After the interpreter."""
    environ: dict[str, str]
    hears: Callable[[bytes], None] | None = None
    """Is given each line of its standard output, on a thread of its own. Such a program ends when its input does."""


class Processes:
    """The children of one thread, which must outlive them. `note` hears of everything that happens, as log events."""

    def __init__(self, log: Callable[[str], IO[bytes]], note: Callable[..., Any], *, restart: bool) -> None:
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        """Every process that has been started and not been seen to end."""
        self._log = log
        self._note = note
        self._restart = restart
        self._programs: dict[str, Program] = {}
        """What is to be running."""
        self._began: dict[str, float] = {}
        self._failures: Counter[str] = Counter()
        self._restarts: Counter[str] = Counter()
        self._due: dict[str, float] = {}

    def start(self, program: Program) -> None:
        self._programs[program.name] = program
        with self._log(program.name) as log:
            process = start(program, log)
        self.running[program.name] = process
        self._began[program.name] = time.monotonic()
        self._note("process_started", name=program.name, pid=process.pid)

    def look(self) -> dict[str, int]:
        """Sees who has ended and starts again whoever is due; returns who ended by itself, with its exit code."""
        gone: dict[str, int] = {}
        for name, process in list(self.running.items()):
            if (code := process.poll()) is not None:
                del self.running[name]
                _close(process)
                if name in self._programs:
                    gone[name] = code
                    self._lost(name, process.pid, code)
                else:
                    self._note("process_ended", name=name, pid=process.pid, how=ending(code))
        for name in [name for name, at in self._due.items() if at <= time.monotonic()]:
            del self._due[name]
            try:
                self.start(self._programs[name])
            except OSError as error:  # no more processes or memory, for now
                self._note("process_not_started", name=name, reason=str(error))
                self._wait(name)
        return gone

    @property
    def due_s(self) -> float:
        """How long until somebody is to be started again; infinite where nobody is."""
        return max(0.0, min(self._due.values(), default=float("inf")) - time.monotonic())

    def began(self, name: str) -> float:
        """When a process was started the last time, in monotonic seconds."""
        return self._began[name]

    def leave(self, names: Iterable[str]) -> None:
        """Starts these no more, whatever becomes of them."""
        for name in names:
            self._programs.pop(name, None)
            self._due.pop(name, None)

    def leave_all(self) -> None:
        """Starts nobody any more, whoever is due."""
        self.leave(list(self._programs))

    def end(self, names: Collection[str]) -> None:
        """Tells processes to end, once; they are not started again. `look` sees them go."""
        self.leave(names)
        for name in names:
            if (process := self.running.get(name)) is None:
                continue
            if process.stdin is not None:
                process.stdin.close()
            else:
                process.terminate()

    def kill(self, names: Iterable[str]) -> None:
        """Ends processes at once and waits until they are gone."""
        found = [name for name in names if name in self.running]
        self.leave(found)
        for name in found:
            self.running[name].kill()
        for name in found:
            process = self.running.pop(name)
            self._note("process_ended", name=name, pid=process.pid, how=ending(process.wait()))
            _close(process)

    def stop(self, names: Iterable[str], limit_s: float) -> None:
        """Tells processes to end and waits; whoever has not within the limit is killed."""
        waited = [name for name in names if name in self.running]
        self.end(waited)
        deadline = time.monotonic() + limit_s
        for name in waited:
            try:
                self.running[name].wait(max(0.01, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self.look()
        self.kill(waited)

    def _lost(self, name: str, pid: int, code: int) -> None:
        if not self._restart:
            return
        ran_s = time.monotonic() - self._began[name]
        if ran_s >= _STEADY_S:
            self._failures[name] = 0
        self._restarts[name] += 1
        wait_s = self._wait(name)
        self._note(
            "process_lost",
            name=name,
            pid=pid,
            how=ending(code),
            ran_s=round(ran_s, 1),
            restarts=self._restarts[name],
            restart_in_s=round(wait_s, 2),
        )

    def _wait(self, name: str) -> float:
        self._failures[name] += 1
        wait_s = pause_s(self._failures[name], random.random())
        self._due[name] = time.monotonic() + wait_s
        return wait_s


def start(program: Program, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Starts a program in a session of its own, so that Ctrl-C is ours to handle; it ends when this thread does."""
    command = [sys.executable, "-P", *program.arguments]
    if program.hears is not None:
        process = _popen(command, program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        threading.Thread(target=_hear, args=(process.stdout, program.hears), name=program.name, daemon=True).start()
        return process
    if sys.platform.startswith("linux"):
        command = [sys.executable, "-I", "-S", "-c", _LEASH, str(os.getpid()), *command]
    return _popen(command, program, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """Ours for a child, with `own` on top.

    Modules of the current folder, such as somebody's kernels, are found after ours and never instead: a producer's
    `tasks.py` stands there too. (-P keeps Python from looking there first, and being on the path keeps Celery from it.)
    """
    found = services.environ({**os.environ, **own})
    return {**found, "PYTHONPATH": os.pathsep.join([found["PYTHONPATH"], str(Path.cwd())])}


def pause_s(failures: int, chance: float) -> float:
    """Seconds before the next start after so many failures in a row; `chance` (0 to 1) keeps them out of step."""
    return min(_LONGEST_S, _SHORTEST_S * 2.0 ** min(failures - 1, 16)) * (0.5 + chance / 2)


def ending(code: int) -> str:
    """How a process ended, in words: `exit code 7`, `SIGKILL`."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:  # most of the real-time signals have no name
        return f"signal {-code}"


def _popen(command: list[str], program: Program, **streams: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=program.environ, start_new_session=True, **streams)


def _hear(stream: IO[bytes], hears: Callable[[bytes], None]) -> None:
    with stream:
        for line in stream:
            hears(line)


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
