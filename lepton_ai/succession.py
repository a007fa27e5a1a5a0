"""Celery's canvas as a job sees it: what it gets from the jobs before it, and what is to follow it.

Celery gives a result to the next task as its first positional argument, and kernels take arguments by name. `inherit`
is the rule between the two; `sequel_of` reads what Celery asks to follow. Both are pure: sending is queues/canvas.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import msgspec
import numpy as np

from lepton_ai.errors import InvalidArguments, OptionNotSupported
from lepton_ai.job import Meta
from lepton_ai.signature import Signature
from lepton_ai.tensor import TensorMap, from_wire
from lepton_ai.wire import Body, Headers, Value

__all__ = ["PUT_OFF_S", "Canvas", "FollowUps", "Sequel", "inherit", "sequel_of"]

Outputs = Mapping[str, Any]
#: How long a job waits whose follow-ups a full broker has no memory for, in seconds.
PUT_OFF_S: Final = 5.0
#: What may stand in `args`: a value, a kernel's outputs by name, or, for a chord's body, a list of either.
_FORMS: Final = (Value, dict[str, Value], list[Value], list[dict[str, Value]])
#: Each costs about a millisecond, and whoever ends the job makes them all at once.
_MOST_SIGNATURES: Final = 500
_ASKED: Final = frozenset({"callbacks", "errbacks", "chain", "chord"})


class Sequel(msgspec.Struct):
    """What is to follow a job, and where the job stands in Celery's canvas. Signatures are Celery's plain maps."""

    id: str
    root_id: str
    group: str | None = None
    group_index: int | None = None
    keep: bool = True
    """False where the caller asked to ignore the result."""
    callbacks: list[dict[str, Any]] = []
    """`link`: sent with the result where the job succeeds."""
    errbacks: list[dict[str, Any]] = []
    """`link_error`: sent with the job's id where it fails."""
    chain: list[dict[str, Any]] = []
    """The rest of its chain, the next one last."""
    chord: dict[str, Any] | None = None
    """The body of the chord whose header it is in."""


class FollowUps(msgspec.Struct, frozen=True):
    """What the end of a job sets off, to be sent by the step that ends it."""

    pushes: tuple[tuple[str, bytes], ...] = ()
    """Redis lists and the messages to be LPUSHed to them, in order."""
    children: tuple[Any, ...] = ()
    """For `Meta.children`, in Celery's form: who follows."""
    chord_part: bytes | None = None
    """What is left for `Canvas.finish` afterwards."""


class Canvas(Protocol):
    """Who makes messages of what is to follow. Both raise Unavailable, and `after_success` InvalidRequest."""

    def after_success(self, sequel: Sequel, outputs: Outputs) -> FollowUps: ...

    def after_failure(self, sequel: Sequel, failure: Meta) -> FollowUps: ...

    def finish(self, part: bytes) -> bool:
        """Counts a committed part of a chord; False where it has to be called again."""


def sequel_of(headers: Headers, embed: Any) -> Sequel | None:
    """What is to follow a job, None where nothing is.

    Raises OptionNotSupported where Celery asks for what we do not know, InvalidArguments where it is no signature.
    """
    if not embed:
        return None
    if not isinstance(embed, dict):
        raise OptionNotSupported(f"the third part of the body is a map, not {embed!r:.80}", "callbacks")
    if not any(embed.values()):
        return None
    asked = {name: value for name, value in embed.items() if value}
    if unknown := asked.keys() - _ASKED:
        raise OptionNotSupported(f"the body asks for {', '.join(map(str, unknown))}, which is not known", "callbacks")
    place = {
        "id": headers.id,
        "root_id": headers.root_id or headers.id,
        "group": headers.group,
        "group_index": headers.group_index,
        "keep": not headers.ignore_result,
    }
    if any(isinstance(each, list) and len(each) > _MOST_SIGNATURES for each in asked.values()):
        raise OptionNotSupported(f"a job may set off {_MOST_SIGNATURES} signatures of a kind at most", "callbacks")
    try:
        return msgspec.convert(place | asked, Sequel)
    except msgspec.ValidationError as error:
        raise InvalidArguments(f"what is to follow the job cannot be read: {error}", "callbacks") from None


