"""A kernel's signature as data: `float32[m,k]`, `int64 = 20`, and the check of arguments against it.

The same check runs at the HTTP door, in the worker and in tests. It turns what the wire brought (tensor maps,
nested lists, numbers) into what a kernel gets: C-contiguous arrays of exactly the declared dtype, plain numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from lepton_ai import tensor
from lepton_ai.blob import Reference
from lepton_ai.errors import InvalidArguments, InvalidKernel, TooLarge
from lepton_ai.formula import Formula

__all__ = ["MOST_OUTPUT_BYTES", "Argument", "Signature", "describe", "shapes_of"]

Dims = dict[str, float]
_PATTERN = re.compile(
    r"(?P<dtype>[a-z]+[0-9]*)\s*(?P<dims>\[[^\[\]]*\])?\s*(=\s*(?P<default>-?[0-9.eE+-]+|true|false))?", re.ASCII
)
_DIM = re.compile(r"[a-z][a-z0-9_]*|[0-9]{1,18}", re.ASCII)
_NATIVE: Final = {name: np.dtype(name) for name in tensor.DTYPES}
_KINDS: Final = {name: dtype.kind for name, dtype in _NATIVE.items()}
#: The least and the greatest whole number of each dtype of whole numbers.
_RANGES: Final = {name: (int(np.iinfo(name).min), int(np.iinfo(name).max)) for name in _NATIVE if _KINDS[name] in "iu"}
_NUMBERS: Final = frozenset({bool, int, float})
#: What a number of each dtype is in Python, and between what.
_FORMS: Final = {
    name: (float, -math.inf, math.inf) if kind == "f" else (bool, False, True) if kind == "b" else (int, *_RANGES[name])
    for name, kind in _KINDS.items()
}
#: The most that the outputs of a job may take: a broker takes half a gigabyte at a time.
MOST_OUTPUT_BYTES: Final = 2**28
#: What stands there for an array: nothing is of that type.
_NO_NUMBER: Final = (None, 0, 0)


class Argument(msgspec.Struct, frozen=True):
    """One input or output: an array with `dims` (symbols or sizes), or a scalar (dims None), perhaps with a default."""

    name: str
    dtype: str
    dims: tuple[str | int, ...] | None = None
    default: float | int | bool | None = None

    def __str__(self) -> str:
        dims = "" if self.dims is None else f"[{','.join(map(str, self.dims))}]"
        default = "" if self.default is None else f" = {self.default}"
        return f"{self.dtype}{dims}{default}"


def parse(name: str, text: str) -> Argument:
    """The Argument that a signature string describes; InvalidKernel names the string where it does not parse."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None or match["dtype"] not in tensor.DTYPES:
        told = f"{name}: {text!r} is not a signature such as float32[m,k], int64 = 20 or bool = true"
        raise InvalidKernel(told, name)
    dims: tuple[str | int, ...] | None = None
    if match["dims"] is not None:
        parts = [part.strip() for part in match["dims"][1:-1].split(",")]
        if not all(_DIM.fullmatch(part) for part in parts):
            raise InvalidKernel(f"{name}: the dims of {text!r} must be lower-case names or sizes", name)
        dims = tuple(int(part) if part.isdigit() else part for part in parts)
    if match["default"] is None:
        return Argument(name, match["dtype"], dims)
    if dims is not None:
        raise InvalidKernel(f"{name}: only a scalar can have a default, {text!r} is an array", name)
    argument = Argument(name, match["dtype"])
    try:
        default = _scalar(argument, msgspec.json.decode(match["default"]))
    except (msgspec.DecodeError, InvalidArguments) as error:
        raise InvalidKernel(f"{name}: {match['default']!r} is no default for {argument}: {error}", name) from None
    return Argument(name, match["dtype"], None, default)


