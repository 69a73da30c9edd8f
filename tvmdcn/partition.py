# SPDX-License-Identifier: Apache-2.0
"""How the pixels of a call are divided into tasks: chosen when the sizes are known, not when the kernel is built."""

from __future__ import annotations

__all__ = ["partition"]


def partition(
    pixels: int, granule: int, max_tile_units: int, batch: int, threads: int, tile_cost: float = 0.0
) -> tuple[int, int]:
    """Divide an image's pixels into equal tiles.

    Among the tile sizes up to `max_tile_units`, take the one with which the busiest thread computes the fewest units;
    of equals the largest, because a larger tile reads the weights less often.

    Parameters
    ----------
    pixels : int
        Output pixels of one image, at least 1.
    granule : int
        Pixels in a unit.
    max_tile_units : int
        Largest tile that the schedule is made for (its columns should stay in the cache).
    batch : int
        Images; may be 0.
    threads : int
        Threads that share the tasks.
    tile_cost : float
        What a tile costs besides its units, in units.

    Returns
    -------
    tiles, tile_units : int
        Tiles in an image and units in a tile; ``tiles * tile_units * granule >= pixels``.
    """
    units = -(-pixels // granule)
    best: tuple[float, int, int] | None = None
    for tile_units in range(min(max_tile_units, units), 0, -1):
        tiles = -(-units // tile_units)
        rounds = -(-max(batch, 1) * tiles // threads)
        cost = rounds * (tile_units + tile_cost)
        if best is None or cost < best[0]:
            best = (cost, tiles, tile_units)
        if 2 * tile_units <= min(max_tile_units, units) and units > 8 * max_tile_units * threads:
            break  # many tasks: nothing to balance, and small tiles would only read the weights more often
    assert best is not None
    return best[1], best[2]
