"""A Schedule to look at: a Gantt chart, and a table for notebooks that needs no package."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from lepton_ai.errors import MissingPackage
from lepton_ai.placement.schedule import Schedule

if TYPE_CHECKING:
    import altair as alt

__all__ = ["chart", "table"]

_HEAD = "<tr><th>task</th><th>resource</th><th>status</th><th>starts</th><th>ends</th><th></th><th>why</th></tr>"


def chart(schedule: Schedule) -> alt.Chart:
    """A bar for each task, a row for each slot of a resource. MissingPackage names the extra that it needs."""
    try:
        import altair as alt
    except ModuleNotFoundError as error:
        raise MissingPackage(f"a plot needs the package {error.name}: pip install 'lepton-ai[plot]'", "plot") from None
    slots = schedule.slots()
    rows = {
        resource: [_lane(resource, slot, count) for slot in range(1, count + 1)] for resource, count in slots.items()
    }
    values = [
        {
            "lane": rows[bar.resource][bar.slot - 1],
            "task": bar.task,
            "start": bar.start_s,
            "end": bar.end_s,
            "priority": bar.priority,
        }
        for bar in schedule.bars()
    ]
    lanes = [lane for each in rows.values() for lane in each]
    found: alt.Chart = (
        alt.Chart(alt.InlineData(values))
        .mark_bar()
        .encode(
            x=alt.X("start:Q", title="seconds"),
            x2="end:Q",
            y=alt.Y("lane:N", title=None, sort=None, scale=alt.Scale(domain=lanes)),
            color=alt.Color("priority:O", title="priority"),
            tooltip=["task:N", "lane:N", "priority:Q", "start:Q", "end:Q"],
        )
    )
    return found


def _lane(resource: str, slot: int, slots: int) -> str:
    return resource if slots == 1 else f"{resource} #{slot}"


def table(schedule: Schedule) -> str:
    """HTML that stands by itself, with nothing of a task's or resource's name taken for markup."""
    bars = {bar.task: bar for bar in schedule.bars()}
    makespan_s = schedule.makespan_s
    whole_s = makespan_s or 1.0  # tasks may be too short for any number
    rows = []
    for task in schedule.tasks():
        why = escape(schedule.explain(task).reason)
        if (bar := bars.get(task)) is None:
            cells = "<td></td><td>waiting</td><td></td><td></td><td></td>"
        else:
            cells = (
                f"<td>{escape(bar.resource)}</td><td>processing</td><td>{bar.start_s:.3g} s</td>"
                f"<td>{bar.end_s:.3g} s</td><td>{_drawn(bar.start_s / whole_s, bar.end_s / whole_s)}</td>"
            )
        rows.append(f"<tr><td>{escape(task)}</td>{cells}<td>{why}</td></tr>")
    caption = f"policy {escape(schedule.policy)}, makespan {makespan_s:.3g} s, at least {schedule.lower_bound_s:.3g} s"
    return f"<table><caption>{caption}</caption><thead>{_HEAD}</thead><tbody>{''.join(rows)}</tbody></table>"


def _drawn(start: float, end: float) -> str:
    bar = f"margin-left:{start:.1%};width:{end - start:.1%};height:1em;background:#4c78a8"
    return f'<div style="width:12em"><div style="{bar}"></div></div>'
