"""What a scenario is, how large it is played, and the row that comes of it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lepton_ai.errors import LeptonError
from tests.faults.auditor import Audit
from tests.faults.play import Play, Unfinished

__all__ = ["Row", "Scenario", "Size", "Skipped", "perform"]

_EXAMPLES = 5


class Size(msgspec.Struct, frozen=True):
    """How large a scenario is played."""

    jobs: int = 0
    rounds: int = 0
    """Kills, cuts or points, whatever the scenario counts."""
    seconds: float = 0.0
    """How long a state lasts that is held for a time: a freeze, a blackout."""
    settings: dict[str, object] = {}
    """Lepton's, where they are not the defaults."""


class Scenario(msgspec.Struct, frozen=True):
    """One row of the table. `play` returns once everything that was acknowledged should have ended."""

    name: str
    play: Callable[[Play, Size], None]
    full: Size
    quick: Size
    tested: Size | None = None
    """The size in which `./lepton test` plays it; None where it does not."""


class Row(msgspec.Struct, omit_defaults=False):
    """What came of one play, as the bench prints it."""

    name: str
    seed: int
    verdict: str = "ok"
    """ok, failed (see `reasons`) or skipped (this machine cannot play it)."""
    reasons: list[str] = []
    submitted: int = 0
    acknowledged: int = 0
    refused: int = 0
    unknown: int = 0
    lost: int = 0
    endless: int = 0
    """Never ended, but their messages are still there: of plain Celery, which runs them again for ever."""
    duplicate_effects: int = 0
    phantom: int = 0
    re_executions: int = 0
    recovery_p50_s: float | None = None
    """From a death until what the dead one held could be claimed again: its lease and the sweep are in it."""
    recovery_max_s: float | None = None
    recoveries: int = 0
    conservation: int | None = None
    seconds: float = 0.0
    notes: dict[str, Any] = {}


class Skipped(Exception):
    """This machine cannot play it, and why."""


def perform(scenario: Scenario, size: Size, seed: int, tell: Callable[[str], None], keep: Path | None = None) -> Row:
    """Plays a scenario from an empty folder to the audit. Nothing of it runs any more when this returns.

    `keep` is a folder for the logs of plays that failed.
    """
    row = Row(scenario.name, seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lepton-faults-") as folder:
        with Play(Path(folder), seed, tell) as play:
            _play(scenario, size, play, row)
        row.seconds = round(time.monotonic() - began, 1)
        if keep is not None and row.verdict == "failed":
            shutil.copytree(folder, keep / f"{scenario.name}-{seed}", dirs_exist_ok=True)
    return row


def _play(scenario: Scenario, size: Size, play: Play, row: Row) -> None:
    try:
        scenario.play(play, size)
    except Skipped as error:
        row.verdict, row.reasons = "skipped", [str(error)]
        return
    except Unfinished as error:
        play.complaints.append(str(error))
    except LeptonError as error:
        play.complaints.append("".join(traceback.format_exception_only(error)).strip())
    try:
        with contextlib.closing(play.connect()) as connection:
            audit = play.auditor.audit(connection, play.told)
            _fill(row, play, audit)
            _judge(play, audit, play.auditor.unsuccessful(connection))
    except LeptonError as error:
        play.complaints.append(f"nothing can be audited: {error}")
    row.reasons = play.complaints
    row.verdict = "failed" if play.complaints else "ok"


def _fill(row: Row, play: Play, audit: Audit) -> None:
    auditor, spans_s = play.auditor, play.recovery.spans_s
    row.submitted, row.acknowledged = auditor.submitted, len(auditor.acknowledged)
    row.refused, row.unknown = len(auditor.refused), len(auditor.unknown)
    lost = [job for job in audit.lost if job not in play.endless]
    row.endless = len(audit.lost) - len(lost)
    row.lost, row.duplicate_effects = len(lost), audit.duplicate_effects
    row.phantom, row.re_executions = len(audit.phantom), audit.re_executions
    row.conservation = audit.conservation
    row.recoveries = len(spans_s)
    if spans_s:
        row.recovery_p50_s, row.recovery_max_s = round(float(np.median(spans_s)), 2), round(max(spans_s), 2)
    row.notes |= {**play.notes, "runs": audit.runs, "counters": audit.counters, "left": audit.left}
    play.expect(not lost, f"lost: {lost[:_EXAMPLES]}")
    play.expect(not row.endless, f"{row.endless} jobs never end")
    play.expect(not audit.repeated_events, f"more than one final event: {audit.repeated_events[:_EXAMPLES]}")
    play.expect(not audit.repeated_replies, f"answered twice: {audit.repeated_replies[:_EXAMPLES]}")
    play.expect(not audit.phantom, f"refused, and ran all the same: {audit.phantom[:_EXAMPLES]}")
    play.expect(not audit.conservation, f"accepted and what became of it differ by {audit.conservation}")
    if not audit.left:
        play.expect(not audit.bundled, f"counted in bundles, although nothing is left: {audit.bundled}")


def _judge(play: Play, audit: Audit, unsuccessful: dict[str, str]) -> None:
    """Every job is to succeed, but for those that are doomed, and they are not to."""
    failed = [told for job, told in unsuccessful.items() if job not in play.doomed]
    play.expect(not failed, f"{len(failed)} jobs did not succeed: {failed[:1]}")
    spared = play.doomed - unsuccessful.keys() - set(audit.lost)
    play.expect(not spared, f"{len(spared)} jobs succeeded that should not have")
