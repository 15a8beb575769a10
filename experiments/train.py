"""Trains a small hybrid model on text, from nothing or with adapters on a checkpoint.

    python -m experiments.train RUN --settings experiments/nemotron_tiny/settings.json [--set steps=200 ...]
    python -m experiments.train RUN --init CHECKPOINT --set 'lora=["in_proj","experts_.*"]' --text FILE...

The text is the running Python's standard library, or the files given. A killed run goes on with the same command, and
ends with the same parameters bit by bit (on a CPU; a GPU needs XLA's deterministic operations for that). The result is
RUN/model, a Hugging Face directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

import nemojax
from convert.stream import convert
from experiments import corpus, curves, lora, objective, packing, run_directory, settings, update
from experiments.packing import Batch
from experiments.run_directory import Checkpoints
from experiments.settings import Settings
from experiments.update import Metrics, TrainState
from nemojax.cli import one_line, silence_libraries
from nemojax.config import Config
from nemojax.errors import InputError
from nemojax.layout import companions, copy_companions
from nemojax.lock import alone
from nemojax.specs import flatten
from nemojax.tokenizer import load_tokenizer

# Rows of held-out text that a look during training takes.
_LOOK_ROWS = 32


class Data(NamedTuple):
    """What a run reads.

    Attributes:
      tokenizer: of the text.
      train, held_out: ids of each document.
      digests: of the texts and the tokenizer, for the record.
    """

    tokenizer: Tokenizer
    train: list[np.ndarray]
    held_out: list[np.ndarray]
    digests: dict[str, str]


class NotFinite(RuntimeError):
    """A step gave a loss or a gradient that is not a number."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 2 for wrong input and 1 for a run that broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of the run; an unfinished run in it goes on")
    parser.add_argument("--settings", type=Path, help="JSON file of settings")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="changes one setting")
    parser.add_argument("--init", type=Path, help="checkpoint to start from: its model, parameters and tokenizer")
    parser.add_argument("--text", type=Path, nargs="+", help="text files, one document each")
    parser.add_argument("--no-progress", action="store_true")
    args = parser.parse_args(arguments)
    return one_line("error", lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    try:
        train(
            args.run,
            settings.read(args.settings, args.set),
            init=args.init,
            text=args.text,
            show_progress=not args.no_progress,
        )
    except NotFinite as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    return 0


def train(
    run: Path,
    chosen: Settings,
    *,
    init: Path | None = None,
    text: Sequence[Path] | None = None,
    show_progress: bool = True,
) -> None:
    """Runs or finishes a training run; see the module.

    Raises:
      InputError: settings, checkpoint, text and directory do not fit together, or the run is going on.
      NotFinite: with the step and the layer.
    """
    if chosen.model is None and init is None:
        raise InputError("settings: model is missing; give --settings with a model, or --init")
    if chosen.lora and init is None:
        raise InputError("settings: lora adapts a trained model; give --init")
    config, base, tokenizer = chosen.config if init is None else None, None, None
    start = {"init_sha256": None}
    if init is not None:
        model, base = nemojax.load(init, dtype="float32")
        start = {"init_sha256": _digest(model.config, base)}
        companions(init)  # which the export will copy
        config, tokenizer = model.config, load_tokenizer(init)
        other = [n for n in chosen.model or () if n != "dtype" and getattr(chosen.config, n) != getattr(config, n)]
        if other:
            raise InputError(f"settings: model has another {', '.join(other)} than {init}; leave it out, or --init")
    data = read_data(text, tokenizer, config.vocab_size)
    state = initial_state(config, chosen, base)
    base = base if chosen.lora else None  # a step overwrites its state, which has these arrays otherwise
    # The words of JAX's key for this seed.
    stream = packing.Stream(data.train, length=chosen.tokens_per_row, rows=chosen.rows_per_step, seed=[0, chosen.seed])
    # Only a run that can begin takes the directory.
    run_directory.prepare(run, vars(chosen) | data.digests | start)
    with alone(run):
        data.tokenizer.save(str(run / run_directory.TOKENIZER))
        checkpoints = Checkpoints(run, chosen.keep)
        try:
            if checkpoints.latest is not None:
                state = checkpoints.load(checkpoints.latest, state)
            state = _loop(run, state, base, stream, data, config, chosen, checkpoints, show_progress)
        finally:
            checkpoints.close()
        curves.draw(run_directory.read_log(run), run / run_directory.CURVES)
        export(run, update.assemble(base, state.trained, config=config, settings=chosen), config, init)


def _digest(config: Config, params: Any) -> str:
    total = hashlib.sha256(repr(config).encode())
    for path, leaf in flatten(params):
        total.update(path.encode() + np.asarray(leaf).tobytes())
    return total.hexdigest()


def read_data(text: Sequence[Path] | None, tokenizer: Tokenizer | None, vocab_size: int) -> Data:
    """Reads and encodes the text, with a tokenizer of its own if none is given.

    Raises:
      InputError: the text is too little, or the tokenizer has more ids than the model.
    """
    texts = corpus.standard_library() if text is None else corpus.from_files(text)
    tokenizer = tokenizer or corpus.train_tokenizer(texts.train, vocab_size)
    corpus.check_ids(tokenizer, vocab_size)
    digests = {
        "train_sha256": corpus.digest(texts.train),
        "held_out_sha256": corpus.digest(texts.held_out),
        "tokenizer_sha256": hashlib.sha256(tokenizer.to_str().encode()).hexdigest(),
    }
    return Data(tokenizer, *(corpus.encode(tokenizer, part) for part in texts), digests)


def initial_state(config: Config, chosen: Settings, base: Any) -> TrainState:
    """The state before the first step: fresh parameters, those of `base`, or fresh adapters on it."""
    key = jax.random.key(chosen.seed)
    if chosen.lora:
        print(lora.describe(config, lora.match(config, chosen.lora), chosen.lora_rank))
        trained = lora.init(config, chosen.lora, chosen.lora_rank, key)
    else:
        trained = nemojax.init_params(config, key) if base is None else base
    return TrainState(jnp.int32(0), trained, update.make_optimizer(chosen).init(trained))


def _loop(run, state, base, stream, data, config, chosen, checkpoints, show_progress) -> TrainState:
    """Steps from the state to the end of the run."""
    token_bytes = jnp.asarray(_padded(corpus.token_bytes(data.tokenizer), config.vocab_size))
    step = jax.jit(update.make_step(config, chosen, token_bytes), donate_argnums=0)
    look = jax.jit(partial(_look, config=config, chosen=chosen, token_bytes=token_bytes))
    held_out = _some_rows(data.held_out, chosen.tokens_per_row)
    done = int(state.step)
    # Where every step leaves it: arrays that JAX may move would make the first step another program than the others.
    state = jax.device_put(state, jax.local_devices()[0])
    bar = tqdm(total=chosen.steps, initial=done, unit="step", disable=not show_progress)
    with run_directory.log(run, done) as write, bar:
        for index in range(done, chosen.steps):
            start = time.perf_counter()
            batch = Batch(*(a.reshape(chosen.accumulate, -1, a.shape[-1]) for a in stream.batch(index)))
            state, metrics = step(state, base, batch)
            record = _record(index + 1, metrics)
            if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
                params = update.assemble(base, state.trained, config=config, settings=chosen)
                compute = config.replace(dtype=chosen.compute_dtype)
                where = update.first_non_finite(update.compute_copy(params, compute), batch, metrics, compute)
                raise NotFinite(f"step {index + 1}: loss {record['loss']}, gradient {record['grad_norm']}, at {where}")
            if not metrics.finite:
                bad = [path for path, leaf in flatten(state.trained) if not bool(jnp.isfinite(leaf).all())]
                raise NotFinite(
                    f"step {index + 1}: its update makes {bad[0]} infinite or NaN ({len(bad)} leaves in all)"
                )
            record["tokens_per_second"] = round(batch.tokens.size / (time.perf_counter() - start), 1)
            if (index + 1) % chosen.evaluate_every == 0 or index + 1 == chosen.steps:
                record["held_out_bits_per_byte"] = seen = float(look(state.trained, base, held_out))
                if not math.isfinite(seen):
                    raise NotFinite(f"step {index + 1}: after its update the held-out loss is {seen}")
            write(record)
            bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['bits_per_byte']:.3f} bits/byte", refresh=False)
            bar.update()
            if (index + 1) % chosen.save_every == 0 or index + 1 == chosen.steps:
                checkpoints.save(index + 1, state)
    return state


