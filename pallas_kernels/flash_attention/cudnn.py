"""Attention of NVIDIA's cuDNN, through JAX: for where the Hopper kernels do not run, and to measure against."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import xla


def supports(q, k, v, start, documents) -> str | None:
    """Why cuDNN cannot handle these arguments, or None. Whether it is installed shows when it is called."""
    if start is not None or documents is not None:
        return "its causal mask knows neither positions nor documents"
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return f"q is {q.dtype}, k is {k.dtype} and v is {v.dtype}; all must be bfloat16 or all float16"
    if q.size == 0 or k.size == 0:
        return "there are no queries or no keys"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"the head dimension is {q.shape[-1]}; it must be a multiple of 8 up to 128"
    return None


def flash_attention(q, k, v, start, documents, key_documents):
    """See `api.flash_attention`; only where `supports` is None. The log-sum-exp has no gradient here.

    Raises:
      RuntimeError: cuDNN is not installed.
    """
    del start, documents, key_documents
    out, lse = _attend(q, k, v)
    return out, _without_gradient(lse)


def with_all_gradients(q, k, v, start, documents, key_documents):
    """`flash_attention`, where `xla` computes the gradient of the log-sum-exp if it is asked for."""
    del documents, key_documents
    out, lse = _attend(q, k, v)
    return out, _with_gradient(lse, q, k, v, start, out)


def _attend(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn", return_residual=True)


def installed(q, k, v) -> bool:
    """Whether cuDNN is there and takes these arrays, by a trace."""
    try:
        jax.eval_shape(lambda *a: flash_attention(*a, None, None, None), q, k, v)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@jax.custom_vjp
def _without_gradient(lse):
    return lse


def _refuse(_, cotangent):
    raise NotImplementedError("flash_attention: cuDNN gives no gradient of the log-sum-exp; use 'xla' or 'mosaic_gpu'")


_without_gradient.defvjp(lambda lse: (lse, None), _refuse)


@jax.custom_vjp
def _with_gradient(lse, q, k, v, start, out):
    del q, k, v, start, out
    return lse


def _backward(saved, d_lse):
    lse, q, k, v, start, out = saved
    saved = (q, k, v, start, None, None, out, lse)
    dq, dk, dv = xla.backward(saved, (jnp.zeros_like(out), d_lse))
    return jnp.zeros_like(lse), dq, dk, dv, None, jnp.zeros_like(out)


_with_gradient.defvjp(lambda *arguments: (arguments[0], arguments), _backward)
