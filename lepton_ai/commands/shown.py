"""How the command line shows things: tables for people, JSON for programs. Nothing here asks or decides anything."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from lepton_ai.dead import DeadLetter
from lepton_ai.device import Announcement, ResourceState
from lepton_ai.event import CloudEvent
from lepton_ai.job import Record
from lepton_ai.kernel import KernelSpec
from lepton_ai.quarantine import Quarantined

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lepton_ai.commands.doctor import Finding
    from lepton_ai.commands.facts import Examined

__all__ = [
    "as_json",
    "cancelled",
    "console",
    "dead",
    "dead_letter",
    "devices",
    "event_line",
    "findings",
    "jobs",
    "kernel",
    "kernels",
    "outputs",
    "tell",
    "why",
]

#: An output of at most so many values is printed whole.
_PRINTED = 64
#: And a reason in a list is cut behind so many characters.
_TOLD = 200
#: No table is cut where a program or a file reads it.
_UNLIMITED = 400
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "absent": "dim"}
_PREDICTED = "predicted when the job was placed, but for the line `really`"
_SPREAD = "spread: the standard deviation of log(real / predicted run time); 0 before anything was measured"


def console(*, stderr: bool = False) -> Console:
    """Where people read. Text is shown as it is: `float32[m,k]` is no markup."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _UNLIMITED
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def as_json(value: Any) -> None:
    """One line of JSON on standard output. NaN and infinity are null there."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def tell(message: str) -> None:
    """A line for people that is no result."""
    sys.stderr.write(f"lepton: {message}\n")


def _table(*columns: str, numbers: slice = slice(0)) -> Table:
    from rich.table import Table

    table = Table(*columns)
    for column in table.columns:
        column.overflow = "fold"
    for column in table.columns[numbers]:
        column.justify = "right"
    return table


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:.2f}" if ms >= 0.01 or ms == 0 else f"{ms:.1g}"


# -- jobs -------------------------------------------------------------------------------------------------------------


def jobs(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What `status` found, a row a job."""
    table = _table("job", "state", "kernel", "device", "told")
    for row in rows:
        told = (row.get("error") or {}).get("message") or row.get("reason")
        table.add_row(row["id"], row["state"], row.get("kernel"), row.get("device"), told)
    return table


def cancelled(row: Mapping[str, Any]) -> str:
    """What came of asking a job to end."""
    if row["ended"]:
        return "had ended already"
    if not row["known"]:
        return f"nothing is known of it (yet); {'asked all the same' if row['asked'] else 'not asked'}"
    return "is asked to end"


def why(record: Record) -> list[Table | Text | str]:
    """Each device that was looked at, what it was predicted to cost, and what the job really cost."""
    from rich.text import Text

    found: list[Table | Text | str] = []
    placement = record.placement
    if placement is not None:
        head = f"{placement.kernel} {placement.job} is {placement.state}"
        if placement.device is not None:
            head = f"{placement.kernel} {placement.job} was placed on {placement.device}"
        found.append(f"{head}: {placement.reason}")
        if placement.policy:
            found.append(f"policy {placement.policy}, by {placement.router} at {_when(placement.placed_at)}")
    candidates = placement.candidates if placement is not None else ()
    if candidates or record.cost is not None:
        table = _table("device", "wait ms", "transfer ms", "run ms", "finish ms", "spread", "told", numbers=slice(1, 6))
        for each in candidates:
            if each.estimate is None:
                table.add_row(each.device, *[""] * 5, each.excluded)
                continue
            e = each.estimate
            table.add_row(each.device, *map(_ms, (e.wait_s, e.transfer_s, e.run_s, e.finish_s)), f"{e.spread:.2f}")
        if record.cost is not None:
            c = record.cost
            times = (c.wait_s, c.transfer_s, c.run_s, c.wait_s + c.transfer_s + c.run_s)
            table.add_row("really", *map(_ms, times), "", f"batch {c.batch}", style="bold")
        found.append(table)
    if any(each.estimate is not None for each in candidates):
        found += [Text(f"({_PREDICTED})", "dim"), Text(f"({_SPREAD})", "dim")]
    if record.error is not None:
        found.append(f"ended with {record.error.get('code')}: {record.error.get('message')}")
    return found


