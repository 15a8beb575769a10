"""The peer of the benchmarks: transformers on torch, driven line by line by the process that compares.

Started by `experiments.bench_forward` in an environment that has torch. Reads JSON requests from standard input and
answers each with one line of JSON on standard output.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch
import transformers


def main(path: str, threads: int) -> None:
    """Serves `prefill`, `decode` and `logits` requests about the checkpoint at `path`."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    model = transformers.NemotronHForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            # transformers clamps dt at 0.001 in prefill and not in decoding; no released model means that
            layer.mixer.time_step_limit = (0.0, float("inf"))
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    _answer({"versions": versions})
    for line in sys.stdin:
        request = json.loads(line)
        tokens = torch.tensor([request["tokens"]])
        start = time.perf_counter()
        with torch.no_grad():
            if request["op"] == "generate":
                options = dict(
                    do_sample=False, use_cache=True, max_new_tokens=request["new"], min_new_tokens=request["new"]
                )
                out = model.generate(tokens, **options)[0, tokens.shape[1] :].tolist()
            else:
                logits = model(tokens, use_cache=False).logits
                out = logits[0, -1].tolist() if request["op"] == "logits" else []
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        _answer({"seconds": seconds, "out": out, "memory": memory})


def _answer(message: dict) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
