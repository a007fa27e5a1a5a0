"""`bench placement` in small, and the files that it reads."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench import instances, placement
from lepton_ai.errors import Malformed


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What the bench says in JSON; its tables are drawn too."""

    def told(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["placement", "--json", *arguments])
        assert placement.main() == 0
        found = json.loads(capsys.readouterr().out)
        with Path(os.devnull).open("w") as nowhere:
            for table in placement._tables(found):
                Console(file=nowhere).print(table)
        return found

    return told


def test_every_policy_is_compared_with_a_bound_that_it_does_not_pass(report: Any) -> None:
    found = report("--quick", "--policies", "affinity,min_min,sufferage,linear_program")
    assert len({row["instance"] for row in found["instances"]}) == 13
    for row in found["instances"]:
        assert {"instance", "policy", "makespan", "bound", "gap", "ms"} <= row.keys()
        assert row["gap"] == pytest.approx(row["makespan"] / row["bound"] - 1)
        assert row["gap"] > -1e-9
        assert row["ms"] > 0
    summary = found["summary"]
    assert summary.keys() == {"affinity", "min_min", "sufferage", "linear_program"}
    assert summary["linear_program"]["average_gap"] < 0.05
    assert summary["linear_program"]["average_gap"] < summary["min_min"]["average_gap"]
    assert summary["min_min"]["max_gap"] < summary["affinity"]["max_gap"]


def test_a_policy_too_slow_for_an_instance_is_named_as_left_out(report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_MOST", {"min_min": 800})
    found = report("--quick", "--policies", "min_min,affinity")
    assert {"instance": "fleet_200x12_4_classes", "policy": "min_min"} in found["left_out"]


def test_files_are_placed_instead_where_a_folder_is_given(report: Any, tmp_path: Path) -> None:
    seconds = np.random.default_rng(0).uniform(1, 9, (512, 16))
    (tmp_path / "u_x").write_text("\n".join(map(str, seconds.ravel())))
    (tmp_path / "small").write_text("3 2\n1 2\n3 4\n5 6\n")
    found = report("--instances", str(tmp_path), "--policies", "min_min")
    assert [row["instance"] for row in found["instances"]] == ["small", "u_x"]
    assert found["instances"][0]["makespan"] == 6.0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1\n2\n3\n", "bad has 3 values, and 512 jobs on 16 machines have 8,192"),
        ("2 2\n1\n2\n3\n", "bad has 3 values, and 2 jobs on 2 machines have 4"),
        ("2 2\n1\n2\nthree\n4\n", "bad has something that is no number: .*three"),
        ("1 2\n1\nnan\n", "bad: value 2 is nan; seconds are above 0"),
        ("1 2\n-1\n2\n", "bad: value 1 is -1.0; seconds are above 0"),
        ("1 0\n", "bad says 1 jobs and 0 machines"),
        ("\xff\xfe", "bad has something that is no number"),
        ("", "bad has 0 values"),
    ],
)
def test_a_file_that_is_no_instance_is_named_with_what_is_wrong(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(text.encode("latin-1"))
    with pytest.raises(Malformed, match=told):
        instances.read(tmp_path)


@pytest.mark.parametrize("arguments", [["--instances", "/nowhere"], ["--policies", "fastest"]])
def test_what_is_not_there_is_a_message_and_no_traceback(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["placement", *arguments])
    assert placement.main() == 2
    assert arguments[1].strip("/") in capsys.readouterr().err


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(Malformed, match="no instance files"):
        instances.read(tmp_path)


@pytest.mark.parametrize("consistency", ["c", "i", "s"])
def test_brauns_classes_follow_the_published_law(consistency: str) -> None:
    seconds = instances.braun(consistency, "hi", "lo").problem.seconds  # type: ignore[arg-type]
    assert seconds.shape == (512, 16)
    assert (seconds >= 1).all()
    assert (seconds < 3000 * 10).all()
    assert bool((np.diff(seconds, axis=1) >= 0).all()) == (consistency == "c")
    assert bool((np.diff(seconds[:, ::2], axis=1) >= 0).all()) == (consistency in "cs")


def test_an_instance_is_the_same_each_time() -> None:
    for make in (lambda: instances.braun("i", "hi", "hi"), lambda: instances.fleet(50, 6, 3, shared=True)):
        np.testing.assert_array_equal(make().problem.seconds, make().problem.seconds)


def test_a_fleet_with_shared_columns_has_a_class_for_each_device() -> None:
    problem = instances.fleet(50, 10, 4, shared=True).problem
    assert problem.seconds.shape == (50, 4)
    assert problem.class_of is not None
    assert problem.class_of.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
