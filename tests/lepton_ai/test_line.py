"""The short way to the broker: what it answers, and what it does where a connection breaks."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import redis

from lepton_ai.direct_protocol import CONNECTION
from lepton_ai.line import Line
from queues.connection import Connection


@pytest.fixture
def client(broker_url: str) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(broker_url, **CONNECTION)
    yield client
    client.close()


def test_it_answers_what_the_broker_does_over_one_connection(client: redis.Redis) -> None:
    line = Line(client)
    assert [line.ask("RPUSH", "list", b"one", "two"), line.ask("LRANGE", "list", 0, -1)] == [2, [b"one", b"two"]]
    assert line.ask("CLIENT", "ID") == line.ask("CLIENT", "ID")


def test_a_refusal_is_raised_and_the_connection_is_used_again(client: redis.Redis) -> None:
    line = Line(client)
    before = line.ask("CLIENT", "ID")
    line.ask("SET", "text", "x")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        line.ask("LPUSH", "text", "y")
    assert line.ask("CLIENT", "ID") == before


def test_a_transaction_answers_each_of_its_commands(client: redis.Redis) -> None:
    line = Line(client)
    assert line.transact([("RPUSH", "list", b"one"), ("LRANGE", "list", 0, -1), ("GET", "none")]) == [1, [b"one"], None]


def test_a_transaction_that_is_refused_is_raised_and_the_connection_is_used_again(client: redis.Redis) -> None:
    line = Line(client)
    before = line.ask("CLIENT", "ID")
    with pytest.raises(redis.ResponseError, match="unknown command"):
        line.transact([("SET", "text", "x"), ("NOSUCH", "command")])
    assert line.ask("EXISTS", "text") == 0
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        line.transact([("SET", "text", "x"), ("LPUSH", "text", "y"), ("GET", "text")])
    assert [line.ask("GET", "text"), line.ask("CLIENT", "ID")] == [b"x", before]


def test_a_connection_that_broke_is_made_again(client: redis.Redis, connection: Connection) -> None:
    line = Line(client)
    for _ in range(3):
        before = line.ask("CLIENT", "ID")
        connection.call("CLIENT", "KILL", "ID", before)
        assert line.ask("CLIENT", "ID") > before
        connection.call("CLIENT", "KILL", "ID", line.ask("CLIENT", "ID"))
        assert line.transact([("SET", "text", "x"), ("GET", "text")]) == [True, b"x"]


def test_a_broker_that_is_away_is_said_to_be(client: redis.Redis) -> None:
    lost = redis.Redis(unix_socket_path="/nowhere/broker.sock")
    with pytest.raises(redis.ConnectionError):
        Line(lost).ask("PING")


def test_a_child_leaves_its_parents_connection_alone(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(client)
    before = line.ask("CLIENT", "ID")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert line.ask("CLIENT", "ID") != before


def test_its_connections_are_closed_with_all_others(client: redis.Redis, connection: Connection) -> None:
    own = Line(client).ask("CLIENT", "ID")
    client.close()
    assert b"id=%d " % own not in connection.call("CLIENT", "LIST")
