"""Where the services live: the checkout's root, or the data that travels inside the wheel.

The wheel installs one import name, `lepton_ai`; `pipeline`, `queues` and `tasks` are on the path of the service
processes only, so that a producer's own `tasks.py` is never shadowed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["environ", "root"]

_PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """The folder that holds `pipeline`, `queues`, `tasks` and `examples`."""
    checkout = _PACKAGE.parent
    if (checkout / "pipeline" / "__main__.py").is_file():
        return checkout
    return _PACKAGE / "_services"


def environ(base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """An environment in which `python -m pipeline` finds the services, and not a `tasks.py` in the current folder."""
    path = [str(root()), *filter(None, [base.get("PYTHONPATH")])]
    return {**base, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1"}
