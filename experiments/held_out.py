"""How good a trained model is on text, beside two programs that know nothing of neural networks.

    python -m experiments.held_out CHECKPOINT [--text FILE...]

Bits per byte of the standard library's held-out part (or of the files given; whether a run trained on these, its user
must know) for the model, for an interpolated 5-gram model fitted to the standard library's training part, and for
`xz -9`; the load of the experts, and how often the multi-token prediction block foretells what the model itself would
say (its attention sees 1,024 tokens at a time). Last result: experiments/nemotron_tiny/README.md.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import lzma
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

import nemojax
from experiments import corpus, ngram, objective
from experiments.corpus import Document
from nemojax import Config, forward
from nemojax.cli import one_line, silence_libraries
from nemojax.errors import InputError
from nemojax.tokenizer import load_tokenizer

# Documents go through in pieces, with the state carried on, so that one compiled program serves every length.
_PIECE = 1024
ORDER = 5


class Result(NamedTuple):
    """Sums over documents.

    Attributes:
      nats: of every token after the first one of a document. tokens: how many these are.
      load: how many times each expert was chosen, by layer.
      agreed: how often the multi-token prediction block gave the model's own choice. foretold: how often it was asked.
    """

    nats: float
    tokens: int
    load: dict[str, np.ndarray]
    agreed: int
    foretold: int


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 2 for wrong input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="Hugging Face or Orbax directory with a tokenizer.json")
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files to measure instead of the held-out part")
    args = parser.parse_args(arguments)
    return one_line("error", lambda: _run(args.checkpoint, args.text))


def _run(checkpoint: Path, files: Sequence[Path] | None) -> int:
    texts = corpus.standard_library()
    held_out = texts.held_out if files is None else unseen(files, texts.train)
    model, params = nemojax.load(checkpoint, dtype="float32")
    tokenizer = load_tokenizer(checkpoint)
    corpus.check_ids(tokenizer, model.config.vocab_size)
    result = measure(model.config, params, corpus.encode(tokenizer, held_out))
    if not math.isfinite(result.nats):
        raise InputError(f"{checkpoint}: its logits are not finite; the weights are damaged")
    _print(texts.train, held_out, result, figures(result, tokenizer, texts.train, held_out))
    return 0


def figures(
    result: Result, tokenizer: Tokenizer, train: Sequence[Document], held_out: Sequence[Document]
) -> dict[str, float]:
    """Bits per byte of the held-out texts: the model's, and those of the two programs that it must beat.

    Args:
      result: of `measure` on the held-out texts.
      tokenizer: the model's. train: what the n-gram model is fitted to, a 5-gram one where so many ids allow it.
    """
    ids = corpus.ids(tokenizer)
    order = next(n for n in range(ORDER, 0, -1) if ngram.fits(ids, n))
    fitted = ngram.fit([d[1:] for d in corpus.encode(tokenizer, train)], ids, order=order)
    counted = -sum(float(fitted.log_probs(d[1:]).sum()) for d in corpus.encode(tokenizer, held_out))
    packed = len(lzma.compress("".join(d.text for d in held_out).encode(), preset=9))
    bits = {
        "model": result.nats / math.log(2),
        f"interpolated {order}-gram": counted / math.log(2),
        "xz -9": 8 * packed,
    }
    return {name: total / corpus.size(held_out) for name, total in bits.items()}


def unseen(paths: Sequence[Path], train: Sequence[Document]) -> list[Document]:
    """The files as documents.

    Raises:
      InputError: one cannot be read, or its text is in the training part.
    """
    known = {hashlib.sha256(d.text.encode()).digest(): d.name for d in train}
    documents = corpus.read_files(paths)
    if not corpus.size(documents):
        raise InputError(f"{', '.join(map(str, paths))}: no text in it")
    for document in documents:
        if name := known.get(hashlib.sha256(document.text.encode()).digest()):
            raise InputError(f"{document.name}: the training part has the same text ({name})")
    return documents


def measure(config: Config, params: dict[str, Any], documents: Sequence[np.ndarray], *, show: bool = True) -> Result:
    """Runs every document through the model alone, in pieces with a cache.

    Args:
      config: the model's configuration. params: its parameters.
      documents: ids of each, int32, the first one is only context.
      show: a progress bar.
    """
    longest = -(-max(map(len, documents)) // _PIECE) * _PIECE
    run = jax.jit(functools.partial(_piece, config=config))
    nats, agreed, foretold, load = 0.0, 0, 0, {}
    for document in tqdm(documents, unit="document", disable=not show):
        cache = nemojax.init_cache(config, 1, longest)
        for start in range(0, len(document), _PIECE):
            window = document[start : start + _PIECE + 1]  # with the label of the last token
            tokens, ids = (np.zeros((1, _PIECE), np.int32) for _ in range(2))
            here, labelled = min(len(window), _PIECE), len(window) - 1
            tokens[0, :here], ids[0, :labelled] = window[:here], window[1:]
            place = np.arange(_PIECE)[None]
            out, cache = run(params, cache, tokens, (place < here).astype(np.int32), ids, place < labelled)
            nats += float(out[0])
            agreed, foretold = agreed + int(out[1]), foretold + int(out[2])
            for layer, counts in out[3].items():
                load[layer] = load.get(layer, 0) + np.asarray(counts)
    return Result(nats, sum(len(d) - 1 for d in documents), load, agreed, foretold)


def _piece(params, cache, tokens, segment_ids, ids, mask, *, config):
    run = forward.backbone(params, tokens, segment_ids, cache, config=config, capture=("router",))
    logits = forward.head(params, run.hidden, config)
    nats = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    real, routings = [segment_ids > 0] * len(run.captured["router"]), list(run.captured["router"])
    agreed = foretold = jnp.int32(0)
    if config.mtp_pattern:
        after = forward.predict_next(params, tokens, run.hidden, run.segments, config=config)
        guess = jnp.argmax(forward.head(params, after.hidden, config), axis=-1)[:, :-1]
        own, asked = jnp.argmax(logits, axis=-1)[:, 1:], after.has_next[:, :-1] & mask[:, 1:]
        agreed, foretold = ((guess == own) & asked).sum(), asked.sum()
        routings, real = routings + after.routings, real + [after.has_next] * len(after.routings)
    count = lambda routing, real: (jax.nn.one_hot(routing.ids, config.n_routed_experts) * real[..., None, None]).sum(
        (0, 1, 2)
    )
    load = dict(zip(objective.expert_layers(config), map(count, routings, real), strict=True))
    return (jnp.where(mask, nats, 0).sum(), agreed, foretold, load), run.cache


def _print(train: Sequence[Document], held_out: Sequence[Document], result: Result, bits: dict[str, float]) -> None:
    print(f"training part  {len(train):5} documents, {corpus.size(train):10,} bytes, sha256 {corpus.digest(train)}")
    print(f"measured text  {len(held_out):5} documents, {corpus.size(held_out):10,} bytes, ", end="")
    print(f"sha256 {corpus.digest(held_out)}\n\n{'':24}bits per byte")
    for name, value in bits.items():
        print(f"{name:24}{value:13.4f}")
    print()
    for layer, load in result.load.items():
        idle = int((load == 0).sum())
        print(
            f"experts of {layer:16} largest load {load.max() / load.mean():.2f} of the mean, {idle} of {load.size} idle"
        )
    if result.foretold:
        print(
            f"the multi-token prediction block names the model's own choice in {result.agreed / result.foretold:.1%} "
            f"of {result.foretold:,} places"
        )


if __name__ == "__main__":
    silence_libraries()
    sys.exit(main())
