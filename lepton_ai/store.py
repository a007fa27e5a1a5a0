"""Arrays on a store of the user's own: `s3://`, or whatever else fsspec knows, named in a job instead of being sent.

    from lepton_ai import store

    image = store.put(array, "s3://bucket/scans/17.npy")      # or store.find("s3://bucket/scans/17.npy")
    client.submit("medical.otsu", {"image": image})

What is there stays the user's: Lepton reads it when the job runs and never deletes it. A worker reads only what is
below one of the prefixes in its LEPTON_STORES. Objects are NumPy's files where they are called `.npy`, else the array's
bytes, little-endian and in C order. Where a store is and who asks is fsspec's to know, by its own settings and the
store's (`FSSPEC_S3_ENDPOINT_URL`, `AWS_PROFILE`, ...).
"""

from __future__ import annotations

import io
import stat
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lepton_ai import blob, tensor
from lepton_ai.blob import InStore, Reference
from lepton_ai.errors import BlobLost, InvalidArguments, LeptonError, MissingPackage

__all__ = ["find", "put", "read"]

#: Bytes in which the header of any .npy file ends that we accept; NumPy's own are 128 long.
_HEADER_BYTES: Final = 4096


def put(array: NDArray[Any], url: str) -> Reference:
    """Writes an array to `url`, over whatever is there, and returns what stands for it among a job's arguments.

    Raises InvalidArguments where its dtype cannot be sent, it has no elements, or the URL is none of a store; BlobLost
    where the store cannot be opened; OSError and its kin as the store does.
    """
    wire = tensor.to_wire(array)
    reference = _checked(Reference(wire.dtype, tuple(wire.shape), url))
    assert wire.data is not None
    data = bytes(wire.data.cast("B"))
    if url.endswith(".npy"):
        buffer = io.BytesIO()
        np.save(buffer, np.frombuffer(data, wire.dtype).reshape(wire.shape), allow_pickle=False)
        data = buffer.getvalue()
    system, path = _opened(url)
    system.pipe_file(path, data)
    return reference


def find(url: str, dtype: str | None = None, shape: Sequence[int] | None = None) -> Reference:
    """What stands for an array that is at `url` already; its dtype and shape are in the file if that is a `.npy`.

    Raises BlobLost where nothing can be read there, InvalidArguments where that is no array which could be sent.
    """
    if dtype is not None and shape is not None:
        known = tensor.DTYPES.get(dtype)
        if known is None:
            raise InvalidArguments(f"unknown dtype {dtype!r}; use one of {', '.join(tensor.DTYPES)}", "dtype")
        return _checked(Reference(known.str, tuple(shape), url))
    if not url.endswith(".npy"):
        raise InvalidArguments(f"say the dtype and the shape of {url}: only .npy files have them inside", "dtype")
    (head,) = _read([(url, _HEADER_BYTES)])
    if isinstance(head, LeptonError):
        raise head
    header = _header(head, url)
    return _checked(Reference(header[0].str, header[1], url))


def read(references: Sequence[Reference], limit_bytes: int) -> list[NDArray[Any] | LeptonError]:
    """The arrays, read-only, or why each cannot be had: all of one store at once, and never more than they say."""
    sizes = [blob.layout(each, limit_bytes) for each in references]
    asked = [
        (each.blob, size + (_HEADER_BYTES if each.blob.endswith(".npy") else 0) + 1)
        for each, (_, size) in zip(references, sizes, strict=True)
    ]
    return [
        data if isinstance(data, LeptonError) else _array(reference, dtype, size, data)
        for reference, (dtype, size), data in zip(references, sizes, _read(asked), strict=True)
    ]


