"""A job as a small card of HTML for notebooks: where it went, what was expected of each device, what it really cost."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from lepton_ai.job import Candidate, Cost, Record

__all__ = ["card"]

_COLOURS = {"succeeded": "#188038", "failed": "#c5221f", "cancelled": "#b06000", "parked": "#b06000"}
_CELL = "padding:1px 8px;text-align:right"
_FIRST = "padding:1px 8px;text-align:left"
_HEADS = ("wait", "transfer", "run", "finish")


def card(job_id: str, kernel: str | None, state: str, record: Record, note: str = "") -> str:
    """The card; everything in it is escaped, and it needs nothing from elsewhere. `note` is a last line."""
    placement = record.placement
    device = record.cost.device if record.cost is not None else placement.device if placement is not None else None
    name = kernel or (placement.kernel if placement is not None else "")
    colour = _COLOURS.get(state, "#5f6368")
    where = f" on <b>{escape(device)}</b>" if device else ""
    told = f"<b>{escape(name)}</b> <span style='color:{colour}'>{escape(state)}</span>{where}"
    lines = [f"<div>{told} <code style='opacity:.6'>{escape(job_id)}</code></div>"]
    if placement is not None:
        lines.append(f"<div style='opacity:.8'>{escape(placement.reason)}</div>")
        if placement.candidates:
            lines.append(_table(placement.candidates, device, record.cost))
    if record.error is not None:
        code, message = str(record.error.get("code", "")), str(record.error.get("message", ""))
        lines.append(f"<div style='color:{_COLOURS['failed']}'><b>{escape(code)}</b>: {escape(message)}</div>")
    if note:
        lines.append(f"<div style='opacity:.8'>{escape(note)}</div>")
    return (
        "<div style='display:inline-block;padding:6px 10px;border:1px solid #8886;border-radius:6px;"
        f"font-size:90%'>{''.join(lines)}</div>"
    )


def _table(candidates: Iterable[Candidate], chosen: str | None, cost: Cost | None) -> str:
    heads = "".join(f"<th style='{_CELL}'>{head} ms</th>" for head in _HEADS)
    rows = [f"<tr><th style='{_FIRST}'>device</th>{heads}</tr>"]
    for each in candidates:
        name = escape(each.device)
        first = f"<td style='{_FIRST}'>{f'<b>{name}</b>' if each.device == chosen else name}</td>"
        if each.estimate is not None:
            expected = each.estimate
            rows.append(_row(first, expected.wait_s, expected.transfer_s, expected.run_s))
        else:
            rows.append(
                f"<tr>{first}<td colspan='4' style='{_FIRST};opacity:.6'>{escape(each.excluded or '')}</td></tr>"
            )
    if cost is not None:
        rows.append(_row(f"<td style='{_FIRST}'><i>really</i></td>", cost.wait_s, cost.transfer_s, cost.run_s))
    return f"<table style='border-collapse:collapse;margin:2px 0'>{''.join(rows)}</table>"


def _row(first: str, *seconds: float) -> str:
    cells = "".join(f"<td style='{_CELL}'>{_milliseconds(each)}</td>" for each in (*seconds, sum(seconds)))
    return f"<tr>{first}{cells}</tr>"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:,.0f}" if seconds >= 0.1 else f"{seconds * 1000:.3g}"
