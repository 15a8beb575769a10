"""The README's tables say something of every kernel that there is."""

import re
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from experiments import h100_programs as programs
from experiments.kernel_report import KERNEL_HEAD, PROGRAM_HEAD, operations
from nemojax.gpu_targets import gpu

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
H100 = AbstractMesh((1,), ("device",), abstract_device=AbstractDevice(gpu("h100").kind, 132, "gpu"))


def cells(head):
    """Rows of the table with this head."""
    (table,) = re.findall(re.escape(head) + r"\n\|[-|]+\|\n((?:\|.*\n)+)", README)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def kernel_names(value):
    """Names of all Mosaic GPU kernels in a traced function, whichever branch of it they are in."""
    found = set()
    for equation in getattr(value, "jaxpr", value).eqns:
        if equation.primitive.name == "mpmd_map":
            found.add(equation.params["name"])
            continue
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found |= kernel_names(inner)
    return found


@pytest.fixture(scope="module")
def existing():
    names = set()
    for case in operations().values():
        traced = [case.program]
        if case.differentiated:
            traced.append(programs.gradient(case.program, case.differentiated))
        with jax.sharding.use_abstract_mesh(H100):
            for program in traced:
                names |= kernel_names(jax.make_jaxpr(program.function)(*program.arguments))
    return names


def test_every_kernel_has_a_row(existing):
    assert {"ssd_scan", "attention_dkv", "expert_mlp_per_expert"} <= existing
    named = {row[2] for row in cells(KERNEL_HEAD)}
    assert existing <= named, (
        f"run python -m experiments.kernel_report kernels: {existing - named} are not in README.md"
    )


def test_every_operation_has_a_row():
    assert set(operations()) <= {row[0] for row in cells(KERNEL_HEAD)}


def test_no_kernel_spills():
    spilled = [row[4] for row in cells(KERNEL_HEAD)]
    assert set(spilled) <= {"0", ""} and "0" in spilled


def test_the_whole_model_calls_the_kernels():
    calls = {row[0]: row[1] for row in cells(PROGRAM_HEAD)}
    assert "23 ssd_scan" in calls["Nano, prefill piece, 1 x 8,192"]
    for name, called in calls.items():
        assert called != "none" or name.startswith("Mamba-2 layer"), name
