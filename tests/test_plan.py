"""`nemojax plan`: bytes of a model compiled for GPUs that are not there."""

from collections import Counter

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

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


def test_kernels_are_counted_and_shown(compiled):
    """Heads are too small for the other kernels. Few rows: of the head; of a token also all but one projection."""
    experts = {"choose_experts": 1, "expert_mlp_to_rows": 1, "expert_mlp_to_tiles": 1}
    prefill = experts | {"gather_rows": 1, "matvec_rows": 1}
    decode = {"choose_experts": 1, "matvec_columns": 1, "matvec_rows": 7}
    assert [p.kernels for p in compiled.programs] == [prefill, decode]
    assert f"  {', '.join(f'1 {name}' for name in prefill)}" in compiled.lines()


def test_without_a_compiler_there_is_an_estimate(no_compiler):
    done = planning.plan(SMALL, context=512, batch=3)
    assert done.programs == () and 'pip install "nemojax[plan]"' in done.missing
    assert done.peak_bytes == num_bytes(SMALL) + cache_bytes(512, 3) + done.estimated_temp_bytes


def test_states_of_16_bits_take_half(no_compiler):
    sizes = [
        planning.plan(SMALL, context=512, batch=3, state_dtype=name).cache_bytes for name in ("float32", "float16")
    ]
    assert sizes[0] - sizes[1] == 3 * 8 * 16 * 32 * 2


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
        "one row on eight shards": (
            ["super-120b-a12b", "--mesh", "expert=8", *["--context", "262144", "--piece", "131072"]],
            1,
        ),
        "config.json": ([FILES + "nano-4b.json", "--device", "h200"], 0),
    }.values(),
    ids=["fits", "too long", "too large", "one row", "config.json"],
)
def test_exit_code(arguments, code, request, monkeypatch, capsys):
    monkeypatch.chdir(request.config.rootpath)
    assert cli.main(["plan", *arguments, "--estimate-only"]) == code
    assert ("does not fit:" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nano-31b"], "unknown name 'nano-31b'"),
        (["no/such/model"], "no/such/model: no such file"),
        (["nano-4b", "--context", "0"], "context must be a whole number, at least 1, got 0"),
        (["nano-4b", "--batch", "0"], "batch must be a whole number, at least 1, got 0"),
        (["nano-4b", "--piece", "-1"], "piece must be a whole number, at least 1, got -1"),
        (["nano-4b", "--device", "h900"], "unknown GPU 'h900'; known: h100, h200"),
    ],
    ids=["preset", "path", "context", "batch", "piece", "device"],
)
def test_bad_argument(arguments, message, capsys):
    assert cli.main(["plan", *arguments, "--estimate-only"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(context=10.5), "context must be a whole number, .* got 10.5"),
        (dict(programs=["train"]), "there is no program train; known: prefill piece, decode step"),
    ],
)
def test_bad_argument_of_the_function(changes, message):
    with pytest.raises(nemojax.InputError, match=message):
        planning.plan(nemojax.preset("nano-4b"), **({"context": 16, "batch": 1} | changes))


@pytest.fixture
def programs_on_disk(tmp_path):
    """A directory in which JAX keeps every program that it compiles."""
    settings = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield lambda: len(list(tmp_path.glob("jit_*")))
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_what_is_compiled_for_absent_gpus_is_not_stored(programs_on_disk):
    """JAX could not load it again, and would warn of it at every further plan."""
    pytest.importorskip("jax_cuda13_plugin")
    device = gpu_targets.abstract_devices(gpu_targets.gpu("h100"), 1)[0]
    x = jax.ShapeDtypeStruct((8,), "float32", sharding=jax.sharding.SingleDeviceSharding(device))
    jax.jit(lambda x: x + 2)(1.0)
    stored = programs_on_disk()
    for _ in range(2):
        gpu_targets.compile_absent(jax.jit(lambda x: x + 2).trace(x))
    assert stored > 0 and programs_on_disk() == stored


def sent(program):
    return {c.kind: c.count for c in program.collectives}


@pytest.mark.parametrize(
    "mesh, weights, prefill, decode",
    [
        # The embedding and each layer are summed; layer E gathers nothing, its experts' hidden units are split.
        ("tensor=2", 2, {"all-reduce": 5}, {"all-reduce": 5}),
        # Rows travel to experts, and sums back; small ones say how many, and how many rounds.
        (
            "expert=2",
            None,
            {"ragged-all-to-all", "all-to-all", "all-reduce"},
            {"ragged-all-to-all", "all-to-all"},
        ),
        # A shift for each part of the state of a Mamba-2 layer; queries meet all slots.
        ("sequence=2", None, {"collective-permute", "all-gather", "all-reduce", "reduce-scatter"}, {"all-reduce"}),
    ],
    ids=["tensor", "expert", "sequence"],
)
def test_plan_of_a_mesh(mesh, weights, prefill, decode):
    pytest.importorskip("jax_cuda13_plugin")
    done = planning.plan(SMALL, context=512, batch=2, piece=128, mesh=mesh)
    whole = num_bytes(SMALL)
    if weights:
        assert done.weight_bytes == pytest.approx(whole / weights, rel=0.05)
    for program, kinds in zip(done.programs, (prefill, decode), strict=True):
        assert program.argument_bytes == pytest.approx(done.weight_bytes + done.cache_bytes, rel=0.01)
        found = sent(program)
        assert (found == kinds) if isinstance(kinds, dict) else (set(found) == kinds), found


