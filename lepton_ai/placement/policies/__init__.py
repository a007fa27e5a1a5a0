"""The policies, one file each, loaded by name: `load("earliest_finish")`.

Those that search need packages that producers do not have: a file that imports one is loaded only when it is asked
for, and where the package is missing the error names the extra that brings it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from lepton_ai.errors import InvalidSettings, MissingPackage
from lepton_ai.placement.problem import Policy

__all__ = ["load", "names"]


def names() -> list[str]:
    """Every policy there is."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str, **options: Any) -> Policy:
    """The policy of a name, which is its file's and its own, made with these options.

    InvalidSettings lists the names where there is none, and the options where one is not among them; MissingPackage
    names the extra that it needs.
    """
    if name not in names():
        raise InvalidSettings(f"no policy {name!r}; there are {', '.join(names())}", "policy")
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise MissingPackage(
            f"the policy {name} needs the package {package}: pip install 'lepton-ai[solvers]'", "policy"
        ) from None
    policy: type[Policy] = next(
        value for value in vars(module).values() if isinstance(value, type) and getattr(value, "name", None) == name
    )
    takes = inspect.signature(policy).parameters
    if unknown := sorted(options.keys() - takes.keys()):
        raise InvalidSettings(f"the policy {name} takes {', '.join(takes) or 'no options'}, not {unknown[0]}", "policy")
    return policy(**options)
