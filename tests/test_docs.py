"""What is written by programs is as they would write it now."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_catalogue_is_what_the_kernels_declare() -> None:
    spec = importlib.util.spec_from_file_location("catalogue", DOCS / "catalogue.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "catalogue.md").read_text("utf-8") == module.text(), "run: .venv/bin/python docs/catalogue.py"
