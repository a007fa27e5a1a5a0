"""`lepton dead` over a real broker."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest

from lepton_ai import cli, topology
from queues.connection import Connection
from tests.lepton_ai.letters import bury, unreadable, waiting

Run = Callable[..., Any]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], broker_url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one `lepton dead` in this process: its exit code, output and remarks."""
    monkeypatch.setenv("LEPTON_REDIS_URL", broker_url)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main(["dead", *arguments])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        return (code, *capsys.readouterr())

    return run


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Somebody at a terminal says so."""
    terminal = io.StringIO(text)
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)


def test_none_is_no_failure(run: Run) -> None:
    assert run("list") == (0, "", "lepton: there are no dead letters\n")
    assert json.loads(run("list", "--json")[1]) == []


def test_a_list_has_a_row_each(run: Run, connection: Connection) -> None:
    found = [bury(connection), bury(connection, reason="x" * 500)]
    code, out, _ = run("list")
    assert code == 0
    assert all(text in out for pair in found for text in pair)
    assert "x" * 201 not in out
    assert [each["entry"] for each in json.loads(run("list", "--json", "--limit", "1")[1])] == [found[1][0]]


def test_one_is_shown_with_everything_that_is_known(run: Run, connection: Connection) -> None:
    entry, job = bury(connection, trace="Traceback (most recent call last):\n  boom\n")
    for each in (entry, job):
        code, out, _ = run("show", each)
        assert code == 0
        for text in (entry, job, "a.b", "x: an array of 2 x 3", "k: 3", "poison: it killed 3 workers", "  boom"):
            assert text in out
    assert json.loads(run("show", job, "--json")[1])["trace"].endswith("boom\n")


def test_one_that_nobody_could_read_is_shown_too(run: Run, connection: Connection) -> None:
    code, out, _ = run("show", unreadable(connection))
    assert code == 0
    assert "which nobody can read" in out


def test_one_that_is_not_there_is_said(run: Run) -> None:
    code, _, told = run("show", "1-1")
    assert code == 1
    assert "lepton dead list" in told


def test_jobs_are_replayed_by_entry_or_id(run: Run, connection: Connection) -> None:
    (entry, first), (_, second) = bury(connection), bury(connection)
    assert run("replay", entry, second) == (0, "replayed 2\n", "")
    assert waiting(connection) == [first, second]


def test_what_could_not_be_replayed_is_said_and_no_success(run: Run, connection: Connection) -> None:
    odd, (_, job) = unreadable(connection), bury(connection)
    code, out, told = run("replay", odd, job)
    assert (code, out) == (1, "replayed 1\n")
    assert f"{odd} was not replayed: nobody can read its message" in told
    code, out, _ = run("purge", "1-1", "--json")
    assert (code, json.loads(out)["purged"], list(json.loads(out)["left"])) == (1, 0, ["1-1"])


@pytest.mark.parametrize("verb", ["replay", "purge"])
def test_all_wants_a_yes(run: Run, connection: Connection, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    bury(connection)
    for wrong in ((), ("1-1", "--all")):
        assert run(verb, *wrong)[0] == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    code, _, told = run(verb, "--all")
    assert (code, "--yes" in told) == (2, True)
    answer(monkeypatch, "\n")
    code, out, told = run(verb, "--all")
    assert (code, out) == (1, "")
    assert f"{verb} all dead letters (1)? [y/N]" in told
    assert connection.call("XLEN", topology.DEAD) == 1
    answer(monkeypatch, "y\n")
    assert run(verb, "--all")[0] == 0
    assert connection.call("XLEN", topology.DEAD) == 0
    assert run(verb, "--all", "--yes")[1].endswith(" 0\n")
