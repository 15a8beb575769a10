"""Runs as a user makes them: finished, killed and resumed, broken, refused, with adapters."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import environment

import nemojax
from experiments import corpus, held_out, packing, run_directory, train, update
from experiments.settings import Settings, read
from nemojax.errors import InputError
from nemojax.lock import alone
from nemojax.specs import flatten

ROOT = Path(__file__).parents[2]
MODEL = dict(
    pattern="ME*",
    mtp_pattern="E",
    vocab_size=300,
    hidden_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    mamba_num_heads=2,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=1,
    chunk_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=8,
)
SHORT = dict(tokens_per_row=64, rows_per_step=2, steps=12, warmup_steps=2, decay_steps=3, learning_rate=1e-2)
SHORT |= dict(save_every=2, evaluate_every=5)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Forty small files with something to learn in them."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(40):
        words = [f"name{rng.integers(30)} = value{rng.integers(30)} + {rng.integers(9)}" for _ in range(30)]
        (folder / f"part{i}.txt").write_text("\n".join(words) + "\n")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def whole_run(text, tmp_path_factory):
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train.train(run, Settings(model=MODEL, **SHORT), text=text, show_progress=False)
    return run


def weights(run):
    return (run / run_directory.MODEL / "model.safetensors").read_bytes()


def last_state(run):
    """Every leaf of the last checkpoint: parameters, optimizer, step."""
    settings = Settings(model=MODEL, **SHORT)
    checkpoints = run_directory.Checkpoints(run, settings.keep)
    try:
        like = train.initial_state(settings.config, settings, None)
        assert checkpoints.latest == settings.steps
        return [np.asarray(leaf) for leaf in jax.tree.leaves(checkpoints.load(settings.steps, like))]
    finally:
        checkpoints.close()


def test_a_run_leaves_everything_that_it_promises(whole_run):
    log = run_directory.read_log(whole_run)
    assert [line["step"] for line in log] == list(range(1, 13))
    assert {line["step"] for line in log if "held_out_bits_per_byte" in line} == {5, 10, 12}
    assert all(np.isfinite(v) for line in log for v in line.values())
    assert log[-1]["next_token_loss"] < log[0]["next_token_loss"] - 0.5
    assert (whole_run / run_directory.CURVES).read_bytes().startswith(b"\x89PNG")
    model, params = nemojax.load(whole_run / run_directory.MODEL)
    assert model.config.dtype == "bfloat16" and model.config.mtp_pattern == "E"
    tokens = corpus.Tokenizer.from_file(str(whole_run / run_directory.MODEL / "tokenizer.json")).encode("name1 =").ids
    assert nemojax.generate(model, params, [tokens], max_new_tokens=3, stop_ids=()).shape == (1, 3)
    steps = sorted(int(p.name) for p in (whole_run / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [10, 12]  # the last two


def start(run, text, *options):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "experiments.train", str(run), "--no-progress", "--text", *map(str, text)]
    for name, value in (SHORT | {"model": MODEL}).items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    return subprocess.Popen([*command, *options], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)


def moments():
    """Numbers of log lines at which to kill, the same in every test run."""
    rng = np.random.default_rng(5)
    return [(int(rng.integers(3, 7)),), (1, int(rng.integers(8, 12)))]


@pytest.mark.slow
@pytest.mark.parametrize("moments", moments(), ids=str)
def test_a_killed_run_resumes_bitwise(whole_run, text, tmp_path, moments):
    """SIGKILL once the log has so many lines, whatever is being written then; the last start runs to the end."""
    run = tmp_path / "killed"
    for lines in moments:
        process = start(run, text)
        while len(run_directory.read_log(run)) < lines:
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    checkpoints = run_directory.Checkpoints(run, 2)
    done = checkpoints.latest
    checkpoints.close()
    assert 0 < done < SHORT["steps"]
    kept = run_directory.read_log(run)[:done]
    assert start(run, text).wait() == 0
    assert run_directory.read_log(run)[:done] == kept  # their times too: these steps were not done again
    assert weights(run) == weights(whole_run)
    assert all(map(np.array_equal, last_state(run), last_state(whole_run)))
    untimed = lambda run: [
        {k: v for k, v in r.items() if k != "tokens_per_second"} for r in run_directory.read_log(run)
    ]
    assert untimed(run) == untimed(whole_run)


def test_a_half_written_checkpoint_is_not_picked_up(tmp_path):
    """Orbax renames a finished one into place; what a kill leaves has another name and is in nobody's way."""
    checkpoints = run_directory.Checkpoints(tmp_path, 2)
    checkpoints.save(4, {"a": jax.numpy.arange(3)})
    checkpoints.close()
    finished = tmp_path / "checkpoints" / "4"
    half = tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp"
    half.mkdir()
    for file in finished.rglob("*"):
        if file.is_file() and "commit" not in file.name:
            (half / file.name).write_bytes(file.read_bytes()[:10])
    again = run_directory.Checkpoints(tmp_path, 2)
    assert again.latest == 4
    assert again.load(4, {"a": jax.numpy.zeros(3, jax.numpy.int32)})["a"].tolist() == [0, 1, 2]
    again.save(6, {"a": jax.numpy.arange(3)})
    again.close()
    assert run_directory.Checkpoints(tmp_path, 2).latest == 6


