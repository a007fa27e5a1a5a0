"""`python -m tasks`: what this machine has, as one line of JSON. For those who may not import `tasks`."""

from __future__ import annotations

import os

import msgspec

from tasks.driver import probe


def main() -> None:
    # Vendors' libraries print as they load; the answer has stdout for itself.
    stdout = os.dup(1)
    os.dup2(2, 1)
    os.write(stdout, msgspec.json.encode(probe()) + b"\n")


if __name__ == "__main__":
    main()
