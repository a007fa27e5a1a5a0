from __future__ import annotations

import contextlib
import os
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
from queues.connection import Connection
from queues.embedded import EmbeddedBroker
from queues.server import address
from tests.queues.servers import ends, linux, server_pid

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def running() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(Settings()) as broker:
        yield broker


def config(url: str, name: str) -> str:
    connection = Connection(url, "config")
    found: bytes = connection.call("CONFIG", "GET", name)[name.encode()]
    connection.close()
    return found.decode()


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


def call(url: str, *command: str) -> Any:
    with contextlib.closing(Connection(url, "test")) as connection:
        return connection.call(*command)


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


@pytest.fixture
def run_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="run-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder
    folder.rmdir()  # fails where something was left


def test_a_broker_whose_socket_is_elsewhere_keeps_its_data_and_leaves_no_socket(tmp_path: Path, run_time: Path) -> None:
    home = tmp_path / 'a "quoted" path with spaces'
    with EmbeddedBroker(Settings(), home) as broker:
        assert broker.directory == home
        assert broker.url == address(home)
        call(broker.url, "SET", "key", "kept")
    assert list(run_time.iterdir()) == []
    with EmbeddedBroker(Settings(), home) as broker:
        assert call(broker.url, "GET", "key") == b"kept"


def test_a_given_directory_is_closed_to_others_while_it_serves(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with EmbeddedBroker(Settings(), tmp_path):
        assert mode(tmp_path) == 0o700


def test_a_given_directory_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NoBroker, match="file"):
        EmbeddedBroker(Settings(), tmp_path / "file")
