"""CPU speed of prefill and decoding beside transformers and the machine's own limits, in one run.

    make bench            or    python -m experiments.bench_forward [--checkpoint DIR] [--rounds 5]

A 47 M-parameter float32 model (2 Mamba-2, 1 attention, 3 expert layers, 32 experts top-6), batch 1, 2 threads. Every
round times ours, the peer, a float32 matrix product and a matrix-vector product (both ways that XLA has here; the
faster one is the limit) one after the other, so that a machine whose speed drifts treats them alike; before each, a
pause lets the other threads go to sleep, and an untimed call warms the caches. The table shows medians, compile time
apart. Last result: see the README.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import nemojax
from convert.progress import peak_memory
from convert.stream import convert
from experiments.rooflines import active_params, decode_bytes, prefill_flops
from nemojax.errors import InputError
from pallas_kernels.matvec import cpu

ROOT = Path(__file__).parents[1]
THREADS = 2
PAUSE = 0.5  # seconds; OpenMP threads spin for a while after their work is done
PREFILL, PROMPT, NEW = 2048, 16, 128
CONFIG = nemojax.Config(
    pattern="MEME*E",
    vocab_size=4096,
    hidden_size=512,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    mamba_num_heads=16,
    mamba_head_dim=64,
    n_routed_experts=32,
    num_experts_per_tok=6,
    moe_intermediate_size=352,
    moe_shared_expert_intermediate_size=704,
    routed_scaling_factor=2.5,
    dtype="float32",
    eos_token_id=None,
)


def main() -> int:
    """Prints the table; exits with 1 if ours and the peer disagree about the model, with 2 for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="Hugging Face directory; default: random weights made here")
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, 100), metavar="N")
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-parity" / "bin" / "python"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint.resolve() if args.checkpoint else _random_checkpoint(Path(folder))
        try:
            model, params = nemojax.load(checkpoint)
        except InputError as error:
            parser.error(str(error))
        peer = Peer(args.peer_python, checkpoint) if Path(args.peer_python).exists() else None
        return _run(model, params, peer, args.rounds)


def _random_checkpoint(folder: Path) -> Path:
    params = nemojax.init_params(CONFIG, jax.random.key(0))
    nemojax.save(folder / "orbax", CONFIG, params)
    convert(folder / "orbax", folder / "huggingface", show_progress=False)
    return folder / "huggingface"


