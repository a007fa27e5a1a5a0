from __future__ import annotations

import select
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_ai.errors import BrokerUnavailable, InvalidSettings
from lepton_ai.settings import Settings
from queues.connection import CommandError, Connection
from queues.embedded import EmbeddedBroker


def named(url: str) -> Any:
    """The name that a connection to this address has there, which is ours if it is the right broker."""
    connection = Connection(url, "a-name")
    found = connection.call("CLIENT", "GETNAME")
    connection.close()
    return found


# -- addresses --------------------------------------------------------------------------------------------------------


def test_a_connection_is_named_for_those_who_look_at_the_broker(broker_url: str) -> None:
    assert named(broker_url) == b"a-name"


@pytest.fixture
def tcp(connection: Connection, broker_url: str) -> Iterator[str]:
    """`:password@host:port` of the same broker over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    connection.call("CONFIG", "SET", "bind", "127.0.0.1", "port", port)
    yield f":{urlsplit(broker_url).password}@127.0.0.1:{port}"
    connection.call("CONFIG", "SET", "port", 0)


@pytest.mark.parametrize("tail", ["", "/", "/0", "/3"])
def test_a_tcp_address_is_reached(tcp: str, tail: str) -> None:
    assert named(f"redis://{tcp}{tail}") == b"a-name"


@pytest.mark.parametrize("scheme", ["redis", "unix"])
def test_the_database_of_the_address_is_used(connection: Connection, broker_url: str, tcp: str, scheme: str) -> None:
    found = Connection(f"{broker_url}?db=3" if scheme == "unix" else f"redis://{tcp}/3", "three")
    found.call("SET", "key", "three")
    found.close()
    assert connection.call("EXISTS", "key") == 0
    connection.call("SELECT", 3)
    assert connection.call("GET", "key") == b"three"


@pytest.mark.parametrize("scheme", ["redis", "unix"])
def test_a_user_and_password_with_any_characters_are_understood(
    connection: Connection, broker_url: str, tcp: str, scheme: str
) -> None:
    user, password = "us/er:1", "p@ss/w:rd?#%"
    connection.call("ACL", "SETUSER", user, "on", f">{password}", "~*", "&*", "+@all")
    place = {"redis": tcp.rpartition("@")[2], "unix": urlsplit(broker_url).path}[scheme]
    found = Connection(f"{scheme}://{quote(user, safe='')}:{quote(password, safe='')}@{place}", "x")
    assert found.call("ACL", "WHOAMI") == user.encode()
    found.close()
    connection.call("ACL", "DELUSER", user)


def test_tls_to_a_broker_without_it_is_unavailable(tcp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("queues.connection._CONNECT_S", 0.2)  # such a broker just waits for more
    with pytest.raises(BrokerUnavailable):
        Connection(f"rediss://{tcp}", "x")


@pytest.mark.parametrize("password", ["", ":wrong@"])
def test_a_broker_that_refuses_us_is_unavailable_and_says_why(broker_url: str, password: str) -> None:
    with pytest.raises(BrokerUnavailable, match=r"NOAUTH|WRONGPASS"):
        Connection(f"unix://{password}{urlsplit(broker_url).path}", "x")


def test_a_database_that_the_broker_has_not_is_unavailable(broker_url: str) -> None:
    with pytest.raises(BrokerUnavailable, match="out of range"):
        Connection(f"{broker_url}?db=99", "x")


@pytest.mark.parametrize(
    ("url", "place"), [("redis://127.0.0.1:1/0", "127.0.0.1:1"), ("unix:///no/such/socket", "/no/such/socket")]
)
def test_a_broker_that_is_not_there_is_unavailable_and_named(url: str, place: str) -> None:
    with pytest.raises(BrokerUnavailable, match=place):
        Connection(url, "x")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host", "http://host"),
        ("nonsense", "nonsense"),
        ("redis://host:port/0", "host:port/0"),
        ("redis://host:99999", "host:99999"),
        ("redis://host/first", "host/first"),
        ("unix:///path?db=first", "/path"),
        ("redis://[::1", "::1"),
    ],
)
def test_an_address_that_is_none_is_refused_by_name(url: str, shown: str) -> None:
    with pytest.raises(InvalidSettings) as refused:
        Connection(url, "x")
    assert shown in refused.value.message
    assert refused.value.field == "redis_url"


def test_a_password_in_a_wrong_address_is_not_repeated() -> None:
    with pytest.raises(InvalidSettings) as refused:
        Connection("redis://:secret@host:port/0", "x")
    assert "secret" not in refused.value.message


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["silent", "http"])
def test_a_server_that_is_no_broker_is_unavailable(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            found, _ = server.accept()
            with found:
                found.recv(1000)
                found.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(BrokerUnavailable):
            Connection(f"redis://127.0.0.1:{server.getsockname()[1]}", "x")
        thread.join()


# -- commands and replies ---------------------------------------------------------------------------------------------


def test_a_command_that_is_refused_raises_and_the_connection_goes_on(connection: Connection) -> None:
    with pytest.raises(CommandError, match="unknown command"):
        connection.call("NO-SUCH-COMMAND")
    assert connection.call("PING") == b"PONG"


def test_the_first_refused_command_of_many_is_raised_after_all_were_answered(connection: Connection) -> None:
    with pytest.raises(CommandError, match="unknown command"):
        connection.many([("SET", "a", 1), ("NO-SUCH-COMMAND",), ("LPUSH", "a", "x"), ("SET", "b", 2)])
    assert connection.call("GET", "b") == b"2"


def test_replies_that_were_sent_for_have_errors_as_values(connection: Connection) -> None:
    sent = connection.send([("SET", "a", 1), ("LPUSH", "a", "x"), ("GET", "a")])
    first, error, last = connection.receive(sent)
    assert (first, isinstance(error, CommandError), last) == (b"OK", True, b"1")


def test_a_transaction_that_was_called_off_answers_with_nothing(connection: Connection, broker_url: str) -> None:
    connection.call("WATCH", "key")
    other = Connection(broker_url, "other")
    other.call("SET", "key", "changed")
    other.close()
    assert connection.many([("MULTI",), ("SET", "key", "mine"), ("EXEC",)])[-1] is None
    assert connection.call("GET", "key") == b"changed"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.binary(max_size=100) | st.text(st.characters(codec="utf-8")) | st.integers(), max_size=20))
def test_whatever_is_sent_is_what_arrives_and_in_order(connection: Connection, values: list[Any]) -> None:
    expected = [value if isinstance(value, bytes) else str(value).encode() for value in values]
    assert connection.many([("ECHO", value) for value in values]) == expected


def test_many_megabytes_go_and_come_in_one_write(connection: Connection) -> None:
    values = [bytes([at % 256]) * 100_000 for at in range(200)]
    assert connection.many([("ECHO", value) for value in values]) == values


def test_no_commands_have_no_replies(connection: Connection) -> None:
    assert connection.many([]) == []


# -- pushes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracking(broker_url: str) -> Iterator[Connection]:
    tracking = Connection(broker_url, "tracking")
    tracking.call("CLIENT", "TRACKING", "ON", "BCAST", "NOLOOP", "PREFIX", "lane")
    yield tracking
    tracking.close()


def test_a_push_wakes_and_is_handed_out_once(connection: Connection, tracking: Connection) -> None:
    connection.call("LPUSH", "lane.high", "m")
    assert select.select([tracking], [], [], 5)[0]
    assert tracking.drain_pushes() == [[b"invalidate", [b"lane.high"]]]
    assert tracking.drain_pushes() == []


def test_a_push_between_replies_is_kept_apart_from_them(connection: Connection, tracking: Connection) -> None:
    connection.call("LPUSH", "lane.high", "m")
    while not tracking.pushes:
        assert tracking.call("ECHO", "x") == b"x"
    assert tracking.drain_pushes() == [[b"invalidate", [b"lane.high"]]]


def test_without_pushes_nothing_is_waited_for(tracking: Connection) -> None:
    assert tracking.drain_pushes() == []
    assert tracking.call("PING") == b"PONG"


# -- the end ----------------------------------------------------------------------------------------------------------


def test_a_reply_that_does_not_come_in_time_is_unavailable(connection: Connection) -> None:
    sent = connection.send([("BLPOP", "nothing", 0)])
    with pytest.raises(BrokerUnavailable, match="did not answer"):
        connection.receive(sent, timeout_s=0.02)


def test_every_way_to_a_broker_that_was_killed_is_unavailable() -> None:
    with EmbeddedBroker(Settings()) as broker:
        waiting, idle, draining = (Connection(broker.url, name) for name in ("waiting", "idle", "draining"))
        sent = waiting.send([("BLPOP", "nothing", 0)])
    with pytest.raises(BrokerUnavailable):
        waiting.receive(sent)
    with pytest.raises(BrokerUnavailable):
        idle.call("PING")
    with pytest.raises(BrokerUnavailable):
        draining.drain_pushes()
    with pytest.raises(BrokerUnavailable):
        Connection(broker.url, "late")
    for connection in (waiting, idle, draining):
        connection.close()


class Encrypted:
    """A socket that says as one of TLS does that nothing has come."""

    def __init__(self, plain: socket.socket) -> None:
        self._plain = plain

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def recv(self, size: int) -> bytes:
        try:
            return self._plain.recv(size)
        except BlockingIOError:
            raise ssl.SSLWantReadError from None


def test_over_tls_a_connection_on_which_nothing_has_come_is_not_broken(connection: Connection) -> None:
    connection._socket = Encrypted(connection._socket)  # type: ignore[assignment]
    assert connection.drain_pushes() == []
    assert connection.call("PING") == b"PONG"
