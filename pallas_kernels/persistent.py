"""Matrix products for Hopper as persistent kernels: one thread block a multiprocessor, walking over a list of items.

A producer warpgroup fills a ring of stages by TMA, a tile of each operand in a stage, or of the second alone where the
first is small and stays; it runs ahead across items, so the ring never drains. One or two consumer warpgroups multiply:
wgmma reads both operands from shared memory.

    barrier of a slot   completes with                     waited for by
    full                its copies                         every consumer
    empty               every consumer of the cluster      the producer, before it fills the slot again

Whoever waits for a barrier waits for each of its phases, once: the producer for the last ones too, when it is done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, mosaic
from pallas_kernels.hopper import MATRIX_ROWS

PEER = "peer"  # axis of the thread blocks of a cluster
DEPTH = 64  # elements of 16 bits in 128 bytes, the width of a swizzled row
# Registers of a thread of the producer, and of one or two consumers: together no more than the block has been given.
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, {1: 240, 2: 232}


@runtime_checkable
class Item(Protocol):
    """One result block: what a thread block computes between two stores.

    Attributes:
      steps: stages to sum over. end: rows of the tile that count.
    """

    steps: Any
    end: Any


@runtime_checkable
class Blocks(Protocol):
    """How a product is cut.

    Attributes:
      columns: of the sums. stages: of the ring. consumers: warpgroups that multiply.
      in_flight: products that a consumer leaves running while it waits for the next stage, 0 or 1.
      cluster: thread blocks that walk over the list together, each with its own result of every item.
    """

    columns: int
    stages: int
    consumers: int
    in_flight: int
    cluster: int


class Ring(NamedTuple):
    """The buffers between producer and consumers; `a` is None where only the second operand passes through."""

    a: Any
    b: Any
    full: Any
    empty: Any


def run(
    ring: Ring,
    count,
    item_at: Callable,
    load: Callable,
    product: Callable,
    finish: Callable,
    blocks: Blocks,
    prepare: Callable = lambda: None,
    find: Callable = lambda place: place,
):
    """Runs the items of this thread block: at its own place of a list, and a round further on each time, below `count`.

    In a cluster, a slot is free when all its blocks have read theirs: so one copy may fill it in each of them.

    `load(item, k, slot, barrier)` starts the copies of step k; `product(acc, slot, rows, k)` multiplies these rows of
    the tile; `store = finish(item, thread, top)` fetches what else the 64 rows from `top` on need, before they are
    multiplied, and `store(sums)` stores them. `prepare()` is what consumers do first, while the ring fills. The item at
    a place is number `find(place)`, which is looked up while the one before is computed: up to a round beyond `count`.
    """
    thread, consumers = lax.axis_index("thread"), blocks.consumers
    walk = functools.partial(_walk, count, hopper.SMS // blocks.cluster, find)

    @pl.when(thread == consumers)
    def _():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        _produce(ring, walk, item_at, load, blocks.stages)

    @pl.when(thread < consumers)
    def _():
        plgpu.set_max_registers(_CONSUMER_REGISTERS[consumers], action="increase")
        prepare()
        _consume(ring, walk, item_at, product, finish, thread, blocks)


def _walk(count, stride, find, visit, step):
    """`step = visit(number, step)` for the items of this thread block.

    No `fori_loop`: of one, the compiler knows the rounds where they come out even, and unrolls all of them, for which
    there are no registers.
    """

    def advance(state):
        place, number, step = state
        following = find(place + stride)
        return place + stride, following, visit(number, step)

    start = lax.axis_index("block")
    return lax.while_loop(lambda state: state[0] < count, advance, (start, find(start), step))[2]


def _produce(ring, walk, item_at, load, stages):
    def item_loads(number, step):
        item = item_at(number)

        def fetch(k, step):
            slot = lax.rem(step, stages)

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(ring.empty.at[slot])

            load(item, k, slot, ring.full.at[slot])
            return step + 1

        return lax.fori_loop(0, item.steps, fetch, step)

    steps = walk(item_loads, jnp.int32(0))

    # A block of a cluster must not end while another may still release a slot to it.
    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(step):
        plgpu.barrier_wait(ring.empty.at[lax.rem(step, stages)])


def _consume(ring, walk, item_at, product, finish, thread, blocks):
    top = thread * MATRIX_ROWS

    def one(number, step):
        item, slots = item_at(number), _Slots(ring, step, blocks.stages)

        def multiply():
            store = finish(item, thread, top)
            store(_multiply(item, slots, top, product, blocks))

        lax.cond(item.end > top, multiply, lambda: _pass_on(item, slots, blocks))
        return step + item.steps

    walk(one, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


class _Slots(NamedTuple):
    """The slots of an item's steps; `first` counts the steps of the thread block before them."""

    ring: Ring
    first: Any
    stages: int

    def at(self, k):
        return lax.rem(self.first + k, self.stages)

    def await_full(self, k):
        plgpu.barrier_wait(self.ring.full.at[self.at(k)])

    def release(self, k):
        plgpu.barrier_arrive(self.ring.empty.at[self.at(k)])


