"""The network of the plays breaks as told, and its traps spring between the two commands that they are set for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from lepton_ai.errors import BrokerUnavailable
from pipeline.supervisor import free_port
from queues.connection import Connection
from tests.faults.actors import Stage
from tests.faults.proxy import Network, Proxy, Trap
from tests.faults.resp import Frames
from tests.faults.server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("network")
    with Stage(folder) as stage:
        server = Server(stage, folder / "data", {})
        server.start()
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with closing(server.connect()) as connection:
        connection.call("FLUSHALL")
    with Network() as network:
        yield network.proxy(server.port)


def there(server: Server) -> list[bytes]:
    """What of the three keys has been written."""
    with closing(server.connect()) as connection:
        return sorted(connection.call("KEYS", "*"))


WRITES = [("SET", "a", 1), ("SET", "b", 2), ("SET", "c", 3)]


def test_what_is_sent_arrives_and_is_answered(proxy: Proxy) -> None:
    with closing(Connection(proxy.url, "any")) as connection:
        assert connection.many([*WRITES, ("GET", "b")])[-1] == b"2"


def test_a_trap_springs_when_a_command_is_done_and_its_answer_on_the_way(proxy: Proxy, server: Server) -> None:
    acted = threading.Event()
    trap = proxy.trap = Trap(acted.set, "SET", connections="victim", after=1)
    with closing(Connection(proxy.url, "victim")) as connection, pytest.raises(BrokerUnavailable):
        connection.many(WRITES)
    assert acted.is_set()
    assert trap.at == "SET"
    assert there(server) == [b"a", b"b"]


def test_a_trap_springs_before_a_command_that_is_never_sent_on(proxy: Proxy, server: Server) -> None:
    proxy.trap = Trap(lambda: None, "SET", after=1, asked=True)
    with closing(Connection(proxy.url, "victim")) as connection, pytest.raises(BrokerUnavailable):
        connection.many(WRITES)
    assert there(server) == [b"a"]


def test_a_fruitful_trap_passes_over_what_was_answered_with_nothing(proxy: Proxy, server: Server) -> None:
    proxy.trap = Trap(lambda: None, "GET", fruitful=True)
    with closing(Connection(proxy.url, "victim")) as connection:
        assert connection.call("GET", "a") is None
        connection.call("SET", "a", 1)
        with pytest.raises(BrokerUnavailable):
            connection.call("GET", "a")


def test_a_trap_for_others_springs_not(proxy: Proxy) -> None:
    trap = proxy.trap = Trap(lambda: None, "SET", connections="victim")
    with closing(Connection(proxy.url, "bystander")) as connection:
        connection.many(WRITES)
    assert not trap.sprung.is_set()


def test_a_cut_breaks_what_is_open_and_refuses_what_is_new_until_it_is_mended(proxy: Proxy) -> None:
    with closing(Connection(proxy.url, "old")) as connection:
        proxy.cut()
        with pytest.raises(BrokerUnavailable):
            connection.call("PING")
    with pytest.raises(BrokerUnavailable):
        Connection(proxy.url, "new")
    proxy.mend()
    Connection(proxy.url, "new").close()


def test_what_is_half_open_says_nothing_and_new_connections_work(proxy: Proxy, server: Server) -> None:
    with closing(Connection(proxy.url, "old")) as connection:
        proxy.swallow()
        waiting = connection.send([("SET", "a", 1)])
        with pytest.raises(BrokerUnavailable, match="did not answer"):
            connection.receive(waiting, 0.3)
    assert there(server) == []
    with closing(Connection(proxy.url, "new")) as connection:
        connection.call("SET", "b", 1)


def test_a_server_that_is_not_there_is_no_connection() -> None:
    with Network() as network, pytest.raises(BrokerUnavailable):
        Connection(network.proxy(free_port()).url, "any")


def test_values_are_found_however_the_network_cuts_them() -> None:
    values = [
        b"+OK\r\n",
        b"$3\r\na\r\n\r\n",
        b"$-1\r\n",
        b"*2\r\n:1\r\n*1\r\n$0\r\n\r\n",
        b"%1\r\n+a\r\n,1.5\r\n",
        b">1\r\n#t\r\n",
    ]
    whole = b"".join(values)
    for size in (1, 3, 7, len(whole)):
        frames = Frames()
        found = [frame for at in range(0, len(whole), size) for frame in frames.feed(whole[at : at + size])]
        assert found == values


def test_a_server_that_was_killed_comes_up_on_its_data(server: Server) -> None:
    with closing(server.connect()) as connection:
        connection.call("CONFIG", "SET", "appendfsync", "always")
        connection.call("SET", "kept", 1)
    server.actor.kill()
    server.start()
    assert b"kept" in there(server)