def test_mesh_that_is_none(capsys):
    assert cli.main(["plan", "nano-4b", "--estimate-only", "--mesh", "pipeline=2"]) == 2
    assert "there is no axis 'pipeline'" in capsys.readouterr().err
    assert cli.main(["plan", "nano-30b-a3b", "--estimate-only", "--mesh", "expert=7"]) == 2
    assert "experts_up_proj of shape (128, 1856, 2688) does not divide" in capsys.readouterr().err


PREFILL, DECODE = planning.PROGRAMS
FULL_SIZE = {
    "nano-1-h100": ("nano-30b-a3b", "h100", None, 8192, 1, [PREFILL, DECODE]),
    "nano-1-h200-1M": ("nano-30b-a3b", "h200", None, 1_048_576, 1, [PREFILL]),
    "nano-8-h100": ("nano-30b-a3b", "h100", "expert=8", 131_072, 8, [PREFILL]),
    "super-8-h100": ("super-120b-a12b", "h100", "expert=4,tensor=2", 131_072, 4, [PREFILL]),
    "ultra-16-h100": ("ultra-550b-a55b", "h100", "expert=2,tensor=8", 8192, 2, [PREFILL]),
}
# Weights leave Ultra 10 GB on each device, so its prompts come in smaller pieces.
PIECES = {"ultra-550b-a55b": 2048}


def kernels_of_layers(config, program):
    """Every layer calls its kernels, once; for one token of a few rows, projections are kernels too, as the head is."""
    if program == PREFILL:
        by_kind = {
            "M": ["causal_conv1d", "ssd_steps", "ssd_piece_states", "ssd_scan"],
            "*": ["attention_forward"],
            "E": ["choose_experts", "gather_rows", "expert_mlp_to_rows", "expert_mlp_to_tiles"],
        }
    else:
        into_and_out = ["matvec_rows"] * 2
        by_kind = {
            "M": ["mamba_step", *into_and_out],
            "*": ["attention_forward", "attention_merge", *into_and_out],
            "E": ["choose_experts", "matvec_rows", "matvec_columns"],
        }
    return Counter(["matvec_rows", *(name for kind in config.pattern for name in by_kind.get(kind, ()))])


def check_plan(config, name, device, mesh, context, batch, programs):
    """Peak: what lies there, and temporaries of a few layers of one piece, however long the context."""
    pytest.importorskip("jax_cuda13_plugin")
    done = planning.plan(
        config,
        context=context,
        batch=batch,
        device=device,
        mesh=mesh,
        piece=PIECES.get(name, 8192),
        programs=programs,
    )
    print("\n".join(done.lines()))
    assert done.fits
    for program in done.programs:
        assert program.kernels == kernels_of_layers(config, program.name)
    prefill = done.programs[0]
    assert prefill.peak_bytes < done.weight_bytes + done.cache_bytes + 1.5 * done.estimated_temp_bytes
    # A projection split at the wrong places would be sent around: nothing is but what the layers ask for.
    kinds = sent(prefill)
    assert "collective-permute" not in kinds
    if mesh and "tensor" in mesh:
        assert kinds["all-reduce"] <= 2 + config.num_layers + config.pattern.count("E")
    if mesh is None:
        assert kinds == {}
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name, device, mesh, context, batch, programs", FULL_SIZE.values(), ids=FULL_SIZE)
def test_full_size(name, device, mesh, context, batch, programs):
    check_plan(nemojax.preset(name), name, device, mesh, context, batch, programs)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["nano-1-h200-1M", "nano-8-h100", "super-8-h100", "ultra-16-h100"])
def test_full_width(case):
    """The first layers of a model, on its mesh. All of its layers have the same temporaries, so all of it fits too."""
    name, device, mesh, context, batch, programs = FULL_SIZE[case]
    whole = nemojax.preset(name)
    part = check_plan(
        whole.replace(pattern=whole.pattern[: whole.pattern.index("*") + 2]),
        name,
        device,
        mesh,
        context,
        batch,
        programs,
    )
    lies = planning.plan(whole, context=context, batch=batch, device=device, mesh=mesh, estimate_only=True)
    temporary = part.programs[0].peak_bytes - part.weight_bytes - part.cache_bytes
    assert lies.weight_bytes + lies.cache_bytes + temporary < planning.gpu(device).memory
