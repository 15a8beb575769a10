"""The main job, end to end, on nemotron-tiny: `make demo` or `python -m experiments.demo`.

Hugging Face directory -> inspect -> Orbax -> load -> jitted forward on text that the model never saw -> comparison with
the logits that transformers computed from the same weights -> greedy text -> Hugging Face directory again, bitwise
equal.

Last result (2 cores, AVX2, jax 0.11.2): see the README.
"""

from __future__ import annotations

import sys
import tempfile
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import nemojax
from nemojax import cli
from nemojax.tokenizer import load_tokenizer

TINY = Path(__file__).parent / "nemotron_tiny"
CHECKPOINT = TINY / "model"
# float32 against float32, in units of the largest logit.
TOLERANCE = 2e-5
LONG_TOKENS = 2048


def main() -> int:
    """Runs every step; returns 1 if one of them is not as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        orbax, exported = Path(folder) / "orbax", Path(folder) / "huggingface"
        _say("1. What the checkpoint is")
        ok = cli.main(["inspect", str(CHECKPOINT)]) == 0
        _say("2. Hugging Face -> Orbax")
        ok &= cli.main(["convert", str(CHECKPOINT), str(orbax), "--no-progress"]) == 0
        _say("3. Load it, run it under jax.jit, compare with transformers")
        ok &= _run(orbax)
        _say("4. Orbax -> Hugging Face, bitwise equal to the original")
        ok &= cli.main(["convert", str(orbax), str(exported), "--no-progress"]) == 0
        ok &= cli.main(["verify", str(CHECKPOINT), str(exported), "--no-progress"]) == 0
    _say("everything as it should be" if ok else "SOMETHING IS WRONG, see above")
    return 0 if ok else 1


def _say(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _run(checkpoint: Path) -> bool:
    model, params = nemojax.load(checkpoint, dtype="float32")
    tokenizer, reference = load_tokenizer(checkpoint), np.load(TINY / "reference.npz")
    text = str(reference["prompt"])
    tokens = jnp.array([tokenizer.encode(text).ids], jnp.int32)
    print(f"text ({tokens.shape[1]} tokens):\n{_indented(text)}")

    forward = jax.jit(model.apply)
    logits = np.asarray(forward({"params": params}, tokens).logits)
    error = np.abs(logits - reference["logits"]).max() / np.abs(reference["logits"]).max()
    print(f"logits {logits.shape}: at most {error:.1e} of the largest logit from transformers' (bound {TOLERANCE:.0e})")

    count = reference["greedy"].shape[1]
    new = np.asarray(nemojax.generate(model, params, tokens, max_new_tokens=count, stop_ids=()))
    same = bool((new == reference["greedy"]).all())
    print(f"greedy text:\n{_indented(text + tokenizer.decode(new[0].tolist()))}")
    print(f"the {count} greedy tokens are {'the same as' if same else 'NOT those of'} transformers'")

    ids = jnp.resize(tokens, (1, LONG_TOKENS))
    prefill = _seconds(lambda: forward({"params": params}, ids).logits)
    longer = lambda n: nemojax.generate(model, params, tokens, max_new_tokens=n, stop_ids=())
    decode = _seconds(lambda: longer(129)) - _seconds(lambda: longer(1))
    print(
        f"speed: prefill of {LONG_TOKENS:,} {LONG_TOKENS / prefill:,.0f} tokens/s, decode {128 / decode:,.0f} tokens/s"
    )
    return error <= TOLERANCE and same and np.array_equal(tokens, reference["tokens"])


def _indented(text: str) -> str:
    return textwrap.indent(text, "  | ", lambda line: True)


def _seconds(call) -> float:
    """Median wall time of five calls, compile time excluded."""
    jax.block_until_ready(call())
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


if __name__ == "__main__":
    sys.exit(main())
