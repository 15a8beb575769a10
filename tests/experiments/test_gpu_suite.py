"""The GPU suite, as far as a CPU can tell: arithmetic, timer, what it makes of wrong numbers and dead processes."""

import json
import re
import subprocess
import sys
import threading
from concurrent.futures import Executor, Future
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from processes import environment

import nemojax
from experiments import rooflines
from experiments.gpu_suite import __main__ as suite
from experiments.gpu_suite import cases, operations, report, sections, timing, whole
from experiments.gpu_suite.cases import Case, Work
from nemojax.gpu_targets import GPUS

ROOT = Path(__file__).parents[2]
NANO = nemojax.preset("nano-30b-a3b")
H100 = Work(GPUS["h100"].bandwidth, rooflines.PEAK_FLOPS)
ANY = Work(1e12, 1e15)


def run(*arguments, **variables):
    command = [sys.executable, "-m", "experiments.gpu_suite", *arguments]
    return subprocess.run(command, env=environment(**variables), cwd=ROOT, capture_output=True, text=True, timeout=400)


# ------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "case, microseconds",
    [
        (cases.ssd_case(NANO, 1, 8192), 51),
        (cases.attention_case(NANO, 1, 8192), 556),
        (cases.attention_case(NANO, 1, 8192, packed=True), 168),
        (cases.experts_case(NANO, 8192), 991),
        (cases.experts_case(NANO, 64), 712),
        (cases.token_experts_case(NANO, 1), 36),
        (cases.token_experts_case(NANO, 1, shared=True), 48),
        (cases.projection_case(2688, 4096, 256, 256), 7.4),
        (cases.step_case(NANO, 16), 20),
        (cases.step_case(NANO, 16, "float16"), 10),
        (cases.conv_case(NANO, 1, 8192), 60),
        (cases.conv_case(NANO, 1, 8192, gradient=True), 90),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_floors_of_operations(case, microseconds):
    """Worked out by hand from the shapes: 3.35 TB/s and 989.4 TFLOP/s; the state of the step in float32 or float16.

    64 tokens choose 119.6 of 125 experts on average. Packed: documents of a sum of squares 0.303 of the row's.
    """
    floor = max(case.least.nbytes / H100.nbytes, case.least.flops / H100.flops)
    assert 1e6 * floor == pytest.approx(microseconds, rel=0.03)


@pytest.mark.parametrize(
    "batch, context, gigabytes",
    [(1, 8192, 6.60), (1, 131072, 7.36), (8, 8192, 23.6), (32, 8192, 54.5), (128, 8192, 81.1)],
)
def test_floor_of_decoding(batch, context, gigabytes):
    assert rooflines.decode_bytes(NANO, context, batch) / 1e9 == pytest.approx(gigabytes, rel=2e-3)


def test_a_head_that_is_the_embedding_is_read_too():
    tied, own = (rooflines.active_params(NANO.replace(tie_word_embeddings=tied)) for tied in (True, False))
    assert tied == own


# ------------------------------------------------------------------------------------------------------ timer


def timed(run, sets, calls, rounds, launches=4):
    turns = timing.Turns(run, jax.eval_shape(lambda *a: a, *sets[0]), len(sets), calls, rounds, {})
    return timing.device_seconds(turns, turns.compiled().run, sets, launches)


def test_a_product_of_64_times_the_work_takes_longer():
    def seconds(size):
        sets = [(jax.random.normal(jax.random.key(i), (size, size)),) for i in range(2)]
        return timed(lambda a: (a @ a,), sets, calls=2, rounds=2)

    assert seconds(1024) > 8 * seconds(256) > 0


RUNS = 1 + timing.REPEATS * (3 + 1)  # of a program that is launched twice more


def test_every_call_runs():
    """Calls on equal inputs are not made one, none is dropped, and the rounds of a program are not made one."""
    ran = []
    count = lambda a: jax.pure_callback(lambda a: ran.append(float(a[0])) or a, a, a)
    timed(count, [(jnp.ones(3),), (jnp.zeros(3),)], calls=3, rounds=2, launches=2)
    assert ran == [1, 0, 1] * 2 * RUNS


def test_a_result_that_replaces_an_argument_is_that_of_the_round_before(monkeypatch):
    """As a state does in decoding; from one program to the next too."""
    monkeypatch.setattr(timing, "empty", lambda shapes: jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes))
    seen = []
    step = lambda x, state: (x, jax.pure_callback(lambda a: seen.append(int(a[0])) or a + 1, state, state))
    turns = timing.Turns(step, (jnp.ones(2), jnp.ones(2)), 1, 2, 3, {1: 1})
    timing.device_seconds(turns, turns.compiled().run, [(jnp.ones(2), jnp.ones(2))], launches=2)
    assert seen == [n for n in range(1, 3 * RUNS + 1) for _ in range(2)]


