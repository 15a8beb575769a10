"""nemojax under lm-eval: its rules for text, and whole runs: killed and resumed, in two processes."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from processes import environment

from nemojax import InputError
from nemojax.evaluation import chat, tasks
from nemojax.evaluation.harness import NemojaxLM

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "tests/golden/demo"


def ask(kind, *arguments):
    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]


@pytest.fixture(scope="module")
def lm():
    return NemojaxLM(str(DEMO), dtype="float32", batch_size=2, max_length=24)


def test_answers_come_in_the_order_of_the_requests(lm):
    pairs = [
        ("def f(x):", " return x"),
        ("", "import os"),
        ("a b c ", "d"),
        ("def f(x):", "\n    pass"),
        ("def f(x):", " 1"),
    ]
    scores = lm.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    turned = lm.loglikelihood(ask("loglikelihood", *pairs[::-1]), disable_tqdm=True)
    assert len({score for score, _ in scores}) == len(pairs)
    for a, b in zip(scores, turned[::-1], strict=True):
        assert a.log_prob == pytest.approx(b.log_prob, abs=1e-4)


def test_a_context_without_tokens_is_an_empty_one(lm):
    """Of white space, a tokenizer may leave nothing; the first token of the continuation is scored all the same."""
    request = lambda context: ((None, None), context, [5, 7])
    bare, begun = lm._loglikelihood_tokens([request([]), request([lm.prefix_token_id])], disable_tqdm=True)
    assert bare.log_prob == begun.log_prob


def test_what_is_too_long_loses_its_beginning_and_is_counted(lm):
    before = lm.truncated
    tail = "the end of it"
    long, longer = ("word " * 50 + tail, "x " * 60 + tail)
    a, b = lm.loglikelihood(ask("loglikelihood", (long, " now"), ("other " * 9 + long, " now")), disable_tqdm=True)
    assert a.log_prob == pytest.approx(b.log_prob, abs=1e-4)
    lm.loglikelihood(ask("loglikelihood", ("short", longer)), disable_tqdm=True)
    lm.generate_until(ask("generate_until", (long, {"until": ["\n"], "max_gen_toks": 4})), disable_tqdm=True)
    assert lm.truncated - before == 4


def test_a_rolling_text_is_the_sum_of_its_windows(lm):
    """With context of one token, the windows of a text in lm-eval's cut are independent requests."""
    text = "one two three four five six seven eight nine ten " * 3
    (total,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)), disable_tqdm=True)
    ids = lm.tok_encode(text)
    first, *rest = [ids[at : at + 24] for at in range(0, len(ids), 24)]
    assert len(rest) >= 2
    windows = [((None, None), [lm.prefix_token_id], first)]
    for at, piece in enumerate(rest, 1):
        context = ids[24 * at + len(piece) - 25 : 24 * at]
        windows.append(((None, None), context, piece))
    scores = lm._loglikelihood_tokens(windows, disable_tqdm=True)
    assert total == pytest.approx(sum(s.log_prob for s in scores), abs=1e-3)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(temperature=-1.0), "temperature must be 0 or a positive number, got -1.0"),
        (dict(temperature=1.0, top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (dict(temperature="abc"), "settings of generation .*: could not convert string to float: 'abc'"),
        (dict(temprature=0.9), "temprature=0.9 has no effect here; known are do_sample, max_gen_toks, temp"),
        (dict(repetition_penalty=1.2), "repetition_penalty=1.2 has no effect here"),
        (dict(max_gen_toks=0), "max_gen_toks=0, but at least 1 is needed"),
    ],
    ids=["temperature", "top-p", "text", "unknown", "not-here", "nothing"],
)
def test_wrong_settings_of_generation_are_named(lm, settings, message):
    with pytest.raises(InputError, match=message):
        lm.generate_until(
            ask("generate_until", ("a", {"do_sample": True, "max_gen_toks": 4, **settings})), disable_tqdm=True
        )


def test_settings_that_ask_nothing_are_taken(lm):
    settings = {"max_gen_toks": 2, "num_beams": 1, "repetition_penalty": 1.0, "max_length": None}
    assert lm.generate_until(ask("generate_until", ("a", settings)), disable_tqdm=True)


