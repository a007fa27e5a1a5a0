from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lepton_ai.errors import InvalidSettings
from tasks import philox
from tasks.driver import Driver, open_device

# Of the authors' own tests (Random123, kat_vectors, philox4x32 with 10 rounds): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
known = pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
Words = tuple[int, ...]
#: Words from one end to the other, with those where a turn's quarters and eighths meet.
EDGES = np.unique(
    [(at + step) % 2**32 for at in range(0, 2**32, 2**29) for step in (-1, 0, 1)]
    + list(np.random.default_rng(0).integers(0, 2**32, 1000))
).astype(np.uint64)


def reference_pair(length: NDArray[Any], angle: NDArray[Any]) -> tuple[Any, Any]:
    radius, turn = np.sqrt(-2 * np.log((length + 0.5) / 2**32)), 2 * np.pi * (angle + 0.5) / 2**32
    return radius * np.cos(turn), radius * np.sin(turn)


def opened(kind: str) -> Driver:
    try:
        return open_device(kind, slots=1)
    except (ImportError, InvalidSettings) as error:
        pytest.skip(f"no {kind} device opens here: {error}")


@known
def test_numpy_makes_the_words_of_the_paper(counter: Any, key: Any, expected: Words) -> None:
    assert tuple(map(int, philox.words(counter, key))) == expected


@known
def test_the_unrolled_rounds_make_them_too(counter: Any, key: Any, expected: Words) -> None:
    assert tuple(map(int, philox.philox4x32(*map(np.uint64, (*counter, *key))))) == expected


@known
def test_numba_makes_them_too(counter: Any, key: Any, expected: Words) -> None:
    from numba import njit

    philox.prepare()
    assert tuple(map(int, njit(philox.philox4x32)(*map(np.uint64, (*counter, *key))))) == expected


@known
def test_jax_makes_them_too(counter: Any, key: Any, expected: Words) -> None:
    opened("tpu")
    import jax

    made = jax.jit(philox.philox4x32)(*map(np.uint64, (*counter, *key)))
    assert tuple(map(int, made)) == expected


@known
def test_opencl_makes_them_too(counter: Any, key: Any, expected: Words) -> None:
    device: Any = opened("fpga")
    source = (
        philox.OPENCL
        + """
    __kernel __attribute__((reqd_work_group_size(1, 1, 1)))
    void words_of(ulong c0, ulong c1, ulong c2, ulong c3, ulong k0, ulong k1, __global ulong* made) {
      ulong4 c[4] = {(ulong4)(c0), (ulong4)(c1), (ulong4)(c2), (ulong4)(c3)};
      philox4x32(c, k0, k1);
      for (int i = 0; i < 4; i++) vstore4(c[i], i, made);
    }
    """
    )
    made = device.empty((4, 4), np.uint64)
    device.program(source, "philox.words").launch("words_of", (1,), *map(np.uint64, (*counter, *key)), made)
    device.synchronize()
    assert [tuple(map(int, lane)) for lane in device.download(made).T] == [expected] * 4


def test_numba_makes_the_normals_of_the_definition() -> None:
    from numba import njit

    philox.prepare()
    normal_pair = philox.normal_pair

    @njit
    def pairs(lengths: Any, angles: Any, made: Any) -> None:
        for i in range(lengths.size):
            made[0, i], made[1, i] = normal_pair(lengths[i], angles[i])

    lengths, angles = (grid.ravel() for grid in np.meshgrid(EDGES[::7], EDGES))
    made = np.empty((2, lengths.size))
    pairs(lengths, angles, made)
    np.testing.assert_allclose(made, reference_pair(lengths, angles), rtol=0, atol=1e-12)


def test_opencl_makes_the_normals_of_the_definition() -> None:
    device: Any = opened("fpga")
    source = (
        philox.OPENCL
        + """
    __kernel __attribute__((reqd_work_group_size(1, 1, 1)))
    void pairs(__global const ulong* lengths, __global const ulong* angles, __global double* made, int size) {
      for (int i = 0; i < size; i++) {
        double4 first, second;
        normal_pair((ulong4)(lengths[i]), (ulong4)(angles[i]), &first, &second);
        made[i] = first.x;
        made[size + i] = second.w;
      }
    }
    """
    )
    lengths, angles = (grid.ravel() for grid in np.meshgrid(EDGES[::7], EDGES))
    made = device.empty((2, lengths.size), np.float64)
    arguments = device.upload(lengths), device.upload(angles), made, np.int32(lengths.size)
    device.program(source, "philox.pairs").launch("pairs", (1,), *arguments)
    device.synchronize()
    np.testing.assert_allclose(device.download(made), reference_pair(lengths, angles), rtol=0, atol=1e-12)


def test_the_other_forms_make_the_normals_of_the_definition() -> None:
    lengths, angles = (grid.ravel() for grid in np.meshgrid(EDGES[::7], EDGES))
    expected = reference_pair(lengths, angles)
    opened("tpu")
    np.testing.assert_allclose(philox.normal_pair_jax(lengths, angles), expected, rtol=0, atol=1e-12)
    made = [philox.normal_pair_cuda(*pair) for pair in zip(lengths[:2000], angles[:2000], strict=True)]
    np.testing.assert_allclose(np.transpose(made), np.array(expected)[:, :2000], rtol=0, atol=1e-12)


def test_normals_have_the_moments_of_normals_and_no_correlation() -> None:
    drawn = philox.normals(1, 50_000, 6)
    # Five deviations of each estimate.
    assert np.abs(drawn.mean(axis=0)).max() < 5 / np.sqrt(50_000)
    assert np.abs((drawn**2).mean(axis=0) - 1).max() < 5 * np.sqrt(2 / 50_000)
    assert np.abs((drawn**4).mean(axis=0) - 3).max() < 5 * np.sqrt(96 / 50_000)
    assert np.abs(np.corrcoef(drawn.T) - np.eye(6)).max() < 5 / np.sqrt(50_000)


def test_no_normal_is_beyond_the_most() -> None:
    furthest, _ = reference_pair(np.array([0]), np.array([0]))
    assert 6.7 < furthest[0] < philox.MOST


def test_seeds_and_rows_draw_other_numbers_and_more_columns_the_same() -> None:
    drawn = philox.normals(7, 100, 5)
    np.testing.assert_array_equal(philox.normals(7, 200, 9)[:100, :5], drawn)
    assert not np.isclose(philox.normals(-7, 100, 5), drawn).any()
    assert not np.isclose(philox.normals(7 + 2**32, 100, 5), drawn).any()
    assert len(np.unique(drawn)) == drawn.size
