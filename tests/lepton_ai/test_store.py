from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from lepton_ai import blob, store, tensor
from lepton_ai.blob import InStore, Reference
from lepton_ai.errors import BlobLost, InvalidArguments, TooLarge

fsspec = pytest.importorskip("fsspec", reason="needs the extra `store`")
AbstractFileSystem: Any = fsspec.AbstractFileSystem
MOST = 2**20


@pytest.fixture(params=["file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on a store."""
    if request.param == "file":
        return f"file://{tmp_path}"
    return str(request.getfixturevalue("bucket"))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on a server of the test's own, which fsspec is told of as its users are: by the environment."""
    moto = pytest.importorskip("moto.server", reason="needs moto")
    pytest.importorskip("s3fs", reason="needs s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    before = {name: os.environ.get(name) for name in keys}
    os.environ.update(keys)
    fsspec.config.conf["s3"] = {"endpoint_url": f"http://{host}:{port}"}
    try:
        fsspec.filesystem("s3").mkdir("scans")
        yield "s3://scans/lepton"
    finally:
        del fsspec.config.conf["s3"]
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        server.stop()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def one(reference: Reference, limit_bytes: int = MOST) -> Any:
    (found,) = store.read([reference], limit_bytes)
    return found


@pytest.mark.parametrize("dtype", tensor.DTYPES)
@pytest.mark.parametrize("name", ["a.npy", "a.bin"])
def test_what_is_put_is_read_as_it_was(root: str, name: str, dtype: str) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    reference = store.put(array, f"{root}/{name}")
    found = one(reference)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    assert not found.flags.writeable


def test_strided_and_big_endian_arrays_are_put_too(root: str) -> None:
    array = np.arange(24, dtype=">i4").reshape(4, 6)[::2, ::3]
    np.testing.assert_array_equal(one(store.put(array, f"{root}/a.npy")), array)
    np.testing.assert_array_equal(one(store.put(array, f"{root}/a")), array)


def test_many_are_read_at_once_and_each_fault_is_its_own(root: str) -> None:
    arrays = [np.full(5, at, np.float32) for at in range(20)]
    references: list[Reference] = [store.put(each, f"{root}/{at}.npy") for at, each in enumerate(arrays)]
    references.insert(7, Reference("<f4", (5,), f"{root}/none.npy"))
    found = store.read(references, MOST)
    assert isinstance(found[7], BlobLost)
    assert f"nothing is at {root}/none.npy" in found[7].message
    np.testing.assert_array_equal(found[:7] + found[8:], arrays)


def test_a_file_says_itself_what_it_holds(root: str) -> None:
    put = store.put(np.ones((3, 2)), f"{root}/a.npy")
    assert store.find(f"{root}/a.npy") == put
    raw = store.put(np.ones((3, 2)), f"{root}/a.raw")
    assert store.find(f"{root}/a.raw", "float64", (3, 2)) == raw
    with pytest.raises(InvalidArguments, match="say the dtype and the shape"):
        store.find(f"{root}/a.raw")
    with pytest.raises(BlobLost, match="nothing is at"):
        store.find(f"{root}/b.npy")


@pytest.mark.parametrize("name", ["a.npy", "a.bin"])
@pytest.mark.parametrize(("dtype", "shape"), [("<f8", (2,)), ("<f8", (4,)), ("<i8", (3,)), ("<f4", (3,))])
def test_what_is_not_what_the_reference_says_is_refused(
    root: str, name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    store.put(np.ones(3), f"{root}/{name}")
    found = one(Reference(dtype, shape, f"{root}/{name}"))
    if (name, dtype) == ("a.bin", "<i8"):  # bytes have no type
        assert found.shape == shape
    else:
        assert isinstance(found, InvalidArguments)
        assert f"{root}/{name}" in found.message


def npy(header: str) -> bytes:
    """A .npy file with this for a header."""
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize("header", ["{[]: 1}", "-" * 3000 + "1", "(" * 900, "{", "1j", "\0"])
def test_a_header_that_numpy_stumbles_over_is_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.npy").write_bytes(npy(header))
    url = f"file://{tmp_path}/a.npy"
    found = one(Reference("<f8", (2, 3), url))
    assert isinstance(found, InvalidArguments)
    assert f"{url} is no .npy file" in found.message
    with pytest.raises(InvalidArguments):
        store.find(url)


@pytest.mark.parametrize(
    "made",
    [
        b"",
        b"\x93NUMPY",
        b"no array at all",
        np.asfortranarray(np.ones((2, 3))),
        np.ones(3, ">f8"),
        np.ones(3, complex),
        np.array(["text"]),
        np.array([{"an": "object"}], object),
    ],
    ids=["empty", "cut", "other", "fortran", "big-endian", "complex", "text", "pickle"],
)
def test_files_that_no_kernel_could_read_are_refused(tmp_path: Path, made: Any) -> None:
    data = made
    if isinstance(made, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, made, allow_pickle=True)
        data = buffer.getvalue()
    (tmp_path / "a.npy").write_bytes(data)
    url = f"file://{tmp_path}/a.npy"
    assert isinstance(one(Reference("<f8", (2, 3), url)), InvalidArguments)
    with pytest.raises(InvalidArguments):
        store.find(url)


def test_nothing_above_the_limit_is_read(tmp_path: Path) -> None:
    reference = store.put(np.ones(100), f"file://{tmp_path}/a.npy")
    with pytest.raises(TooLarge):
        store.read([reference], 799)
    assert one(reference, 800).shape == (100,)


def test_a_store_that_cannot_be_reached_is_told_and_not_raised() -> None:
    assert isinstance(one(Reference("<f8", (2,), "nosuch://bucket/a.npy")), Exception)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise KeyError


class Broken(AbstractFileSystem):  # type: ignore[misc]
    """A file system whose library raises what it likes, and answers as it likes."""

    protocol = "broken"
    cachable = False
    raises_when_opened: BaseException | None = None
    answers: ClassVar[list[Any] | None] = None

    def __init__(self) -> None:
        super().__init__()
        if self.raises_when_opened is not None:
            raise self.raises_when_opened

    def cat_ranges(self, paths: Any, starts: Any, ends: Any, *_: Any, **__: Any) -> Any:
        if self.answers is None:
            raise Unprintable
        return self.answers


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> type[Broken]:
    fsspec.register_implementation("broken", Broken, clobber=True)
    monkeypatch.setattr(Broken, "raises_when_opened", None)
    monkeypatch.setattr(Broken, "answers", None)
    return Broken


@pytest.mark.parametrize("error", [KeyError("region"), TypeError("no key"), Unprintable(), RecursionError()])
def test_whatever_a_store_raises_when_it_is_opened_its_arrays_are_lost(broken: type[Broken], error: Exception) -> None:
    broken.raises_when_opened = error
    found = one(Reference("<f8", (2,), "broken://bucket/a.npy"))
    assert isinstance(found, BlobLost)
    assert "broken://bucket/a.npy" in found.message
    assert type(error).__name__ in found.message
    with pytest.raises(BlobLost):
        store.find("broken://bucket/a.npy")


@pytest.mark.parametrize("answers", [None, [], [b"", b""]], ids=["raises", "none", "too-many"])
def test_whatever_a_store_does_when_it_is_read_its_arrays_are_lost(broken: type[Broken], answers: Any) -> None:
    broken.answers = answers
    found = one(Reference("<f8", (2,), "broken://bucket/a"))
    assert isinstance(found, BlobLost)
    assert "broken://bucket/a" in found.message


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["a.npy", "a.bin"])
def test_of_local_files_only_regular_ones_are_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / name)
    for url in (f"file://{tmp_path}/{name}", f"local://{tmp_path}/{name}", f"file://{tmp_path}/link"):
        found = one(Reference("<f8", (2,), url))
        assert isinstance(found, BlobLost)
        assert f"{url} is no regular file" in found.message


def test_one_file_that_is_not_regular_costs_the_others_nothing(tmp_path: Path) -> None:
    reference = store.put(np.ones(3), f"file://{tmp_path}/a.npy")
    device, array = store.read([Reference("<f8", (3,), "file:///dev/zero"), reference], MOST)
    assert isinstance(device, BlobLost)
    np.testing.assert_array_equal(array, np.ones(3))


@pytest.mark.skipif(os.geteuid() == 0 or not sys.platform.startswith("linux"), reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    reference = store.put(np.ones(3), f"file://{tmp_path}/a.npy")
    (tmp_path / "a.npy").chmod(0)
    assert isinstance(one(reference), BlobLost)


@pytest.mark.parametrize(
    "url",
    [
        "a.npy",
        "s3://",
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/../a.npy",
        "s3://bucket/a/./b.npy",
        "s3://bucket/%2e%2e/a.npy",
        "s3://key:secret@bucket/a.npy",
        "http://host/a.npy?token=1",
        "s3://bucket/a b.npy",
        "s3://bucket/a::file://b",
        "S3://bucket/a.npy",
        "s3://bucket/" + "a" * 1024,
        "redis:0123456789abcdef:1",
    ],
)
def test_what_is_no_plain_place_on_a_store_is_refused(url: str) -> None:
    with pytest.raises(InvalidArguments):
        store.put(np.ones(3), url)


@pytest.mark.parametrize(
    ("url", "prefixes", "is_below"),
    [
        ("s3://bucket/scans/a.npy", ["s3://bucket/scans"], True),
        ("s3://bucket/scans/a.npy", ["s3://bucket/scans/"], True),
        ("s3://bucket/scans/a.npy", ["s3://other", "s3://bucket"], True),
        ("s3://bucket/scans2/a.npy", ["s3://bucket/scans"], False),
        ("s3://bucket2/a.npy", ["s3://bucket"], False),
        ("file:///etc/a.npy", ["s3://bucket"], False),
        ("s3://bucket/a.npy", [], False),
    ],
)
def test_a_prefix_is_a_folder(url: str, prefixes: list[str], is_below: bool) -> None:
    place = blob.place_of(Reference("<f8", (1,), url))
    assert isinstance(place, InStore)
    assert place.is_below(prefixes) == is_below


def test_arrays_of_no_elements_and_of_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArguments, match="sizes"):
        store.put(np.ones((0, 3)), f"file://{tmp_path}/a.npy")
    with pytest.raises(InvalidArguments, match="cannot be sent"):
        store.put(np.ones(3, complex), f"file://{tmp_path}/a.npy")
