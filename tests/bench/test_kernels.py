"""`bench kernels`: the report has its figures, what is broken is told, and every kernel's entry says what it should."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from bench import kernel_chart, kernel_rows, kernels
from bench.baselines import SIZES, Baseline, baseline_of
from bench.contestants import Pace, Rounds, grown_s, play
from bench.kernel_rows import KernelBench
from bench.peaks import Roof, float_type, roof_of
from lepton_ai.errors import InvalidSettings
from lepton_ai.kernel import Kernel, Work
from tasks.catalogue import load
from tasks.driver import Driver, cores, open_device

KNOWN = load().kernels
NDVI, MATMUL = KNOWN["vision.ndvi"], KNOWN["linalg.matmul"]
PACE = Pace(2, 0.001, 5.0, 5.0)
ROOF = Roof(1e10, 1e11, 5e10, "made up")

Report = Callable[..., dict[str, Any]]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Report:
    """What the bench says in JSON; its tables are drawn too."""

    def told(*arguments: str, code: int = 0) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["kernels", "--quick", "--json", *arguments])
        assert kernels.main() == code
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        with Path("/dev/null").open("w") as nowhere:
            for table in kernels._tables(found):
                Console(file=nowhere).print(table)
        return found

    return told


@pytest.fixture
def cpu() -> dict[str, Driver]:
    return {"cpu": open_device("cpu", 1)}


def test_a_row_says_what_a_launch_takes_beside_numpy_and_the_roofline(report: Report) -> None:
    found = report("--device", "cpu", "--kernel", "vision.ndvi", "linalg.matmul")
    assert found["problems"] == []
    rows = {(row["kernel"], row["size"]): row for row in found["kernels"]}
    assert rows.keys() == {(kernel, size) for kernel in ("vision.ndvi", "linalg.matmul") for size in SIZES[:2]}
    for row in rows.values():
        assert row["device"] == "cpu"
        assert not row["emulated"]
        assert row["seconds_range"][0] <= row["seconds"] <= row["seconds_range"][1]
        assert row["seconds"] == row["cpu_seconds"] > 0
        assert row["numpy_seconds"] == row["expressions"][row["numpy_expression"]] > 0
        assert 0 < row["speedup_range"][0] <= row["speedup"] <= row["speedup_range"][1]
        assert row["roofline_fraction"] > 0
        assert row["transfer_seconds"] > 0
    assert rows["vision.ndvi", "small"]["bound"] == "memory"
    assert found["peaks"]["cpu"]["bytes_per_s"] > 1e8
    assert found["summary"]["cpu"]["kernels"] == 2
    assert found["summary"]["cpu"]["geometric_mean_speedup"] > 0


def test_emulators_are_measured_beside_the_cpu_and_said_to_be_emulated(report: Report) -> None:
    found = report("--kernel", "vision.ndvi", "--size", "small")
    emulated = [row for row in found["kernels"] if row["device"] == "fpga"]
    if "fpga" in found["machine"]["not_opened"]:
        pytest.skip(found["machine"]["not_opened"]["fpga"])
    assert [row["emulated"] for row in emulated] == [True]
    assert emulated[0]["cpu_seconds"] > 0


def test_batches_are_compared_with_one_launch_each(report: Report) -> None:
    found = report("--batches", "--device", "cpu", "--kernel", "vision.ndvi", "retrieval.top_k")
    rows = found["batches"]
    assert {row["kernel"] for row in rows} == {"vision.ndvi"}  # the other does not batch
    assert [row["jobs"] for row in rows] == [1, 16, 64, 256]
    for row in rows:
        assert "left_out" in row or (row["gain"] > 0 and row["batched_seconds"] > 0)
    assert "gain" in rows[0]


def _broken(**_: Any) -> Any:
    raise ArithmeticError("on purpose")


def _wrong(red: Any, nir: Any) -> dict[str, Any]:
    return {"ndvi": np.zeros_like(red)}


@pytest.fixture
def broken_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry with one expression that raises, and one that returns something else."""
    right = baseline_of(NDVI)
    expressions = {"broken": _broken, "wrong": _wrong, **right.expressions}
    entry = msgspec.structs.replace(right, expressions=expressions)
    monkeypatch.setattr(kernel_rows, "baseline_of", lambda _: entry)


