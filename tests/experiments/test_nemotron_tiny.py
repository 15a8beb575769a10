"""The shipped model: as small, as good and as balanced as its README says."""

import ast
import contextlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import experiments
import nemojax
from experiments import corpus, held_out
from nemojax.tokenizer import load_tokenizer

FOLDER = Path(experiments.__file__).parent / "nemotron_tiny"
MODEL = FOLDER / "model"


def test_it_is_small_enough_to_ship():
    assert sum(f.stat().st_size for f in MODEL.iterdir()) < 12e6


def test_it_has_every_kind_of_layer_often_enough():
    config = nemojax.Config.from_hf(MODEL)
    assert all(config.pattern.count(kind) >= n for kind, n in (("M", 3), ("E", 3), ("*", 1)))
    assert config.n_routed_experts >= 16 and config.num_experts_per_tok >= 4 and config.mtp_pattern


def test_it_comes_from_the_settings_beside_it():
    """The record of the run holds every setting of the file, and the digests of the data."""
    record, settings = (json.loads((FOLDER / name).read_text()) for name in ("run.json", "settings.json"))
    assert settings.items() <= record.items()
    assert {len(record[name]) for name in ("train_sha256", "held_out_sha256")} == {64}


@pytest.fixture(scope="module")
def library():
    texts = corpus.standard_library()
    record = json.loads((FOLDER / "run.json").read_text())
    if corpus.digest(texts.train) != record["train_sha256"]:
        pytest.skip("this Python has another standard library than the one that the model was trained on")
    return texts


def measured(library, texts):
    """The sums over the texts, and bits per byte."""
    model, params = nemojax.load(MODEL, dtype="float32")
    tokenizer = load_tokenizer(MODEL)
    result = held_out.measure(model.config, params, corpus.encode(tokenizer, texts), show=False)
    return result, held_out.figures(result, tokenizer, library.train, texts)


@pytest.mark.slow
def test_it_beats_counting_and_compressing_on_text_that_it_never_saw(library, monkeypatch):
    """On every second held-out document, by a clear margin: bits per byte, balanced experts, foretold tokens."""
    texts = library.held_out[::2]
    # So much to run pays for a good compilation, which `make test` does without.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result, bits = pool.submit(measured, library, texts).result()
    ours = bits.pop("model")
    assert len(bits) == 2 and ours < 0.92 * min(bits.values()), (ours, bits)
    for layer, load in result.load.items():
        assert load.min() > 0 and load.max() < 2 * load.mean(), layer
    assert result.agreed > 0.4 * result.foretold


def test_it_writes_python():
    """What follows the head of a function is an indented line that Python can parse."""
    model, params = nemojax.load(MODEL, dtype="float32")
    tokenizer = load_tokenizer(MODEL)
    tokens = jnp.array([tokenizer.encode("def is_file(path):").ids], jnp.int32)
    new = np.asarray(nemojax.generate(model, params, tokens, max_new_tokens=40))[0]
    text = tokenizer.decode(new.tolist())
    assert text.startswith("\n    "), text
    ast.parse("def is_file(path):\n" + _first_statement(text))


def _first_statement(text: str) -> str:
    """The shortest run of whole lines that parses as a function's body, else the first line."""
    lines = text.strip("\n").splitlines()
    for count in range(1, len(lines)):
        body = "\n".join(lines[:count])
        with contextlib.suppress(SyntaxError):
            ast.parse(f"def f():\n{body}")
            return body
    return lines[0]
