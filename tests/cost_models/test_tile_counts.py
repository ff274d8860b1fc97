"""Tiles that a band visits are counted exactly, without walking over them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnc.codegen.tiles import static_tiles
from attnc.cost_models.tile_counts import Band, band_tiles, document_tiles, floor_sum
from attnc.expr_text import parse

lengths = st.integers(1, 300)
blocks = st.sampled_from([1, 16, 32, 64, 128])
bands = st.builds(
    Band,
    st.none() | st.integers(0, 200),
    st.none() | st.integers(0, 200),
    st.integers(-60, 60),
)


def walked(L: int, S: int, block_m: int, block_n: int, band: Band) -> tuple[int, int]:
    """Visited tiles and those of the longest block of rows, one block after another."""
    visited = longest = 0
    for low in range(0, L, block_m):
        high = min(L, low + block_m) - 1
        first = 0 if band.back is None else max(0, low + band.shift - band.back)
        last = S - 1 if band.ahead is None else min(S - 1, high + band.shift + band.ahead)
        count = last // block_n - first // block_n + 1 if last >= first else 0
        visited, longest = visited + count, max(longest, count)
    return visited, longest


@given(lengths, lengths, blocks, blocks, bands)
def test_visited_tiles_are_exact_for_every_band(L: int, S: int, block_m: int, block_n: int, band: Band) -> None:
    found = band_tiles(L, S, block_m, block_n, band)
    visited, longest = walked(L, S, block_m, block_n, band)
    assert found.visited == visited
    assert abs(found.longest - longest) <= 1
    assert 0 <= found.masked <= found.visited


@pytest.mark.parametrize("L", [1000, 1024, 4096])
@pytest.mark.parametrize("window", [0, 1, 300, 1024])
@pytest.mark.parametrize(("block_m", "block_n"), [(64, 64), (128, 64), (64, 128)])
def test_counts_agree_with_the_classes_of_tiles(L: int, window: int, block_m: int, block_n: int) -> None:
    keep = "j - i <= 0" + (f" and i - j <= {window - 1}" if window else "")
    tiles = static_tiles(parse(keep), L, L, block_m, block_n)
    found = band_tiles(L, L, block_m, block_n, Band.causal(L, L, window))
    assert found.visited == int(tiles.may.sum())
    ragged = found.longest if L % block_m else 0  # kernels mask all of a block of rows that is not whole
    corners = -(-L // block_n) if L % block_n else 0  # ... and tiles beyond the last key
    assert int(tiles.partial.sum()) <= found.masked <= int(tiles.partial.sum()) + ragged + corners


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 90), st.integers(0, 90))
def test_floor_sums(n: int, m: int, a: int, b: int) -> None:
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


def test_a_long_sequence_costs_no_walk() -> None:
    found = band_tiles(1 << 30, 1 << 30, 128, 64, Band.causal(1 << 30, 1 << 30))
    rows = (1 << 30) // 128
    assert found.visited == rows * (rows + 1)  # 2, 4, 6 ... tiles
    assert found.longest == 2 * rows


@given(st.integers(256, 4096), st.floats(1, 16))
def test_documents_save_tiles_and_never_all(L: int, documents: float) -> None:
    band = Band.causal(L, L)
    whole = document_tiles(L, L, 64, 64, band, 1.0)
    packed = document_tiles(L, L, 64, 64, band, documents)
    assert whole == band_tiles(L, L, 64, 64, band)
    assert -(-L // 64) / 2 <= packed.visited <= (-(-L // 64)) ** 2
    assert packed.masked <= packed.visited
