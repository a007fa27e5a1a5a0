"""A pytest plugin for the simulator's process: writes what each kernel launched, and with which types of arguments.

`--launches` names the file: JSON, a list of Launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from lepton_ai.kernel import Kernel
from tasks.devices.gpu import Array, GpuDriver, Launcher


class Launch(msgspec.Struct, frozen=True):
    """A function that a kernel launched, by its module and name."""

    kernel: str
    function: tuple[str, str]
    types: tuple[tuple[str, int], ...]
    """The dtype of each argument, and its dims: 0 for a number."""


class Watch:
    """What is built now, and what has been launched."""

    kernel = ""

    def __init__(self) -> None:
        self.launched: set[Launch] = set()


class WatchedLauncher(Launcher):
    """A launcher that tells of its launches."""

    def __call__(self, blocks: int | Sequence[int], *arguments: Array | np.generic) -> None:
        types = tuple((each.dtype.name, each.ndim) for each in arguments)
        WATCH.launched.add(Launch(*self.origin, types))
        super().__call__(blocks, *arguments)


WATCH = Watch()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--launches", type=Path, required=True)


def pytest_configure() -> None:
    build, compile_ = Kernel.build, GpuDriver.compile

    def watched_build(kernel: Kernel, kind: str, device: Any) -> Any:
        WATCH.kernel = kernel.name
        return build(kernel, kind, device)

    def watched_compile(
        driver: GpuDriver,
        function: Callable[..., None],
        threads: Sequence[int] | None = None,
        helpers: Sequence[Callable[..., Any]] = (),
        constants: Mapping[str, int] | None = None,
    ) -> Launcher:
        launcher = compile_(driver, function, threads, helpers, constants)
        launcher.__class__ = WatchedLauncher
        launcher.origin = (WATCH.kernel, (function.__module__, function.__name__))  # type: ignore[attr-defined]
        return launcher

    Kernel.build = watched_build  # type: ignore[method-assign]
    GpuDriver.compile = watched_compile  # type: ignore[method-assign]


def pytest_unconfigure(config: pytest.Config) -> None:
    found = sorted(WATCH.launched, key=lambda each: (each.kernel, each.function, each.types))
    config.getoption("launches").write_bytes(msgspec.json.encode(found))
