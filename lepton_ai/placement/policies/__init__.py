"""The policies, one file each, loaded by name: `load("earliest_finish")`."""

from __future__ import annotations

import importlib
import pkgutil

from lepton_ai.errors import InvalidSettings
from lepton_ai.placement.problem import Policy

__all__ = ["load", "names"]


def names() -> list[str]:
    """Every policy there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Policy:
    """The policy of a name, which is its file's and its own; InvalidSettings lists the names where there is none."""
    if name not in names():
        raise InvalidSettings(f"no policy {name!r}; there are {', '.join(names())}", "policy")
    module = importlib.import_module(f"{__name__}.{name}")
    found: Policy = next(
        value() for value in vars(module).values() if isinstance(value, type) and getattr(value, "name", None) == name
    )
    return found