def inherit(signature: Signature, body: Body) -> dict[str, Any]:
    """A job's arguments by name: those that were given, and what the jobs before it gave.

    Outputs that are called as an input is go to that input; else a single output goes to the single input that is
    missing. What was given by name wins. A result without names goes to the single missing input; of a list of results
    (a chord's) each input gets them stacked along a new first axis. Raises InvalidArguments where nothing fits.
    """
    if not body.args:
        return body.kwargs
    if len(body.args) > 1:
        raise InvalidArguments("arguments are given by name (kwargs); only a result goes before them", "args")
    found = _typed(body.args[0])
    if isinstance(found, dict):
        return _by_name(signature, body.kwargs, found)
    if isinstance(found, list) and found and isinstance(found[0], dict):
        return _by_name(signature, body.kwargs, _stacked_by_name(found))
    value = _stacked(found, "args") if _has_tensors(found) else found
    missing = _missing(signature, body.kwargs)
    if len(missing) != 1:
        raise _unfitting(signature, missing, "a result without names")
    return body.kwargs | {missing[0]: value}


def _typed(value: Any) -> Any:
    for form in _FORMS:
        try:
            return msgspec.convert(value, form)
        except msgspec.ValidationError:
            continue
    raise InvalidArguments(
        "a kernel takes numbers, nested lists of them and tensor maps, by name or in a list, from the job before it,"
        f" not {value!r:.80}",
        "args",
    )


def _by_name(signature: Signature, given: Mapping[str, Any], outputs: Outputs) -> dict[str, Any]:
    taken = {name: value for name, value in outputs.items() if name in signature.inputs}
    arguments: dict[str, Any] = {**taken, **given}
    missing = _missing(signature, arguments)
    if len(outputs) == len(missing) == 1 and not taken:
        return arguments | {missing[0]: next(iter(outputs.values()))}
    if missing or not taken:
        raise _unfitting(signature, missing, ", ".join(outputs) or "nothing")
    return arguments


def _missing(signature: Signature, arguments: Mapping[str, Any]) -> list[str]:
    return [name for name, each in signature.inputs.items() if each.default is None and name not in arguments]


def _unfitting(signature: Signature, missing: list[str], given: str) -> InvalidArguments:
    if not missing:
        return InvalidArguments(
            f"the job before gave {given}, which is none of {', '.join(signature.inputs)}, and nothing is missing; an"
            " immutable signature (.si) would not get it",
            "args",
        )
    wanted = ", ".join(f"{name} ({signature.inputs[name]})" for name in missing)
    return InvalidArguments(f"the job before gave {given}; missing is {wanted}", missing[0])


def _stacked_by_name(results: list[Outputs]) -> Outputs:
    """The outputs that all of a chord's results have, each stacked."""
    names = [name for name in results[0] if all(name in each for each in results)]
    return {name: _stacked([each[name] for each in results], name) for name in names}


def _has_tensors(found: Any) -> bool:
    return isinstance(found, list) and any(isinstance(each, TensorMap) for each in found)


def _stacked(values: list[Any], field: str) -> Any:
    """Values along a new first axis: one array where all came as tensor maps, else nested lists."""
    if not values or not all(isinstance(each, TensorMap) for each in values):
        return [from_wire(each, field).tolist() if isinstance(each, TensorMap) else each for each in values]
    arrays = [from_wire(each, field) for each in values]
    if len({(each.shape, each.dtype) for each in arrays}) > 1:
        shapes = ", ".join(f"{each.dtype}{list(each.shape)}" for each in arrays[:8])
        raise InvalidArguments(f"the results for {field!r} differ and cannot be stacked: {shapes}", field)
    return np.stack(arrays)
