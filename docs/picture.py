"""Draws `docs/demo.svg`, the picture in the README: what `lepton demo` really prints. `python docs/picture.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

WIDTH = 112


def main() -> None:
    # Colours without a terminal, and of a progress bar only how it ended.
    environ = os.environ | {"FORCE_COLOR": "1", "TTY_INTERACTIVE": "0", "COLUMNS": str(WIDTH)}
    command = [sys.executable, "-m", "lepton_ai.cli", "demo"]
    printed = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    console = Console(record=True, width=WIDTH, force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(Text("$ ./lepton demo", style="bold"))
    console.print(Text.from_ansi(printed), soft_wrap=True)
    drawn = console.export_svg(title="lepton demo", theme=MONOKAI)
    # The fonts of a README come from its reader's machine, not from somebody's server.
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    assert "http" not in drawn.replace("http://www.w3.org", "").replace("https://www.textualize.io", "")
    (Path(__file__).parent / "demo.svg").write_text(drawn)
    print(printed)


if __name__ == "__main__":
    main()
