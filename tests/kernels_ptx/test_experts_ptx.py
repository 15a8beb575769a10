"""Grouped experts and their rows on the PTX machine: clusters of two thread blocks, multicast, and tiles of 16 rows."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import as_bfloat16, random
from ptx_cases import agree, exact, on_the_machine

from experiments.ptx_machine import Schedule, kernels_on_the_machine, laws, session
from pallas_kernels import hopper, persistent
from pallas_kernels.expert_mlp import expert_mlp, gather_rows, mosaic_gpu, tuning

TO_TILES, TO_ROWS, PER_EXPERT = (f"expert_mlp_{name}" for name in ("to_tiles", "to_rows", "per_expert"))


@pytest.fixture(autouse=True)
def few_multiprocessors(monkeypatch):
    """Four of them: two clusters. From 200 rows on, tiles have 128."""
    monkeypatch.setattr(hopper, "SMS", 4)
    monkeypatch.setattr(tuning, "tile_rows", lambda rows, experts: 128 if rows >= 200 else 16)
    monkeypatch.setattr(tuning, "_cut", lambda rows, width: (128, 1 + (rows == 128), 2))
    monkeypatch.setattr(tuning, "_MOST_STAGES", 3)


def arguments(rows, experts, features=128, width=192):
    return (
        as_bfloat16(random(0, rows, features)),
        as_bfloat16(random(1, experts, width, features) / 8),
        as_bfloat16(random(2, experts, width, features) / 8),
        jnp.asarray(random(3, rows)),
    )


@pytest.mark.parametrize("sizes", [[70, 0, 130], [5, 0, 17]], ids=["clusters", "tiles-of-16"])
def test_experts(sizes):
    """Groups across tile edges, an empty one, and rows beyond the last."""
    rows = sum(sizes) + 3
    values, sizes = arguments(rows, 3), jnp.array(sizes, jnp.int32)
    run = lambda name, *a: expert_mlp(*a, sizes, implementation=name)
    found = on_the_machine(functools.partial(run, "mosaic_gpu"), *values, kernels=[TO_TILES, TO_ROWS])
    agree(found, run("reference", *exact(values)), 5e-3)


@pytest.mark.parametrize("slots", [1, 2])
def test_more_pieces_than_slots(slots, monkeypatch):
    """A piece of 64 columns waits for what left its slot before; some rows leave as a whole, others in part."""
    monkeypatch.setattr(tuning, "blocks", lambda rows, depth, width, beside=0: tuning.Blocks(rows, 256, 2, slots, 2))
    values, sizes = arguments(203, 3, features=192), jnp.array([70, 0, 130], jnp.int32)
    run = lambda name, *a: expert_mlp(*a, sizes, implementation=name)
    found = on_the_machine(functools.partial(run, "mosaic_gpu"), *values, kernels=[TO_TILES, TO_ROWS])
    agree(found, run("reference", *exact(values)), 5e-3)


@pytest.mark.parametrize("sizes", [[70, 0, 130], [5, 0, 17]], ids=["tiles-of-128", "tiles-of-16"])
@pytest.mark.parametrize("shape", [dict(features=64), dict(width=64)], ids=["features", "width"])
def test_an_axis_of_one_swizzled_row(shape, sizes):
    """Copies have no index along it: what a block of columns has beyond it must not reach memory."""
    values, sizes = arguments(sum(sizes), 3, **shape), jnp.array(sizes, jnp.int32)
    run = lambda name, *a: expert_mlp(*a, sizes, implementation=name)
    found = on_the_machine(functools.partial(run, "mosaic_gpu"), *values, kernels=[TO_TILES, TO_ROWS])
    agree(found, run("reference", *exact(values)), 5e-3)


@pytest.mark.parametrize("shape", [dict(), dict(features=64, width=64)], ids=["columns", "one-swizzled-row"])
def test_gradients(shape):
    values, sizes = arguments(203, 3, **shape), jnp.array([70, 0, 130], jnp.int32)
    dy = as_bfloat16(random(4, *values[0].shape))

    def pull(name, *values):
        run = lambda *a: expert_mlp(*a, sizes, implementation=name)
        y, back = jax.vjp(run, *values)
        return y, back(dy.astype(y.dtype))

    kernels = [TO_TILES] * 3 + [TO_ROWS] * 2 + [PER_EXPERT] * 2
    found = on_the_machine(functools.partial(pull, "mosaic_gpu"), *values, kernels=kernels)
    agree(found, pull("reference", *exact(values)), 1e-2)


def test_gather_rows():
    """More groups of rows than slots; rows that are asked for often, or never."""
    x, index = as_bfloat16(random(0, 7, 192)), jnp.asarray(np.random.default_rng(1).integers(0, 7, 40))
    run = lambda x, index: gather_rows(x, index, implementation="mosaic_gpu")
    agree(on_the_machine(run, x, index, kernels=["gather_rows"]), x[index], 0.0)


# ------------------------------------------------------------------------------- the machine sees what is missing


def in_part(pattern, becomes, after="", before="", count=0):
    """An edit of the text between two marks: what is found becomes something else, `count` times or always."""

    def edit(text):
        start = text.index(after) if after else 0
        end = text.index(before, start) if before else len(text)
        part, changed = re.subn(pattern, becomes, text[start:end], count=count)
        assert changed
        return text[:start] + part + text[end:]

    return edit


def without(pattern, **where):
    return in_part(r"(?:@!?%p\d+ +)?" + pattern + "[^;]*;", "", **where)


PRODUCER, CONSUMER = dict(after="setmaxnreg.dec", before="setmaxnreg.inc"), dict(after="setmaxnreg.inc")
TRY_WAIT, SEND = r"mbarrier\.try_wait", r"cp\.async\.bulk\.wait_group"
EDITS = {
    "a-copy-is-not-waited-for": (without(TRY_WAIT, **CONSUMER), (laws.NotDelivered, laws.DataRace)),
    "a-slot-is-not-waited-for": (without(TRY_WAIT, **PRODUCER), (laws.DataRace, laws.PhaseOvertaken)),
    "the-end-is-not-waited-for": (without(TRY_WAIT, after="max.s32", before="setmaxnreg.inc"), laws.PeerGone),
    "half-the-bytes": (in_part(r"(mov\.b32\s+%r\d+, )128;", r"\g<1>64;", **PRODUCER), laws.TransactionBytes),
    "twice-the-bytes": (in_part(r"(mov\.b32\s+%r\d+, )128;", r"\g<1>256;", **PRODUCER), laws.Deadlock),
    "multicast-to-one": (in_part(r"(mov\.b16\s+%rs\d+, )3;", r"\g<1>1;"), laws.Deadlock),
    "no-release-to-the-peer": (without(r"mbarrier\.arrive\.shared::cluster", **CONSUMER), laws.Deadlock),
    "no-wait-for-the-cluster": (without(r"barrier\.cluster\.wait"), laws.DataRace),
    "no-fence-of-the-barriers": (without(r"fence\.mbarrier_init"), (laws.DataRace, laws.MissingProxyFence)),
    "no-proxy-fence": (without(r"fence\.proxy\.async", **CONSUMER), laws.MissingProxyFence),
    "no-barrier-before-a-store": (without(r"bar\.sync", **CONSUMER), laws.DataRace),
    "a-source-is-overwritten": (without(SEND + r"\.read", **CONSUMER), laws.SourceOverwritten),
    "stores-at-the-exit": (without(SEND + r"\s", **CONSUMER), laws.NotDrained),
    "products-not-waited-for": (without(r"wgmma\.wait_group"), laws.RegisterInFlight),
    "no-fence-of-registers": (without(r"wgmma\.fence"), laws.RegisterInFlight),
    "a-tile-outside": (in_part(r"(add\.s32\s+%r\d+, %r\d+, )49152;", r"\g<1>4915200;", **PRODUCER), laws.BadAddress),
}


def to_tiles(sizes, features=128, width=512):
    """Forward, first product only: several items for each cluster."""
    rows = sum(sizes)
    x, up, _, _ = arguments(rows, len(sizes), features, width)
    work = mosaic_gpu.plan(jnp.array(sizes, jnp.int32), rows, 128)
    return jax.block_until_ready(mosaic_gpu.to_tiles(x, up, work, lambda a: a))


KERNELS = {}  # compiled for the first edit, the same for all


@pytest.mark.parametrize("edit, law", EDITS.values(), ids=EDITS)
def test_an_edited_kernel_breaks_a_law(edit, law, monkeypatch):
    compile_kernel = session.compile_kernel
    once = lambda *kernel: KERNELS.get(TO_TILES) or KERNELS.setdefault(TO_TILES, compile_kernel(*kernel))
    monkeypatch.setattr(session, "compile_kernel", once)
    with pytest.raises(laws.LawBroken) as caught, kernels_on_the_machine(Schedule(0), edit):
        to_tiles([128, 128])
    assert isinstance(caught.value, law), str(caught.value)
    assert TO_TILES in str(caught.value)


@pytest.mark.parametrize("shape", [dict(features=64), dict(width=64)], ids=["features", "width"])
def test_an_index_that_a_copy_does_not_have(shape, monkeypatch):
    """Blocks of 128 columns, of which an array with 64 has no second half."""
    monkeypatch.setattr(tuning, "blocks", lambda rows, depth, width, beside=0: tuning.Blocks(rows, 128, 3))
    values, sizes = arguments(22, 3, **shape), jnp.array([5, 0, 17], jnp.int32)
    with pytest.raises(laws.IndexDropped), kernels_on_the_machine():
        jax.block_until_ready(expert_mlp(*values, sizes, implementation="mosaic_gpu"))


def test_a_warp_that_runs_ahead_of_its_warpgroup(monkeypatch):
    """Consumers that do not multiply need a barrier of their own before one warp releases a slot for all."""

    class Without:
        commit_smem = staticmethod(lambda: None)

        def __getattr__(self, name):
            return getattr(mosaic_gpu.plgpu, name)

    run = lambda: to_tiles([40, 40], features=512, width=256)
    schedule = Schedule(0, apart=True, late=False)
    with kernels_on_the_machine(schedule):
        run()
    monkeypatch.setattr(persistent, "plgpu", Without())
    with pytest.raises(laws.PhaseOvertaken), kernels_on_the_machine(schedule):
        run()