def test_a_finished_run_does_nothing_when_started_again(whole_run, text):
    before, log = weights(whole_run), (whole_run / run_directory.LOG).read_bytes()
    train.train(whole_run, Settings(model=MODEL, **SHORT), text=text, show_progress=False)
    assert weights(whole_run) == before and (whole_run / run_directory.LOG).read_bytes() == log


POISONED = {
    "backbone": (("layers_01", "mixer", "shared_up_proj"), "layers_01 (kind 'E', in the forward pass)"),
    "embedding": (("embed",), "embed (in the forward pass)"),
    "head": (("lm_head",), "norm_f or the head"),
    "multi-token prediction": (("mtp", "eh_proj"), "mtp (the multi-token prediction block"),
}


@pytest.mark.parametrize("path, where", POISONED.values(), ids=POISONED)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_layer(path, where, text, tmp_path, monkeypatch, capsys):
    """One parameter is poisoned before the first step."""
    initial = train.initial_state

    def poisoned(config, chosen, base):
        state = initial(config, chosen, base)
        *parents, name = path
        node = functools.reduce(dict.__getitem__, parents, state.trained)
        node[name] = jax.numpy.full_like(node[name], np.nan)
        return state

    monkeypatch.setattr(train, "initial_state", poisoned)
    settings = [f"--set={name}={json.dumps(value)}" for name, value in (SHORT | {"model": MODEL}).items()]
    code = train.main([str(tmp_path / "run"), *settings, "--no-progress", "--text", *map(str, text)])
    assert code == 1
    message = capsys.readouterr().err
    assert "stopped: step 1: loss nan" in message and f"at {where}" in message
    assert run_directory.read_log(tmp_path / "run") == []


def test_adapters_train_and_come_out_as_a_checkpoint(whole_run, text, tmp_path, capsys, caplog):
    start_from = tmp_path / "base"
    shutil.copytree(whole_run / run_directory.MODEL, start_from)
    (start_from / "chat_template.jinja").write_text("{{ messages }}")
    settings = Settings(**SHORT, lora=("in_proj", "experts_.*"), lora_rank=2)
    with jax.log_compiles():
        train.train(tmp_path / "run", settings, init=start_from, text=text, show_progress=False)
    assert sum("Finished XLA compilation of jit(step)" in line for line in caplog.messages) == 1
    report = capsys.readouterr().out
    assert "in_proj" in report and "experts_up_proj" in report
    (_, before), (_, after) = nemojax.load(start_from), nemojax.load(tmp_path / "run" / run_directory.MODEL)
    changed = {path for path, leaf in flatten(after) if not np.array_equal(leaf, dict(flatten(before))[path])}
    assert (tmp_path / "run" / run_directory.MODEL / "chat_template.jinja").read_text() == "{{ messages }}"
    names = {"in_proj", "experts_up_proj", "experts_down_proj"}
    assert changed == {path for path, _ in flatten(before) if path.rsplit("/", 1)[-1] in names}
    # With the same weights the checkpoint may still be another model, which would go on with this one's adapters.
    written = json.loads((start_from / "config.json").read_text())
    (start_from / "config.json").write_text(json.dumps(written | {"num_experts_per_tok": 1}))
    with pytest.raises(InputError, match="holds a run with other settings .*init_sha256"):
        train.train(tmp_path / "run", settings, init=start_from, text=text, show_progress=False)


