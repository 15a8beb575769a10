"""`nemojax generate`: what it prints, and one line for whatever is wrong."""

import json
import shutil
from pathlib import Path

import pytest

import nemojax
from nemojax import cli
from nemojax.tokenizer import load_tokenizer

DEMO = Path(__file__).parent / "golden/demo"
PROMPT = "def f(x):"


def printed(capsys, *arguments):
    assert cli.main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out.removesuffix("\n")


@pytest.fixture(scope="module")
def greedy():
    """Ids of 12 tokens after the prompt."""
    model, params = nemojax.load(DEMO)
    ids = load_tokenizer(DEMO).encode(PROMPT).ids
    return nemojax.generate(model, params, [ids], max_new_tokens=12, stop_ids=())[0].tolist()


def test_nothing_is_printed_behind_the_end(greedy, tmp_path, capsys):
    """The end of a turn is known from `generation_config.json`; what pads the row is an ordinary token here."""
    target = shutil.copytree(DEMO, tmp_path / "model")
    end = next(token for token in greedy if token != greedy[0])
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"pad_token_id": greedy[0]}))
    upto = greedy[: greedy.index(end) + 1]
    expected = PROMPT + load_tokenizer(DEMO).decode(upto)
    assert printed(capsys, target, "--prompt", PROMPT, "--max-new-tokens", 12) == expected
    assert printed(capsys, DEMO, "--prompt", PROMPT, "--max-new-tokens", 12) != expected


def test_the_prompt_is_taken_whole(tmp_path, capsys):
    """Whatever the tokenizer's file remembers of its last call."""
    target = shutil.copytree(DEMO, tmp_path / "model")
    tokenizer = load_tokenizer(DEMO)
    tokenizer.enable_truncation(max_length=3)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(target / "tokenizer.json"))
    run = lambda path: printed(capsys, path, "--prompt", PROMPT, "--max-new-tokens", 4)
    assert run(target) == run(DEMO)


WRONG = {
    "no-directory": (["/no/where", "--prompt", "a"], "/no/where: does not exist"),
    "no-text": ([DEMO, "--prompt="], "--prompt: the text has no tokens"),
    "bytes": ([DEMO, "--prompt", "\udcff\udcfe"], "--prompt: the bytes are no UTF-8 text"),
    "seed": ([DEMO, "--prompt", "a", "--seed", 2**70], "a seed has 64 bits"),
    "tokens": ([DEMO, "--prompt", "a", "--max-new-tokens", 10**12], "max_new_tokens must be at least 1 and at most"),
    "memory": ([DEMO, "--prompt", "a", "--max-new-tokens", 2**30], "out of memory"),
}


@pytest.mark.parametrize("arguments, message", WRONG.values(), ids=WRONG)
def test_one_line_for_what_is_wrong(arguments, message, capsys):
    assert cli.main(["generate", *map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err


def test_a_damaged_weight_is_reported(tmp_path, capsys):
    model, params = nemojax.load(DEMO)
    nemojax.save(tmp_path / "model", model.config, params | {"norm_f": params["norm_f"].at[0].set(float("nan"))})
    shutil.copy(DEMO / "tokenizer.json", tmp_path / "model")
    assert cli.main(["generate", str(tmp_path / "model"), "--prompt", PROMPT, "--max-new-tokens", "4"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "logits are NaN" in shown.err


def test_top_k_beyond_the_vocabulary_keeps_all(capsys):
    run = lambda *more: printed(capsys, DEMO, "--prompt", PROMPT, "--max-new-tokens", 4, "--temperature", 1, *more)
    assert run("--top-k", 10**13) == run("--top-p", 1.0)
