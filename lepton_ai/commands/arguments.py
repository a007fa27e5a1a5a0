"""What the command line takes and gives: text, JSON and files become a kernel's arguments, outputs become a file."""

from __future__ import annotations

import csv
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from lepton_ai import wire
from lepton_ai.errors import LeptonError
from lepton_ai.kernel import KernelSpec
from lepton_ai.signature import Argument

__all__ = ["Misuse", "check_out", "fit", "plain", "read_arguments", "save"]

_VALUE = msgspec.json.Decoder(wire.Value)
_FORMS = "a number, true or false, a list of them, or @FILE (.npy, .npz, .json, .csv; @- is JSON from standard input)"
#: What others' bytes can make of reading them.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    MemoryError,
    RecursionError,
    zipfile.BadZipFile,
    csv.Error,
)
_KEPT_AS = (".npz", ".npy", ".json")


class Misuse(LeptonError):
    """The command line itself is wrong: nothing was sent anywhere."""

    code = "misuse"


class _Rows(NamedTuple):
    """A CSV file: a matrix, until it is known whether a vector is wanted."""

    values: NDArray[Any]


# -- in ---------------------------------------------------------------------------------------------------------------


def read_arguments(given: Iterable[str]) -> dict[str, Any]:
    """The values of `name=VALUE` texts by name; Misuse names the one that does not read."""
    found: dict[str, Any] = {}
    for each in given:
        name, equals, text = each.partition("=")
        if not name or not equals:
            raise Misuse(f"--arg takes name=VALUE, not {each!r}")
        if name in found:
            raise Misuse(f"argument {name!r} is given twice")
        try:
            found[name] = _read(text)
        except msgspec.DecodeError as error:
            fault = "does not read" if isinstance(error, msgspec.ValidationError) else "is no JSON"
            raise Misuse(f"argument {name!r}: {text[:60]!r} {fault}: {error}; it is {_FORMS}", name) from None
        except _UNREADABLE as error:
            said = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise Misuse(f"argument {name!r}: {text[:60]!r} does not read: {said}; it is {_FORMS}", name) from None
    return found


def fit(arguments: Mapping[str, Any], spec: KernelSpec | None) -> dict[str, Any]:
    """These arguments as the kernel declares them, where that loses no meaning; as they are for an unknown kernel.

    An array from a file becomes the declared dtype: floats and integers any float, integers any integer that holds
    them. Raises InvalidArguments, as the worker would, where an argument does not fit the signature.
    """
    inputs = spec.signature().inputs if spec is not None else {}
    settled = {name: _settle(value, inputs.get(name)) for name, value in arguments.items()}
    if spec is None:
        return settled
    bound, _ = spec.signature().bind(settled)
    return {name: bound[name] for name in settled}


def _read(text: str) -> Any:
    if not text.startswith("@"):
        return _json(text.encode())
    if text == "@-":
        return _json(sys.stdin.buffer.read())
    name = text[1:]
    path, colon, member = name.rpartition(":")
    if colon and path.lower().endswith(".npz"):
        return _read_npz(Path(path), member)
    match Path(name).suffix.lower():
        case ".npy":
            return np.load(name, allow_pickle=False)
        case ".npz":
            return _read_npz(Path(name), None)
        case ".json":
            return _json(Path(name).read_bytes())
        case ".csv":
            return _read_csv(Path(name))
        case suffix:
            raise ValueError(f"a file ends in .npy, .npz, .json or .csv, not {suffix or 'nothing'}")


def _json(data: bytes) -> Any:
    value = wire.decode_value(_VALUE.decode(data))
    if isinstance(value, list):
        _shape(value)
    return value


def _shape(value: list[Any]) -> tuple[int, ...]:
    """The shape of nested lists; ValueError where they differ side by side, which no array does."""
    if not any(isinstance(each, list) for each in value):
        return (len(value),)
    shapes = {_shape(each) if isinstance(each, list) else () for each in value}
    if len(shapes) > 1:
        raise ValueError("its rows differ in length, and an array has rows of one length")
    return (len(value), *shapes.pop())