class Peer:
    """transformers in a process of its own."""

    def __init__(self, python: str, checkpoint: Path):
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        command = [python, "-m", "experiments.peer_transformers", str(checkpoint), str(THREADS)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions = self._receive()["versions"]
        self.memory = 0

    def ask(self, op: str, tokens: np.ndarray, new: int = 0) -> dict:
        """Runs one request twice; `seconds` of the answer is the second one's wall time in the peer."""
        time.sleep(PAUSE)
        for _ in range(2):
            print(json.dumps({"op": op, "tokens": tokens.tolist(), "new": new}), file=self._process.stdin, flush=True)
            answer = self._receive()
        self.memory = answer["memory"]
        return answer

    def _receive(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer stopped with exit code {self._process.wait()}")
        return json.loads(line)


def _seconds(call: Callable[[], jax.Array]) -> float:
    time.sleep(PAUSE)
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _run(model: nemojax.Nemotron, params: dict, peer: Peer | None, rounds: int) -> int:
    config = model.config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, PREFILL, np.int32)
    start = time.perf_counter()
    forward = jax.jit(lambda p, t: model.apply({"params": p}, t).logits).lower(params, tokens[None]).compile()
    compile_seconds = time.perf_counter() - start
    generate = lambda new: nemojax.generate(model, params, tokens[None, :PROMPT], max_new_tokens=new, stop_ids=())
    square, vector = jnp.ones((2048, 2048)), jnp.ones(4096)
    tall = jnp.ones((16384, 4096))  # 268 MB, far beyond any cache
    product = jax.jit(lambda a, b: a @ b)
    stream = jax.jit(lambda a, b: cpu.rows_dot(a[None], jnp.zeros(1, jnp.int32), b))
    ours = {
        "prefill": lambda: forward(params, tokens[None]),
        "decode": lambda: generate(NEW + 1),
        "first": lambda: generate(1),
        "matmul": lambda: product(square, square),
        "matvec": lambda: product(tall, vector),
        "stream": lambda: stream(tall, vector),
    }
    theirs = {
        "prefill": lambda: peer.ask("prefill", tokens),
        "decode": lambda: peer.ask("generate", tokens[:PROMPT], NEW + 1),
        "first": lambda: peer.ask("generate", tokens[:PROMPT], 1),
    }
    times: dict[str, list[float]] = {}
    for round_ in range(rounds + 1):  # the first one warms up
        for name, call in ours.items():
            seconds = _seconds(call)
            other = theirs[name]()["seconds"] if peer and name in theirs else None
            if round_:
                times.setdefault(name, []).append(seconds)
                times.setdefault(f"peer {name}", []).append(other) if other else None
    agreement = _agreement(peer, forward(params, tokens[None]), generate(NEW), tokens) if peer else None
    _print(config, times, compile_seconds, peer, agreement)
    return 0 if agreement is None or agreement[0] < 2e-5 and agreement[1] else 1


def _agreement(peer: Peer, logits: jax.Array, new: jax.Array, tokens: np.ndarray) -> tuple[float, bool]:
    """Largest difference of the last logits in units of the largest, and whether the greedy tokens are the same."""
    expected = np.array(peer.ask("logits", tokens)["out"])
    error = np.abs(np.asarray(logits[0, -1]) - expected).max() / np.abs(expected).max()
    return float(error), np.asarray(new[0]).tolist() == peer.ask("generate", tokens[:PROMPT], NEW)["out"]


def _print(config, times, compile_seconds, peer, agreement) -> None:
    median = lambda name: float(np.median(times[name]))
    prefill = lambda prefix: PREFILL / median(f"{prefix}prefill")
    decode = lambda prefix: NEW / float(np.median(np.subtract(times[f"{prefix}decode"], times[f"{prefix}first"])))
    matmul, bandwidth = 2 * 2048**3 / median("matmul"), 16384 * 4096 * 4 / min(median("matvec"), median("stream"))
    floors = {
        "prefill": matmul / (prefill_flops(config, PREFILL) / PREFILL),
        "decode": bandwidth / decode_bytes(config, PROMPT + NEW // 2),
    }
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, {peer.versions if peer else 'no peer'}"
    )
    print(f"{nemojax.num_params(config) / 1e6:.1f} M parameters, {active_params(config) / 1e6:.1f} M active")
    print(f"measured limits: float32 matmul {matmul / 1e9:.0f} GFLOP/s, matrix-vector {bandwidth / 1e9:.1f} GB/s\n")
    print(f"{'tokens/s':24}{'ours':>9}{'transformers':>14}{'limit':>9}{'ours/peer':>11}{'ours/limit':>12}")
    for name, label, rate in (
        ("prefill", f"prefill {PREFILL}", prefill),
        ("decode", f"decode {NEW} at batch 1", decode),
    ):
        other = rate("peer ") if peer else float("nan")
        floor = floors[name]
        print(f"{label:24}{rate(''):9,.0f}{other:14,.0f}{floor:9,.0f}{rate('') / other:11.2f}{rate('') / floor:12.0%}")
    print(f"\ncompile time of the forward {compile_seconds:.1f} s, peak memory {peak_memory() / 1e9:.2f} GB", end="")
    print(f" (transformers {peer.memory / 1e9:.2f} GB)" if peer else "")
    if agreement:
        print(f"last logits agree to {agreement[0]:.1e}, greedy tokens {'are the same' if agreement[1] else 'DIFFER'}")


if __name__ == "__main__":
    sys.exit(main())
