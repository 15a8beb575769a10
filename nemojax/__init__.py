"""nemojax: the NVIDIA Nemotron-H / Nemotron 3 family as pure functions in JAX/Flax."""

from nemojax.cache import AttentionState, Cache, MambaState, init_cache
from nemojax.checkpoint import load, save
from nemojax.config import Config
from nemojax.errors import InputError
from nemojax.generate import generate
from nemojax.layers.moe import Routing
from nemojax.model import Nemotron, Output, init_params
from nemojax.presets import preset, preset_names
from nemojax.sharding import make_mesh, param_shardings
from nemojax.specs import abstract_params, num_params

__all__ = [
    # configuration
    "Config",
    "preset",
    "preset_names",
    # model and state
    "AttentionState",
    "Cache",
    "MambaState",
    "Nemotron",
    "Output",
    "Routing",
    "init_cache",
    "init_params",
    # several devices
    "make_mesh",
    "param_shardings",
    # checkpoints and text
    "generate",
    "load",
    "save",
    # parameters
    "abstract_params",
    "num_params",
    # errors
    "InputError",
]
