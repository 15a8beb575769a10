"""What an evaluation found and what it cost."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from nemojax.evaluation.harness import NemojaxLM


class Cost(NamedTuple):
    """Beside the scores.

    Attributes:
      requests: all. resumed: of them, answered by an earlier run. truncated: of them, cut to the longest context.
      tokens: real tokens that this run computed. shared_tokens: tokens that it did not, as a prefix had them.
      padding: share of computed positions that held no token.
      tokens_per_second: in compiled programs. programs, compile_seconds: shapes compiled and the time for that.
      seconds: of the whole run after loading.
      peak_memory: bytes, of the fullest device, or of this process where the devices do not tell.
    """

    requests: int
    resumed: int
    truncated: int
    tokens: int
    shared_tokens: int
    padding: float
    tokens_per_second: float
    programs: int
    compile_seconds: float
    seconds: float
    peak_memory: int

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"requests     {self.requests:,}, of them {self.resumed:,} answered before, {self.truncated:,} truncated",
            f"tokens       {self.tokens:,} computed, {self.shared_tokens:,} more were in shared prefixes",
            f"speed        {self.tokens_per_second:,.0f} tokens/s; {self.seconds:.1f} s in all",
            f"compilation  {self.compile_seconds:.1f} s for {self.programs} shapes",
            f"padding      {self.padding:.1%} of the computed positions",
            f"peak memory  {self.peak_memory / 1e9:.2f} GB",
        ]


def cost(lm: NemojaxLM, seconds: float) -> Cost:
    """The cost of a finished evaluation."""
    work = lm.engine.work
    return Cost(
        requests=lm.answered + lm.resumed,
        resumed=lm.resumed,
        truncated=lm.truncated,
        tokens=work.tokens,
        shared_tokens=lm.scorer.saved_tokens,
        padding=1 - work.tokens / max(work.positions, 1),
        tokens_per_second=work.tokens / max(work.run_seconds, 1e-9),
        programs=work.programs,
        compile_seconds=work.compile_seconds,
        seconds=seconds,
        peak_memory=_peak_memory(lm.engine.params),
    )


def _peak_memory(params: Any) -> int:
    devices = [d for d in jax.tree.leaves(params)[0].devices() if d.process_index == jax.process_index()]
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices]
    unit = 1 if sys.platform == "darwin" else 1024
    return max(peaks) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write(folder: Path, results: dict[str, Any], cost: Cost) -> None:
    """`samples_TASK.jsonl` a task, and `results.json`."""
    from lm_eval.utils import handle_non_serializable

    dump = lambda value, **options: json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **options)
    for task, samples in results["samples"].items():
        lines = "".join(dump(sample) + "\n" for sample in samples)
        (folder / f"samples_{task.replace('/', '_')}.jsonl").write_text(lines, encoding="utf-8")
    rest = {name: value for name, value in results.items() if name != "samples"}
    (folder / "results.json").write_text(dump(rest | {"cost": cost._asdict()}, indent=2) + "\n", encoding="utf-8")