def _array(reference: Reference, dtype: np.dtype[Any], size: int, data: bytes) -> NDArray[Any] | LeptonError:
    url, start = reference.blob, 0
    if url.endswith(".npy"):
        try:
            found, shape, start = _header(data, url)
        except InvalidArguments as error:
            return error
        if (found, shape) != (dtype, reference.shape):
            return InvalidArguments(
                f"{url} holds {found.name}{list(shape)}, and {dtype.name}{list(reference.shape)} is said"
            )
    if len(data) - start != size:
        more = "more than " if len(data) - start > size else ""
        return InvalidArguments(f"{url} has {more}{min(len(data) - start, size)} bytes, {size} are said")
    return blob.array_of(reference, dtype, memoryview(data)[start:])


def _header(data: bytes, url: str) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """The dtype and shape in a .npy file, and where its data begin; InvalidArguments where it is none that we take."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
    except Exception as error:  # noqa: BLE001 - of a hostile header NumPy's parser raises TypeError, TokenError and more
        raise InvalidArguments(f"{url} is no .npy file: {_told(error)}") from None
    if dtype.str not in {each.str for each in tensor.DTYPES.values()} or (fortran and len(shape) > 1):
        order = "Fortran" if fortran else "C"
        raise InvalidArguments(f"{url} holds {dtype.str} in {order} order: numbers, little-endian, in C order are read")
    return dtype, shape, file.tell()


def _checked(reference: Reference) -> Reference:
    """InvalidArguments where this cannot stand for an array on a store."""
    if not isinstance(blob.place_of(reference, "url"), InStore):
        raise InvalidArguments(f"{reference.blob!r} is not on a store", "url")
    blob.layout(reference, tensor.MOST)
    return reference


def _opened(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there; fsspec keeps one for all calls. BlobLost where none opens."""
    try:
        import fsspec
    except ModuleNotFoundError:
        raise MissingPackage("arrays on a store need fsspec: pip install 'lepton-ai[store]'") from None
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:  # of the package for this kind of store
        raise MissingPackage(f"{url}: {error}") from None
    except Exception as error:  # noqa: BLE001 - what the constructor of a file system raises is its own to choose
        raise _lost(url, error) from None
    return system, path


def _require_regular(system: Any, path: str, url: str) -> None:
    """BlobLost where a local path is no regular file: a FIFO or a device could hold its reader for ever."""
    from fsspec.implementations.local import LocalFileSystem

    if not isinstance(system, LocalFileSystem):
        return
    try:
        mode = Path(path).stat().st_mode
    except (OSError, ValueError) as error:
        raise _lost(url, error) from None
    if not stat.S_ISREG(mode):
        raise BlobLost(f"{url} is no regular file; of local files only those are read")


def _read(asked: Sequence[tuple[str, int]]) -> list[bytes | LeptonError]:
    """At most so many bytes from the start of each URL, or why not."""
    found: list[bytes | LeptonError] = [BlobLost("not asked for")] * len(asked)
    systems: dict[int, tuple[Any, list[tuple[int, str, int]]]] = {}
    for at, (url, most) in enumerate(asked):
        try:
            system, path = _opened(url)
            _require_regular(system, path, url)
            systems.setdefault(id(system), (system, []))[1].append((at, path, most))
        except LeptonError as error:
            found[at] = error
    for system, parts in systems.values():
        paths, ends = [path for _, path, _ in parts], [most for _, _, most in parts]
        try:
            answers = list(zip(parts, system.cat_ranges(paths, [0] * len(paths), ends, on_error="return"), strict=True))
        except Exception as error:  # noqa: BLE001 - what fsspec and the libraries under it raise is theirs to choose
            answers = [(part, error) for part in parts]
        for (at, _, _), answer in answers:
            found[at] = bytes(answer) if isinstance(answer, bytes | bytearray) else _lost(asked[at][0], answer)
    return found


def _lost(url: str, error: BaseException) -> BlobLost:
    if isinstance(error, FileNotFoundError):
        return BlobLost(f"nothing is at {url}")
    return BlobLost(f"{url} cannot be read: {_told(error)}")


def _told(error: BaseException) -> str:
    """An error's type and text; others' exceptions may raise while they are printed, which this stands."""
    return "".join(traceback.format_exception_only(error)).strip()
