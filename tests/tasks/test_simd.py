"""What kernels claim of vector code is in the machine code that their CPU variants are compiled to here."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import Any

import numba
import pytest
from llvmlite import binding
from numba.core import config

from lepton_ai.kernel import Kernel
from lepton_ai.settings import Settings
from tasks.catalogue import load
from tasks.driver import open_device

#: The claims: instructions, without the `v` of AVX, that do the work of a kernel's inner loop on a whole register.
CLAIMS = {
    "farming.zonal_stats": "addpd",
    "finance.black_scholes": "(divpd|sqrtpd)",
    "medical.gaussian_filter": "(mulps|fmadd[0-9]+ps)",
    "medical.median_filter": "pminsd",
    "medical.otsu": "(pminub|pmaxub|pcmpgtb|psubusb|pcmpeqb)",
    "monitor.anomaly": "sqrtpd",
    "vision.ndvi": "divps",
}
KERNELS = load(Settings.read().kernel_modules).kernels


def widest() -> str:
    """A pattern of the widest registers that LLVM uses here; skips the test where it would be no x86's."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"the claims name instructions of x86-64, and this is {platform.machine()}")
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return "[yz]mm"  # LLVM keeps to 256 bits on processors that slow down for 512
    if features.get("avx"):
        return "ymm"
    return "xmm"


def assembly(kernel: Kernel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """All that the builder compiles, compiled anew: Numba shows nothing of what comes from its cache."""
    compiled: list[Any] = []
    original = numba.njit

    def recording(*arguments: Any, **options: Any) -> Any:
        def decorate(function: Any) -> Any:
            compiled.append(original(*arguments, **options)(function))
            return compiled[-1]

        return decorate

    monkeypatch.setattr(config, "CACHE_DIR", str(folder))
    monkeypatch.setattr(numba, "njit", recording)
    kernel.build("cpu", open_device("cpu", slots=1))
    assert compiled, f"{kernel.name} compiles nothing with numba.njit"
    return "\n".join(text for each in compiled for text in each.inspect_asm().values())


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_a_kernel_has_the_vector_code_that_it_claims(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registers = widest()
    text = assembly(KERNELS[name], tmp_path, monkeypatch)
    found = re.findall(rf"^\s+v?{CLAIMS[name]}\s.*%{registers}", text, re.MULTILINE)
    assert found, f"no {CLAIMS[name]} on {registers} in what {name} compiles to"


def test_code_without_vectors_would_be_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain in which each step waits for the one before it: no compiler makes vectors of that."""
    registers = widest()
    chain = Kernel("test.chain", inputs={"n": "int64"}, outputs={"x": "float64[1]"}, flops="n", bytes="8")

    @chain.on("cpu")
    def _cpu(device: Any) -> Any:
        return numba.njit((numba.float64, numba.int64), cache=False)(_halve)

    text = assembly(chain, tmp_path, monkeypatch)
    assert re.search(r"^\s+v?divsd\s", text, re.MULTILINE)
    assert not re.search(rf"^\s+v?divpd\s.*%{registers}", text, re.MULTILINE)


def _halve(x: float, n: int) -> float:
    for _ in range(n):
        x = 1.0 / (x + 1.0)
    return x