@pytest.mark.parametrize(
    "nbytes, expected, sets, calls, rounds",
    [(16, 1e-5, 8, 8, 7), (0, 0, 8, 8, 32), (3e7, 3e-5, 3, 4, 5), (1e9, 1e-2, 2, 2, 1), (4e9, 1, 1, 1, 1)],
)
def test_sets_of_inputs(nbytes, expected, sets, calls, rounds):
    """More than the L2, enough work to hide the host, and no more memory than there is."""
    turns = timing.Turns.of(abs, (jax.ShapeDtypeStruct((int(nbytes),), jnp.int8),), expected, {})
    assert (turns.sets, turns.calls, turns.rounds) == (sets, calls, rounds)


@pytest.mark.parametrize(
    "case, kernel",
    [(cases.step_case(NANO, 16), "mamba_step"), (cases.projection_case(2688, 4096), "matvec_rows")],
    ids=["overwrites-its-state", "only-reads"],
)
def test_a_gpu_does_nothing_but_the_calls(case, kernel):
    pytest.importorskip("jax_cuda13_plugin")
    from experiments.h100_compiler import compile_for_h100

    turns = operations.turns_of(case, "mosaic_gpu", H100)
    program = compile_for_h100(turns.program, *turns.shapes(), donate=(1,))
    assert program.calls == {kernel: turns.calls}
    assert re.findall(r'known_trip_count":{"n":"(\d+)"', program.hlo) == [str(turns.rounds)]
    assert re.findall(r" = (\S+) copy\(", program.hlo) == ["s32[]"]


# --------------------------------------------------------------------------------------------- what goes wrong