@pytest.mark.usefixtures("broken_entry")
def test_broken_and_wrong_expressions_are_told_and_do_not_count(report: Report) -> None:
    found = report("--device", "cpu", "--kernel", "vision.ndvi", "--size", "small", code=1)
    assert len(found["problems"]) == 2
    assert "vision.ndvi by broken: ArithmeticError: on purpose" in found["problems"]
    assert any("vision.ndvi by wrong" in each and "apart" in each for each in found["problems"])
    (row,) = found["kernels"]
    assert row["expressions"].keys() == baseline_of(NDVI).expressions.keys()


def test_a_device_that_gives_something_else_is_told_and_left_out(
    cpu: dict[str, Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_: Any) -> Any:
        return lambda inputs, _: {"ndvi": np.ones_like(inputs["red"])}

    other: Any = SimpleNamespace(**{each: getattr(cpu["cpu"], each) for each in ("upload", "launch", "download")})
    monkeypatch.setattr(NDVI, "_builders", {**NDVI._builders, "gpu": wrong})
    problems: list[str] = []
    bench = KernelBench(NDVI, {**cpu, "gpu": other}, PACE, problems)
    assert bench.variants.keys() == {"cpu"}
    (problem,) = problems
    assert problem.startswith("vision.ndvi on gpu: ValueError: its results are")


def test_a_call_that_would_take_too_long_is_left_out_and_said_so(cpu: dict[str, Driver]) -> None:
    bench = KernelBench(NDVI, cpu, msgspec.structs.replace(PACE, longest_s=1e-6), [])
    (small,) = bench.rows("small", {"cpu": ROOF})
    assert small["seconds"] > 0
    (medium,) = bench.rows("medium", {"cpu": ROOF})
    assert medium["left_out"].startswith("left out: would take")
    assert "seconds" not in medium


def test_a_kernel_without_an_entry_is_measured_against_its_reference(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEPTON_KERNELS", "bench.synthetic")
    found = report("--device", "cpu", "--kernel", "bench.touch", "--size", "small")
    (row,) = found["kernels"]
    assert row["numpy_expression"] == "the reference"
    assert row["bound"] is None


@pytest.mark.parametrize(
    "arguments",
    [
        ("--device", "abacus"),
        ("--kernel", "no.such"),
        ("--size", "huge"),
        ("--plot", "chart.txt"),
        ("--plot", "/no/x.html"),
    ],
)
def test_what_there_is_not_is_refused_before_anything_runs(
    arguments: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels", *arguments])
    with pytest.raises(SystemExit):
        kernels.main()
    told = capsys.readouterr().err
    assert arguments[0] in told
    assert arguments[1] in told or "/no" in told


@pytest.mark.parametrize("kernel", [KNOWN[name] for name in sorted(KNOWN)], ids=str)
def test_the_expressions_of_an_entry_give_what_the_kernel_gives(kernel: Kernel, cpu: dict[str, Driver]) -> None:
    problems: list[str] = []
    KernelBench(kernel, cpu, PACE, problems)
    assert problems == []


def test_an_entry_with_an_unknown_bound_or_no_expression_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(BOUND="luck", inputs=dict, expressions=lambda: {"one": dict})
    monkeypatch.setattr("bench.baselines.importlib.import_module", lambda _: module)
    with pytest.raises(ValueError, match="BOUND is one of memory, compute, latency, not 'luck'"):
        baseline_of(NDVI)
    module.BOUND, module.expressions = "memory", dict
    with pytest.raises(ValueError, match="returns none"):
        baseline_of(NDVI)


class _Taking:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.calls = 0

    def once(self) -> float:
        self.calls += 1
        return self.seconds


def test_whoever_is_quick_is_called_more_often_and_whoever_is_slow_has_fewer_rounds() -> None:
    taking = {"quick": _Taking(0.001), "slow": _Taking(2.0), "slowest": _Taking(8.0)}
    found = play(taking, {name: each.seconds for name, each in taking.items()}, Pace(5, 0.01, 5.0, 60.0))
    assert [each.calls for each in taking.values()] == [50, 2, 0]
    assert [len(each.values) for each in found.values()] == [5, 2, 1]
    assert found["slow"].over(found["quick"]).median == 2000
    assert found["slowest"].median == 8.0


def test_ratios_are_taken_within_a_round() -> None:
    """Everything took twice as long in the second round."""
    assert Rounds([2.0, 4.0, 2.0]).over(Rounds([1.0, 2.0, 1.0])).range == [2.0, 2.0]


def test_what_a_larger_size_takes_is_foretold_by_what_grows_most() -> None:
    assert grown_s(0.5, Work(10, 100), Work(80, 200)) == 4.0
    assert grown_s(0.5, Work(10, 100), Work(10, 400)) == 2.0
    assert grown_s(0.5, Work(0, 0), Work(10, 400)) == 0.5


def test_the_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    assert ROOF.fraction(Work(1e11, 1.0), "float32", 2.0) == 0.5
    assert ROOF.fraction(Work(1e11, 1.0), "float64", 2.0) == 1.0
    assert ROOF.fraction(Work(1.0, 1e10), "float32", 4.0) == 0.25
    assert float_type(NDVI) == "float32"
    assert float_type(KNOWN["finance.black_scholes"]) == "float64"


@pytest.mark.parametrize("kind", ["fpga", "tpu"])
def test_an_emulator_does_not_claim_more_than_the_processor_can_do(kind: str, cpu: dict[str, Driver]) -> None:
    try:
        emulator = open_device(kind, 1)
    except (ImportError, InvalidSettings) as error:
        pytest.skip(str(error))
    if not emulator.emulated:
        pytest.skip(f"there is a {kind}")
    claimed, known = roof_of(emulator, 3), roof_of(cpu["cpu"], 3)
    assert claimed.float32_flops_per_s < 4 * cores() * known.float32_flops_per_s
    assert claimed.bytes_per_s < 20 * cores() * known.bytes_per_s  # its copies may fit the caches


def _row(kernel: str, speedup: float, **more: Any) -> dict[str, Any]:
    return {
        "kernel": kernel, "device": "cpu", "size": "large", "emulated": False, "seconds": 1.0, "cpu_seconds": 1.0,
        "numpy_expression": "it", "speedup": speedup, "speedup_range": [speedup] * 2, "roofline_fraction": 0.5, **more,
    }  # fmt: skip


def test_the_bars_name_who_misses_them() -> None:
    rows = [
        _row("a.quick", 20.0),
        _row("a.slow", 0.5),
        _row("a.stream", 10.0, bandwidth_fraction=0.7),
        _row("linalg.matmul", 0.95),
        {**_row("a.lame", 1.0), "speedup": None, "left_out": "left out: would take 12 s"},
    ]
    found = kernels._summary(rows, "large", ["cpu", "gpu"])
    assert found.keys() == {"cpu"}
    assert found["cpu"]["left_out"] == 1
    assert found["cpu"]["memory_bound_least_fraction"] == 0.7
    assert [(bar["kernel"], bar["value"], bar["held"]) for bar in found["cpu"]["bars"]] == [
        ("", pytest.approx(3.122, rel=1e-3), False),
        ("a.slow", 0.5, False),
        ("a.stream", 0.7, True),
        ("linalg.matmul", 0.95, True),
    ]


def test_the_chart_has_a_point_for_each_row_that_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("altair", reason="the chart needs the extra plot")
    rows = [_row("a.quick", 20.0), {"kernel": "a.lame", "device": "cpu", "size": "large", "left_out": "left out"}]
    file = tmp_path / "chart.html"
    assert kernel_chart.unable(file) is None
    kernel_chart.chart(rows).save(file)
    told = kernel_chart.chart(rows).to_dict()
    assert len(told["vconcat"]) == 2
    (values,) = told["datasets"].values()
    assert [each["kernel"] for each in values] == ["a.quick"]
    assert "a.quick" in file.read_text()


def test_samples_stand_in_for_an_entry_from_small_to_large() -> None:
    sized = Kernel("own.sized", inputs={"x": "float32[n]"}, outputs={"y": "float32[n]"}, flops="n", bytes="8*n")
    sized.reference(lambda x: {"y": x})
    sized.samples(lambda: [{"x": np.ones(n, np.float32)} for n in (1, 10, 100, 1000)])
    found: Baseline = baseline_of(sized)
    assert [found.inputs(size)["x"].size for size in SIZES] == [10, 100, 1000]
