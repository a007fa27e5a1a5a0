"""Writes `docs/catalogue.md`, every kernel as it declares itself: `.venv/bin/python docs/catalogue.py`."""

from __future__ import annotations

import inspect
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lepton_ai.kernel import DEVICE_KINDS, Kernel  # noqa: E402 - a program, run from anywhere
from tasks.catalogue import load  # noqa: E402

AREAS = {
    "city": "Smart city",
    "data": "Big data",
    "driving": "Autonomous driving",
    "farming": "Farming",
    "finance": "Finance",
    "linalg": "Linear algebra",
    "medical": "Medicine",
    "monitor": "Monitoring and prediction",
    "nn": "Neural networks",
    "recommend": "Recommendation",
    "retrieval": "Retrieval",
    "stream": "Streams",
    "vision": "Images from cameras and satellites",
}
BATCHES = {
    "stack": "jobs of equal shapes share a launch",
    "concat": "jobs share a launch, joined along their first axis",
    None: "one job a launch",
}


def text() -> str:
    kernels = sorted(load(()).kernels.values(), key=lambda kernel: kernel.name)
    parts = [
        "# The kernels",
        "",
        f"Written by `docs/catalogue.py` from what the {len(kernels)} kernels declare. Arguments are checked against",
        "it before a job is accepted. A dim that only an output has is decided by the data. Every variant is held to",
        "the reference, whose words these are, within the tolerance. How to write your own: [kernels.md](kernels.md).",
        "",
        "| kernel | what | runs on |",
        "|---|---|---|",
        *(f"| [`{each.name}`](#{anchor(each)}) | {each.spec.summary} | {', '.join(kinds(each))} |" for each in kernels),
    ]
    for area, members in groupby(kernels, lambda kernel: kernel.name.partition(".")[0]):
        parts += ["", f"## {AREAS.get(area, area)}"]
        for kernel in members:
            parts += section(kernel)
    return "\n".join(parts) + "\n"


def section(kernel: Kernel) -> list[str]:
    spec = kernel.spec
    reference = kernel._reference
    assert reference is not None
    inputs = "; ".join(f"`{name}` {text}" for name, text in spec.inputs.items())
    outputs = "; ".join(f"`{name}` {text}" for name, text in spec.outputs.items())
    facts = [f"**Takes** {inputs}.", f"**Gives** {outputs}."]
    if spec.limits:
        facts.append("**Where** " + ", ".join(f"`{limit}`" for limit in spec.limits.values()) + ".")
    if spec.carries:
        facts.append(
            "**Carries** " + ", ".join(f"`{name}`" for name in spec.carries) + " from job to job by state key."
        )
    facts.append(f"**Tolerance** {spec.tolerance:g}; {BATCHES[spec.batch]}.")
    return [
        "",
        f"### {kernel.name}",
        "",
        spec.summary,
        "",
        *(f"- {fact}" for fact in facts),
        "",
        inspect.getdoc(reference) or "",
    ]


def kinds(kernel: Kernel) -> list[str]:
    return [kind for kind in DEVICE_KINDS if kind in kernel.kinds]


def anchor(kernel: Kernel) -> str:
    return kernel.name.replace(".", "")


if __name__ == "__main__":
    (ROOT / "docs" / "catalogue.md").write_text(text(), "utf-8")
