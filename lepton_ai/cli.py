"""The console script `lepton`: hands over to the commands, or names what must be installed to have them."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Runs one command, which ends the process where it fails; 2 where the command line itself is not installed."""
    try:
        return _main()
    except KeyboardInterrupt:
        return 130


def _main() -> int:
    try:
        from lepton_ai.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("cyclopts", "rich"):
            raise
        print(f"lepton: the command line needs {error.name}: pip install 'lepton-ai[cli]'", file=sys.stderr)
        return 2
    app()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
