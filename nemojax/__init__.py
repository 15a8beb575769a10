"""nemojax: the NVIDIA Nemotron-H / Nemotron 3 family as pure functions in JAX/Flax."""

# Configuration
# Model and state
from nemojax.cache import AttentionState, Cache, MambaState, init_cache
from nemojax.checkpoint import load, save
from nemojax.config import Config
from nemojax.errors import InputError
from nemojax.generate import generate
from nemojax.layers.moe import Routing
from nemojax.model import Nemotron, Output, init_params
from nemojax.presets import preset, preset_names

# Parameters
from nemojax.specs import abstract_params, num_params

__all__ = [
    "AttentionState",
    "Cache",
    "Config",
    "InputError",
    "MambaState",
    "Nemotron",
    "Output",
    "Routing",
    "abstract_params",
    "generate",
    "init_cache",
    "init_params",
    "load",
    "num_params",
    "preset",
    "preset_names",
    "save",
]