def test_generation_stops_at_the_text_and_leaves_it_out(lm):
    limit = {"max_gen_toks": 12}
    free, empty = lm.generate_until(ask("generate_until", ("def f", limit), ("", limit)), disable_tqdm=True)
    stop = free[len(free) // 2 :][:2]
    (cut,) = lm.generate_until(ask("generate_until", ("def f", limit | {"until": ["", stop]})), disable_tqdm=True)
    assert cut == free[: free.index(stop)] and empty


def test_a_special_token_stops_generation(lm, monkeypatch):
    """It is in no decoded text, so the text does not tell."""
    found = []
    monkeypatch.setattr(lm.scorer, "generate", lambda prompts, decoding, *_: found.append(decoding.stop_ids))
    turn, until = lm.tokenizer.token_to_id("<|im_start|>"), ["<|im_start|>", "def", "\n", "<|im_end|>"]
    settings = {"max_gen_toks": 4, "until": until, "do_sample": False, "temperature": 0.0}
    lm._generate([], settings, lambda _: None)
    assert turn not in lm._stop_ids and found == [(*lm._stop_ids, turn)]


def test_an_id_outside_the_vocabulary_is_refused(lm, monkeypatch):
    monkeypatch.setattr(lm, "config", lm.config.replace(vocab_size=300))
    with pytest.raises(InputError, match="has id .* but the model's vocabulary ends at 299"):
        lm.loglikelihood(ask("loglikelihood", ("def f(x):", " return x")), disable_tqdm=True)


def test_no_room_for_a_prompt_is_said(lm):
    with pytest.raises(InputError, match="max_gen_toks 24 leaves no room"):
        lm.generate_until(ask("generate_until", ("x", {"max_gen_toks": 24})), disable_tqdm=True)


def test_chat_template(lm, tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    text = lm.apply_chat_template(messages)
    assert "<|im_start|>user\nHi<|im_end|>" in text and "assistant" in text.rsplit("<|im_start|>", 1)[1]
    begun = lm.apply_chat_template([*messages, {"role": "assistant", "content": "Yes"}], add_generation_prompt=False)
    assert begun.endswith("Yes")
    given = "{% if tools is not none or documents is not none %}x{% endif %}{{ strftime_now('%Y')|length }}"
    given += "{{ messages|tojson(separators=(',', ':')) }}{{ {'a': '<é>'}|tojson(false, 1) }}"
    shown = chat.render(given, messages, {}, add_generation_prompt=True)
    assert shown == '4[{"role":"user","content":"Hi"}]{\n "a": "<é>"\n}'
    with pytest.raises(InputError, match="has no chat template"):
        chat.chat_template(tmp_path)
    with pytest.raises(InputError, match="chat template: .* not supported between"):
        chat.render("{{ 1 < 'a' }}", messages, {}, add_generation_prompt=True)
    with pytest.raises(InputError, match="no cats; check the roles"):
        chat.render("{{ raise_exception('no cats') }}", messages, {}, add_generation_prompt=True)
    with pytest.raises(InputError, match="unsafe"):
        chat.render("{{ ''.__class__.__mro__ }}", messages, {}, add_generation_prompt=True)


def test_what_a_template_marks_for_training_is_text(lm):
    """As in transformers, what is set inside is not known outside."""
    template = "{% set a = 1 %}{% generation %}{% set a = 2 %}<{{ messages[0].content }}>{% endgeneration %}{{ a }}"
    assert chat.render(template, [{"role": "user", "content": "Hi"}], {}, add_generation_prompt=True) == "<Hi>1"


NAMED = '{"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}'


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": "d", "additional_chat_templates/tool_use.jinja": "t", "tokenizer_config.json": "{}"},
        {"tokenizer_config.json": NAMED},
    ],
    ids=["files", "tokenizer_config"],
)
def test_templates_by_name(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [chat.chat_template(tmp_path, name) for name in (None, "default", "tool_use")] == ["d", "d", "t"]
    with pytest.raises(InputError, match="no chat template 'rag'; there are default, tool_use"):
        chat.chat_template(tmp_path, "rag")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("chat_template.jinja", b"", "has no chat template"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "no list of names and templates"),
        ("tokenizer_config.json", b'{"chat_template": ["a"]}', "no list of names and templates"),
    ],
)
def test_damaged_templates_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        chat.chat_template(tmp_path)


def test_a_tokenizer_config_that_is_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="tokenizer_config.json: not JSON"):
        chat.tokenizer_config(tmp_path)


