"""Every gpu variant, on Numba's CUDA simulator, passes the conformance tests of `test_kernels.py`.

The simulator takes the place of CUDA for a whole process, so the tests run in one of their own, once for all kernels
that are selected here; each kernel's test tells of its own. With `-k NAME` only that kernel's are run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lepton_ai.settings import Settings
from tasks.catalogue import load

ROOT = Path(__file__).parents[2]
NAMES = [name for name, kernel in sorted(load(Settings.read().kernel_modules).kernels.items()) if "gpu" in kernel.kinds]
#: How many failures of a kernel are shown in full.
SHOWN = 3


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """By kernel and test: an empty text where it passed, else why not."""
    selected = {
        str(item.callspec.params["name"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == Path(__file__) and hasattr(item, "callspec")
    }
    report = tmp_path_factory.mktemp("simulator") / "report.xml"
    arguments = ["tests/conformance/test_kernels.py", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "-k", " or ".join(f"{name}-gpu" for name in sorted(selected))],
        cwd=ROOT,
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), f"the simulator's process ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    found: dict[str, dict[str, str]] = {name: {} for name in selected}
    for case in ElementTree.parse(report).iter("testcase"):
        test = case.attrib["name"]
        told = [f"{each.tag}: {each.text or each.get('message')}" for each in case if each.tag in FAILURES]
        for name in selected.intersection(test.partition("[")[2].rstrip("]").split("-")):
            found[name][test] = "\n".join(told)
    return found


FAILURES = ("error", "failure", "skipped")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_the_gpu_variant_conforms_on_the_simulator(name: str, outcomes: dict[str, dict[str, str]]) -> None:
    assert outcomes[name], f"no test ran for {name}"
    failed = {test: why for test, why in outcomes[name].items() if why}
    shown = "\n\n".join(f"{test}\n{why}" for test, why in list(failed.items())[:SHOWN])
    assert not failed, f"{len(failed)} of {len(outcomes[name])} failed:\n{shown}"
