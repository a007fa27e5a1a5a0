"""The chart of `bench kernels`: speedup over NumPy, and share of the roofline, of each kernel by device and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair as alt

__all__ = ["chart", "unable"]

_BY_ITSELF = (".html", ".json")
_CONVERTED = (".svg", ".png")


def unable(path: Path) -> str | None:
    """Why no chart can be written there, to be asked before anything is measured; None where it can."""
    if path.suffix not in _BY_ITSELF + _CONVERTED:
        return f"{path} must end in one of {', '.join(_BY_ITSELF + _CONVERTED)}"
    if not path.absolute().parent.is_dir():
        return f"there is no folder {path.absolute().parent}"
    if find_spec("altair") is None:
        return "a plot needs the package altair: pip install 'lepton-ai[plot]'"
    if path.suffix in _CONVERTED and find_spec("vl_convert") is None:
        return f"a {path.suffix} needs the package vl-convert-python; .html needs none"
    return None


def chart(rows: Sequence[Mapping[str, Any]]) -> alt.VConcatChart:
    """Two rows of panels, a panel a size: speedups above, on a logarithmic axis, and rooflines below."""
    import altair as alt

    values = [
        {
            "kernel": row["kernel"],
            "device": f"{row['device']}, emulated" if row["emulated"] else row["device"],
            "size": row["size"],
            "speedup": row["speedup"],
            "roofline": row["roofline_fraction"],
            "milliseconds": row["seconds"] * 1e3,
            "expression": row["numpy_expression"],
        }
        for row in rows
        if row.get("speedup") is not None
    ]
    sizes = list(dict.fromkeys(each["size"] for each in values))

    def panels(field: str, title: str) -> alt.FacetChart:
        found: alt.FacetChart = (
            alt.Chart(alt.InlineData(values))
            .mark_point(filled=True, size=60)
            .encode(
                x=alt.X(f"{field}:Q", title=title, scale=alt.Scale(type="log")),
                y=alt.Y("kernel:N", title=None),
                color=alt.Color("device:N", title="device"),
                tooltip=["kernel:N", "device:N", "size:N", f"{field}:Q", "milliseconds:Q", "expression:N"],
            )
            .properties(width=220)
            .facet(column=alt.Column("size:N", title=None, sort=sizes))
        )
        return found

    return alt.vconcat(
        panels("speedup", "times as fast as the best NumPy or SciPy expression"),
        panels("roofline", "share of the roofline (above 1: its bytes fit the caches)"),
    )