class Signature:
    """The parsed inputs, outputs and limits of a kernel.

    `limits` maps an input to a condition on dims and scalars (`{"k": "1 <= k <= n"}`); an input that breaks its own
    is refused by name. `carries` are inputs that an earlier job's outputs of the same names become: an argument of
    these may be left out, and is then what the first job begins with (`initial`).
    """

    def __init__(
        self,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        limits: Mapping[str, str],
        carries: Collection[str] = (),
    ) -> None:
        self.inputs = {name: parse(name, text) for name, text in inputs.items()}
        self.outputs = {name: parse(name, text) for name, text in outputs.items()}
        self.initial = {name: self._initial(name) for name in carries}
        """What the first job of a state key begins with, by name."""
        self.limits = {name: Formula(text) for name, text in limits.items()}
        self._forms = [
            (name, each, *(_FORMS[each.dtype] if each.dims is None else _NO_NUMBER))
            for name, each in self.inputs.items()
        ]
        self._grown = self._growing()
        known = self.names
        for name, limit in self.limits.items():
            if name not in self.inputs:
                raise InvalidKernel(f"a limit is set on {name!r}, which is not an input", name)
            if limit.names - known:
                raise InvalidKernel(f"the limit of {name!r} uses unknown {sorted(limit.names - known)}", name)

    def _initial(self, name: str) -> NDArray[Any]:
        """An array without elements; where all of its sizes are declared, of NaN, or of nought for whole numbers."""
        given, left = self.inputs.get(name), self.outputs.get(name)
        if given is None or left is None or given.dims is None or left.dims is None:
            raise InvalidKernel(f"what is carried is an array among inputs and outputs, {name!r} is not", name)
        if given.dtype != left.dtype or len(given.dims) != len(left.dims):
            raise InvalidKernel(f"{name!r} is carried, so {left} among the outputs must be as {given}", name)
        others = {dim for each in self.inputs.values() if each.name != name for dim in each.dims or ()}
        if shared := {dim for dim in given.dims if isinstance(dim, str)} & others:
            raise InvalidKernel(f"{name!r} is carried, so no other input may have its {sorted(map(str, shared))}", name)
        sizes = [dim if isinstance(dim, int) else 0 for dim in given.dims]
        kind = _NATIVE[given.dtype]
        array = np.full(sizes, np.nan if kind.kind == "f" else 0, kind)
        array.flags.writeable = False
        return array

    def _growing(self) -> list[tuple[int, list[str]]]:
        """The outputs whose sizes arguments tell: bytes of what is fixed, and dims. Inputs bound none of them.

        A number may be a size; so may the product of two; and an array of no elements may have any size beside its 0.
        """
        known = self.names
        found = []
        for each in self.outputs.values():
            names = [dim for dim in each.dims or () if isinstance(dim, str)]
            if names and known.issuperset(names):
                fixed = math.prod(dim for dim in each.dims or () if isinstance(dim, int))
                found.append((fixed * _NATIVE[each.dtype].itemsize, names))
        return found

    @property
    def names(self) -> frozenset[str]:
        """The dims and scalars that formulas over this signature may use."""
        found: set[str] = set()
        for argument in self.inputs.values():
            if argument.dims is None:
                found.add(argument.name)
            else:
                found.update(dim for dim in argument.dims if isinstance(dim, str))
        return frozenset(found)

    def bind(self, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], Dims]:
        """The kernel's inputs (arrays and numbers, defaults filled in) and the dims that they fix.

        An array that is outside its message stays a Reference, whose dtype and shape are what is checked. Raises
        InvalidArguments naming the argument that is missing, extra, or of the wrong dtype, shape or range.
        """
        self._check_names(arguments)
        inputs: dict[str, Any] = {}
        dims: Dims = {}
        for name, argument, number, least, most in self._forms:
            value = arguments.get(name, argument.default)
            if value is None and name in self.initial:
                value = self.initial[name]
            if type(value) is number and least <= value <= most:  # as it should be, which most are
                inputs[name] = dims[name] = value
            elif argument.dims is None:
                inputs[name] = dims[name] = _scalar(argument, value)
            else:
                array = inputs[name] = _array(argument, value)
                _bind_shape(argument, array.shape, dims)
        if self.limits:
            self._check_limits(dims)
        if self._grown:
            self._check_grown(dims)
        return inputs, dims

    def _check_grown(self, dims: Dims) -> None:
        """TooLarge where the outputs cannot be sent: a few bytes must not make a worker fill its memory."""
        size = sum(fixed * math.prod([dims[name] for name in names]) for fixed, names in self._grown)
        if size > MOST_OUTPUT_BYTES:
            growing = sorted({name for _, names in self._grown for name in names})
            values = ", ".join(f"{name} = {dims[name]:g}" for name in growing)
            raise TooLarge(f"its outputs would take {size:.3g} bytes, the limit is {MOST_OUTPUT_BYTES}; here {values}")

    def check_outputs(self, outputs: Mapping[str, Any], dims: Mapping[str, Any]) -> None:
        """InvalidKernel where outputs are not what the signature declares, for inputs that fix these dims.

        A dim that no input fixes is as long as the data make it, and the same in all outputs.
        """
        if outputs.keys() != self.outputs.keys():
            raise InvalidKernel(f"returned {sorted(outputs)}, and declares {sorted(self.outputs)}")
        known = dict(dims)
        for name, argument in self.outputs.items():
            found = np.asarray(outputs[name])
            if found.dtype != _NATIVE[argument.dtype]:
                raise InvalidKernel(f"returned {name!r} of {found.dtype}, and declares {argument}", name)
            declared = argument.dims or ()
            expected = tuple(
                known.setdefault(dim, size) if isinstance(dim, str) else dim
                for dim, size in zip(declared, found.shape, strict=False)
            )
            if found.ndim != len(declared) or found.shape != expected:
                wanted = ", ".join(
                    f"{dim} = {known[dim]:g}" for dim in declared if isinstance(dim, str) and dim in known
                )
                told = f"returned {name!r} of shape {list(found.shape)}, and declares {argument}"
                raise InvalidKernel(f"{told}{f' with {wanted}' if wanted else ''}", name)

    def dims(self, shapes: Mapping[str, Any]) -> Dims:
        """The dims by declared shapes alone: a list of sizes for an array, the value for a scalar."""
        self._check_names(shapes)
        dims: Dims = {}
        for name, argument in self.inputs.items():
            value = shapes.get(name, argument.default)
            if value is None and name in self.initial:
                value = self.initial[name].shape
            if argument.dims is None:
                dims[name] = _scalar(argument, value)
            elif isinstance(value, list | tuple):
                _bind_shape(argument, tuple(value), dims)
            else:
                raise InvalidArguments(f"the shape of {name!r} must be a list of sizes, not {value!r}", name)
        self._check_limits(dims)
        return dims

    def check(self, name: str, value: Any) -> None:
        """InvalidArguments where a value cannot be this input, whatever the others are."""
        argument = self.inputs[name]
        if argument.dims is None:
            _scalar(argument, value)
        else:
            _bind_shape(argument, _array(argument, value).shape, {})

    def _check_names(self, arguments: Mapping[str, Any]) -> None:
        if arguments.keys() == self.inputs.keys():
            return
        for name in arguments:
            if name not in self.inputs:
                raise InvalidArguments(f"unknown argument {name!r}; the kernel takes {', '.join(self.inputs)}", name)
        for name, argument in self.inputs.items():
            if name not in arguments and argument.default is None and name not in self.initial:
                raise InvalidArguments(f"argument {name!r} is missing; it is {argument}", name)

    def _check_limits(self, dims: Dims) -> None:
        for name, limit in self.limits.items():
            met = limit(dims)
            if not met or math.isnan(met):
                values = ", ".join(f"{key} = {dims[key]:g}" for key in sorted(limit.names))
                raise InvalidArguments(f"argument {name!r} must satisfy {limit.text}; here {values}", name)


