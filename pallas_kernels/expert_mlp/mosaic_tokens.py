"""The experts of a few tokens on Hopper: nothing is sorted, and the weights are read at the speed of memory.

Both products are those of `pallas_kernels/matvec/mosaic_gpu.py`, with a matrix for each (row, expert) pair. Each is
multiplied with every row; what the first product has in other rows than the pair's own is then made zero, so that the
second may sum over all pairs.
By that an inf or NaN among the weights of `down` reaches all rows; one of x or of `up` stays in its row.
"""

from __future__ import annotations

import jax

from pallas_kernels.choice import with_gradient_of
from pallas_kernels.expert_mlp import xla
from pallas_kernels.matvec import mosaic_gpu as matvec
from pallas_kernels.matvec.mosaic_gpu import Factors, Stack
from pallas_kernels.norm import Norm
from pallas_kernels.persistent import DEPTH
from pallas_kernels.tiles import TILE_ROWS


def supports(x: jax.Array, *weights: jax.Array, norm: Norm | None = None) -> str | None:
    """Why these kernels cannot run on such rows, after a norm, and weights [..., F, L], or None if they can."""
    if any(w.shape[-2] % DEPTH for w in weights):
        return f"the widths {[w.shape[-2] for w in weights]} are not all multiples of {DEPTH}"
    return matvec.supports(x, *weights, norm=norm)


def _forward(x, up, down, ids, weights, shared=None, norm=None):
    """See `api.token_mlp`."""
    (rows, chosen), pairs = ids.shape, ids.reshape(-1)
    ups, downs = [Stack(up, pairs)], [Stack(down, pairs)]
    if shared is not None:
        for stacks, matrix in zip((ups, downs), shared, strict=True):
            stacks.append(Stack(matrix[None]))
    factors, room = Factors(weights.reshape(-1), chosen), rows + -rows % TILE_ROWS
    hidden = matvec.rows_dot(ups, x, up.dtype, xla.relu_squared, factors, norm, room)
    return matvec.columns_dot(downs, hidden)[:rows]


token_mlp = with_gradient_of(xla.gathered, _forward)
