"""What the command line makes of `--arg`, and what it keeps of outputs."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lepton_ai import KernelSpec
from lepton_ai.commands.arguments import Misuse, check_out, fit, read_arguments, save
from lepton_ai.errors import InvalidArguments


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.arange(6.0).reshape(2, 3))
    np.savez("two.npz", x=np.arange(3), y=np.zeros(2))
    np.savez("one.npz", only=np.ones(4))
    Path("rows.json").write_text("[[1, 2], [3, 4]]")
    Path("column.csv").write_text("price\n1.5\n2\n")
    Path("table.csv").write_text("x,y\n1,2\n\n3,4\n5,6\n")
    return tmp_path


def spec(**inputs: str) -> KernelSpec:
    return KernelSpec("a.b", inputs, {"out": "float32"}, "1", "1")


def read(text: str) -> Any:
    return fit(read_arguments([f"x={text}"]), None)["x"]


# -- in ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("-2.5", -2.5), ("true", True), ("[1,2]", [1, 2]), ("[[1],[2]]", [[1], [2]])]
)
def test_json_is_what_it_says(text: str, value: Any) -> None:
    assert read(text) == value
    assert type(read(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("@a.npy", [[0, 1, 2], [3, 4, 5]]),
        ("@two.npz:x", [0, 1, 2]),
        ("@one.npz", [1, 1, 1, 1]),
        ("@one.npz:only", [1, 1, 1, 1]),
        ("@rows.json", [[1, 2], [3, 4]]),
        ("@column.csv", [1.5, 2]),
        ("@table.csv", [[1, 2], [3, 4], [5, 6]]),
    ],
)
def test_a_file_is_read_by_its_ending(folder: Path, text: str, value: Any) -> None:
    assert np.asarray(read(text)).tolist() == value


def test_a_value_may_have_an_equals_sign_in_its_path(folder: Path) -> None:
    np.save("k=3.npy", np.ones(2))
    assert read("@k=3.npy").tolist() == [1, 1]


def test_a_tensor_map_in_json_is_an_array(folder: Path) -> None:
    Path("t.json").write_text('{"dtype": "<i2", "shape": [2], "data": "AQACAA=="}')
    found = read("@t.json")
    assert found.dtype == np.int16
    assert found.tolist() == [1, 2]


def test_json_comes_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"[1, 2, 3]")))
    assert read("@-") == [1, 2, 3]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("x", "takes name=VALUE"),
        ("=3", "takes name=VALUE"),
        ("x=", "is no JSON"),
        ("x=abc", "JSON is malformed"),
        ("x=[[1", "'[[1' is no JSON"),
        ("x=[[1, 2], [3]]", "its rows differ in length"),
        ("x=[1, [2]]", "its rows differ in length"),
        ("x=[[[1], [2]], [[3, 4], [5, 6]]]", "its rows differ in length"),
        ("x=null", "got `null`"),
        ('x="abc"', "got `str`"),
        ("x=@none.npy", "No such file or directory"),
        ("x=@.", "ends in .npy"),
        ("x=@a.txt", "ends in .npy, .npz, .json or .csv, not .txt"),
        ("x=@objects.npy", "allow_pickle"),
        ("x=@broken.npy", "does not read"),
        ("x=@empty.npy", "does not read"),
        ("x=@broken.npz", "does not read"),
        ("x=@a.npy.npz", "not an .npz"),
        ("x=@two.npz", "name the array: @two.npz:NAME, one of x, y"),
        ("x=@two.npz:z", "one of x, y"),
        ("x=@broken.json", "is no JSON"),
        ("x=@words.csv", "line 2: 'b' is no number"),
        ("x=@ragged.csv", "line 2 has 1 numbers, the first has 2"),
    ],
)
def test_what_does_not_read_is_told_with_its_name(folder: Path, given: str, told: str) -> None:
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("broken.npy", "broken.npz", "broken.json"):
        Path(name).write_bytes(b"\x93NUMPY nonsense")
    Path("empty.npy").write_bytes(b"")
    Path("a.npy.npz").write_bytes(Path("a.npy").read_bytes())
    Path("words.csv").write_text("1,2\na,b\n".replace("a,", "3,"))
    Path("ragged.csv").write_text("1,2\n3\n")
    with pytest.raises(Misuse) as raised:
        read_arguments([given])
    assert told in raised.value.message
    assert "\n" not in raised.value.message


def test_an_argument_given_twice_is_refused() -> None:
    with pytest.raises(Misuse, match="twice"):
        read_arguments(["x=1", "x=2"])


@pytest.mark.parametrize(
    ("found", "declared"),
    [("float64", "float32"), ("float64", "float16"), ("int64", "float32"), ("int64", "int32"), ("int64", "uint8")],
)
def test_an_array_is_cast_to_what_the_kernel_declares(found: str, declared: str) -> None:
    fitted = fit({"x": np.array([1, 2, 3], found)}, spec(x=f"{declared}[n]"))
    assert fitted["x"].dtype == declared
    assert fitted["x"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "declared"),
    [
        (np.array([1.5]), "int32[n]"),
        (np.array([2**40]), "int32[n]"),
        (np.array([-1]), "uint8[n]"),
        (np.array([1e300]), "float32[n]"),
        (np.array([True]), "float32[n]"),
        (np.array([1]), "bool[n]"),
        (np.array([1j]), "float32[n]"),
    ],
)
def test_a_cast_that_would_change_a_meaning_is_refused(value: Any, declared: str) -> None:
    with pytest.raises(InvalidArguments, match="'x'"):
        fit({"x": value}, spec(x=declared))


def test_infinity_and_nan_stay_what_they_are() -> None:
    fitted = fit({"x": np.array([np.inf, np.nan, 1])}, spec(x="float32[n]"))["x"]
    assert np.isinf(fitted[0])
    assert np.isnan(fitted[1])


def test_a_wrong_argument_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(InvalidArguments, match="unknown argument 'y'"):
        fit({"x": 1, "y": 2}, spec(x="int64"))


def test_defaults_are_left_to_the_worker() -> None:
    assert fit({"x": 1}, spec(x="int64", k="int64 = 5")) == {"x": 1}


@pytest.mark.parametrize(("declared", "shape"), [("float32[n]", (2,)), ("float32[n,m]", (2, 1))])
def test_a_csv_column_is_a_vector_or_a_matrix_as_the_kernel_wants(
    folder: Path, declared: str, shape: tuple[int, ...]
) -> None:
    assert fit(read_arguments(["x=@column.csv"]), spec(x=declared))["x"].shape == shape


# -- out --------------------------------------------------------------------------------------------------------------


def test_every_output_is_kept_by_its_name(tmp_path: Path) -> None:
    outputs = {"file": np.arange(3), "allow_pickle": [1.5, 2.5], "n": 7}
    save(outputs, tmp_path / "o.npz")
    with np.load(tmp_path / "o.npz") as kept:
        assert {name: kept[name].tolist() for name in kept.files} == {
            "file": [0, 1, 2],
            "allow_pickle": [1.5, 2.5],
            "n": 7,
        }
    save(outputs, tmp_path / "o.json")
    assert json.loads((tmp_path / "o.json").read_text()) == {
        "file": [0, 1, 2],
        "allow_pickle": [1.5, 2.5],
        "n": 7,
    }


def test_one_output_is_kept_as_an_array(tmp_path: Path) -> None:
    save({"c": np.ones((2, 2), np.float32)}, tmp_path / "c.npy")
    assert np.load(tmp_path / "c.npy").dtype == np.float32
    with pytest.raises(Misuse, match=r"a, b: use \.npz"):
        save({"a": 1, "b": 2}, tmp_path / "c.npy")


@pytest.mark.parametrize("name", ["o.npz", "o.npy"])
def test_what_is_no_array_is_kept_as_json_only(tmp_path: Path, name: str) -> None:
    with pytest.raises(Misuse, match=r"use \.json"):
        save({"x": {"a": 1}}, tmp_path / name)
    save({"x": {"a": 1}}, tmp_path / "o.json")


@pytest.mark.parametrize("name", ["o.txt", "o", "nowhere/o.npz", "folder.npz"])
def test_a_place_where_nothing_can_be_kept_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(Misuse, match="--out"):
        check_out(tmp_path / name)
