"""Causal grouped-query attention with packed documents and a cached prefix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.choice import choose, target, with_rules
from pallas_kernels.flash_attention import cudnn, reference, xla
from pallas_kernels.late import Late
from pallas_kernels.shapes import check_shapes

mosaic_gpu = Late("pallas_kernels.flash_attention.mosaic_gpu")
IMPLEMENTATIONS = {
    "xla": xla.flash_attention,
    "mosaic_gpu": mosaic_gpu.flash_attention,
    "cudnn": cudnn.flash_attention,
    "reference": reference.flash_attention,
}


def flash_attention(
    q: Float[Array, "B T H P"],
    k: Float[Array, "B S G P"],
    v: Float[Array, "B S G P"],
    *,
    start: Int[Array, "B"] | None = None,
    documents: Int[Array, "B T"] | None = None,
    key_documents: Int[Array, "B S"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T H P"], Float[Array, "B T H"]]:
    """`softmax(q k^T / sqrt(P)) v` over the visible keys, head h using key/value head `h // (H / G)`.

    Query t of row b stands at position `start[b] + t` of the key sequence. It sees key s if `s <= start[b] + t` and,
    with documents, if both belong to the same one; a pad (document 0) sees nothing and is seen by nothing.

    Args:
      q: queries.
      k: keys. v: values.
      start: position of the first query of each row; default 0. Negative or beyond S where the keys are a stretch of a
        longer sequence.
      documents: see `pallas_kernels.documents`. key_documents: the same of the keys; give both or neither.
      implementation: `"xla"`, `"mosaic_gpu"` (Hopper; bfloat16, P = 128), `"cudnn"` (neither `start` nor documents),
        `"reference"`, or None: the kernels on Hopper where they can, else cuDNN on NVIDIA GPUs where it can, else
        `"xla"`.

    Returns:
      The output in q's dtype (zero where nothing is visible) and the log-sum-exp of the scores, float32 (-inf there).

    Raises:
      ValueError: shapes that do not belong together; a named implementation that cannot run with these arrays.
    """
    (batch, length, heads, width), (_, size, groups, _) = q.shape, k.shape
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != width or groups == 0 or heads % groups:
        raise ValueError(f"flash_attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit together")
    if (documents is None) != (key_documents is None):
        raise ValueError("flash_attention: give both documents and key_documents, or neither")
    expected = {
        "start": (start, (batch,)),
        "documents": (documents, (batch, length)),
        "key_documents": (key_documents, (batch, size)),
    }
    check_shapes("flash_attention", expected)
    refuses_cudnn = cudnn.supports(q, k, v, start, documents)
    refusals = {"mosaic_gpu": lambda: mosaic_gpu.supports(q, k, v), "cudnn": lambda: refuses_cudnn}
    if documents is not None:
        documents, key_documents = documents.astype(jnp.int32), key_documents.astype(jnp.int32)
    if start is None:
        start = jnp.zeros((batch,), jnp.int32)
    run = choose("flash_attention", IMPLEMENTATIONS, implementation, refusals, _best)
    may_be_cudnn = implementation is None and run is not _best and target().startswith("NVIDIA")
    if may_be_cudnn and refuses_cudnn is None and cudnn.installed(q, k, v):
        run = _cudnn_on_cuda
    return run(q, k, v, start, documents, key_documents)


def _cudnn_on_cuda(*arguments):
    return jax.lax.platform_dependent(*arguments, cuda=cudnn.with_all_gradients, default=xla.flash_attention)


_best = with_rules(
    (mosaic_gpu.flash_attention, mosaic_gpu.backward), (xla.flash_attention, xla.backward), keeps_results=True
)