def _padded(array: np.ndarray, size: int) -> np.ndarray:
    return np.pad(array, (0, size - len(array)))


def _some_rows(documents: list[np.ndarray], length: int) -> Batch:
    """Rows from all over the documents, the same in every run."""
    rows = packing.pack(documents, length)
    chosen = np.random.default_rng(0).permutation(len(rows.tokens))[:_LOOK_ROWS]
    return Batch(*(a[chosen] for a in rows))


def _look(trained, base, rows, *, config, chosen, token_bytes):
    """Bits per byte of rows of held-out text."""
    params = update.assemble(base, trained, config=config, settings=chosen)
    evaluate = lambda row: objective.evaluate(params, row, token_bytes, config=config)
    sums = jax.lax.map(evaluate, Batch(*(a[:, None] for a in rows)))
    return sums.nats.sum() / sums.text_bytes.sum() / math.log(2)


def _record(step: int, metrics: Metrics) -> dict[str, Any]:
    """One line of the log. A mean over nothing is 0."""
    sums = jax.tree.map(np.asarray, metrics.sums)
    loads = list(sums.load.values())
    record = {
        "step": step,
        "loss": float(metrics.loss),
        "next_token_loss": float(sums.nats / max(sums.counts.tokens, 1)),
        "bits_per_byte": float(sums.nats / max(sums.text_bytes, 1) / math.log(2)),
        "mtp_loss": float(sums.mtp_nats / max(sums.counts.mtp_tokens, 1)),
        "balance_loss": float(sums.balance / max(sums.counts.rows, 1)),
        "grad_norm": float(metrics.grad_norm),
        "learning_rate": float(metrics.learning_rate),
        "tokens": int(sums.counts.tokens),
    }
    if loads:
        record["expert_load_max_over_mean"] = max(float(load.max() / max(load.mean(), 1e-9)) for load in loads)
        record["idle_experts"] = float(np.mean([(load == 0).mean() for load in loads]))
    return record


def export(run: Path, params: Any, config: Config, init: Path | None) -> None:
    """Writes RUN/model: as the checkpoint that the run started from (its dtype and the files beside its weights), or in
    bfloat16, the dtype of the released checkpoints.
    """
    config = config.replace(dtype="bfloat16" if init is None else Config.from_hf(init).dtype)
    orbax = run / run_directory.STAGED
    shutil.rmtree(orbax, ignore_errors=True)  # of a run that was killed here
    try:
        nemojax.save(orbax, config, update.compute_copy(params, config))
        if init is not None:
            copy_companions(init, orbax)
        else:
            (orbax / "tokenizer.json").write_bytes((run / run_directory.TOKENIZER).read_bytes())
            special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_position_embeddings}
            (orbax / "tokenizer_config.json").write_text(json.dumps(kind | special, indent=2) + "\n")
        convert(orbax, run / run_directory.MODEL, overwrite=True, show_progress=False)
    finally:
        shutil.rmtree(orbax, ignore_errors=True)


if __name__ == "__main__":
    silence_libraries()
    sys.exit(main())