# ------------------------------------------------------------------------------------------------- whole runs


def command(folder, *extra):
    task = Path(folder) / "mine.yaml"
    return [sys.executable, "-m", "nemojax", "evaluate", str(DEMO), "--tasks", str(task), "--batch-size", "4", *extra]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A task of 40 questions, shorter than the shipped one."""
    folder = tmp_path_factory.mktemp("task")
    rows = (tasks.SHIPPED / "python_choice.jsonl").read_text().splitlines()[:40]
    short = [json.loads(row) for row in rows]
    for row in short:
        row["context"], row["choices"] = row["context"][-60:], [c[:30] for c in row["choices"]]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, short)))
    text = (tasks.SHIPPED / "python_choice.yaml").read_text()
    (folder / "mine.yaml").write_text(text.replace("python_choice", "mine"))
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    run(command(folder, "--output", str(folder / "whole")))
    return results(folder / "whole")


def run(arguments, **options):
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def results(output):
    found = json.loads((output / "results.json").read_text())
    assert len((output / "samples_mine.jsonl").read_text().splitlines()) == 40
    return found


def scores(found):
    return {name: value for name, value in found["results"]["mine"].items() if isinstance(value, float)}


@pytest.mark.slow
@pytest.mark.parametrize("sign", (signal.SIGKILL, signal.SIGINT), ids=["killed", "interrupted"])
def test_a_run_goes_on_where_it_stopped(folder, whole, sign):
    output = folder / f"stopped{int(sign)}"
    answers = output / "requests.jsonl"
    process = subprocess.Popen(
        command(folder, "--output", str(output)), env=environment(), stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (answers.exists() and answers.stat().st_size > 500):
        time.sleep(0.005)
    process.send_signal(sign)
    error = process.communicate(timeout=60)[1]
    kept = answers.read_bytes().count(b"\n")
    assert 4 <= kept < 160
    if sign == signal.SIGINT:
        assert process.returncode == 130 and "repeat the command with --resume" in error.splitlines()[-1]
    run(command(folder, "--output", str(output), "--resume", "--batch-size", "3"))
    found = results(output)
    assert found["cost"]["resumed"] == kept and found["cost"]["requests"] == 160
    assert scores(found) == pytest.approx(scores(whole), abs=1e-4)
    assert answers.read_bytes().count(b"\n") == 160


MESH = ["--mesh", "data=2,expert=4", "--batch-size", "8"]


def test_eight_devices_give_the_same_scores(folder, whole):
    output = folder / "mesh"
    arguments = command(folder, "--output", str(output), *MESH)
    done = subprocess.run(arguments, env=environment(JAX_NUM_CPU_DEVICES="8"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert scores(results(output)) == pytest.approx(scores(whole), abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "devices"), [([], "1"), (MESH, "4")], ids=["each-has-a-whole-copy", "one-mesh-over-both"]
)
def test_two_processes_give_the_same_scores(arguments, devices, folder, whole):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    output = folder / f"two-of-{devices}"
    processes = ["--coordinator", address, "--processes", "2"]
    start = lambda i: subprocess.Popen(
        command(folder, "--output", str(output), *arguments, *processes, "--process", str(i)),
        env=environment(JAX_NUM_CPU_DEVICES=devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for process in [start(i) for i in range(2)]:
        text = process.communicate(timeout=300)[0]
        assert process.returncode == 0, text[-3000:]
    assert scores(results(output)) == pytest.approx(scores(whole), abs=1e-4)


def test_the_command_of_lm_eval_knows_the_model(folder, whole):
    arguments = f"--model nemojax --model_args path={DEMO} --tasks mine.yaml --batch_size 4".split()
    text = run([sys.executable, "-m", "nemojax.evaluation", *arguments], cwd=folder)
    found = re.search(r"\|\s*acc\s*\|[^|]*\|([^|]*)\|", text)
    assert float(found[1]) == pytest.approx(scores(whole)["acc,none"], abs=1e-4)


def test_a_checkpoint_without_template_is_refused_for_chat(folder, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(DEMO, plain, ignore=shutil.ignore_patterns("chat_template.jinja"))
    arguments = command(folder, "--apply-chat-template")
    arguments[4] = str(plain)
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "has no chat template" in done.stderr
