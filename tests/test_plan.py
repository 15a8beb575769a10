"""`nemojax plan`: bytes of a model compiled for GPUs that are not there."""

import pytest

import nemojax
from nemojax import cli, gpu_targets
from nemojax import plan as planning
from nemojax.specs import num_bytes

SMALL = nemojax.Config(
    pattern="ME*-",
    mtp_pattern="*E",
    vocab_size=256,
    hidden_size=128,
    num_attention_heads=4,
    head_dim=32,
    mamba_num_heads=8,
    mamba_head_dim=16,
    ssm_state_size=32,
    n_groups=2,
    intermediate_size=256,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    moe_shared_expert_intermediate_size=128,
)
KEYS_AND_VALUES = 2 * 2 * 32 * 2  # bytes a slot: two arrays of 2 heads of 32 in bfloat16
FILES = "tests/golden/configs/"


def cache_bytes(context: int, batch: int) -> int:
    """By hand: slots with a document number, convolution and state of the Mamba-2 layer, three numbers a row."""
    mamba = 3 * 2 * (4 * 16 + 2 * 32) * 2 + 8 * 16 * 32 * 4
    return batch * (context * (KEYS_AND_VALUES + 4) + mamba + 3 * 4)


@pytest.fixture
def no_compiler(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(gpu_targets.topologies, "get_topology_desc", refuse)


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("jax_cuda13_plugin")
    return planning.plan(SMALL, context=512, batch=3, piece=128)


def test_arguments_are_weights_cache_and_tokens(compiled):
    weights, cache = num_bytes(SMALL), cache_bytes(512, 3)
    assert (compiled.weight_bytes, compiled.cache_bytes) == (weights, cache)
    assert [p.argument_bytes - weights - cache for p in compiled.programs] == [3 * 128 * 4, 3 * 4]


def test_the_cache_is_not_counted_twice(compiled):
    for program in compiled.programs:
        new = program.peak_bytes - program.argument_bytes - program.temp_bytes
        assert 3 * 256 * 4 <= new < 3 * 256 * 4 + 8192  # float32 logits of one position, and the outputs' table


def test_one_device_sends_nothing(compiled):
    assert [(p.name, p.tokens, p.collectives) for p in compiled.programs] == [
        ("prefill piece", 128, ()),
        ("decode step", 1, ()),
    ]


def test_without_a_compiler_there_is_an_estimate(no_compiler):
    done = planning.plan(SMALL, context=512, batch=3)
    assert done.programs == () and 'pip install "nemojax[plan]"' in done.missing
    assert done.peak_bytes == num_bytes(SMALL) + cache_bytes(512, 3) + done.estimated_temp_bytes


def test_command_without_a_compiler(no_compiler, capsys):
    assert cli.main(["plan", "nano-4b"]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and "the CUDA compiler is not installed" in shown.err
    assert "fits: estimated peak" in shown.out


@pytest.mark.parametrize(
    "arguments, code",
    {
        "fits": (["nano-30b-a3b"], 0),
        "too long for an H100": (["nano-30b-a3b", "--context", "8000000"], 1),
        "not on an H100": (["super-120b-a12b"], 1),
        "config.json": ([FILES + "nano-4b.json", "--device", "h200"], 0),
    }.values(),
    ids=["fits", "too long", "too large", "config.json"],
)
def test_exit_code(arguments, code, request, monkeypatch, capsys):
    monkeypatch.chdir(request.config.rootpath)
    assert cli.main(["plan", *arguments, "--estimate-only"]) == code
    assert ("does not fit:" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nano-31b"], "unknown name 'nano-31b'"),
        (["nano-4b", "--context", "0"], "context must be at least 1, got 0"),
        (["nano-4b", "--batch", "0"], "batch must be at least 1, got 0"),
        (["nano-4b", "--piece", "-1"], "piece must be at least 1, got -1"),
        (["nano-4b", "--device", "h900"], "unknown GPU 'h900'; known: h100, h200"),
    ],
    ids=["preset", "context", "batch", "piece", "device"],
)
def test_bad_argument(arguments, message, capsys):
    assert cli.main(["plan", *arguments, "--estimate-only"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "device, context", [("h100", 8192), ("h200", 1_048_576)], ids=["8K on one H100", "1M on one H200"]
)
def test_nano_fits(device, context):
    """Temporaries of a piece do not grow with the context: the inputs of 23 Mamba-2 layers and one layer of experts."""
    pytest.importorskip("jax_cuda13_plugin")
    done = planning.plan(nemojax.preset("nano-30b-a3b"), context=context, batch=1, device=device)
    prefill, decode = done.programs
    in_proj, experts = 8192 * 10304 * 2, 8192 * 6 * 2688 * (2 + 4)
    assert done.fits
    assert prefill.peak_bytes < done.weight_bytes + done.cache_bytes + 23 * in_proj + 2 * experts
    assert decode.peak_bytes < done.weight_bytes + done.cache_bytes + 0.2e9
