"""lm-eval's own model of transformers and ours give the same answers to the same requests, one by one."""

from pathlib import Path

import oracle
import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from nemojax.evaluation.harness import NemojaxLM

TINY = Path(__file__).parents[2] / "experiments/nemotron_tiny/model"
MAX_LENGTH = 48
CONTEXTS = (
    "def first_word(text):",
    "import os\n\n",
    "",
    "class A:\n    def f(self):\n        ",
    "<s>x = ",
    "for i in range(10):\n" * 9,
)
ANSWERS = ("\n    return text", " pass", "1", "\n" + "    total += value\n" * 4)
TEXTS = ("def f():\n    return 1\n" * 20, "import sys", "a = 1\n" * 8)


@pytest.fixture(scope="module")
def pair():
    tokenizer = AutoTokenizer.from_pretrained(TINY, local_files_only=True)
    theirs = HFLM(pretrained=oracle.load(TINY), tokenizer=tokenizer, batch_size=1, max_length=MAX_LENGTH, device="cpu")
    return theirs, NemojaxLM(str(TINY), dtype="float32", batch_size=8, max_length=MAX_LENGTH)


def answers(pair, kind, arguments):
    requests = [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]
    return [getattr(lm, kind)(requests, disable_tqdm=True) for lm in pair]


def test_loglikelihoods(pair):
    """Empty and too long contexts, several choices, a context that brings its own begin of text."""
    theirs, ours = answers(pair, "loglikelihood", [(c, a) for c in CONTEXTS for a in ANSWERS])
    for (their_score, their_greedy), (our_score, our_greedy) in zip(theirs, ours, strict=True):
        assert our_score == pytest.approx(their_score, abs=1e-3)
        assert our_greedy == their_greedy
    assert pair[1].truncated > 0


def test_rolling_loglikelihoods(pair):
    theirs, ours = answers(pair, "loglikelihood_rolling", [(text,) for text in TEXTS])
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_greedy_generation(pair):
    settings = {"until": ["\n\n", "return"], "max_gen_toks": 16, "do_sample": False}
    theirs, ours = answers(pair, "generate_until", [(c, settings) for c in CONTEXTS if c])
    assert ours == theirs
