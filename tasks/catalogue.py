"""Which kernels there are: those of `tasks/kernels/`, of installed packages, and of the modules an operator names.

A kernel is added by adding a file: every module in `tasks/kernels/` is imported. Other people's kernels come from the
entry point group `lepton_ai.kernels` (each entry names a module) and from LEPTON_KERNELS (dotted module names). Those
may be broken without harm to the rest: what cannot be loaded is refused and named.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points

import msgspec

import tasks.kernels
from lepton_ai.errors import InvalidKernel
from lepton_ai.kernel import Kernel

__all__ = ["ENTRY_POINTS", "Catalogue", "load"]

ENTRY_POINTS = "lepton_ai.kernels"


class Catalogue(msgspec.Struct, frozen=True):
    """What `load` found."""

    kernels: dict[str, Kernel]
    """By name."""
    refused: dict[str, str]
    """Modules that were left out, and why."""


def load(extra: Iterable[str] = ()) -> Catalogue:
    """Every kernel: our own, those of installed packages, and those of the modules in `extra`.

    A module from outside that does not import, holds no kernel, or takes a name that is taken is refused as a whole.
    Raises InvalidKernel where two of our own kernels have one name, or a file in `tasks/kernels/` holds none.
    """
    kernels: dict[str, Kernel] = {}
    for module in pkgutil.iter_modules(tasks.kernels.__path__, "tasks.kernels."):
        kernels |= _kernels_in(module.name, kernels)
    refused: dict[str, str] = {}
    for module_name in dict.fromkeys([*_installed(), *extra]):
        try:
            kernels |= _kernels_in(module_name, kernels)
        # Somebody else's module may raise anything, and must not end the worker even by sys.exit().
        except (Exception, SystemExit) as error:  # noqa: BLE001
            refused[module_name] = f"{type(error).__name__}: {error}"
    return Catalogue(kernels, refused)


def _installed() -> Iterator[str]:
    """The modules that installed packages name, in an order that does not depend on the installation."""
    yield from sorted(point.value.partition(":")[0].strip() for point in entry_points(group=ENTRY_POINTS))


def _kernels_in(module_name: str, known: Mapping[str, Kernel]) -> dict[str, Kernel]:
    """The kernels of a module; InvalidKernel where it has none, or another kernel has the name of one."""
    found: dict[str, Kernel] = {}
    for value in vars(importlib.import_module(module_name)).values():
        if not isinstance(value, Kernel):
            continue
        other = known.get(value.name) or found.get(value.name)
        if other is not None and other is not value:
            raise InvalidKernel(f"{module_name}: a kernel of the name {value.name!r} is already in the catalogue")
        found[value.name] = value
    if not found:
        raise InvalidKernel(f"{module_name} holds no Kernel at module level")
    return found
