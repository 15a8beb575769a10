"""The log of a training run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

matplotlib.use("Agg")  # no display is needed

_PANELS = (
    ("bits per byte", ("bits_per_byte", "held_out_bits_per_byte")),
    ("loss", ("next_token_loss", "mtp_loss")),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
    ("expert load, largest over mean", ("expert_load_max_over_mean",)),
    ("tokens per second", ("tokens_per_second",)),
)


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes one PNG with a panel a quantity.

    Args:
      records: lines of the log; a quantity may be missing from some.
      path: the file to write.
    """
    figure = Figure(figsize=(13, 7), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        for name in names:
            points = [(r["step"], r[name]) for r in records if name in r]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axes.set_title(title)
        axes.set_xlabel("step")
        if len(names) > 1:
            axes.legend()
    figure.savefig(path, dpi=110)
