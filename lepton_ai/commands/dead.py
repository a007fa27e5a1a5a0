"""The commands about dead letters: list, show, replay, purge. Each is a function; its docstring is its help."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
from cyclopts import Parameter, validators

from lepton_ai.commands import shown
from lepton_ai.commands.address import connected
from lepton_ai.commands.arguments import Misuse
from lepton_ai.commands.jobs import Json, Url
from lepton_ai.dead import Settled
from lepton_ai.errors import UnknownJob

__all__ = ["listed", "purge", "replay", "show"]

Ids = Annotated[str, Parameter(help="Entries, or ids of their jobs.")]
All = Annotated[bool, Parameter(name="--all", help="All that there are.", negative="", show_default=False)]
Yes = Annotated[bool, Parameter(name=("--yes", "-y"), help="Do not ask.", negative="", show_default=False)]


def listed(
    *,
    limit: Annotated[int, Parameter(help="The newest so many.", validator=validators.Number(gte=1))] = 100,
    url: Url = None,
    json: Json = False,
) -> int:
    """List the jobs that were given up, newest first.

    poison: a job killed its workers, alone, as often as it may; retries: its
    retries are used up; unreadable: the message is no job, or it should have
    followed one and the key of its queue holds something else.

    For example:

      lepton dead list --limit 20
    """
    with connected(url) as client:
        found = client.dead(limit=limit)
    if json:
        shown.as_json(found)
    elif found:
        shown.console().print(shown.dead(found))
    if not found:
        shown.tell("there are no dead letters")
    return 0


def show(
    id: Annotated[str, Parameter(help="An entry, or the id of its job.")],
    /,
    *,
    url: Url = None,
    json: Json = False,
) -> int:
    """Show one dead letter: kernel, arguments, reason, attempts, traceback.

    For example:

      lepton dead show 1790000000000-0
    """
    with connected(url) as client:
        found = client.dead(job=id, limit=1)
    if not found:
        raise UnknownJob(f"no dead letter is {id!r}: see `lepton dead list`", "id")
    if json:
        shown.as_json(found[0])
    else:
        shown.console().print(shown.dead_letter(found[0]))
        if found[0].trace:
            sys.stdout.write(f"{found[0].trace.rstrip()}\n")
    return 0


def replay(
    *id: Ids,
    all: All = False,  # noqa: A002 - the option's name
    yes: Yes = False,
    url: Url = None,
    json: Json = False,
) -> int:
    """Run dead letters once more.

    Their attempts and retries begin anew, their old error is forgotten, and
    a deadline or delay that they had holds no more. What was to follow one in
    a chain or a chord has failed already, and is not run. However many ask
    for it at once, each is replayed once.

    Left are those that nobody can read, and those whose job, or another one
    of the same key, has ended otherwise since or has not ended yet: there
    would be two effects. A follow-up that had no queue is sent to it.

    Exits with 1 where one that was named could not be replayed.

    For example:

      lepton dead replay 01a208c9-72e5-74d8-bb78-baba0091b291
      lepton dead replay --all --yes
    """
    _check(id, all)
    with connected(url) as client:
        if all and not _agreed("replay", len(client.dead(limit=1_000)), yes):
            return 1
        settled = client.replay(id, all=all)
    return _tell("replayed", settled, json)


def purge(
    *id: Ids,
    all: All = False,  # noqa: A002
    yes: Yes = False,
    url: Url = None,
    json: Json = False,
) -> int:
    """Throw dead letters away. Their jobs keep the error that they ended with.

    Exits with 1 where one that was named is none (any more).

    For example:

      lepton dead purge 1790000000000-0 1790000000001-0
    """
    _check(id, all)
    with connected(url) as client:
        if all and not _agreed("purge", len(client.dead(limit=1_000)), yes):
            return 1
        settled = client.purge(id, all=all)
    return _tell("purged", settled, json)


# -- behind them ------------------------------------------------------------------------------------------------------


def _check(ids: tuple[str, ...], every: bool) -> None:
    if bool(ids) == every:
        raise Misuse("name dead letters by their entry or job id (see `lepton dead list`), or say --all")


def _agreed(what: str, count: int, yes: bool) -> bool:
    """Whether somebody who was asked has said yes."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise Misuse(f"--all would {what} every dead letter: say --yes where nobody can be asked")
    sys.stderr.write(f"lepton: {what} all dead letters ({count if count < 1_000 else 'a thousand or more'})? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    shown.tell("nothing was done")
    return False


def _tell(done: str, settled: Settled, json: bool) -> int:
    if json:
        shown.as_json({done: settled.count, "left": msgspec.to_builtins(settled.left)})
    else:
        sys.stdout.write(f"{done} {settled.count}\n")
        for each, reason in settled.left.items():
            shown.tell(f"{each} was not {done}: {reason}")
    return 1 if settled.left else 0
