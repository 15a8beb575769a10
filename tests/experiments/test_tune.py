"""The table of block sizes, and what the script makes of measured times."""

import json

import jax
import jax.numpy as jnp
import pytest

import nemojax
from experiments import tune
from experiments.gpu_suite.cases import Case, Work
from pallas_kernels import tuned
from pallas_kernels.expert_mlp import tuning as experts
from pallas_kernels.flash_attention import tuning as attention
from pallas_kernels.matvec import tuning as matvec
from pallas_kernels.ssd import tuning as scan

NANO = nemojax.preset("nano-30b-a3b")
CHOICES = {
    "experts": tune.experts(NANO, 8192),
    "attention": tune.attention(NANO, 8192),
    "attention-gradient": tune.attention(NANO, 8192, gradient=True),
    "scan": tune.scan(NANO, 8192),
    "projection": tune.projection(2688, 4096, 256, 256),
    "token-up": tune.token(NANO)[0],
    "token-down": tune.token(NANO)[1],
}


def blocks():
    """What the kernels of Nano would take at 8,192 tokens."""
    heads, groups = NANO.num_attention_heads, NANO.num_key_value_heads
    return (
        experts.blocks(128, NANO.hidden_size, NANO.moe_intermediate_size),
        experts.blocks(128, NANO.moe_intermediate_size, NANO.hidden_size, beside=1),
        attention.forward(1, 8192, 8192, heads, groups),
        attention.backward(1, 8192, 8192, heads, groups, False),
        matvec.by_rows([(1, 4096), (1, 256), (1, 256)], 2688),
        matvec.by_rows([(6, 1856), (1, 3712)], 2688),
        matvec.by_columns(6 * 29 + 58, 2688),
        scan.plan(1, 8192, NANO.mamba_num_heads, 8, 64, 128),
    )


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_the_kernels_take_what_is_in_the_table(choice):
    """Each candidate is a table of its own, and the kernels see it: no key is spelled differently on either side."""
    seen = []
    for table in choice.candidates:
        with tuned.using(table):
            seen.append(blocks())
    assert len(set(map(repr, seen))) == len(choice.candidates) > 1


def test_another_table_is_gone_afterwards():
    before = blocks()
    with pytest.raises(KeyError), tuned.using(CHOICES["scan"].candidates[0]):
        raise KeyError
    assert blocks() == before


@pytest.mark.parametrize(
    "seconds, winner",
    [
        ([1.0, 0.97, 0.9], 1),
        ([1.0, 0.99, 1.2], None),
        ([1.0, None, 0.5], 1),
        ([1.0, None, None], None),
        ([None, 1.0, 1.0], None),
    ],
    ids=["fastest", "not-worth-it", "one-cannot-run", "none-can-run", "rule-cannot-run"],
)
def test_what_goes_into_the_table(seconds, winner):
    choice = tune.Choice(CHOICES["scan"].case, CHOICES["scan"].candidates[:2])
    assert tune.best(choice, seconds) == ({} if winner is None else choice.candidates[winner])


def test_only_the_shapes_that_were_timed_change():
    table = {"ssd piece": {"128,32": [16], "7,7": [3]}, "flash_attention forward": {"1,1,1,1": [128, 2]}}
    kept = tune.without(table, CHOICES["scan"])
    assert kept == {"ssd piece": {"7,7": [3]}, "flash_attention forward": {"1,1,1,1": [128, 2]}}
    assert tune.merged(kept, {"ssd piece": {"128,32": [32]}})["ssd piece"] == {"7,7": [3], "128,32": [32]}


@pytest.fixture
def two_candidates(tmp_path, monkeypatch):
    """Runs the command on a CPU with an operation that is `run` of a piece (None: the rule) and x; gives the table."""
    choice = lambda run: tune.Choice(
        Case("double", arrays, 1, lambda _, x: (run((tuned.tuned("ssd piece", 7, 7) or [None])[0], x),), FAST, WORK),
        ({"ssd piece": {"7,7": [3]}}, {"ssd piece": {"7,7": [4]}}),
    )
    arrays = lambda key: (jax.random.normal(key, (64,)).astype(jnp.bfloat16),)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (tmp_path / "table.json").write_text('{"ssd piece": {"7,7": [9], "8,8": [2]}}')

    def command(run):
        monkeypatch.setattr(tune, "OPERATIONS", {"double": lambda config, tokens: [choice(run)]})
        assert tune.main(["--operations", "double", "--table", str(tmp_path / "table.json")]) == 0
        return json.loads((tmp_path / "table.json").read_text())["ssd piece"]

    return command


FAST, WORK = ("mosaic_gpu",), Work(256, 64)


def test_a_table_is_written(two_candidates, capsys):
    table = two_candidates(lambda piece, x: 2 * x)
    assert table.pop("8,8") == [2] and table.get("7,7") in (None, [3], [4])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and shown[0].startswith("double rule: ") and all(line.endswith(" us") for line in shown)


def test_a_candidate_with_other_numbers_is_not_timed(two_candidates, capsys):
    """However fast it is."""

    def run(piece, x):
        if piece is None:
            x = jax.lax.fori_loop(0, 1_000, lambda i, x: jnp.where(i < 0, 0, x), x)
        return (2.05 if piece == 3 else 2) * x

    assert two_candidates(run) == {"7,7": [4], "8,8": [2]}
    assert "[3]}}: ArithmeticError: differs from the rule by 2." in capsys.readouterr().out.splitlines()[1]


def test_without_a_gpu(capsys):
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "tune: JAX finds no NVIDIA GPU\n"


def test_an_unknown_operation(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--operations", "scans"])
    assert "unknown scans; known: experts, attention, scan, token" in capsys.readouterr().err
