"""The Flax module and what a call returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from nemojax import checks, forward
from nemojax.cache import Cache
from nemojax.config import Config
from nemojax.layers.shell import declare
from nemojax.sharding import param_shardings
from nemojax.specs import model_specs


class Output(NamedTuple):
    """Result of a forward pass.

    Attributes:
      logits: float32; position t predicts token t+1 of its document. Unspecified at pads.
      cache: state after the call; None unless a cache was given.
      mtp_logits: with `mtp=True`, position t uses token t+1 and predicts token t+2; unspecified where the document has
        no token t+1.
      captured: what `capture` asked for, one entry a layer that has it: `resid_pre`, `resid_post`, `mixer_out`
        [B, T, D]; `router` (`Routing`, expert layers); `ssm_state` [B, G, H, P, N] after the call, as a cache
        keeps it (Mamba-2 layers).
    """

    logits: Float[Array, "B T V"]
    cache: Cache | None = None
    mtp_logits: Float[Array, "B T V"] | None = None
    captured: dict[str, list] | None = None


class Nemotron(nn.Module):
    """A Nemotron-H / Nemotron 3 language model.

    `model.init(key, tokens)["params"]` makes parameters without running the layers;
    `model.apply({"params": params}, tokens, ...)` is a pure function to hand to `jax.jit`, `jax.vmap` and `jax.grad`.
    Its operations have gradients of their own: forward mode (`jax.jvp`) and gradients of gradients exist only with
    `implementation="reference"`, and not through an exchange of experts' rows over a mesh.

    Attributes:
      config: the model's configuration.
      implementation: of every kernel; None for the default of each.
      mesh: the mesh on which the parameters lie (`nemojax.make_mesh`), or None for one device.
      dispatch: strategy for experts on several devices, `"ring"` or `"all_to_all"`; None for the rule.
    """

    config: Config
    implementation: str | None = None
    mesh: Mesh | None = None
    dispatch: str | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        mtp: bool = False,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """Runs the model.

        Args:
          tokens: ids, int32.
          segment_ids: 0 is padding (left, right or between documents; the token there may be anything), equal positive
            ids are one document, a document is contiguous. None: each row is one document without padding, and with a
            cache it continues the row's document.
          cache: state of earlier calls. The first document of a row continues the cached one if it has its id.
          mtp: also run the multi-token prediction block (not together with a cache).
          capture: names of `Output.captured`.

        Raises:
          InputError: an argument has a wrong shape, dtype or value, as far as values are known outside `jax.jit`.
            Inside it, an id out of range or a full cache gives NaN logits for the row instead, and a document that is
            interrupted is two.
        """
        tokens, segment_ids = checks.call(self.config, tokens, segment_ids, cache, mtp, capture)
        params = declare(self, model_specs(self.config))
        if self.is_initializing():
            return Output(jnp.zeros((*tokens.shape, self.config.vocab_size)))  # only the parameters are wanted
        run = forward.backbone(params, tokens, segment_ids, cache, capture=tuple(capture), **self.options())
        predicted = None
        if mtp:
            after = forward.predict_next(params, tokens, run.hidden, run.segments, **self.options())
            predicted = forward.head(
                params, after.hidden, self.config, mesh=self.mesh, implementation=self.implementation
            )
        logits = forward.head(params, run.hidden, self.config, mesh=self.mesh, implementation=self.implementation)
        return Output(logits, run.cache, predicted, run.captured if capture else None)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the functions in `nemojax.forward`."""
        return {
            "config": self.config,
            "implementation": self.implementation,
            "mesh": self.mesh,
            "dispatch": self.dispatch,
        }


def init_params(config: Config, key: jax.Array, *, mesh: Mesh | None = None) -> dict[str, Any]:
    """Fresh parameters: what `Nemotron(config).init` makes, which does not depend on the tokens.

    With `mesh`, each device makes its own slice of them.

    Raises:
      InputError: a parameter does not divide over the mesh.
    """
    init = lambda key: Nemotron(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return init(key) if mesh is None else jax.jit(init, out_shardings=param_shardings(config, mesh))(key)