class AtOnce(Executor):
    """Nothing is left to be done when a task has been submitted."""

    def submit(self, task, *arguments):
        done = Future()
        try:
            done.set_result(task(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


@pytest.fixture
def pool():
    return AtOnce()


def case(kernel, gradient=None):
    """Twice the input; `mosaic_gpu` does what `kernel` does."""
    run = lambda implementation, x: (2 * x,) if implementation == "xla" else (kernel(x),)
    arrays = lambda key: (jax.random.normal(key, (64,)).astype(jnp.bfloat16),)
    return Case("double", arrays, 1, run, ("mosaic_gpu", "xla"), Work(256, 64), gradient)


def wrong_gradient(x):
    x = jax.custom_vjp(lambda x: 2 * x)
    x.defvjp(lambda x: (2 * x, None), lambda _, dy: (2.1 * dy,))
    return x


BROKEN = {
    "too-large": (lambda x: 2.05 * x, None),
    "nan": (lambda x: x / 0 * 0, None),
    "gradient": (wrong_gradient(None), 3.0),
}


@pytest.mark.parametrize("kernel, gradient", BROKEN.values(), ids=BROKEN)
def test_a_wrong_number_is_found(kernel, gradient, pool):
    xla, fast = operations.check(case(kernel, gradient), pool)
    assert (xla["implementation"], xla["ok"], fast["ok"]) == ("xla", True, False)
    (problem,) = report.failures([xla, fast])
    assert problem.startswith("double, mosaic_gpu: error ")


def test_a_right_number_is_right(pool):
    for gradient in (None, 3.0):
        assert all(row["ok"] for row in operations.check(case(lambda x: x + x, gradient), pool))


def test_a_kernel_that_does_not_compile_is_said_and_the_rest_goes_on(pool):
    def broken(x):
        raise NotImplementedError("no such instruction\nand more")

    for rows in (operations.check(case(broken), pool), operations.speed(case(broken), ANY, pool)):
        by_name = {row["implementation"]: row for row in rows}
        assert by_name["mosaic_gpu"]["failed"] == "NotImplementedError: no such instruction"
        assert "failed" not in by_name["xla"]
    assert by_name["xla"]["seconds"] > 0


def test_a_reference_that_does_not_run_is_said_too(pool):
    def run(implementation, x):
        raise MemoryError("too large")

    broken = case(None)._replace(run=run)
    (row,) = operations.check(broken, pool)
    assert (row["implementation"], row["failed"]) == ("float32", "MemoryError: too large")
    (row,) = operations.speed(broken._replace(arrays=_once(broken.arrays)), ANY, pool)
    assert (row["implementation"], row["failed"]) == ("inputs", "MemoryError: no room")


def _once(arrays):
    """Shapes, but no values."""

    def make(key):
        if not isinstance(key, jax.core.Tracer):
            raise MemoryError("no room")
        return arrays(key)

    return make


def test_a_section_that_takes_too_long_is_stopped(tmp_path):
    args = suite._arguments(["--tiny", "--output", str(tmp_path)])
    (*_, row) = suite._in_process("experts", args, 1.0, tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir())
    assert row["case"] == "experts" and row["failed"].startswith("stopped after 1 s")


def test_what_is_not_compiled_in_time_is_left_out(monkeypatch):
    """And nobody waits for it."""
    begun, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(operations, "compiled", lambda *a: begun.set() or ended.wait(60))
    monkeypatch.setattr(timing, "compiled", lambda *a, **k: begun.set() or ended.wait(60))
    rows = list(sections.rows("token", True, 0.0, []))
    ended.set()
    checks, speeds = sections.operation_cases({"nano": sections.TINY}, 256, 512)["token"]
    assert begun.is_set() and [row["case"] for row in rows] == [case.name for case in (*checks, *speeds)]
    assert {row["failed"] for row in rows} == {"no time was left to compile it"}


def test_what_is_not_asked_for_is_not_timed():
    rows = list(sections.rows("ssd", True, 600.0, ["cudnn"]))
    assert {row["kind"] for row in rows} == {"check"} and not report.failures(rows)


@pytest.mark.parametrize("row, status", [({"failed": "died"}, 1), ({"ok": True, "error": 0.0, "limit": 1.0}, 0)])
def test_exit_status(row, status, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_in_process", lambda *a: [{"kind": "check", "case": "c", "implementation": "i"} | row])
    assert suite.main(["--tiny", "--sections", "ssd", "--output", str(tmp_path)]) == status
    assert len(list(tmp_path.iterdir())) == 2
    assert suite.main(["--tiny", "--sections", "token", "--output", str(tmp_path)]) == status
    assert len(list(tmp_path.iterdir())) == 4  # the first results are still there


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert suite._commit() == ""


def test_an_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        suite.main(["--tiny", "--output", str(tmp_path / "file")])
    assert "--output" in capsys.readouterr().err


def test_without_a_gpu():
    done = run()
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "no NVIDIA GPU" in done.stderr


def test_an_unknown_section():
    done = run("--sections", "ssd,attn")
    assert done.returncode == 2 and "unknown section attn; known: ssd, attention" in done.stderr


def test_an_unknown_implementation(capsys):
    with pytest.raises(SystemExit):
        suite._arguments(["--implementations", "xla,triton"])
    assert "unknown implementation triton; known: mosaic_gpu, xla, cudnn" in capsys.readouterr().err


def test_whose_peaks_the_floors_are_for():
    assert operations.peaks("NVIDIA H200") == ("NVIDIA H200", Work(GPUS["h200"].bandwidth, rooflines.PEAK_FLOPS))
    assert operations.peaks("NVIDIA B200") == ("NVIDIA H100 80GB HBM3", H100)
    about = suite._about(tiny=True)
    assert (about["card"], about["floors"]) == ("cpu", "0.01 TB/s and 0.01 TFLOP/s")


def test_an_unknown_card_is_said(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout="0.11.2|cuda|NVIDIA B200\n")
    monkeypatch.setattr(suite.subprocess, "run", lambda *a, **k: answer)
    assert suite._about(tiny=False)["floors"].startswith("3.35 TB/s and 989 TFLOP/s, an NVIDIA H100 80GB HBM3's: this")


# -------------------------------------------------------------------------------------------------- whole runs


def test_all_of_a_section_and_its_files(tmp_path):
    done = run("--tiny", "--sections", "experts,torch", "--output", str(tmp_path), "--minutes", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = tmp_path.glob("*.json")
    found = json.loads(written.read_text())
    checks, speeds = sections.operation_cases({"nano": sections.TINY}, 256, 512)["experts"]
    expected = {("check", c.name) for c in checks} | {("speed", c.name) for c in speeds}
    assert expected <= {(row["kind"], row["case"]) for row in found["rows"]}
    assert found["about"]["card"] == "cpu" and found["about"]["date"]
    text = written.with_suffix(".md").read_text()
    assert all(c.name in text for c in (*checks, *speeds)) and "torch is not installed" in text


def test_the_whole_model(pool):
    rows = list(whole.rows(sections.TINY, 32, (1, 3), ANY, pool))
    assert [row["case"] for row in rows[1:]] == [
        "prefill of 32 tokens",
        "decode at batch 1, context 32",
        "decode at batch 3, context 32",
    ]
    assert not report.failures(rows)
    assert all("seconds" in row and row["floor_seconds"] > 0 for row in rows[1:])


def test_a_time_of_results_that_are_no_numbers_is_a_failure():
    assert whole._numbers({"ids": jnp.ones(3, jnp.int32), "logits": jnp.ones(3)}) == {}
    row = {"kind": "model", "case": "prefill", "seconds": 1.0} | whole._numbers([jnp.array([1.0, jnp.inf])])
    assert report.failures([row]) == ["prefill: results are not finite"] and not report._model([row])


@pytest.mark.parametrize("section", ["ssd", "attention", "token", "model"])
def test_operations_agree_with_float32(section, pool):
    for tiny in sections.operation_cases({"nano": sections.TINY}, 256, 512)[section][0]:
        (row,) = operations.check(tiny._replace(implementations=("xla",)), pool)
        assert row["ok"] and row["error"] < (0.02 if section == "model" else 0.0078), row


def test_it_needs_little():
    """A GPU machine has jax, flax, orbax, einops and jaxtyping; our other dependencies may be missing."""
    blocked = ["optax", "tokenizers", "tqdm", "lm_eval", "safetensors", "matplotlib", "beartype", "hypothesis"]
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport experiments.gpu_suite.sections"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
