from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lepton_ai.errors import NoBroker
from lepton_ai.settings import Settings
from queues import guardian
from queues.connection import Connection
from queues.embedded import EmbeddedBroker
from queues.guardian import Status
from queues.server import find_server
from tests.queues.servers import ends, linux, server_pid

ROOT = Path(__file__).parents[2]


def status(broker: EmbeddedBroker) -> Status:
    """What its guardian says next."""
    assert broker._guardian.stdout is not None
    return Status.read(broker._guardian.stdout.readline())


def call(url: str, *command: str) -> Any:
    with contextlib.closing(Connection(url, "test")) as connection:
        return connection.call(*command)


def test_a_server_that_was_killed_is_started_again_with_its_data_at_the_same_address() -> None:
    with EmbeddedBroker(Settings()) as broker:
        call(broker.url, "SET", "key", "kept")
        call(broker.url, "WAITAOF", "1", "0", "10000")
        before = server_pid(broker.url)
        os.kill(before, signal.SIGKILL)
        ended, started = status(broker), status(broker)
        assert (ended.event, ended.code) == ("ended", -9)
        assert (started.event, started.url) == ("started", broker.url)
        assert started.pid == server_pid(broker.url) != before
        assert call(broker.url, "GET", "key") == b"kept"


#: A guardian that waits for little and gives up soon, as `python -c`.
HASTY = """
import sys
from queues import guardian
guardian._STARTS, guardian._PAUSE_S = 2, 0.02
raise SystemExit(guardian._guard(*sys.argv[1:3], sys.argv[3] or None))
"""


def test_a_server_that_was_killed_again_and_again_is_started_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guardian, "command", lambda server, durability, _: ("-c", HASTY, str(server), durability, ""))
    with EmbeddedBroker(Settings()) as broker:
        for _ in range(6):
            os.kill(server_pid(broker.url), signal.SIGKILL)
            assert [status(broker).event, status(broker).event] == ["ended", "started"]


def a_server(path: Path, version: str = "", then: str = "exit 0") -> Path:
    """A program that says that it is a server of this version."""
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; exit 0; fi\n{then}\n')
    path.chmod(0o755)
    return path


def test_a_server_that_can_no_longer_be_started_is_given_up_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = find_server(Settings())
    script = f'if [ -e {tmp_path}/ran ]; then exit 7; fi; touch {tmp_path}/ran; exec "{real}" "$@"'
    server = a_server(tmp_path / "server", "Valkey server v=9.0.0", script)
    with EmbeddedBroker(Settings(redis_server=str(server))) as broker:
        os.kill(server_pid(broker.url), signal.SIGKILL)
        said = [status(broker) for _ in range(5)]
        assert [each.event for each in said] == ["ended"] * 4 + ["failed"]
        assert "ended 5 times in a row; exit code 7" in said[-1].reason
        assert broker._guardian.wait(10) == 1
    assert not broker.directory.exists()


def test_a_server_that_ends_at_once_is_refused_with_its_exit_code(tmp_path: Path) -> None:
    server = a_server(tmp_path / "server", "Valkey server v=8.1.0", "exit 7")
    with pytest.raises(NoBroker, match="did not start: exit code 7"):
        EmbeddedBroker(Settings(redis_server=str(server)))


@linux
def test_sigkill_of_the_guardian_ends_the_server() -> None:
    broker = EmbeddedBroker(Settings())
    server = server_pid(broker.url)
    os.kill(broker._guardian.pid, signal.SIGKILL)
    assert ends(server)
    broker.close()
    assert not broker.directory.exists()


@linux
def test_sigterm_of_the_guardian_leaves_nothing() -> None:
    broker = EmbeddedBroker(Settings())
    server = server_pid(broker.url)
    broker._guardian.terminate()
    assert ends(server)
    broker.close()
    assert not broker.directory.exists()


@linux
def test_sigint_of_the_guardian_is_the_parents_to_handle() -> None:
    with EmbeddedBroker(Settings()) as broker:
        broker._guardian.send_signal(signal.SIGINT)
        assert call(broker.url, "PING") == b"PONG"
        assert broker._guardian.poll() is None


@linux
def test_the_next_guardian_of_a_directory_waits_until_the_last_one_s_server_is_gone(tmp_path: Path) -> None:
    first = EmbeddedBroker(Settings(), tmp_path)
    server = server_pid(first.url)
    os.kill(first._guardian.pid, signal.SIGKILL)
    with EmbeddedBroker(Settings(), tmp_path) as second:
        assert ends(server, 0)
        assert second.url == first.url
        assert server_pid(second.url) != server
    first.close()


