"""Every gpu variant passes the tests of `test_kernels.py` on Numba's CUDA simulator, and compiles for a card.

The simulator takes the place of CUDA for a whole process, so the tests run in one of their own, once for all kernels
that are selected here; each kernel's test tells of its own. With `-k NAME` only that kernel's are run. The simulator
runs what numba-cuda could not compile, so a third process compiles whatever was launched, with its types.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest

from lepton_ai.settings import Settings
from tasks.catalogue import load
from tests.conformance.launches import Launch

ROOT = Path(__file__).parents[2]
NAMES = [name for name, kernel in sorted(load(Settings.read().kernel_modules).kernels.items()) if "gpu" in kernel.kinds]
#: How many failures of a kernel are shown in full.
SHOWN = 3


FAILURES = ("error", "failure", "skipped")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulator")


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest, folder: Path) -> dict[str, dict[str, str]]:
    """By kernel and test: an empty text where it passed, else why not."""
    selected = {
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == Path(__file__)
    }
    report = folder / "report.xml"
    done = python(
        *("-m", "pytest", "tests/conformance/test_kernels.py", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"),
        *("-p", "tests.conformance.launches", "--launches", str(folder / "launches.json")),
        *("-k", " or ".join(f"{name}-gpu" for name in sorted(selected))),
        NUMBA_ENABLE_CUDASIM="1",
    )
    assert report.exists(), f"the simulator's process ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    found: dict[str, dict[str, str]] = {name: {} for name in selected}
    for case in ET.parse(report).iter("testcase"):
        test = case.attrib["name"]
        told = [f"{each.tag}: {each.text or each.get('message')}" for each in case if each.tag in FAILURES]
        for name in selected.intersection(test.partition("[")[2].rstrip("]").split("-")):
            found[name][test] = "\n".join(told)
    return found


@pytest.fixture(scope="session")
def compiled(outcomes: object, folder: Path) -> list[tuple[Launch, str]]:
    """What was launched, and what the compiler said against it."""
    launches = folder / "launches.json"
    done = python("-m", "tests.conformance.compiled", str(launches), NUMBA_ENABLE_CUDASIM="0")
    assert done.returncode == 0, done.stderr
    told = msgspec.json.decode(done.stdout, type=list[str])
    return list(zip(msgspec.json.decode(launches.read_bytes(), type=list[Launch]), told, strict=True))


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False
    )


# Either may be the first of its kernel, and so have to wait for all of them.
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_variant_conforms_on_the_simulator(name: str, outcomes: dict[str, dict[str, str]]) -> None:
    assert outcomes[name], f"no test ran for {name}"
    failed = {test: why for test, why in outcomes[name].items() if why}
    shown = "\n\n".join(f"{test}\n{why}" for test, why in list(failed.items())[:SHOWN])
    assert not failed, f"{len(failed)} of {len(outcomes[name])} failed:\n{shown}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_variant_compiles_for_a_card(name: str, compiled: list[tuple[Launch, str]]) -> None:
    assert name in {launch.kernel for launch, _ in compiled}, f"{name} launched nothing"
    failed = [f"{launch.function[1]}{launch.types}: {why}" for launch, why in compiled if launch.kernel == name and why]
    assert not failed, "\n\n".join(failed[:SHOWN])
