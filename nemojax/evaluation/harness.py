"""nemojax as a model of lm-evaluation-harness: text in, answers in the order of the requests out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import nemojax
from nemojax.errors import InputError
from nemojax.evaluation import chat
from nemojax.evaluation.engine import Engine
from nemojax.evaluation.record import Record, key
from nemojax.evaluation.scorer import Decoding, Prompt, Request, Score, Scorer
from nemojax.generate import check_sampling, end_ids
from nemojax.tokenizer import load_tokenizer

_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
# What others understand, where it asks for nothing.
_NEUTRAL = dict.fromkeys(("num_beams", "repetition_penalty", "length_penalty", "num_return_sequences", "typical_p"), 1)
_NEUTRAL |= dict.fromkeys(("min_p", "no_repeat_ngram_size", "presence_penalty", "frequency_penalty"), 0)
_NEUTRAL |= {"min_new_tokens": 0, "early_stopping": False, "use_cache": True, "skip_special_tokens": True}

# Called with the index and the answer of each finished request.
Done = Callable[[dict[int, Any]], None]


@register_model("nemojax")
class NemojaxLM(TemplateLM):
    """The model `nemojax` of lm-eval.

    Args:
      path: checkpoint directory, Hugging Face or Orbax, with its tokenizer. pretrained: the same.
      mesh: devices, `data=2,expert=4`; in `--model_args`, which is split at commas, `data:2;expert:4`.
      dtype: to compute in; default the checkpoint's.
      batch_size: rows of a batch.
      max_length: tokens of context and continuation; default the model's.
      max_gen_toks: generated tokens where a task does not say.
      buckets: pad to few lengths. share_prefixes: run common beginnings once.
      seed: of sampled generation.
      record: where answers are kept and found again.
      max_batch_size, device: what lm-eval hands to every model; not used.

    Attributes:
      truncated: requests that did not fit and lost their beginning.
      resumed: requests whose answer was in the record. answered: those that were computed.

    Raises:
      InputError: the checkpoint or an argument cannot be used.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        pretrained: str | None = None,
        mesh: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        buckets: bool = True,
        share_prefixes: bool = True,
        seed: int = 0,
        record: Record | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        self.path = path or pretrained
        if self.path is None:
            raise InputError("nemojax: no checkpoint; give --model_args path=DIRECTORY")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"batch_size must be a positive number, got {batch_size!r}")
        self.batch_size = int(batch_size)
        self.tokenizer = load_tokenizer(self.path)
        self._settings = chat.tokenizer_config(self.path)
        self._template: str | None = None
        model, params = nemojax.load(self.path, dtype=dtype, **_mesh(mesh))
        self.engine = Engine(model, params)
        self.scorer = Scorer(self.engine, batch_size=self.batch_size, buckets=buckets, share_prefixes=share_prefixes)
        self.config = model.config
        self.max_length = max_length or self.config.max_position_embeddings
        self.max_gen_toks, self._seed, self._record = max_gen_toks, seed, record
        self.truncated = self.resumed = self.answered = 0

    # -------------------------------------------------------------------------------------------------- text

    @property
    def eot_token_id(self) -> int:
        """The end-of-text id that the tokenizer's settings name, else the config's first."""
        eos = self.config.eos_token_id
        return self._special("eos_token", eos[0] if isinstance(eos, tuple) else eos)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: begin of text."""
        return self._special("bos_token", self.config.bos_token_id)

    def _special(self, name: str, default: int | None) -> int:
        text = chat.special_token(self._settings, name)
        found = default if text is None else self.tokenizer.token_to_id(text)
        if found is None:
            raise InputError(f"{self.path}: the tokenizer has no {name}; name one in tokenizer_config.json")
        return found

    @property
    def _stop_ids(self) -> tuple[int, ...]:
        return tuple({self.eot_token_id, *end_ids(self.config)})

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; a text that begins with begin-of-text does not get another one.

        Raises:
          InputError: an id is outside the model's vocabulary.
        """
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.id_to_token(self.prefix_token_id))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens).ids
        if (last := max(ids, default=0)) >= self.config.vocab_size:
            raise InputError(
                f"{self.path}: the tokenizer has id {last} for {self.tokenizer.id_to_token(last)!r}, but the model's "
                f"vocabulary ends at {self.config.vocab_size - 1}; take the tokenizer that belongs to the weights"
            )
        return ids

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which lm-eval caches requests."""
        return str(self.path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Chooses the checkpoint's template, or the named one of several; returns its source."""
        if chat_template:
            self._template = chat.chat_template(self.path, chat_template if isinstance(chat_template, str) else None)
        return self._template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        template = self._template or self.chat_template(True)
        return chat.render(template, chat_history, self._settings, add_generation_prompt=add_generation_prompt)

    # ----------------------------------------------------------------------------------------------- answers

    def _loglikelihood_tokens(self, requests: Sequence[tuple], disable_tqdm: bool = False, **_: Any) -> list[Score]:
        built = [self._request(context, continuation) for _, context, continuation in requests]
        compute = lambda chosen, done: self.scorer.loglikelihood([built[i] for i in chosen], done)
        answers = self._answer("loglikelihood", [texts for texts, _, _ in requests], compute, disable_tqdm)
        return [Score(*answer) for answer in answers]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows that overlap by one token."""

        def compute(chosen: list[int], done: Done) -> None:
            owners, windows = [], []
            for at, i in enumerate(chosen):
                tokens = self.tok_encode(requests[i].args[0])
                pieces = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
                windows += [Request(*make_disjoint_window(piece)) for piece in pieces]
                owners += [at] * (len(windows) - len(owners))
            missing, totals = Counter(owners), dict.fromkeys(range(len(chosen)), 0.0)
            done({at: 0.0 for at in totals if not missing[at]})

            def add(scores: dict[int, Score]) -> None:
                for window in sorted(scores):
                    totals[owners[window]] += scores[window].log_prob
                    missing[owners[window]] -= 1
                ready = {owners[window] for window in scores if not missing[owners[window]]}
                done({at: totals[at] for at in ready})

            self.scorer.loglikelihood(windows, add)

        return self._answer("loglikelihood_rolling", [r.args for r in requests], compute, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts up to a stop string, an end of text, or the limit of tokens."""
        arguments = [r.args for r in requests]
        options = [_normalised(settings, self.max_gen_toks) for _, settings in arguments]
        prompts = [
            self._prompt(context, option["max_gen_toks"], name)
            for (context, _), option, name in zip(arguments, options, _keys("sample", arguments), strict=True)
        ]

        def compute(chosen: list[int], done: Done) -> None:
            alike: dict[str, list[int]] = {}
            for at, i in enumerate(chosen):
                alike.setdefault(str(sorted(arguments[i][1].items())), []).append(at)
            for batch in alike.values():
                here = lambda found, batch=batch: done({batch[at]: text for at, text in found.items()})
                self._generate([prompts[chosen[at]] for at in batch], options[chosen[batch[0]]], here)

        return self._answer("generate_until", arguments, compute, disable_tqdm)

    def _prompt(self, context: str, limit: int, name: str) -> Prompt:
        if limit >= self.max_length:
            raise InputError(
                f"max_gen_toks {limit} leaves no room for a prompt in max_length {self.max_length}; lower the former"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.truncated += len(ids) > self.max_length - limit
        return Prompt(ids[limit - self.max_length :], (self._seed ^ int(name[:8], 16)) & 0xFFFFFFFF)

    def _generate(self, prompts: list[Prompt], options: dict[str, Any], done: Done) -> None:
        """Continues prompts that have the same settings."""
        sampling = (
            options.get("temperature", 1.0) if options["do_sample"] else 0.0,
            options.get("top_k") or None,  # lm-eval's other models take 0 for all
            options.get("top_p"),
        )
        check_sampling(*sampling)
        until = [stop for stop in options["until"] if stop]
        stop_ids = tuple(dict.fromkeys([*self._stop_ids, *filter(None, map(self._unseen, until))]))
        decoding = Decoding(options["max_gen_toks"], stop_ids, *sampling)
        decode = lambda ids: self.tokenizer.decode(ids)
        is_finished = lambda ids: any(stop in decode(ids) for stop in until)
        text = lambda ids: postprocess_generated_text(decode(ids), until, None)
        self.scorer.generate(prompts, decoding, is_finished, lambda new: done({i: text(ids) for i, ids in new.items()}))

    def _unseen(self, stop: str) -> int | None:
        """The id of a stop string that is a special token, which decoding leaves out."""
        token = self.tokenizer.token_to_id(stop)
        return token if token is not None and not self.tokenizer.decode([token]) else None

    def _request(self, context: Sequence[int], continuation: Sequence[int]) -> Request:
        """Keeps the end of what is too long, as lm-eval's own model does."""
        if not continuation:
            raise InputError("loglikelihood: a continuation has no tokens; the task's target must not be empty")
        context = context or [self.prefix_token_id]  # of white space, a tokenizer may leave nothing
        self.truncated += len(context) + len(continuation) > self.max_length + 1
        tokens = [*context, *continuation][-(self.max_length + 1) :]
        scored = min(len(continuation), len(tokens) - 1)
        return Request(tokens[:-scored], tokens[-scored:])

    def _answer(self, kind: str, arguments: list[Any], compute: Callable[[list[int], Done], None], quiet: bool) -> list:
        """Answers from the record where it has them; `compute(indices, done)` for the others."""
        keys = _keys(kind, arguments)
        known = self._record.answers if self._record else {}
        answers = {i: known[name] for i, name in enumerate(keys) if name in known}
        chosen = [i for i in range(len(keys)) if i not in answers]
        self.resumed += len(answers)
        with tqdm(total=len(keys), initial=len(answers), desc=kind, file=sys.stderr, disable=quiet) as bar:

            def done(found: dict[int, Any]) -> None:
                new = {chosen[at]: answer for at, answer in found.items()}
                answers.update(new)
                if self._record and new:
                    self._record.append([{"key": keys[i], "kind": kind, "result": a} for i, a in new.items()])
                for i, answer in new.items():
                    self.cache_hook.add_partial(kind, arguments[i], answer)
                self.answered += len(new)
                bar.update(len(new))

            if chosen:
                compute(chosen, done)
        return [answers[i] for i in range(len(keys))]


def _normalised(settings: dict[str, Any], max_gen_toks: int) -> dict[str, Any]:
    """Settings of generation as lm-eval reads them; those that are unknown here may be there if they ask nothing."""
    try:
        found = dict(normalize_gen_kwargs(settings, max_gen_toks))
    except (TypeError, ValueError) as error:
        raise InputError(f"settings of generation {settings}: {error}") from None
    for name in found.keys() - _SETTINGS:
        if found[name] not in (None, _NEUTRAL.get(name)):
            raise InputError(
                f"settings of generation: {name}={found[name]!r} has no effect here; known are "
                f"{', '.join(sorted(_SETTINGS))}"
            )
    if found["max_gen_toks"] < 1:
        raise InputError(f"settings of generation: max_gen_toks={found['max_gen_toks']}, but at least 1 is needed")
    return found


def _keys(kind: str, arguments: Sequence[Any]) -> list[str]:
    """A name of each request; those that ask the same are counted."""
    seen: Counter[str] = Counter()
    keys = []
    for argument in arguments:
        plain = key(kind, argument, 0)
        keys.append(key(kind, argument, seen[plain]))
        seen[plain] += 1
    return keys


def _mesh(text: str | None) -> dict[str, jax.sharding.Mesh]:
    if text is None:
        return {}
    return {"mesh": nemojax.make_mesh(text.replace(":", "=").replace(";", ","))}