def test_a_directory_that_another_broker_uses_is_refused_with_its_guardians_pid(tmp_path: Path) -> None:
    guard = f"guardian._guard('/nowhere', 'everysec', {str(tmp_path)!r})"
    program = f"from queues import guardian; guardian.STOP_S = 0.2; {guard}"
    with EmbeddedBroker(Settings(), tmp_path) as broker:
        with subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as second:
            assert second.stdout is not None
            said = Status.read(second.stdout.readline())
        assert said.event == "failed"
        assert f"pid {broker._guardian.pid}) still uses {tmp_path}" in said.reason
        assert call(broker.url, "PING") == b"PONG"


def test_a_broker_that_takes_long_to_read_its_data_is_waited_for(tmp_path: Path) -> None:
    write = "for at = 1, 200000 do redis.call('SET', at, at) end"
    with EmbeddedBroker(Settings(), tmp_path) as broker:
        connection = Connection(broker.url, "writer")
        connection.call("EVAL", write, 0)
        connection.close()
    with EmbeddedBroker(Settings(), tmp_path) as broker:
        connection = Connection(broker.url, "reader")
        assert connection.call("DBSIZE") == 200_000
        connection.close()


@pytest.mark.parametrize(
    ("code", "words"), [(7, "exit code 7"), (-9, "killed by SIGKILL"), (-40, "killed by signal 40")]
)
def test_an_end_is_told_by_the_signals_name(code: int, words: str) -> None:
    assert guardian._ending(code) == words


# -- a full disk ------------------------------------------------------------------------------------------------------

#: In a mount namespace of its own: a disk of 16 MiB, filled and freed three times, and a guardian that would give up
#: after two failures. Prints what was acknowledged, what was there in the end, and what the guardian said.
FULL_DISK = """
import json, subprocess, sys
from pathlib import Path
from lepton_ai.errors import LeptonError
from lepton_ai.settings import Settings
from queues import guardian
from queues.connection import Connection
from queues.embedded import EmbeddedBroker

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "lepton", disk], check=True)
guardian.command = lambda server, durability, home: ("-c", sys.argv[2], str(server), durability, str(home))
acknowledged, found, said = 0, [], []
with EmbeddedBroker(Settings(durability="fsync"), disk / "broker") as broker:
    for _ in range(3):
        ballast = (disk / "ballast").open("wb", buffering=0)
        connection = Connection(broker.url, "writer")
        try:
            ballast.write(bytes(12 << 20))
            while True:
                acknowledged = connection.call("LPUSH", "list", bytes(20_000))
        except (LeptonError, OSError):
            pass
        while not said or said[-1]["event"] != "waiting":
            said.append(json.loads(broker._guardian.stdout.readline()))
        ballast.truncate(0)
        ballast.close()
        said.append(json.loads(broker._guardian.stdout.readline()))
        connection = Connection(broker.url, "reader")
        found.append((acknowledged, connection.call("LLEN", "list")))
        connection.call("DEL", "list")
        connection.call("BGREWRITEAOF")
        while b"aof_rewrite_in_progress:1" in connection.call("INFO", "persistence"):
            pass
print(json.dumps([found, said]))
"""


@pytest.fixture
def in_a_namespace() -> list[str]:
    """What runs a command where it may mount a disk that nobody else sees."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        tried = subprocess.run([*alone, "true"], capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"a small disk cannot be made here: {error}")
    if tried.returncode != 0:
        pytest.skip(f"a small disk cannot be made here: {tried.stderr.strip()}")
    return alone


def test_a_server_on_a_full_disk_is_back_with_all_that_was_acknowledged_once_there_is_room(
    tmp_path: Path, in_a_namespace: list[str]
) -> None:
    ran = subprocess.run(
        [*in_a_namespace, sys.executable, "-c", FULL_DISK, str(tmp_path), HASTY],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    found, said = json.loads(ran.stdout)
    assert [each["event"] for each in said] == ["ended", "waiting", "started"] * 3
    for acknowledged, kept in found:
        assert 50 < acknowledged <= kept <= acknowledged + 1
    assert said[0]["code"] == 1
    assert "takes no more (No space left on device" in said[1]["reason"]
