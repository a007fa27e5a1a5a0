"""`lepton quarantine` over a real broker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from lepton_ai import AsyncClient, Client, cli, topology
from lepton_ai.errors import OptionNotSupported
from lepton_ai.quarantine import Quarantined, field
from queues.connection import Connection

Run = Callable[..., Any]
ENTRY = Quarantined("test.a", "gpu.h100", "it differs by 0.5", 0.5, 1e-5, "worker-1", "job-1", {"x": [3]}, 1.8e9)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one `lepton quarantine` in this process: its exit code, output and remarks."""
    monkeypatch.setenv("LEPTON_REDIS_URL", broker_url)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main(["quarantine", *arguments])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def entry(connection: Connection) -> Quarantined:
    name = field(ENTRY.kernel, ENTRY.device)
    connection.call("HSET", topology.QUARANTINE, name, msgspec.msgpack.encode(ENTRY))
    return ENTRY


def test_none_is_no_failure(run: Run) -> None:
    assert run() == (0, "", "lepton: no kernel is quarantined\n")
    assert json.loads(run("--json")[1]) == []


def test_a_list_has_a_row_each(run: Run, entry: Quarantined) -> None:
    code, out, _ = run()
    assert code == 0
    assert all(text in out for text in ("test.a", "gpu.h100", "0.5", "it differs by 0.5"))
    (found,) = json.loads(run("--json")[1])
    assert (found["kernel"], found["shapes"]) == ("test.a", {"x": [3]})


def test_clear_lifts_that_one_alone(run: Run, entry: Quarantined, connection: Connection) -> None:
    other = msgspec.structs.replace(entry, device="cpu")
    connection.call("HSET", topology.QUARANTINE, field("test.a", "cpu"), msgspec.msgpack.encode(other))
    code, out, told = run("--clear", "test.a", "gpu.h100")
    assert (code, out) == (0, "")
    assert "gpu.h100 runs test.a again" in told
    assert connection.call("HKEYS", topology.QUARANTINE) == [b"test.a cpu"]


def test_to_clear_what_is_not_quarantined_fails_and_names_what_is(run: Run, entry: Quarantined) -> None:
    code, _, told = run("--clear", "test.b", "gpu.h100")
    assert code == 1
    assert "test.b is not quarantined on gpu.h100; known: test.a gpu.h100" in told


def test_what_another_hand_has_put_there_is_left_out(run: Run, entry: Quarantined, connection: Connection) -> None:
    connection.call("HSET", topology.QUARANTINE, "nonsense", "nonsense")
    assert len(json.loads(run("--json")[1])) == 1


def test_on_an_event_loop_it_is_the_same(broker_url: str, entry: Quarantined) -> None:
    async def ask() -> tuple[list[Quarantined], bool, bool, list[Quarantined]]:
        async with AsyncClient(broker_url) as client:
            before, other = await client.quarantined(), await client.lift("test.b", "gpu.h100")
            return before, other, await client.lift(entry.kernel, entry.device), await client.quarantined()

    assert asyncio.run(ask()) == ([entry], False, True, [])


def test_an_ingest_is_told_so_on_an_event_loop_too() -> None:
    async def ask(verb: Callable[[AsyncClient], Awaitable[object]]) -> None:
        async with AsyncClient("http://127.0.0.1:1") as client:
            await verb(client)

    with pytest.raises(OptionNotSupported, match="broker"):
        asyncio.run(ask(lambda client: client.quarantined()))
    with pytest.raises(OptionNotSupported, match="broker"):
        asyncio.run(ask(lambda client: client.lift("test.a", "cpu")))


def test_an_ingest_is_told_that_it_is_the_brokers_to_say() -> None:
    with Client("http://127.0.0.1:1") as client:
        with pytest.raises(OptionNotSupported, match="broker"):
            client.quarantined()
        with pytest.raises(OptionNotSupported, match="broker"):
            client.lift("test.a", "cpu")


@pytest.mark.parametrize(
    ("device", "name", "holds"),
    [("gpu", "gpu.h100", True), ("gpu.h100", "gpu.h100", True), ("gpu.h100", "gpu", False), ("cpu", "gpu", False)],
)
def test_a_quarantine_is_of_a_device_or_of_a_kind(device: str, name: str, holds: bool) -> None:
    assert Quarantined("test.a", device, "").holds_for(name) is holds
