"""Two processes with half of the devices each: load, forward, generate and save give what one process gives."""

import jax
import numpy as np
import pytest
from processes import ROOT, start

import nemojax
from convert.stream import convert

TINY = ROOT / "experiments/nemotron_tiny/model"


def test_where_another_process_fails_nothing_is_left(monkeypatch, tmp_path):
    model, params = nemojax.load(TINY)
    monkeypatch.setattr(nemojax.checkpoint, "any_has", lambda flag: True)
    with pytest.raises(nemojax.InputError, match="another process could not write its part"):
        nemojax.save(tmp_path / "model", model.config, params)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def expected():
    model, params = nemojax.load(TINY, dtype="float32")
    tokens = np.random.default_rng(0).integers(1, model.config.vocab_size, (8, 40)).astype(np.int32)
    logits = jax.jit(lambda params: model.apply({"params": params}, tokens).logits)(params)
    return logits, nemojax.generate(model, params, tokens[:, :9], max_new_tokens=5, stop_ids=())


@pytest.mark.parametrize("kind", ["hugging-face", "orbax"])
@pytest.mark.parametrize("mesh", ["data=2,expert=4", "tensor=2,sequence=4"])
def test_two_processes_equal_one(kind, mesh, expected, tmp_path):
    checkpoint = TINY
    if kind == "orbax":
        checkpoint = tmp_path / "orbax"
        convert(TINY, checkpoint, show_progress=False)
    start(checkpoint, mesh, tmp_path / "out.npz")
    found = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(found["logits"], expected[0], atol=1e-5 * np.abs(expected[0]).max())
    np.testing.assert_array_equal(found["new"], expected[1])
    (_, saved), (_, loaded) = (nemojax.load(path, dtype="float32") for path in (tmp_path / "out.npz.saved", TINY))
    jax.tree.map(np.testing.assert_array_equal, saved, loaded)