def outputs(found: Mapping[str, Any]) -> list[str]:
    """Each output by name: a small one whole, a large one by what it is like."""
    lines = []
    for name, value in found.items():
        array = np.asarray(value)
        if array.ndim == 0:
            lines.append(f"{name} = {value}")
            continue
        described = f"{name}  {array.dtype.name}[{','.join(map(str, array.shape))}]"
        if array.size <= _PRINTED:
            lines += [described, np.array2string(array, threshold=_PRINTED, max_line_width=100)]
        else:
            lines.append(f"{described}  {_range(array)}")
    return lines


def _range(array: Any) -> str:
    if array.dtype.kind not in "iuf":
        return f"{np.count_nonzero(array)} of {array.size} true"
    finite = array[np.isfinite(array)]
    odd = f", {array.size - finite.size} not finite" if finite.size < array.size else ""
    if not finite.size:
        return "nothing finite"
    return f"min {finite.min():g}, max {finite.max():g}, mean {finite.mean(dtype=np.float64):g}{odd}"


# -- dead letters -----------------------------------------------------------------------------------------------------


def examined(found: Sequence[Examined]) -> Table:
    """A row a kernel and kind of device."""
    table = _table("kernel", "on", "", "seconds", "told", numbers=slice(3, 4))
    for each in found:
        table.add_row(each.kernel, each.kind, each.status, f"{each.seconds:.2f}" if each.seconds else "", each.reason)
    return table


def quarantined(found: Sequence[Quarantined]) -> Table:
    """A row a kernel and device."""
    table = _table("kernel", "device", "since", "differs by", "tolerance", "job", "told", numbers=slice(3, 5))
    for each in found:
        apart = f"{each.difference:.3g}" if each.difference else ""
        since = _when(each.at) if each.at else ""
        table.add_row(each.kernel, each.device, since, apart, f"{each.tolerance:g}", each.job, each.reason)
    return table


def dead(found: Sequence[DeadLetter]) -> Table:
    """A row a dead letter."""
    table = _table("entry", "died", "job", "kernel", "why", "attempts", "told", numbers=slice(5, 6))
    for each in found:
        told = each.reason if len(each.reason) <= _TOLD else f"{each.reason[:_TOLD]}…"
        table.add_row(each.entry, _when(each.died_at), each.job, each.kernel, each.code, str(each.attempts), told)
    return table


def dead_letter(each: DeadLetter) -> Table:
    """Everything that is known of one; its traceback is printed below."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    arguments = each.arguments or {}
    rows = [
        ("entry", each.entry),
        ("job", each.job or "unknown"),
        ("kernel", each.kernel or "unknown"),
        *(("argument", f"{name}: {_argument(shape)}") for name, shape in arguments.items()),
        ("message", f"{each.size_bytes:,} bytes" + ("" if each.arguments is not None else ", which nobody can read")),
        ("died", _when(each.died_at)),
        ("why", f"{each.code}: {each.reason}"),
        ("attempts", str(each.attempts)),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _argument(shape: Any) -> str:
    return f"an array of {' x '.join(map(str, shape)) or 'no size'}" if isinstance(shape, list) else f"{shape}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


# -- the fleet --------------------------------------------------------------------------------------------------------


def devices(found: Sequence[Announcement]) -> Table:
    """A row a worker that is alive. A transfer without limit is none: the device works in the host's memory."""
    table = _table(
        "device",
        "worker",
        "busy",
        "kernels",
        "GFLOP/s",
        "GB/s",
        "transfer GB/s",
        "launch us",
        "speed",
        "share",
        "since",
        "told",
        numbers=slice(2, 10),
    )
    for each in found:
        peaks, state = each.peaks, each.state
        rates = (peaks.flops_per_s, peaks.bytes_per_s, peaks.transfer_bytes_per_s)
        table.add_row(
            f"{each.device} (emulated)" if each.emulated else each.device,
            each.worker,
            f"{'?' if state is None else state.busy_slots}/{each.slots}",
            str(len(each.kernels)),
            *(f"{rate / 1e9:,.1f}" if math.isfinite(rate) else "–" for rate in rates),
            f"{peaks.launch_s * 1e6:.1f}",
            *(["?", "?"] if state is None else [f"{state.speed:.0%}", f"{state.share:.0%}"]),
            time.strftime("%m-%d %H:%M:%S", time.localtime(each.started_at)),
            _state(state),
        )
    return table


