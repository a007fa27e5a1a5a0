from __future__ import annotations

import re
import sys
from collections import deque
from pathlib import Path

import pytest

from lepton_ai.errors import InvalidSettings
from tasks.cuda_memory import Lease, Memory, size_class
from tasks.devices import gpu
from tests import simulator

SIMULATED = Path(__file__).with_name("simulated_gpu.py")
NAMES = re.findall(r"^def (test_\w+)", SIMULATED.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return simulator.outcomes(tmp_path_factory.mktemp("simulator") / "report.xml", str(SIMULATED))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_on_the_simulator(name: str, outcomes: dict[str, str]) -> None:
    own = {test: why for test, why in outcomes.items() if test.partition("[")[0] == name}
    assert own, f"{name} did not run"
    assert not any(own.values()), "\n\n".join(f"{test}\n{why}" for test, why in own.items() if why)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100mig1g10gb"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx4070tisuper"),
        ("NVIDIA GeForce RTX 3070 Laptop GPU", "rtx3070laptop"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA RTX A6000", "rtxa6000"),
        ("Quadro RTX 8000", "rtx8000"),
        ("NVIDIA TITAN V", "titanv"),
        ("NVIDIA", "unknown"),
    ],
)
def test_a_model_is_what_its_vendor_calls_it_without_brand_and_build(name: str, model: str) -> None:
    assert gpu.model_of(name) == model


def test_several_cards_are_told_by_their_models_and_left_alone_by_their_uuids() -> None:
    found = gpu._several([("Tesla T4", "GPU-a"), ("NVIDIA A10G", "GPU-b"), ("Tesla T4", "GPU-c")])
    assert found.what == "2 x Tesla T4 (gpu.t4), NVIDIA A10G (gpu.a10g)"
    assert [(unit.device, unit.environ) for unit in found.units] == [
        ("gpu.t4", {"CUDA_VISIBLE_DEVICES": "GPU-a"}),
        ("gpu.a10g", {"CUDA_VISIBLE_DEVICES": "GPU-b"}),
        ("gpu.t4", {"CUDA_VISIBLE_DEVICES": "GPU-c"}),
    ]


def test_without_numba_cuda_it_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_has_driver", lambda: True)
    monkeypatch.setitem(sys.modules, "numba.cuda", None)
    found = gpu.probe()
    assert (found.available, found.fix) == (False, "pip install 'lepton-ai[gpu]'")
    with pytest.raises(InvalidSettings, match="pip install"):
        gpu.open_device("gpu", slots=1)


def test_without_a_card_it_says_so_and_nothing_stands_in_for_it() -> None:
    done = simulator.python(
        "-c",
        "from tasks.devices import gpu; found = gpu.probe(); print(found.available, found.emulated, found.what)",
        NUMBA_ENABLE_CUDASIM="0",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.stdout.startswith("False False CUDA finds no GPU"), done.stdout + done.stderr


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000, 4096, 4097, 10**6, 2**30 + 1, 3 * 2**32])
def test_a_block_holds_what_it_is_for_and_little_more(size: int) -> None:
    block = size_class(size)
    assert size <= block <= max(256 * (size // 256 + 1), 1.25 * size)
    assert block % 256 == 0
    assert size_class(block) == block


def test_sizes_that_are_near_share_a_block() -> None:
    made: list[int] = []
    memory = Memory(lambda size: made.append(size) or object())
    block = memory.take(1_000_000).block
    assert memory.take(990_000).block is block
    memory.give_up()
    assert memory.take(1_000_000).block is not block
    assert (len(made), memory.kept_bytes) == (2, made[0])


def test_a_lease_ends_once() -> None:
    home: deque[tuple[int, object]] = deque()
    lease = Lease("block", 256, home)
    shared = [lease, lease]
    del lease
    assert not home
    shared.clear()
    assert list(home) == [(256, "block")]
