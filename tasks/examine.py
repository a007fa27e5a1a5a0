"""`python -m tasks.examine MODULE`: what a worker here would say of a module's kernels, as one line of JSON.

For authors, through `lepton kernels --check`: each variant is built on each kind of device that opens here, and run on
the kernel's samples, as when a worker starts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator

import msgspec

from lepton_ai.errors import LeptonError
from lepton_ai.kernel import DEVICE_KINDS, Kernel
from tasks.catalogue import load
from tasks.driver import Driver, open_device, probe
from tasks.warmup import build

__all__ = ["Examined", "examine"]


class Examined(msgspec.Struct, frozen=True):
    """What came of one kernel, or a module, on one kind of device."""

    kernel: str
    kind: str
    """Empty where it is refused before any device is opened."""
    status: str
    """serves, refused, no variant, or no device."""
    reason: str = ""
    seconds: float = 0.0
    """To build, compile and compare it."""


def examine(modules: Iterable[str]) -> list[Examined]:
    """Every kernel of these modules on every kind of device; a module that cannot be loaded is one of the rows."""
    named = list(modules)
    before = load().kernels
    found = load(named)
    rows = [Examined(name, "", "refused", reason) for name, reason in found.refused.items() if name in named]
    kernels = [kernel for name, kernel in found.kernels.items() if name not in before]
    opens = {each.kind: each for each in probe()}
    for kind in DEVICE_KINDS:
        rows += _on(kind, kernels, "" if opens[kind].available else opens[kind].what)
    return sorted(rows, key=lambda each: (each.kernel, DEVICE_KINDS.index(each.kind) if each.kind else -1))


def _on(kind: str, kernels: Iterable[Kernel], missing: str) -> Iterator[Examined]:
    having = []
    for kernel in kernels:
        if kind not in kernel.kinds:
            yield Examined(kernel.name, kind, "no variant")
        elif missing:
            yield Examined(kernel.name, kind, "no device", missing)
        else:
            having.append(kernel)
    if not having:
        return
    try:
        driver = open_device(kind, 1)
    except LeptonError as error:
        yield from [Examined(kernel.name, kind, "no device", error.message) for kernel in having]
        return
    try:
        yield from [_examined(kernel, driver) for kernel in having]
    finally:
        driver.close()


def _examined(kernel: Kernel, driver: Driver) -> Examined:
    start = time.perf_counter()
    try:
        build(kernel, driver)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's kernel may raise anything
        reason = f"{type(error).__name__}: {error}"
        return Examined(kernel.name, driver.kind, "refused", reason, round(time.perf_counter() - start, 3))
    return Examined(kernel.name, driver.kind, "serves", "", round(time.perf_counter() - start, 3))


def main() -> None:
    # Vendors' libraries, and kernels, print as they load; the answer has stdout for itself.
    stdout = os.dup(1)
    os.dup2(2, 1)
    os.write(stdout, msgspec.json.encode(examine(sys.argv[1:])) + b"\n")


if __name__ == "__main__":
    main()