def _state(state: ResourceState | None) -> str:
    """How a worker, its host and its device are; and first why it may be given less than usual."""
    if state is None:
        return "its state is not known yet"
    told = [state.reason] if state.reason else []
    told.append(f"cpu {state.host_cpu:.0%} ({state.foreign_cpu:.0%} others')")
    told.append(f"memory {_gib(state.memory_used_bytes)} of {_gib(state.memory_total_bytes)} GiB")
    speed = state.network_speed_bytes_per_s
    told.append(f"network {state.network_bytes_per_s / 1e6:,.1f} MB/s" + (f" of {speed / 1e6:,.0f}" if speed else ""))
    if (device := state.device) is not None:
        if device.utilization is not None:
            told.append(f"device {device.utilization:.0%}")
        if device.memory_used_bytes is not None and device.memory_total_bytes is not None:
            told.append(f"its memory {_gib(device.memory_used_bytes)} of {_gib(device.memory_total_bytes)} GiB")
        if device.temperature_c is not None:
            told.append(f"{device.temperature_c:.0f} °C")
        if device.power_w is not None:
            told.append(f"{device.power_w:.0f} W")
    return ", ".join(told)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f}"


def kernels(found: Iterable[tuple[KernelSpec, Sequence[str]]]) -> Table:
    """A row a kernel that is announced, with the devices that run it."""
    table = _table("kernel", "inputs", "outputs", "devices", "what it does")
    for spec, runs_on in found:
        table.add_row(spec.name, _named(spec.inputs), _named(spec.outputs), ", ".join(runs_on), spec.summary)
    return table


def kernel(spec: KernelSpec, runs_on: Sequence[str]) -> Table:
    """Everything that is known of one kernel."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    rows: list[tuple[str, str]] = [("", spec.summary)] if spec.summary else []
    rows += [("input", f"{name}: {text}") for name, text in spec.inputs.items()]
    rows += [("limit", f"{name}: {text}") for name, text in spec.limits.items()]
    rows += [("output", f"{name}: {text}") for name, text in spec.outputs.items()]
    rows += [
        ("flops", spec.flops),
        ("bytes", spec.bytes),
        ("batch", spec.batch or "one after another"),
        ("tolerance", f"{spec.tolerance:g}"),
        ("devices", ", ".join(runs_on)),
    ]
    table.add_row("kernel", spec.name)
    for row in rows:
        table.add_row(*row)
    return table


def _named(texts: Mapping[str, str]) -> str:
    return "\n".join(f"{name}: {text}" for name, text in texts.items())


def event_line(event: CloudEvent) -> str:
    """One event on one line: when, what, of whom, and what is said of it."""
    data = dict(event.data)
    named = [str(data.pop(name)) for name in ("kernel", "device") if name in data]
    who = [name for name in named if name != event.subject]
    told = [f"{name}={_short(value)}" for name, value in data.items()]
    when = event.time.replace("T", " ").rstrip("Z")
    return "  ".join([when, f"{short_type(event):<17}", event.subject, *who, *told])


def short_type(event: CloudEvent) -> str:
    """`io.lepton.job.placed.v1` -> `job.placed`."""
    return event.type.removeprefix("io.lepton.").removesuffix(".v1")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_short(each)}" for name, each in value.items()) + "}"
    return msgspec.json.encode(value).decode()


def findings(found: Sequence[Finding]) -> Table:
    """What the doctor found, a row each, the fix below what it mends."""
    from rich.text import Text

    table = _table("", "looked at", "found")
    for each in found:
        text = f"{each.text}\n→ {each.fix}" if each.fix and each.status != "ok" else each.text
        table.add_row(Text(each.status, _STYLES[each.status]), each.check, text)
    return table
