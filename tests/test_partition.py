# SPDX-License-Identifier: Apache-2.0
"""How a call's pixels become tasks: all are covered, tiles stay within bounds, threads get equal work."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tvmdcn.partition import partition

CALLS = {
    "pixels": st.integers(1, 3000) | st.integers(1, 1 << 30),
    "granule": st.integers(1, 64),
    "max_tile_units": st.integers(1, 64),
    "batch": st.integers(0, 40),
    "threads": st.integers(1, 130),
}


@given(**CALLS)
@example(pixels=1, granule=24, max_tile_units=8, batch=0, threads=1)
@example(pixels=24 * 8, granule=24, max_tile_units=8, batch=1, threads=2)
def test_tiles_cover_the_image_and_none_is_empty(
    pixels: int, granule: int, max_tile_units: int, batch: int, threads: int
) -> None:
    tiles, tile_units = partition(pixels, granule, max_tile_units, batch, threads)
    assert tiles * tile_units * granule >= pixels
    assert (tiles - 1) * tile_units * granule < pixels


@given(**CALLS)
def test_tiles_are_within_bounds(pixels: int, granule: int, max_tile_units: int, batch: int, threads: int) -> None:
    tiles, tile_units = partition(pixels, granule, max_tile_units, batch, threads)
    units = math.ceil(pixels / granule)
    assert 1 <= tile_units <= min(max_tile_units, units)
    assert 1 <= tiles <= units
    assert type(tiles) is type(tile_units) is int


def busiest(pixels: int, granule: int, tile_units: int, batch: int, threads: int) -> int:
    """Return the units that the thread with the most tasks computes."""
    tiles = math.ceil(math.ceil(pixels / granule) / tile_units)
    return math.ceil(max(batch, 1) * tiles / threads) * tile_units


@given(**CALLS)
def test_busiest_thread_has_little_more_than_its_share(
    pixels: int, granule: int, max_tile_units: int, batch: int, threads: int
) -> None:
    tiles, tile_units = partition(pixels, granule, max_tile_units, batch, threads)
    found = busiest(pixels, granule, tile_units, batch, threads)
    # Its share of the tasks, rounded up to a whole task: of tiles that are all of one size none does better.
    assert found < max(batch, 1) * tiles * tile_units / threads + tile_units


@given(**{**CALLS, "pixels": st.integers(1, 20_000)})
def test_no_other_size_is_better_where_it_matters(
    pixels: int, granule: int, max_tile_units: int, batch: int, threads: int
) -> None:
    _, tile_units = partition(pixels, granule, max_tile_units, batch, threads)
    units = math.ceil(pixels / granule)
    found = busiest(pixels, granule, tile_units, batch, threads)
    sizes = range(1, min(max_tile_units, units) + 1)
    best = min(busiest(pixels, granule, size, batch, threads) for size in sizes)
    if units <= 8 * max_tile_units * threads:
        assert found == best
        larger = range(tile_units + 1, sizes[-1] + 1)
        assert all(busiest(pixels, granule, size, batch, threads) > found for size in larger)
    else:  # many tasks: sizes below half the largest are not looked at, as all are nearly balanced
        assert tile_units >= sizes[-1] // 2
        assert found <= 1.25 * best


@pytest.mark.parametrize(
    ("call", "tiles", "tile_units"),
    [
        # two threads share an image of 16 units: one tile each
        ((16 * 24, 24, 8, 1, 2), 2, 8),
        # of 18 units tiles of 8 would leave two to one thread, and one to the other
        ((18 * 24, 24, 8, 1, 2), 6, 3),
        # one thread: the largest tile that wastes nothing
        ((18 * 24, 24, 8, 1, 1), 3, 6),
        # an image per thread
        ((5 * 24, 24, 8, 4, 4), 1, 5),
        # less than a unit
        ((1, 24, 8, 1, 8), 1, 1),
    ],
)
def test_examples(call: tuple[int, ...], tiles: int, tile_units: int) -> None:
    assert partition(*call) == (tiles, tile_units)
