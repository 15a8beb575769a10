"""Imports point one way: experiments -> convert -> nemojax -> pallas_kernels -> jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from processes import environment

ROOT = Path(__file__).parent.parent
ORDER = ("experiments", "convert", "nemojax", "pallas_kernels")  # each may import those behind it
# Files with one function that reaches up: the command finds its subcommands, `load` reads Hugging Face directories.
LAZY = {"nemojax/cli.py", "nemojax/checkpoint.py"}
FILES = sorted(path.relative_to(ROOT).as_posix() for package in ORDER for path in (ROOT / package).rglob("*.py"))


def imported(node: ast.AST) -> set[str]:
    """Top-level packages that an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: a relative import hides where it points"
        return {node.module.split(".")[0]}
    return set()


def imports(tree: ast.AST, inside_function: bool = False) -> list[tuple[str, bool, int]]:
    """(package, whether inside a function, line) of every import."""
    found = []
    for node in ast.iter_child_nodes(tree):
        found += [(name, inside_function, node.lineno) for name in imported(node)]
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        found += imports(node, inside_function or is_function)
    return found


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file):
    rank = ORDER.index(file.split("/")[0])
    for name, inside_function, line in imports(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        reaches_up = name in ORDER[:rank]
        assert not reaches_up or (file in LAZY and inside_function), f"{file}:{line} imports {name}"
        assert name != "tests", f"{file}:{line} imports the tests"


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("pallas_kernels")])
def test_kernels_know_no_flax(file):
    names = {name for name, _, _ in imports(ast.parse((ROOT / file).read_text(encoding="utf-8")))}
    assert not names & {"flax", "optax", "orbax"}


def test_lazy_exceptions_are_used():
    """An exception that is not needed any more should go."""
    for file in LAZY:
        names = {name for name, inside, _ in imports(ast.parse((ROOT / file).read_text(encoding="utf-8"))) if inside}
        assert "convert" in names, file


def test_without_a_hopper_gpu_nothing_of_mosaic_is_imported():
    """It takes longer to import than all of ours; a forward and a step of decoding look at every operation."""
    code = """
import sys, jax, jax.numpy as jnp, nemojax, convert.cli, nemojax.generate
from experiments.gpu_suite.sections import TINY
params = nemojax.init_params(TINY, jax.random.key(0))
cache = nemojax.init_cache(TINY, 1, 16)
for tokens in (jnp.ones((1, 8), jnp.int32), jnp.ones((1, 1), jnp.int32)):
    cache = jax.eval_shape(nemojax.Nemotron(TINY).apply, {"params": params}, tokens, cache=cache).cache
print([name for name in ("jax.experimental.mosaic.gpu", "jax.experimental.pallas.mosaic_gpu") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