def shapes_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the header `shapes` says of arguments: a list of sizes for an array, the value itself for a number."""
    shapes = dict(arguments)
    for name, value in arguments.items():
        if not isinstance(value, (bool, int, float)):
            shapes[name] = list(tensor.shape_of(value, name))
    return shapes


def describe(shapes: Mapping[str, Any]) -> str:
    """Arguments for people and Flower, by what `shapes_of` says of them: sizes and numbers, never the data."""
    parts = [
        f"{name}=[{','.join(map(str, value))}]" if isinstance(value, list) else f"{name}={value!r}"
        for name, value in shapes.items()
    ]
    return f"{{{', '.join(parts)}}}"


def _bind_shape(argument: Argument, shape: tuple[int, ...], dims: Dims) -> None:
    declared = argument.dims or ()
    if len(shape) != len(declared):
        raise InvalidArguments(
            f"argument {argument.name!r} must be {argument}, not of {len(shape)} dimensions {list(shape)}",
            argument.name,
        )
    for dim, size in zip(declared, shape):  # noqa: B905 - as long as each other, and this is done for every job
        if type(size) is not int or not 0 <= size <= tensor.MOST:
            raise InvalidArguments(f"the shape of {argument.name!r} must hold sizes, 0 to 2**63 - 1", argument.name)
        expected = dims.setdefault(dim, size) if type(dim) is str else dim
        if size != expected:
            raise InvalidArguments(
                f"argument {argument.name!r} must be {argument}: {dim} is {expected:g}, here {size}", argument.name
            )


def _array(argument: Argument, value: Any) -> NDArray[Any] | Reference:
    name = argument.name
    by_wire = isinstance(value, tensor.TensorMap)
    if by_wire:
        if value.blob is not None and value.data is None:
            if value.dtype != tensor.DTYPES[argument.dtype].str:
                raise InvalidArguments(f"argument {name!r} must be {argument}, not {value.dtype[:80]!r}", name)
            return Reference(value.dtype, tuple(value.shape), value.blob)
        value = tensor.from_wire(value, name)
    if isinstance(value, np.ndarray):
        if value.dtype != _NATIVE[argument.dtype]:
            raise InvalidArguments(
                f"argument {name!r} must be {argument}, not {value.dtype.name}; use .astype({argument.dtype!r})",
                name,
            )
        return value if by_wire else np.ascontiguousarray(value).reshape(value.shape)
    if not isinstance(value, (list, tuple)):
        raise InvalidArguments(f"argument {name!r} must be {argument}, not {type(value).__name__}", name)
    try:
        array = np.array(value)
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidArguments(f"argument {name!r} must be {argument}: {error}", name) from None
    return _cast(argument, array)


def _cast(argument: Argument, array: NDArray[Any]) -> NDArray[Any]:
    """Numbers from nested lists in the declared dtype, refused where a value would change its meaning."""
    wanted, found = _NATIVE[argument.dtype], array.dtype.kind
    allowed = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[wanted.kind]
    if array.size and found not in allowed:
        raise InvalidArguments(
            f"argument {argument.name!r} must be {argument}; its values are {array.dtype.name}", argument.name
        )
    if array.size and wanted.kind in "iu":
        least, most = _RANGES[argument.dtype]
        if array.min() < least or array.max() > most:
            raise InvalidArguments(f"argument {argument.name!r} holds values that do not fit {wanted}", argument.name)
    with np.errstate(over="ignore"):
        return array.astype(wanted)


def _scalar(argument: Argument, value: Any) -> bool | int | float:
    name, kind = argument.name, _KINDS[argument.dtype]
    if type(value) not in _NUMBERS:
        value = _item(value, name)
    if kind == "f":
        if type(value) is float:
            return value
        if type(value) is int:
            try:
                return float(value)
            except OverflowError:
                raise InvalidArguments(f"argument {name!r} must fit {argument.dtype}, not {value}", name) from None
    elif kind == "b":
        if type(value) is bool:
            return value
    elif type(value) is int:
        least, most = _RANGES[argument.dtype]
        if least <= value <= most:
            return value
        raise InvalidArguments(f"argument {name!r} must fit {argument.dtype}, not {value}", name)
    raise InvalidArguments(f"argument {name!r} must be {argument}, not {value!r:.80}", name)


def _item(value: Any, field: str) -> Any:
    """The number in an array or a tensor map of no dims; anything else as it is."""
    if isinstance(value, tensor.TensorMap):
        value = tensor.from_wire(value, field)
    return value.item() if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0 else value
