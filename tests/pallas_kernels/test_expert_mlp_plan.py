"""The work list of expert_mlp's Hopper kernels, and the block sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import tuned
from pallas_kernels.expert_mlp import mosaic_gpu, tuning
from pallas_kernels.expert_mlp.plan import Plan, end_of_walk, plan, turns

EXPERTS, COLUMNS, ROWS = 6, 3, 200


def items_of(work, tile_rows):
    """Every item of `to_rows`, as arrays."""
    item_at = lambda i: mosaic_gpu._tile_item(
        work.tiles, i, experts=EXPERTS, columns=COLUMNS, depth=64, tile_rows=tile_rows
    )
    return jax.vmap(item_at)(jnp.arange(work.tiles.shape[0] * COLUMNS))


@pytest.mark.parametrize("tile_rows", [8, 16, 64, 128])
def test_every_row_has_one_tile_of_its_expert(monkeypatch, tile_rows):
    """And every tile has each column block once; tiles begin at multiples of 8 rows."""
    monkeypatch.setattr(pl, "multiple_of", lambda x, _: x)  # a hint to the compiler, unknown outside of a kernel
    cut = jax.jit(lambda sizes: tuple(plan(sizes, ROWS, tile_rows)[:3]))
    list_items = jax.jit(lambda plan: items_of(Plan(*plan, tile_rows), tile_rows))
    rng = np.random.default_rng(tile_rows)
    for _ in range(30):
        sizes = rng.multinomial(rng.integers(0, ROWS + 1), rng.dirichlet(np.full(EXPERTS, 0.5)))
        arrays = cut(jnp.asarray(sizes))
        real, total = np.asarray(arrays[2])[:, 0]
        assert total <= arrays[0].shape[0]
        items = [np.asarray(a)[: total * COLUMNS] for a in list_items(arrays)]
        owner = np.full((ROWS, COLUMNS), -1)
        for expert, column, row, place, begin, end, steps in zip(*items, strict=True):
            mine = owner[row + begin : row + end, column]
            assert (mine == -1).all() and begin < end <= tile_rows and row % 8 == place % 8 == 0
            mine[:] = expert if steps else EXPERTS
        expected = np.repeat(np.arange(EXPERTS + 1), [*sizes, ROWS - sizes.sum()])
        np.testing.assert_array_equal(owner, np.broadcast_to(expected[:, None], owner.shape))
        assert real * COLUMNS == (items[-1] > 0).sum()


@pytest.mark.parametrize("which", [0, 1], ids=["experts", "all"])
@pytest.mark.parametrize("blocks", [1, 3, 66])
def test_blocks_take_turns(blocks, which):
    """Every item is some block's, once, and at any moment no block is more than one whole item behind another."""
    cut = jax.jit(lambda sizes: tuple(plan(sizes, 9_000, 128)[:3]))
    order = jax.jit(lambda *arrays: turns(Plan(*arrays, 128), arrays[2][which], COLUMNS, blocks))
    rng = np.random.default_rng(blocks)
    for _ in range(10):
        arrays = cut(jnp.asarray(rng.multinomial(rng.integers(0, 9_001), rng.dirichlet(np.full(EXPERTS, 0.5)))))
        places, (tiles, half) = np.asarray(order(*arrays)), np.asarray(arrays[2])[which]
        ends = end_of_walk(*arrays[2][which], COLUMNS, jnp.arange(blocks), blocks)
        walks = [np.arange(block, end, blocks) for block, end in enumerate(ends)]
        assert all(walk.max(initial=0) + blocks < len(places) for walk in walks)
        found = [places[walk] for walk in walks]
        np.testing.assert_array_equal(np.sort(np.concatenate(found)), item := np.arange(tiles * COLUMNS))
        assert all((np.diff(items) > 0).all() for items in found)
        _, first, start, end, _ = np.asarray(arrays[0])[item // COLUMNS].T
        span = end - start // 8 * 8
        position = (item - first * COLUMNS) % -(-span // 128)
        steps = 1 + (span - 128 * position > 64)
        assert (steps == 1).sum() == half * COLUMNS
        done = np.zeros((blocks, tiles * COLUMNS + 1), int)
        for block, items in enumerate(found):
            done[block, items + 1] = steps[items]
        assert np.ptp(done.cumsum(axis=1), axis=0).max() <= 2


@pytest.mark.parametrize("rows", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("width", [64, 1024, 1856, 2048, 2688, 5120])
def test_blocks_fill_shared_memory_and_no_more(rows, width):
    blocks = tuning.blocks(rows, 1024, width, beside=1)
    stage, piece = 2 * 64 * (max(64, rows) + blocks.columns), 128 * (128 if rows > 64 else 64)
    used = blocks.stages * stage + (blocks.slots + 1) * piece
    assert blocks.stages >= 3 and used + 1024 <= tuning.SHARED_MEMORY
    assert blocks.stages == 8 or blocks.stages * stage + 3 * piece + stage > tuning.SHARED_MEMORY - 2048
    assert min(2, blocks.columns // 64) <= blocks.slots <= blocks.columns // 64


def test_one_slot_leaves_room_for_another_stage():
    with tuned.using({"expert_mlp columns": {"128,2688,1856": [192, 2, 1]}}):
        found = tuning.blocks(128, 2688, 1856)
        assert tuning.blocks(128, 1024, 1856) == tuning.blocks(128, 0, 1856) != found  # another model's
    assert (found.stages, found.slots) == (tuning.blocks(128, 2688, 1856).stages + 1, 1)
    assert found.stages * 40_960 + 16_384 + 1024 <= tuning.SHARED_MEMORY


@pytest.mark.parametrize("mean, rows", [(1, 16), (3, 16), (8, 32), (22, 64), (48, 128), (384, 128)])
def test_tiles_hold_a_group_of_usual_size(mean, rows):
    assert tuning.tile_rows(mean * 128, 128) == rows
