"""Bytes of collectives, read from programs whose traffic is known: eight devices exchange 64 rows each of 4 kB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemojax.collectives import Collective, collectives

ROOT = Path(__file__).parent.parent
SHARD = 64 * 1024 * 4  # bytes of a device's rows

# Needs eight devices, which a process must ask for before its first use of JAX.
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

ring = [(i, (i + 1) % 8) for i in range(8)]
halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
programs = {
    "psum": (lambda x: lax.psum(x, "x"), P("x"), P()),
    "psum of halves": (lambda x: lax.psum(x, "x", axis_index_groups=halves), P("x"), P("x")),
    "two psums": (lambda x: (lax.psum(x, "x"), lax.psum(x[:4], "x")), P("x"), (P(), P())),
    "all_gather": (lambda x: lax.all_gather(x, "x", tiled=True), P("x"), P()),
    "psum_scatter": (lambda x: lax.psum_scatter(x, "x", tiled=True), P(), P("x")),
    "all_to_all": (lambda x: lax.all_to_all(x, "x", 0, 0, tiled=True), P("x"), P("x")),
    "ppermute": (lambda x: lax.ppermute(x, "x", ring), P("x"), P("x")),
    "loop": (lambda x: lax.fori_loop(0, 5, lambda i, c: 2 * lax.ppermute(c, "x", ring), x), P("x"), P("x")),
    "nothing": (lambda x: x + 1, P("x"), P("x")),
}
platform = sys.argv[1]
devices = jax.devices()
if platform == "cuda":
    from nemojax.gpu_targets import abstract_devices, gpu
    devices = abstract_devices(gpu("h100"), 8)
mesh = Mesh(np.array(devices), ("x",))
texts = {}
for name, (f, before, after) in programs.items():
    f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=before, out_specs=after, check_vma=False))
    x = jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=NamedSharding(mesh, before))
    texts[name] = f.trace(x).lower(lowering_platforms=(platform,)).compile().as_text()
print(json.dumps(texts))
"""

EXPECTED = {
    "psum": [("all-reduce", 0, SHARD * 2 * 7 // 8)],
    "psum of halves": [("all-reduce", 0, SHARD * 2 * 3 // 4)],
    "two psums": [("all-reduce", 0, (SHARD + SHARD // 16) * 2 * 7 // 8)],
    "all_gather": [("all-gather", 0, 7 * SHARD)],
    "psum_scatter": [("reduce-scatter", 0, 7 * SHARD)],
    "all_to_all": [("all-to-all", 0, SHARD * 7 // 8)],
    "ppermute": [("collective-permute", 0, SHARD)],
    "loop": [("collective-permute", 1, SHARD)],
    "nothing": [],
}


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def texts(request):
    if request.param == "cuda":
        pytest.importorskip("jax_cuda13_plugin")
    flags = "--xla_force_host_platform_device_count=8"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, request.param]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", EXPECTED)
def test_bytes_of_known_programs(texts, name):
    assert [(c.kind, c.in_loops, c.nbytes) for c in collectives(texts[name])] == EXPECTED[name]


LINES = {
    "start with operands and context": (
        "%s = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}",
        Collective("collective-permute", 1, 0, 256),
    ),
    "start of two arrays": (
        "%s = ((f32[8]{0}, bf16[8]{0}), (f32[32]{0}, bf16[32]{0})) all-gather-start(%a, %b), replica_groups=[2,4]<=[8]",
        Collective("all-gather", 1, 0, (128 + 64) * 3 // 4),
    ),
    "start that returns no operands": (
        "%s = f32[16]{0} all-reduce-start(%a), replica_groups={{0,1},{2,3}}",
        Collective("all-reduce", 1, 0, 64),
    ),
    "everyone": (
        "%s = pred[16]{0} all-gather(%a), replica_groups={}, dimensions={0}",
        Collective("all-gather", 1, 0, 14),
    ),
    "two axes of a mesh": (
        "%s = s8[16]{0} all-to-all(%a), replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','b'}",
        Collective("all-to-all", 1, 0, 14),
    ),
    "ragged": (
        "%s = bf16[8,16]{1,0} ragged-all-to-all(%a, %b, %c, %d, %e, %f), replica_groups={{0,1,2,3,4,5,6,7}}",
        Collective("ragged-all-to-all", 1, 0, 224),
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_forms_of_the_text(name):
    line, expected = LINES[name]
    done = '  %d = f32[1]{0} all-reduce-done(%s), metadata={op_name="all-gather("}\n'
    text = f"HloModule m, num_partitions=8\n\nENTRY %main (a: f32[8]) -> f32[8] {{\n  {line}\n{done}}}\n"
    assert collectives(text) == [expected]


def test_unknown_groups_are_refused():
    text = "ENTRY %main (a: f32[8]) -> f32[8] {\n  %s = f32[8]{0} all-reduce(%a), replica_groups=odd\n}\n"
    with pytest.raises(ValueError, match="replica_groups='odd"):
        collectives(text)
