"""State that jobs carry from one to the next by key, for kernels that say what they carry. Without any I/O.

A kernel's `carries` are inputs that are outputs too. A job with a `state_key` gets what the last one of that key left,
and its own replaces it in the step that ends it, so each job counts once. It is kept in the broker, as a hash:

    lepton:carried:<lane>:<kernel>:<state key>      version: changes with every job; value: msgpack, tensor maps by name
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lepton_ai import tensor
from lepton_ai.errors import InvalidArguments, LeptonError, OptionNotSupported, TooLarge
from lepton_ai.signature import Signature
from lepton_ai.tensor import TensorMap

__all__ = ["NONE_YET", "State", "check_state", "decode", "encode", "read"]

#: What a kernel carries, by name.
State = dict[str, NDArray[Any]]
#: The version of a state that is not there.
NONE_YET = ""
_DECODER = msgspec.msgpack.Decoder(dict[str, TensorMap])


def check_state(kernel: str, carries: Collection[str], state_key: str | None, arguments: Collection[str]) -> None:
    """Raises where a job asks for a state that its kernel does not carry, or brings what is carried beside it."""
    if state_key is None:
        return
    if not carries:
        raise OptionNotSupported(f"{kernel} carries no state from job to job", "state_key")
    for name in carries:
        if name in arguments:
            raise InvalidArguments(f"{name!r} is carried by the state key: leave it out", name)


def encode(outputs: Mapping[str, NDArray[Any]], limit_bytes: int) -> bytes:
    """What a job leaves, as the broker keeps it; TooLarge above the limit."""
    encoded = msgspec.msgpack.encode({name: tensor.to_wire(np.asarray(value)) for name, value in outputs.items()})
    if len(encoded) > limit_bytes:
        raise TooLarge(f"the state takes {len(encoded)} bytes, the limit is {limit_bytes}", "state_key")
    return encoded


def read(value: bytes | None) -> State | None:
    """What a state holds, by name, None where there is none; InvalidArguments where no release of ours has left it."""
    if value is None:
        return None
    try:
        return _arrays(value)
    except (LeptonError, msgspec.DecodeError) as error:
        raise InvalidArguments(f"what stands there is no state: {error}", "state_key") from None


def decode(value: bytes | None, signature: Signature) -> State:
    """What the last job left, or what the first begins with.

    InvalidArguments where it is not what the kernel carries: it was left by another release of it.
    """
    if value is None:
        return dict(signature.initial)
    try:
        found = _arrays(value)
        if found.keys() != signature.initial.keys():
            raise InvalidArguments(f"it holds {', '.join(sorted(found))}")
        for name, array in found.items():
            signature.check(name, array)
    except (LeptonError, msgspec.DecodeError) as error:
        told = f"what the state key's last job left does not fit: {error}; use another key"
        raise InvalidArguments(told, "state_key") from None
    return found


def _arrays(value: bytes) -> State:
    """What `encode` made of them."""
    return {name: tensor.from_wire(each) for name, each in _DECODER.decode(value).items()}
