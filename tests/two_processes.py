"""One of several processes that load a checkpoint onto one mesh and run it; `processes.py` starts them.

Arguments: checkpoint, mesh, address of the first process, number of processes, this one's number, file for the
logits, beside which they also save the model, or - to load only, in the dtypes that are stored.
"""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np

CHECKPOINT, MESH, ADDRESS, PROCESSES, PROCESS, OUT = sys.argv[1:]

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8 // int(PROCESSES))
jax.distributed.initialize(ADDRESS, int(PROCESSES), int(PROCESS))

from jax.experimental import multihost_utils  # noqa: E402  (after the processes know each other)

import nemojax  # noqa: E402


def peak_memory() -> int:
    """Largest resident memory of this program; `ru_maxrss` would count that of the one that started it."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def main() -> None:
    mesh = nemojax.make_mesh(MESH)
    jax.jit(lambda: jax.numpy.zeros(8))().block_until_ready()  # what jax itself takes is not counted
    before = peak_memory()
    model, params = nemojax.load(CHECKPOINT, mesh=mesh, dtype=None if OUT == "-" else "float32")
    jax.block_until_ready(params)
    grown = peak_memory() - before
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    print(json.dumps({"held": held, "grown": grown}), flush=True)
    if OUT == "-":
        return
    tokens = np.random.default_rng(0).integers(1, model.config.vocab_size, (8, 40)).astype(np.int32)
    logits = jax.jit(lambda params: model.apply({"params": params}, tokens).logits)(params)
    new = nemojax.generate(model, params, tokens[:, :9], max_new_tokens=5, stop_ids=())
    logits, new = multihost_utils.process_allgather((logits, new), tiled=True)
    nemojax.save(f"{OUT}.saved", model.config, params)
    refused = ""
    try:
        nemojax.save(f"{OUT}.saved", model.config, params)
    except nemojax.InputError as error:
        refused = str(error)
    assert "exists and is not empty" in refused, refused
    if PROCESS == "0":
        np.savez(OUT, logits=logits, new=new)


main()
