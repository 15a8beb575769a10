"""Hugging Face directory -> parameters in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from convert.hf_reader import HFReader
from convert.source import HFSource
from nemojax.config import Config
from nemojax.specs import unflatten


def load_hf(path: Path, config: Config) -> dict[str, Any]:
    """Reads every parameter, leaf by leaf, in the dtypes of the specs.

    Raises:
      InputError: the checkpoint is damaged or does not fit the config.
    """
    with HFReader(path) as reader:
        source = HFSource(path, config, reader)
        return unflatten(
            [(e.leaf, jax.device_put(source.read(e).astype(e.spec.dtype, copy=False))) for e in source.entries]
        )