def _multiply(item, slots, top, product, blocks):
    """The sums of 64 rows from `top` on. With a product in flight, a slot is released a step later, when it is read."""
    rows = pl.ds(pl.multiple_of(top, MATRIX_ROWS), MATRIX_ROWS)

    def sum_up(acc):
        @pl.loop(0, item.steps)
        def _(k):
            slots.await_full(k)
            product(acc, slots.at(k), rows, k)
            plgpu.wgmma_wait(blocks.in_flight)
            if blocks.in_flight:
                pl.when(k > 0)(lambda: slots.release(k - 1))
            else:
                slots.release(k)

        return acc[...]

    sums = pl.run_scoped(sum_up, plgpu.ACC((MATRIX_ROWS, blocks.columns), jnp.float32))
    if blocks.in_flight:
        pl.when(item.steps > 0)(lambda: slots.release(item.steps - 1))
    return sums


def _pass_on(item, slots, blocks):
    """Releases the slots of an item that has nothing for this consumer."""

    @pl.loop(0, item.steps)
    def _(k):
        slots.await_full(k)
        if blocks.cluster > 1:
            # One warp releases a slot to all blocks, and must not run a whole round ahead of those that wait: this is a
            # barrier of the warpgroup. (Where it multiplies, wgmma keeps its warps together.)
            plgpu.commit_smem()
        slots.release(k)


def launch(
    body: Callable,
    operands: Sequence[Any],
    out: Any,
    blocks: Blocks,
    tiles: tuple[tuple[int, int] | None, tuple[int, int]],
    scratch: Sequence[Any],
    *,
    exact_layouts: bool = False,
    before: Callable = lambda *refs: None,
) -> Any:
    """Runs `body(*operands, *out, ring, *scratch)` on every multiprocessor; in a cluster, blocks differ in `"peer"`.

    Args:
      out: shape and dtype of the result, or a tuple of such.
      tiles: shapes of both tiles of a stage, in bfloat16; None for a first operand that is not in the ring.
      exact_layouts: shared memory is laid out as it is declared, so that single rows of it can be stored; else the
        compiler may tile what is not.
      before: see `mosaic.early`.
    """
    semantics = plgpu.LoweringSemantics.Lane if exact_layouts else plgpu.LoweringSemantics.Warpgroup
    results = len(out) if isinstance(out, tuple) else 1

    def unpacked(*refs):
        inputs, (a, b, full, empty, *rest) = refs[: len(operands) + results], refs[len(operands) + results :]
        body(*inputs, Ring(a, b, full, empty), *rest)

    stages = blocks.stages
    together = functools.partial(plgpu.ClusterBarrier, collective_axes=(PEER,))
    empty = plgpu.Barrier if blocks.cluster == 1 else together
    shared = [
        *(None if shape is None else mosaic.swizzled(jnp.bfloat16, stages, *shape) for shape in tiles),
        plgpu.Barrier(num_arrivals=sum(shape is not None for shape in tiles), num_barriers=stages),
        empty(num_arrivals=blocks.consumers, num_barriers=stages),
        *scratch,
    ]
    grid, cluster = {"block": hopper.SMS // blocks.cluster}, {PEER: blocks.cluster}
    how = dict(cluster=cluster, before=before, semantics=semantics, approximate=False)
    return mosaic.launch(unpacked, body.__name__, grid, blocks.consumers + 1, out, shared, **how)(*operands)


def cut(index, size):
    """Part `index` of an axis cut into parts of `size`."""
    return pl.ds(pl.multiple_of(index * size, size), size)
