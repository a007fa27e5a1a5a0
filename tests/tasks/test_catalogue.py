from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import tasks.kernels
from lepton_ai.errors import InvalidKernel
from tasks import catalogue

KERNEL = """
from lepton_ai.kernel import Kernel
kernel = Kernel({name!r}, inputs={{"x": "float32[n]"}}, outputs={{"y": "float32[n]"}}, flops="n", bytes="8*n")
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes an importable module and forgets it afterwards."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(module: str, text: str) -> str:
        (tmp_path / f"{module}.py").write_text(text)
        monkeypatch.delitem(sys.modules, module, raising=False)
        return module

    return write


def test_every_file_in_the_kernels_folder_is_in_the_catalogue() -> None:
    found = catalogue.load()
    assert {"linalg.matmul", "finance.black_scholes", "monitor.anomaly"} <= set(found.kernels)
    assert {"retrieval.top_k", "vision.ndvi", "medical.median_filter"} <= set(found.kernels)
    assert all(name == kernel.name for name, kernel in found.kernels.items())
    assert found.refused == {}


def test_listing_kernels_imports_no_toolkit() -> None:
    script = (
        "import sys; from tasks.catalogue import load; load(); "
        "print([name for name in ('numba', 'llvmlite', 'jax', 'pyopencl', 'celery') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_module_named_by_the_operator_adds_its_kernels(write) -> None:
    found = catalogue.load([write("lepton_test_more", KERNEL.format(name="more.one"))])
    assert "more.one" in found.kernels
    assert found.refused == {}


def test_a_module_named_by_an_installed_package_adds_its_kernels(write, monkeypatch: pytest.MonkeyPatch) -> None:
    module = write("lepton_test_installed", KERNEL.format(name="installed.one"))
    points = [EntryPoint("any", module, catalogue.ENTRY_POINTS)]
    monkeypatch.setattr(catalogue, "entry_points", lambda group: points if group == "lepton_ai.kernels" else [])
    assert "installed.one" in catalogue.load().kernels


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("raise RuntimeError('no such library')", "no such library"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("def broken(:", "SyntaxError"),
        ("x = 1", "holds no Kernel"),
        (KERNEL.format(name="NoDot"), "NoDot"),
    ],
)
def test_a_broken_module_is_refused_and_the_rest_stays(write, text: str, why: str) -> None:
    module = write("lepton_test_broken", text)
    found = catalogue.load([module, "lepton_test_absent"])
    assert why in found.refused[module]
    assert "lepton_test_absent" in found.refused["lepton_test_absent"]
    assert "linalg.matmul" in found.kernels


def test_a_module_that_takes_a_name_that_is_taken_is_refused_as_a_whole(write) -> None:
    text = KERNEL.format(name="greedy.one") + KERNEL.format(name="linalg.matmul").replace("kernel =", "other =")
    module = write("lepton_test_greedy", text)
    ours = catalogue.load().kernels["linalg.matmul"]
    found = catalogue.load([module])
    assert "linalg.matmul" in found.refused[module]
    assert "greedy.one" not in found.kernels
    assert found.kernels["linalg.matmul"] is ours


def test_a_module_that_shows_a_kernel_of_ours_again_is_no_quarrel(write) -> None:
    module = write("lepton_test_again", "from tasks.kernels.linalg_matmul import matmul\nagain = matmul\n")
    assert catalogue.load([module, module]).refused == {}


def test_two_kernels_of_ours_with_one_name_are_an_error(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("zz_double", KERNEL.format(name="linalg.matmul"))
    monkeypatch.setattr(tasks.kernels, "__path__", [*tasks.kernels.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tasks.kernels.zz_double", raising=False)
    with pytest.raises(InvalidKernel, match=r"linalg\.matmul"):
        catalogue.load()
    sys.modules.pop("tasks.kernels.zz_double", None)
