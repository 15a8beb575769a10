"""What a forward pass costs each device as devices are added: memory, work, and bytes sent, from the compiled program.

    python -m experiments.bench_sharding

Devices are made of the CPU, so times would say nothing; the programs and what they send are those of real devices. The
last column is what the theory says is sent. Last result: README, "On several devices".
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

import nemojax
from nemojax.collectives import collectives
from nemojax.config import Config
from nemojax.dispatch import all_to_all
from nemojax.errors import InputError
from nemojax.sharding import param_shardings

# The widths of Nano in small: 8 groups, 2 key/value heads, 6 of 128 experts.
CONFIG = Config(
    pattern="MEM*EME",
    vocab_size=4096,
    hidden_size=256,
    num_attention_heads=16,
    head_dim=32,
    mamba_num_heads=16,
    mamba_head_dim=32,
    ssm_state_size=64,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=128,
    moe_shared_expert_intermediate_size=256,
    dtype="float32",
)
ROWS, TOKENS = 8, 512
# Mesh and dispatch strategy; the size of the axis is filled in.
CASES = [
    ("data", None),
    ("expert", "ring"),
    ("expert", "all_to_all"),
    ("tensor", None),
    ("sequence", None),
]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one device. Bytes are sent ones; operations inside loops of unknown length (experts) are counted once.

    Attributes:
      parameter_bytes: of its slices. temp_bytes: temporaries. flops: operations.
      sent: bytes by kind of collective. expected: bytes of all, by theory.
    """

    parameter_bytes: int
    temp_bytes: int
    flops: float
    sent: dict[str, int]
    expected: int


def measure(config: Config, axis: str, size: int, dispatch: str | None, rows: int, tokens: int) -> Cost:
    """Compiles the forward of `rows` rows over `size` devices on one axis."""
    mesh = nemojax.make_mesh({axis: size})
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    shardings = param_shardings(config, mesh)
    params = jax.tree.map(place, nemojax.abstract_params(config), shardings)
    model = nemojax.Nemotron(config, mesh=mesh, dispatch=dispatch)
    run = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits)
    compiled = run.lower(params, jax.ShapeDtypeStruct((rows, tokens), jnp.int32)).compile()
    slices = (math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(params))
    return Cost(
        sum(slices) * config.np_dtype.itemsize,
        compiled.memory_analysis().temp_size_in_bytes,
        compiled.cost_analysis()["flops"],
        {c.kind: c.nbytes for c in collectives(compiled.as_text())},
        round(expected_bytes(config, axis, size, dispatch, rows, tokens)),
    )


def expected_bytes(config: Config, axis: str, size: int, dispatch: str | None, rows: int, tokens: int) -> float:
    """Bytes that a device sends in a forward pass, by theory (float32)."""
    c, width, layers = config, 4 * config.hidden_size, {kind: config.pattern.count(kind) for kind in "M*E-"}
    if size == 1 or axis == "data":
        return 0
    if axis == "tensor":  # the embedding and every layer: one sum over the shards, 2 (n - 1) / n of it on the wire
        return 2 * (size - 1) / size * rows * tokens * width * (1 + c.num_layers)
    if axis == "sequence":
        window = 4 * (c.conv_kernel - 1) * (c.mamba_inner + 2 * c.n_groups * c.ssm_state_size)
        state = 4 * c.mamba_num_heads * (1 + c.mamba_head_dim * c.ssm_state_size)
        exchanges = 1 + math.ceil(math.log2(max(size - 1, 1)))
        keys = 2 * 4 * c.num_key_value_heads * c.head_dim * tokens // size
        return rows * (layers["M"] * exchanges * (window + state) + layers["*"] * (size - 1) * keys)
    own, pair = rows * tokens // size, 8 * c.num_experts_per_tok
    if dispatch == "all_to_all":
        own = math.ceil(all_to_all.ROOM * own * all_to_all.share(c.num_experts_per_tok, size))
        own = min(own, rows * tokens // size)
    return layers["E"] * (size - 1) * own * (width + pair + width)  # a row with its choices out, a sum back


def table(config: Config, sizes: Sequence[int], rows: int, tokens: int) -> list[str]:
    """The table as Markdown."""
    lines = [
        "| mesh | parameters MB | temporaries MB | GFLOP | sent MB | by theory MB | collectives |",
        "|---|---|---|---|---|---|---|",
    ]
    for axis, dispatch in CASES:
        for size in sizes:
            if size == 1 and axis != "data":
                continue
            cost = measure(config, axis, size, dispatch, rows, tokens)
            name = f"{axis}={size}" + (f" {dispatch}" if dispatch else "")
            kinds = ", ".join(f"{kind} {nbytes / 1e6:.2f}" for kind, nbytes in cost.sent.items() if nbytes >= 5000)
            numbers = (cost.parameter_bytes, cost.temp_bytes, cost.flops / 1e3, sum(cost.sent.values()), cost.expected)
            shown = " | ".join(f"{n / 1e6:.2f}" for n in numbers)
            lines.append(f"| {name} | {shown} | {kinds or 'none'} |")
            print(lines[-1], flush=True)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, row by row as they are compiled, then whole; exits with 2 for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(args.sizes))
    print(f"{nemojax.num_params(CONFIG) / 1e6:.1f} M parameters, {args.rows} rows of {args.tokens} tokens, float32\n")
    try:
        lines = table(CONFIG, args.sizes, args.rows, args.tokens)
    except InputError as error:
        parser.error(str(error))
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
