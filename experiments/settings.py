"""What decides a training run: the same settings, data and software give the same parameters bit by bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemojax.config import Config
from nemojax.errors import InputError

_EXAMPLE = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
_EXAMPLE |= {tuple: 'a list such as ["in_proj"]'}
_LARGEST = 3.4e38  # float32 ends a little above


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of `experiments.train`; the values are those of the released models where these are public.

    Attributes:
      model: fields of `nemojax.Config`; None with `--init`, which brings a model.
      compute_dtype: of activations and of the copy of the weights that they meet; master weights are float32.
      tokens_per_row, rows_per_step, accumulate: a step has `rows_per_step` rows, in `accumulate` equal parts.
      steps, warmup_steps, decay_steps: constant learning rate between a linear rise and a fall in 1 - sqrt.
      learning_rate, final_learning_rate: its peak and its end.
      bias_rate: step of the router's correction bias. balance_scale, mtp_scale: weights in the loss.
      remat: keep only the residual stream for the backward pass.
      seed: of the parameters and of the order of the data.
      save_every, keep: checkpoints, in steps, and how many stay. evaluate_every: look at held-out text, in steps.
      lora: projections to adapt (regular expressions), none to train everything. lora_rank, lora_alpha: of adapters.
    """

    model: dict[str, Any] | None = None
    compute_dtype: str = "float32"
    tokens_per_row: int = 1024
    rows_per_step: int = 8
    accumulate: int = 1
    steps: int = 1000
    warmup_steps: int = 50
    decay_steps: int = 200
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    bias_rate: float = 1e-3
    balance_scale: float = 1e-4
    mtp_scale: float = 0.3
    remat: bool = False
    seed: int = 0
    save_every: int = 100
    keep: int = 2
    evaluate_every: int = 100
    lora: tuple[str, ...] = ()
    lora_rank: int = 8
    lora_alpha: float = 16.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, wanted = getattr(self, field.name), type(field.default)
            fits = isinstance(value, (int, float)) if wanted is float else isinstance(value, wanted)
            if wanted is float and fits and not 0 <= value <= _LARGEST:
                raise InputError(f"settings: {field.name} must be at least 0 and finite, got {value}")
            if field.name != "model" and (not fits or isinstance(value, bool) != (wanted is bool)):
                raise InputError(f"settings: {field.name} must be {_EXAMPLE[wanted]}, got {value!r}")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise InputError(f"settings: compute_dtype must be float32 or bfloat16, got {self.compute_dtype!r}")
        for name in ("tokens_per_row", "rows_per_step", "accumulate", "steps", "save_every", "keep", "evaluate_every"):
            if getattr(self, name) < 1:
                raise InputError(f"settings: {name} must be at least 1, got {getattr(self, name)}; raise it")
        for name, end in (("beta1", 1), ("beta2", 1), ("seed", 2**32), ("steps", 2**31)):
            if not 0 <= getattr(self, name) < end:
                raise InputError(f"settings: {name} must be at least 0 and below {end}, got {getattr(self, name)}")
        if not self.clip_norm:
            raise InputError("settings: clip_norm 0 makes every gradient 0; to clip none, give a large number")
        if self.tokens_per_row < 2:
            raise InputError("settings: tokens_per_row must be at least 2, got 1; a token needs another to predict")
        if not all(isinstance(target, str) for target in self.lora):
            raise InputError(f"settings: lora must be a list of regular expressions, got {list(self.lora)!r}")
        if not isinstance(self.model, dict | None):
            raise InputError(f"settings: model must be an object of the configuration's fields, got {self.model!r}")
        if self.rows_per_step % self.accumulate:
            raise InputError(
                f"settings: rows_per_step {self.rows_per_step} is not divisible by {self.accumulate} parts"
            )
        if self.warmup_steps < 0 or self.decay_steps < 0 or self.warmup_steps + self.decay_steps > self.steps:
            raise InputError(
                f"settings: warmup_steps {self.warmup_steps} and decay_steps {self.decay_steps} do not fit into "
                f"{self.steps} steps"
            )

    @property
    def config(self) -> Config:
        """The model's configuration, float32.

        Raises:
          InputError: `model` does not describe one.
        """
        try:
            fields = {k: tuple(v) if isinstance(v, list) else v for k, v in (self.model or {}).items()}
            return Config(**fields).replace(dtype="float32")
        except TypeError as error:  # a field that is unknown or missing
            raise InputError(f"settings: model: {str(error).replace('Config.__init__() ', '')}") from None


def read(path: Path | None, changes: Sequence[str] = ()) -> Settings:
    """Settings from a JSON file, with `name=value` changes on top (the value in JSON, or a plain string).

    Raises:
      InputError: the file or a change cannot be read, or names no setting.
    """
    values: Any = {}
    if path is not None:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a {type(values).__name__}; give an object of settings")
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"--set {change}: give name=value")
        try:
            values[name] = json.loads(value)
        except (ValueError, RecursionError):
            values[name] = value
    known = {field.name for field in dataclasses.fields(Settings)}
    if unknown := sorted(values.keys() - known):
        raise InputError(f"settings: {', '.join(unknown)} unknown; known: {', '.join(sorted(known))}")
    if isinstance(values.get("lora"), list):
        values["lora"] = tuple(values["lora"])
    return Settings(**values)
