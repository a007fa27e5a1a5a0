"""The console script `lepton`: hands over to the commands, or names what must be installed to have them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lepton_ai.errors import LeptonError

__all__ = ["main"]

#: The codes of what the command line or the environment itself has wrong: nothing was sent anywhere.
_WRONG_USAGE = ("misuse", "invalid_settings")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 is what was asked for, 1 a failure that is told in one line, 2 a command line or a setting that is wrong (or the
    command line is not installed), 130 Ctrl-C. Wrong usage that the parser finds itself, and some commands, end
    the process.
    """
    try:
        code = _told(_joined(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough. What is still buffered must not fail again at the very end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UnicodeError as error:
        print(f"lepton: an argument is no text (UTF-8): {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"lepton: {error}", file=sys.stderr)
        return 1
    return code


def _told(arguments: Sequence[str]) -> int:
    """Runs one command; tells an error of ours to people, and under --json to programs too."""
    try:
        return _main(arguments)
    except LeptonError as error:
        print(f"lepton: {error}", file=sys.stderr)
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments
        if "--json" in options:
            print(json.dumps({"error": error.to_wire()}))
        return 2 if error.code in _WRONG_USAGE else 1


def _main(arguments: Sequence[str]) -> int:
    try:
        with _quiet_interrupts():
            from lepton_ai.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("cyclopts", "rich"):
            raise
        from lepton_ai import services

        here = services.root()
        bundled = here.name == "_services"
        what = "./lepton_ai-VERSION-py3-none-any.whl[cli]" if bundled else f"{here}[cli]"
        install = shlex.join([sys.executable, "-m", "pip", "install", *([] if bundled else ["-e"]), what])
        print(f"lepton: the command line needs {error.name}: {install}", file=sys.stderr)
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
