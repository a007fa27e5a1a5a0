"""What the benches share in talking: options, the report in JSON or in tables, and how they end."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

__all__ = ["how_each_is_run", "parser", "play", "shown", "table"]

_WIDTH = 160


def parser(text: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that all have."""
    found = argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    found.add_argument("--quick", action="store_true", help="in small: to see that it runs, not for figures")
    found.add_argument("--rounds", type=int, default=rounds, metavar="N", help="repeats (default: %(default)s)")
    found.add_argument("--json", action="store_true", help="the report as JSON; else tables")
    return found


def play(
    measure: Callable[[], dict[str, Any]], tables: Callable[[dict[str, Any]], Iterable[Table]], *, plain: bool
) -> int:
    """Measures and reports; the exit code. Ctrl-C and SIGTERM end what was started."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        found = measure()
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    if plain:
        print(json.dumps(found))
        return 0
    # A pipe or a file has no width of its own, and figures that are cut are none.
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    for each in tables(found):
        console.print(each)
    return 0


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """The first column is a name, the others are figures."""
    found = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        found.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        found.add_row(*map(shown, row))
    return found


def how_each_is_run(settings: Mapping[str, str]) -> Table:
    """What each contender says of its settings."""
    found = Table(title="how each is run", box=SIMPLE, padding=(0, 1, 0, 0), show_header=False)
    for name, text in settings.items():
        found.add_row(name, text)
    return found


def shown(value: Any) -> str:
    """A figure for people: numbers with separators, ranges as `a to b`."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return " to ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
