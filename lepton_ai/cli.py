"""The console script `lepton`: hands over to the commands, or names what must be installed to have them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lepton_ai.errors import LeptonError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 is what was asked for, 1 a failure that is told in one line, 2 a command line that is wrong (or not installed),
    130 Ctrl-C. Wrong usage that the parser finds itself, and some commands, end the process.
    """
    try:
        code = _main(_joined(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough. What is still buffered must not fail again at the very end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except LeptonError as error:
        print(f"lepton: {error}", file=sys.stderr)
        return 2 if error.code == "misuse" else 1
    except UnicodeError as error:
        print(f"lepton: an argument is no text (UTF-8): {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"lepton: {error}", file=sys.stderr)
        return 1
    return code


def _main(arguments: Sequence[str]) -> int:
    try:
        with _quiet_interrupts():
            from lepton_ai.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("cyclopts", "rich"):
            raise
        print(f"lepton: the command line needs {error.name}: pip install 'lepton-ai[cli]'", file=sys.stderr)
        return 2
    return app(arguments) or 0


@contextmanager
def _quiet_interrupts() -> Iterator[None]:
    """Ctrl-C just ends the process meanwhile: an exception while a module loads may be swallowed, or told at length."""
    usual = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--wait 5` and `--wait` as the parser wants them: with `=`, so that a plain one never takes the next argument."""
    found: list[str] = []
    for each in arguments:
        if found and found[-1] == "--wait" and "--" not in found:
            found[-1] += f"={each}" if _is_number(each) else "=true"
            if _is_number(each):
                continue
        found.append(each)
    if found and found[-1] == "--wait":
        found[-1] = "--wait=true"
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