def _read_npz(path: Path, member: str | None) -> Any:
    arrays = np.load(path, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError("that is not an .npz file")  # noqa: TRY004 - its bytes are wrong, not their type
    with arrays:
        if member is None and len(arrays.files) == 1:
            (member,) = arrays.files
        if member not in arrays.files:
            raise ValueError(f"name the array: @{path}:NAME, one of {', '.join(arrays.files)}")
        return arrays[member]


def _read_csv(path: Path) -> _Rows:
    """The numbers of a file; a first line without a single number is a heading."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = [(number, cells) for number, cells in enumerate(csv.reader(file), 1) if cells]
    if lines and not any(_is_number(cell) for cell in lines[0][1]):
        del lines[0]
    rows = []
    for number, cells in lines:
        for cell in cells:
            if not _is_number(cell):
                raise ValueError(f"line {number}: {cell!r} is no number")
        if len(cells) != len(lines[0][1]):
            raise ValueError(f"line {number} has {len(cells)} numbers, the first has {len(lines[0][1])}")
        rows.append([_number(cell) for cell in cells])
    return _Rows(np.array(rows).reshape(len(rows), -1))


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _settle(value: Any, argument: Argument | None) -> Any:
    if isinstance(value, _Rows):
        value = value.values
        wants_vector = (
            value.shape[1] == 1 if argument is None else argument.dims is not None and len(argument.dims) == 1
        )
        if wants_vector and min(value.shape) == 1:
            value = value.ravel()
    if argument is None or argument.dims is None or not isinstance(value, np.ndarray):
        return value
    wanted = np.dtype(argument.dtype)
    if value.dtype == wanted:
        return value
    if wanted.kind == "f" and value.dtype.kind in "iuf":
        with np.errstate(over="ignore"):
            cast = value.astype(wanted)
        return cast if bool((np.isfinite(cast) | ~np.isfinite(value)).all()) else value
    if wanted.kind in "iu" and value.dtype.kind in "iu" and value.size:
        limits = np.iinfo(wanted)
        return value.astype(wanted) if value.min() >= limits.min and value.max() <= limits.max else value
    return value


# -- out --------------------------------------------------------------------------------------------------------------


def check_out(path: Path | None) -> None:
    """Misuse where outputs could not be kept there: better said before the job runs than after it."""
    if path is None:
        return
    if path.suffix.lower() not in _KEPT_AS:
        raise Misuse(f"--out takes a file that ends in {', '.join(_KEPT_AS)}, not {str(path)!r}")
    if path.is_dir() or not path.parent.is_dir():
        raise Misuse(f"--out: {str(path)!r} cannot be a file: {str(path.parent)!r} is no folder, or it is one itself")


def save(outputs: Mapping[str, Any], path: Path) -> None:
    """Keeps outputs in a file: .npz and .json hold all of them by name, .npy the only one.

    Misuse where they are none that such a file holds.
    """
    try:
        _save(outputs, path)
    except ValueError as error:
        raise Misuse(f"{path} cannot hold {', '.join(outputs)}: {error}; use .json") from None


def _save(outputs: Mapping[str, Any], path: Path) -> None:
    match path.suffix.lower():
        case ".json":
            path.write_bytes(msgspec.json.encode(plain(outputs)) + b"\n")
        case ".npy":
            if len(outputs) != 1:
                raise Misuse(f"an .npy file holds one array, and there are {', '.join(outputs)}: use .npz")
            (only,) = outputs.values()
            np.save(path, np.asarray(only), allow_pickle=False)
        case _:
            # Not np.savez: it takes the names as keywords, and an output may be called `file`.
            with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
                for name, value in outputs.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, np.asarray(value), allow_pickle=False)


def plain(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs as nested lists and numbers; in JSON, NaN and infinity become null."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in outputs.items()}
