from __future__ import annotations

import asyncio
from typing import Any

import pytest
import redis.asyncio as redis

from lepton_ai.durability import ASK, Barrier, barrier, barrier_of
from lepton_ai.errors import BrokerUnavailable, InvalidSettings
from lepton_ai.settings import Settings
from queues.connection import Connection
from queues.embedded import EmbeddedBroker

FORBIDDEN = Exception("NOPERM User ingest has no permissions to run the 'config|get' command")
UNKNOWN = Exception("ERR unknown command 'WAITAOF', with args beginning with: '1' '0' '1' ")
NO_FILE = Exception("ERR WAITAOF cannot be used when numlocal is set but appendonly is disabled.")


def told(only: str, policy: str, waited: Any) -> list[Any]:
    return [{"appendonly": only}, {"appendfsync": policy}, waited]


def test_a_broker_that_writes_always_needs_nothing_more() -> None:
    assert barrier_of(told("yes", "always", UNKNOWN)).commands() == ()


@pytest.mark.parametrize("waited", [[1, 0], [0, 0]])
@pytest.mark.parametrize("config", [told("yes", "everysec", None)[:2], [FORBIDDEN, FORBIDDEN]])
def test_any_other_that_can_say_when_it_has_written_is_asked(config: list[Any], waited: list[int]) -> None:
    assert barrier_of([*config, waited], 2.5).commands() == (("WAITAOF", "1", "0", "2500"),)


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        (told("no", "always", NO_FILE), "no append-only file"),
        ([FORBIDDEN, FORBIDDEN, NO_FILE], "no append-only file"),
        (told("yes", "no", [0, 0]), "appendfsync no"),
        (told("yes", "everysec", UNKNOWN), "unknown command 'WAITAOF'"),
        ([FORBIDDEN, FORBIDDEN, UNKNOWN], "does not tell its configuration: NOPERM"),
    ],
)
def test_one_that_can_promise_nothing_is_refused_with_the_way_out(answers: list[Any], why: str) -> None:
    with pytest.raises(InvalidSettings, match="give the broker `appendonly yes` and `appendfsync always`") as refused:
        barrier_of(answers)
    assert why in refused.value.message
    assert refused.value.field == "durability"


@pytest.mark.parametrize("config", [[b"appendfsync", b"always"], {b"appendfsync": b"always"}])
def test_the_configuration_is_read_in_every_form_in_which_servers_and_clients_give_it(config: Any) -> None:
    only = [b"appendonly", b"yes"] if isinstance(config, list) else {b"appendonly": b"yes"}
    assert barrier_of([only, config, UNKNOWN]) == Barrier()


@pytest.mark.parametrize("answer", [[0, 0], FORBIDDEN])
def test_what_is_not_known_to_be_on_the_disk_is_not_acknowledged(answer: Any) -> None:
    with pytest.raises(BrokerUnavailable, match="disk"):
        Barrier(5.0).check([answer])


def test_what_is_on_the_disk_is_acknowledged() -> None:
    Barrier(5.0).check([[1, 0]])
    Barrier().check([])


@pytest.fixture(params=["everysec", "fsync"])
def own(request: pytest.FixtureRequest) -> Any:
    with EmbeddedBroker(Settings(durability=request.param)) as broker:
        yield broker


def test_a_real_broker_is_asked_and_waited_for(own: EmbeddedBroker) -> None:
    async def accept() -> tuple[Barrier, Barrier]:
        async with redis.Redis.from_url(own.url) as client:
            found = await barrier(client, "fsync")
            async with client.pipeline(transaction=False) as pipeline:
                commands = [("MULTI",), ("LPUSH", "lane", "job"), ("EXEC",), *found.commands()]
                for command in commands:
                    pipeline.execute_command(*command)
                answers = await pipeline.execute()
            found.check(answers[3:])
            return found, await barrier(client, "everysec")

    found, unasked = asyncio.run(accept())
    connection = Connection(own.url, "test")
    writes_always = connection.call("CONFIG", "GET", "appendfsync")[b"appendfsync"] == b"always"
    connection.close()
    assert bool(found.commands()) is not writes_always
    assert unasked == Barrier()


def test_a_real_broker_without_a_file_is_refused(own: EmbeddedBroker) -> None:
    connection = Connection(own.url, "test")
    connection.call("CONFIG", "SET", "appendonly", "no")
    with pytest.raises(InvalidSettings, match="no append-only file"):
        barrier_of(connection.receive(connection.send(ASK)))
    connection.close()
