"""A package of somebody's own: found by its entry point or by name, checked, served; and what is broken is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lepton_ai import Client, services
from lepton_ai.settings import Settings
from pipeline.supervisor import Fleet, run_fleet

PACKAGE = services.root() / "examples" / "own_kernels"
BROKEN = """
import numpy as np
from lepton_ai.kernel import Kernel

def make(name, run, reference=lambda x: {"y": 2 * x}, samples=lambda: [{"x": np.ones(3)}]):
    kernel = Kernel(name, inputs={"x": "float64[n]"}, outputs={"y": "float64[n]"}, flops="n", bytes="8*n")
    if reference:
        kernel.reference(reference)
    if samples:
        kernel.samples(samples)
    kernel.on("cpu")(lambda device: lambda inputs, context: run(inputs["x"]))
    return kernel

def twice(x):
    return {"y": 2 * x}

good = make("broken.good", twice)
differs = make("broken.differs", lambda x: {"y": 2.1 * x})
names = make("broken.names", lambda x: {"z": 2 * x})
dtype = make("broken.dtype", lambda x: {"y": (2 * x).astype(np.float32)})
shape = make("broken.shape", lambda x: {"y": (2 * x)[:1]})
reference = make("broken.reference", twice, reference=lambda x: {"y": 2 * x[:, None]})
unsure = make("broken.no_reference", twice, reference=None)
untried = make("broken.no_samples", twice, samples=None)
unbound = make("broken.samples", twice, samples=lambda: [{"x": np.ones((2, 2))}])
"""
#: Why each of them is refused.
REASONS = {
    "broken.differs": "differs from its reference by 0.05 on sample 0",
    "broken.names": "returned ['z'], and declares ['y']",
    "broken.dtype": "returned 'y' of float32, and declares float64[n]",
    "broken.shape": "returned 'y' of shape [1], and declares float64[n] with n = 3",
    "broken.reference": "its reference, on sample 0, returned 'y' of shape [3, 1]",
    "broken.no_reference": "has no reference",
    "broken.no_samples": "has no samples",
    "broken.samples": "must be float64[n], not of 2 dimensions",
}
FORMULA = """
from lepton_ai.kernel import Kernel
kernel = Kernel("broken.formula", inputs={"x": "float64[n]"}, outputs={"y": "float64[n]"}, flops="n*m", bytes="n")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip would have made of the package, and beside it modules that are broken."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "audio_kernels").symlink_to(PACKAGE / "audio_kernels")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    info = folder / f"audio_kernels-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, points),) = project["entry-points"].items()
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    (folder / "broken_kernels.py").write_text(BROKEN)
    (folder / "broken_formula.py").write_text(FORMULA)
    (folder / "broken_import.py").write_text("import no_such_toolkit\n")
    return folder


def environ(folder: Path, kernels: str = "") -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("LEPTON_")}
    return ours | {"PYTHONPATH": str(folder)} | ({"LEPTON_KERNELS": kernels} if kernels else {})


@pytest.fixture(scope="module")
def fleet(folder: Path) -> Iterator[Fleet]:
    """The package is found by its entry point; the broken ones are named by the operator."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environ(folder, "broken_kernels,broken_formula,broken_import,absent").items():
            patch.setenv(name, value)
        with run_fleet(Settings(), {"cpu": 1}, lambda _: None) as fleet:
            yield fleet


def test_a_package_is_served_that_names_its_module_in_an_entry_point(fleet: Fleet) -> None:
    impulse = np.zeros(5, np.float32)
    impulse[0] = 1
    with Client(fleet.broker_url) as client:
        wet = client.submit("audio.comb", {"samples": impulse, "delay": 2, "gain": 0.5}).result(timeout=20)["wet"]
        level = client.submit("audio.level", {"samples": np.ones((3, 8), np.float32)}).result(timeout=20)["level_db"]
    assert wet.tolist() == [1, 0, 0.5, 0, 0.25]
    assert level.tolist() == [0, 0, 0]


def test_what_is_broken_is_refused_with_the_reason_and_the_rest_serves(fleet: Fleet) -> None:
    with Client(fleet.broker_url) as client:
        (worker,) = client.devices()
        assert client.submit("broken.good", {"x": [1.0]}).result(timeout=20)["y"] == [2.0]
    assert worker.refused.keys() == {*REASONS, "broken_formula", "broken_import", "absent"}
    assert {name: reason for name, reason in REASONS.items() if reason not in worker.refused[name]} == {}
    assert "flops uses ['m']" in worker.refused["broken_formula"]
    assert "no_such_toolkit" in worker.refused["broken_import"]
    assert {"linalg.matmul", "audio.level"} <= {spec.name for spec in worker.kernels}


def test_the_events_tell_of_every_refusal(fleet: Fleet) -> None:
    told: set[str] = set()
    with Client(fleet.broker_url) as client:
        for each in client.events(since="0", timeout=20):
            if each.type == "io.lepton.kernel.refused.v1":
                told.add(each.data["kernel"])
            if told == {*REASONS, "broken_formula", "broken_import", "absent"}:
                return
    raise AssertionError(f"only of {told}")


def test_doctor_names_what_is_refused(fleet: Fleet) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "lepton_ai.cli", "doctor", "--json", "--url", fleet.broker_url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    findings = [each for each in json.loads(ran.stdout)["findings"] if each["check"] == "kernel"]
    assert any("broken.differs" in each["text"] for each in findings), ran.stdout


def check(folder: Path, *modules: str) -> tuple[int, dict[tuple[str, str], dict[str, str]]]:
    """`lepton kernels --check` of modules: its exit code, and what it says of each kernel on each kind."""
    options = [word for module in modules for word in ("--check", module)]
    ran = subprocess.run(
        [sys.executable, "-m", "lepton_ai.cli", "kernels", *options, "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environ(folder),
        cwd=folder,
        check=False,
    )
    assert ran.stdout, ran.stderr
    return ran.returncode, {(each["kernel"], each["kind"]): each for each in json.loads(ran.stdout)}


def test_an_author_sees_that_a_worker_would_serve_the_package(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "audio_kernels").symlink_to(PACKAGE / "audio_kernels")  # not installed
    code, found = check(tmp_path, "audio_kernels.kernels")
    assert code == 0
    assert found["audio.level", "cpu"]["status"] == found["audio.comb", "cpu"]["status"] == "serves"
    assert found["audio.level", "gpu"]["status"] == "no variant"


def test_an_author_sees_what_would_be_refused_and_why(folder: Path) -> None:
    code, found = check(folder, "broken_kernels", "broken_formula")
    assert code == 1
    assert found["broken.good", "cpu"]["status"] == "serves"
    assert {name for name, _ in found if found[name, _]["status"] == "refused"} == {*REASONS, "broken_formula"}
    assert "differs from its reference" in found["broken.differs", "cpu"]["reason"]


def test_the_packages_own_tests_pass() -> None:
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(PACKAGE),
            str(PACKAGE / "tests"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=environ(PACKAGE),
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert "6 passed" in ran.stdout
