"""The stored golden checkpoints against live transformers and live nemojax: stale files fail here."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import oracle
import pair

import nemojax

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("nano", "dense", "fused", "super", "demo", "tiny")
TINY = GOLDEN.parents[1] / "experiments" / "nemotron_tiny"


def locate(case):
    """Checkpoint and reference of a case."""
    return (
        (TINY / "model", TINY / "reference.npz") if case == "tiny" else (GOLDEN / case, GOLDEN / case / "reference.npz")
    )


@pytest.mark.parametrize("case", CASES)
def test_transformers_still_gives_the_stored_answers(case):
    path, reference = locate(case)
    stored, model = np.load(reference), oracle.load(path)
    found = oracle.forward(model, stored["tokens"])
    for name in {"logits", "hidden_states"} & set(stored):
        assert oracle.distance(found[name], stored[name]) < 2e-6
    greedy, _ = oracle.greedy(model, stored["tokens"], stored["greedy"].shape[1])
    assert np.array_equal(greedy, stored["greedy"])


@pytest.mark.parametrize("case", CASES)
def test_nemojax_gives_the_stored_answers(case):
    path, reference = locate(case)
    stored, (model, params) = np.load(reference), nemojax.load(path, dtype="float32")
    out = pair.run(pair.Pair(None, model, params), stored["tokens"], capture=("resid_post",))
    assert oracle.distance(out.logits, stored["logits"]) < 2e-5
    if "hidden_states" in stored:
        assert oracle.distance(np.stack(out.captured["resid_post"]), stored["hidden_states"]) < 2e-5
    new = nemojax.generate(model, params, stored["tokens"], max_new_tokens=stored["greedy"].shape[1])
    assert np.array_equal(new, stored["greedy"])


def test_the_demo_prompt_is_the_text_it_says():
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    stored = np.load(GOLDEN / "demo" / "reference.npz")
    prompt, ids = str(stored["prompt"]), stored["tokens"][0].tolist()
    assert Tokenizer.from_file(str(GOLDEN / "demo" / "tokenizer.json")).encode(prompt).ids == ids
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "demo", local_files_only=True)
    assert tokenizer(prompt).input_ids == ids
    assert tokenizer.decode(ids) == prompt
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 11, 0)


CHAT = [
    {"role": "user", "content": "What does break do?"},
    {"role": "assistant", "content": "It ends the loop.", "reasoning_content": "A keyword."},
    {"role": "user", "content": "And continue?"},
]


@pytest.mark.parametrize(("options", "end"), [({}, "<think>\n"), ({"enable_thinking": False}, "<think></think>")])
def test_the_demo_chat_template(options, end):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "demo", local_files_only=True)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True, **options)
    assert text == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhat does break do?<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>It ends the loop.<|im_end|>\n"
        f"<|im_start|>user\nAnd continue?<|im_end|>\n<|im_start|>assistant\n{end}"
    )