REFUSED = {
    "text for a number": (["--set", "steps=abc"], "steps must be a whole number, got 'abc'"),
    "text for a list": (["--set", "lora=in_proj"], "lora must be a list such as"),
    "dtype": (["--set", "compute_dtype=float8"], "compute_dtype must be float32 or bfloat16, got 'float8'"),
    "unknown model field": (["--set", 'model={"patern": "M"}'], "settings: model: "),
    "unknown setting": (["--set", "stepps=3"], "stepps unknown; known: accumulate"),
    "not a change": (["--set", "steps"], "--set steps: give name=value"),
    "no model": (["--set", "model=null"], "model is missing; give --settings with a model, or --init"),
    "adapters on nothing": (["--set", 'lora=["in_proj"]'], "lora adapts a trained model; give --init"),
    "no steps": (["--set", "steps=0"], "steps must be at least 1, got 0"),
    "schedule too long": (["--set", "decay_steps=11"], "warmup_steps 2 and decay_steps 11 do not fit into 12 steps"),
    "rate": (["--set", "learning_rate=-1"], "learning_rate must be at least 0 and finite, got -1"),
    "rate beyond numbers": (["--set", f"learning_rate=1{'0' * 400}"], "learning_rate must be at least 0 and finite"),
    "a mean of one step": (["--set", "beta1=1"], "beta1 must be at least 0 and below 1, got 1"),
    "no gradient": (["--set", "clip_norm=0"], "clip_norm 0 makes every gradient 0"),
    "seed of 33 bits": (["--set", f"seed={2**32}"], "seed must be at least 0 and below 4294967296"),
    "too many steps": (["--set", f"steps={2**31}"], "steps must be at least 0 and below 2147483648"),
    "dtype of the model": (["--set", f"model={json.dumps(MODEL | {'dtype': 'float8'})}"], "dtype must be one of"),
    "nesting": (["--set", "model=" + "[" * 100_000], "model must be an object of the configuration's fields"),
    "rate that is none": (["--set", "learning_rate=NaN"], "learning_rate must be at least 0 and finite, got nan"),
    "numbers in a list": (["--set", 'lora=["in_proj", 5]'], "lora must be a list of regular expressions, got"),
    "no object": (["--set", "model=5"], "model must be an object of the configuration's fields, got 5"),
    "one token": (["--set", "tokens_per_row=1"], "tokens_per_row must be at least 2, got 1"),
    "two models": (["--init", "experiments/nemotron_tiny/model"], "settings: model has another pattern, "),
    "parts": (["--set", "accumulate=3"], "rows_per_step 2 is not divisible by 3 parts"),
    "missing settings": (["--settings", "nowhere.json"], "nowhere.json: cannot be read as JSON"),
    "missing checkpoint": (["--init", "nowhere"], "nowhere: does not exist"),
    "missing text": (["--text", "nowhere.txt"], "nowhere.txt: cannot be read as text"),
    "little text": (["--set", "rows_per_step=4000"], "give more text"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_wrong_input_is_one_line_and_exit_code_2(options, message, text, tmp_path, capsys):
    settings = [f"--set={name}={json.dumps(value)}" for name, value in (SHORT | {"model": MODEL}).items()]
    code = train.main([str(tmp_path / "run"), "--text", *map(str, text), *settings, "--no-progress", *options])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error, error


def test_a_batch_without_a_label_is_logged_as_json(whole_run):
    """Rows of documents of one token: every mean is one over nothing."""
    settings = Settings(model=MODEL)
    state = train.initial_state(settings.config, settings, None)
    step = jax.jit(update.make_step(settings.config, settings, jax.numpy.ones(300, jax.numpy.int32)))
    _, metrics = step(state, None, packing.Batch(*jax.numpy.array([[[[7] * 4]], [[[1, 2, 3, 4]]]])))
    record = json.loads(json.dumps(train._record(1, metrics), allow_nan=False))
    assert record["tokens"] == record["next_token_loss"] == record["bits_per_byte"] == record["mtp_loss"] == 0


def test_lists_of_a_model_come_from_json():
    config = Settings(model=MODEL | {"time_step_limit": [0.0, 1.0], "eos_token_id": [2, 11]}).config
    assert (config.time_step_limit, config.eos_token_id) == ((0.0, 1.0), (2, 11))


@pytest.mark.parametrize(
    "setting, message",
    [
        ("learning_rate=1e30", "after its update the held-out loss is"),
        ("learning_rate=3.4e38", "its update makes "),
        ("mtp_scale=1e25", "gradient's norm, which"),
    ],
    ids=["update", "parameters", "norm"],
)
def test_what_breaks_behind_the_loss_stops_the_run_too(setting, message, text, tmp_path, capsys):
    """An update that leaves numbers of no use, a norm that overflows where every gradient is finite."""
    chosen = SHORT | {"model": MODEL, "steps": 1, "warmup_steps": 0, "decay_steps": 0}
    settings = [f"--set={name}={json.dumps(value)}" for name, value in chosen.items()]
    command = [str(tmp_path / "run"), "--text", *map(str, text), *settings, "--set", setting, "--no-progress"]
    assert train.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("stopped: step 1: ") and error.count("\n") == 1 and message in error, error
    assert not (tmp_path / "run" / run_directory.MODEL).exists()
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_refused_run_does_not_take_the_directory(text, tmp_path):
    settings = [f"--set={name}={json.dumps(value)}" for name, value in (SHORT | {"model": MODEL}).items()]
    code = train.main([str(tmp_path / "run"), "--text", *map(str, text), *settings, "--set", "rows_per_step=4000"])
    assert code == 2 and not (tmp_path / "run").exists()


def test_another_run_in_the_directory_is_refused(whole_run, text, tmp_path):
    with alone(whole_run), pytest.raises(InputError, match="another run is writing there"):
        train.train(whole_run, Settings(model=MODEL, **SHORT), text=text, show_progress=False)
    with pytest.raises(InputError, match="holds a run with other settings .*seed 0, now 1"):
        train.train(whole_run, Settings(model=MODEL, **SHORT, seed=1), text=text, show_progress=False)
    (tmp_path / "mine.txt").write_text("something else")
    with pytest.raises(InputError, match="is not empty and holds no run"):
        train.train(tmp_path, Settings(model=MODEL, **SHORT), text=text, show_progress=False)


def test_settings_survive_their_file(tmp_path):
    chosen = Settings(model=MODEL, lora=("a", "b"))
    (tmp_path / "settings.json").write_text(json.dumps(vars(chosen)))
    assert read(tmp_path / "settings.json") == chosen
    assert read(tmp_path / "settings.json", ["seed=4", "compute_dtype=bfloat16"]).compute_dtype == "bfloat16"


# ------------------------------------------------------------------------------------------------ held-out text


def test_pieces_with_a_cache_measure_what_whole_documents_do(whole_run, text, monkeypatch):
    """`held_out` cuts documents; the sums are those of rows that hold each document whole."""
    monkeypatch.setattr(held_out, "_PIECE", 16)
    model, params = nemojax.load(whole_run / run_directory.MODEL, dtype="float32")
    tokenizer = corpus.Tokenizer.from_file(str(whole_run / run_directory.TOKENIZER))
    documents = [
        d[:n] for d, n in zip(corpus.encode(tokenizer, corpus.read_files(text[:4])), (40, 16, 17, 2), strict=True)
    ]
    result = held_out.measure(model.config, params, documents, show=False)
    token_bytes = jax.numpy.zeros(model.config.vocab_size, jax.numpy.int32)
    rows = packing.Batch(*(np.concatenate(a) for a in zip(*(packing.pack([d], 40) for d in documents), strict=True)))
    expected = jax.jit(lambda b: train.objective.evaluate(params, b, token_bytes, config=model.config))(rows)
    assert result.tokens == expected.counts.tokens == 39 + 15 + 16 + 1
    np.testing.assert_allclose(result.nats, expected.nats, rtol=1e-5)
    np.testing.assert_array_equal(result.load["layers_01"], expected.load["layers_01"])
    assert 0 <= result.agreed <= result.foretold < result.tokens


@pytest.mark.parametrize(
    "fault, message", [("tokenizer", "the tokenizer has 301 ids, the model only 300"), ("weights", "are damaged")]
)
def test_what_cannot_be_measured_is_one_line(fault, message, whole_run, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    shutil.copytree(whole_run / run_directory.MODEL, model)
    documents = [corpus.Document(f"{i}", f"name{i} = value{i}") for i in range(2)]
    monkeypatch.setattr(corpus, "standard_library", lambda: corpus.Corpus(documents[:1], documents[1:]))
    if fault == "tokenizer":
        tokenizer = corpus.Tokenizer.from_file(str(model / "tokenizer.json"))
        assert corpus.ids(tokenizer) == 300 and tokenizer.add_tokens(["one more"])
        tokenizer.save(str(model / "tokenizer.json"))
    else:
        (config, params) = nemojax.load(model)
        params["norm_f"] = params["norm_f"] * np.nan
        shutil.rmtree(model)
        nemojax.save(model, config.config, params)
        shutil.copy(whole_run / run_directory.MODEL / "tokenizer.json", model)
    assert held_out.main([str(model)]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and message in error, error


def test_a_file_of_the_training_part_is_refused(tmp_path):
    train_part = [corpus.Document("known.py", "x = 1\n" * 50)]
    (tmp_path / "copy.py").write_text("x = 1\n" * 50)
    with pytest.raises(InputError, match=r"copy.py: the training part has the same text \(known.py\)"):
        held_out.unseen([tmp_path / "copy.py"], train_part)
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match="empty.py: no text in it"):
        held_out.unseen([tmp_path / "empty.py"], train_part)
