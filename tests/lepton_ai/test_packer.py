"""How commands are written, and that Ctrl-C meanwhile ends no process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from redis.connection import HiredisRespSerializer

from lepton_ai import Client
from lepton_ai.packer import Packer

HAMMERED = """
import signal
from lepton_ai.packer import Packer

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
command, packer = ("XREAD", *range(20_000)), Packer()
for _ in range(200):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        while True:
            packer.pack(*command)
    except KeyboardInterrupt:
        pass
print("is still there")
"""


@pytest.mark.parametrize(
    "command", [("GET", "k"), ("CONFIG GET", "x"), ("SET", b"\xff", 5, 0.5, "\xfc", memoryview(b"a"))]
)
def test_commands_are_written_as_hiredis_writes_them(command: tuple[Any, ...]) -> None:
    assert Packer().pack(*command) == HiredisRespSerializer().pack(*command)


@pytest.mark.skipif(sys.platform == "win32", reason="has no interval timers")
def test_an_interrupt_while_numbers_are_written_ends_no_process() -> None:
    ran = subprocess.run([sys.executable, "-c", HAMMERED], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout) == (0, "is still there\n"), ran.stderr


def test_a_client_writes_by_it(broker_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[object, ...]] = []
    usual = Packer.pack

    def pack(self: Packer, *words: Any) -> list[bytes]:
        written.append(words)
        return usual(self, *words)

    monkeypatch.setattr(Packer, "pack", pack)
    with Client(broker_url) as client:
        assert client.quarantined() == []
    assert any(words[0] == "HGETALL" for words in written)
