"""Every gpu variant passes the tests of `test_kernels.py` on Numba's CUDA simulator, and compiles for a card.

The simulator takes the place of CUDA for a whole process, so the tests run in one of their own, once for all kernels
that are selected here; each kernel's test tells of its own. With `-k NAME` only that kernel's are run. The simulator
runs what numba-cuda could not compile, so a third process compiles whatever was launched, with its types.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from lepton_ai.settings import Settings
from tasks.catalogue import load
from tests import simulator
from tests.conformance.launches import Launch

NAMES = [name for name, kernel in sorted(load(Settings.read().kernel_modules).kernels.items()) if "gpu" in kernel.kinds]
#: How many failures of a kernel are shown in full.
SHOWN = 3


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
    told = simulator.outcomes(
        folder / "report.xml",
        *("tests/conformance/test_kernels.py", "-k", " or ".join(f"{name}-gpu" for name in sorted(selected))),
        *("-p", "tests.conformance.launches", "--launches", str(folder / "launches.json")),
    )
    found: dict[str, dict[str, str]] = {name: {} for name in selected}
    for test, why in told.items():
        for name in selected.intersection(test.partition("[")[2].rstrip("]").split("-")):
            found[name][test] = why
    return found


@pytest.fixture(scope="session")
def compiled(outcomes: object, folder: Path) -> list[tuple[Launch, str]]:
    """What was launched, and what the compiler said against it."""
    launches = folder / "launches.json"
    done = simulator.python("-m", "tests.conformance.compiled", str(launches), NUMBA_ENABLE_CUDASIM="0")
    assert done.returncode == 0, done.stderr
    told = msgspec.json.decode(done.stdout, type=list[str])
    return list(zip(msgspec.json.decode(launches.read_bytes(), type=list[Launch]), told, strict=True))


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
