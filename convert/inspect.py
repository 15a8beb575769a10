"""What a checkpoint is, from its config and headers alone: no tensor is read."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from convert.hf_reader import HFReader
from convert.names import entries, match
from nemojax import checkpoint, layout
from nemojax.config import LAYER_KINDS, Config
from nemojax.specs import num_bytes, num_params


@dataclass(frozen=True)
class Report:
    """Result of `inspect`.

    Attributes:
      format: Hugging Face or Orbax, with the layout or dialect.
      config: the configuration.
      tensors: number stored. nbytes: their bytes on disk. dtypes: how many tensors have each dtype.
      quantisation: scheme that the checkpoint declares, or None.
      missing: tensors that the model has and the checkpoint lacks. extra: the reverse. misshaped: with both shapes.
    """

    format: str
    config: Config
    tensors: int
    nbytes: int
    dtypes: dict[str, int]
    quantisation: str | None
    missing: list[str]
    extra: list[str]
    misshaped: list[str]

    @property
    def whole(self) -> bool:
        """Whether every tensor is there, used, and of the right shape."""
        return not (self.missing or self.extra or self.misshaped)

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        c, counts = self.config, Counter(self.config.pattern)
        kinds = ", ".join(f"{counts[k]} {name}" for k, name in LAYER_KINDS.items() if counts[k])
        rows = [
            ("format", self.format),
            ("layers", f"{c.num_layers} ({kinds})" + (", multi-token prediction" if c.mtp_pattern else "")),
            ("pattern", c.pattern),
            ("width", f"{c.hidden_size}, vocabulary {c.vocab_size:,}"),
            ("parameters", f"{num_params(c):,}"),
            ("in memory", f"{num_bytes(c) / 1e9:.3f} GB in {c.dtype}"),
            ("on disk", f"{self.tensors:,} tensors, {self.nbytes / 1e9:.3f} GB"),
            ("dtypes", ", ".join(f"{n:,} {d}" for d, n in sorted(self.dtypes.items()))),
            ("quantised", self.quantisation or "no"),
        ]
        for name in ("missing", "extra", "misshaped"):
            found = sorted(getattr(self, name))
            rows.append((name, f"{len(found):,}" + (f": {', '.join(found[:5])}" if found else "")))
        return [f"{name:<11} {value}" for name, value in rows]


def inspect(path: str | os.PathLike) -> Report:
    """Describes a Hugging Face or Orbax directory.

    Raises:
      InputError: the config, the index or a header is damaged.
    """
    directory = layout.require_directory(Path(path))
    config = Config.from_hf(directory)
    return _inspect_orbax(directory, config) if layout.is_orbax(directory) else _inspect_hf(directory, config)


def _inspect_hf(directory: Path, config: Config) -> Report:
    with HFReader(directory) as reader:
        found, missing, extra = match(config, reader)
        misshaped = [
            f"{name} {reader[name].shape}, expected {entry.shape}"
            for entry in found
            for name in entry.tensors
            if name in reader and reader[name].shape != entry.shape
        ]
        fused = any(entry.stacked for entry in found)
        prefix = "model.*" if any(name.startswith("model.") for name in reader) else "backbone.*"
        experts = ", experts stacked" if fused else ", one tensor an expert" if "E" in config.kinds else ""
        return Report(
            f"Hugging Face safetensors, {prefix} names{experts}",
            config,
            len(reader),
            reader.total_bytes(),
            dict(Counter(str(info.dtype) for info in reader.values())),
            _quantisation(directory),
            missing,
            extra,
            misshaped,
        )


def _inspect_orbax(directory: Path, config: Config) -> Report:
    stored = checkpoint.orbax_leaves(directory)
    specs = {entry.leaf: entry for entry in entries(config)}
    shapes = {name: tuple(leaf.shape) for name, leaf in stored.items()}
    return Report(
        "Orbax",
        config,
        len(stored),
        sum(_size(shapes[name]) * leaf.dtype.itemsize for name, leaf in stored.items()),
        dict(Counter(str(leaf.dtype) for leaf in stored.values())),
        _quantisation(directory),
        [name for name in specs if name not in stored],
        [name for name in stored if name not in specs],
        [
            f"{name} {shapes[name]}, expected {specs[name].spec.shape}"
            for name in stored
            if name in specs and shapes[name] != specs[name].spec.shape
        ],
    )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _quantisation(directory: Path) -> str | None:
    """The scheme in ModelOpt's own file or in the config, as far as it says one."""
    for name, keys in (("hf_quant_config.json", ("quantization",)), ("config.json", ("quantization_config",))):
        try:
            section = json.loads((directory / name).read_text())
        except (OSError, ValueError):
            continue
        for key in keys:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict):
            return str(section.get("quant_algo") or section.get("quant_method") or "yes")
    return None
