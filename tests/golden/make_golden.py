"""Writes the golden checkpoints and their references with transformers, from seeds.

    python tests/golden/make_golden.py                      # everything
    python tests/golden/make_golden.py nano demo            # some of it
    python tests/golden/make_golden.py --keep-weights demo  # references only, for the weights already there

Needs torch, transformers, tokenizers and safetensors (the parity environment); the tests that read the
results need none of them. Each `<case>/` is a Hugging Face directory and a `reference.npz`:

    tokens         int32 [B, T]
    logits         float32 [B, T, V]          transformers in float32, weights upcast, dt floor lifted
    hidden_states  float32 [layers, B, T, D]  residual stream after each layer, before norm_f (not in `demo`)
    greedy         int32 [B, N]               transformers' own cached loop, end-of-text ids switched off
    prompt         str                        `demo` and `tiny`: the text whose ids are `tokens`

Cases: `nano` and `dense` are float32 as transformers saves them (released names); `fused` holds the weights
of `nano` under the transformers 5 names, experts stacked, in shards; `super` is bfloat16 with float32
correction biases, LatentMoE, group-limited routing and a multi-token prediction block (which transformers
ignores: no reference here); `demo` is bfloat16, with a chat template and a tokenizer trained on the help texts
that come with Python 3.11; `tiny` is the trained model of `make demo` (experiments/nemotron_tiny), of which
only the reference is made here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "parity"))
import oracle

HERE = Path(__file__).resolve().parent
SEEDS = {"nano": 0, "dense": 0, "fused": 0, "super": 2, "demo": 31}
BATCH, LENGTH, NEW_TOKENS = 2, 37, 12  # 37 is two whole chunks of 16 and a part of one
# Below these a reordered float32 sum could pick another expert or token: the reference would not be one.
MIN_ROUTING_MARGIN, MIN_TOKEN_MARGIN = 1e-4, 1e-3

DEMO = {
    "pattern": "MEM*EMEM-E",
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 32,
    "chunk_size": 64,
    "intermediate_size": 256,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 88,
    "moe_shared_expert_intermediate_size": 176,
    "eos_token_id": [2, 11],
}
TINY = HERE.parents[1] / "experiments" / "nemotron_tiny"
TINY_PROMPT = '''def read_lines(path):
    """Return the lines of the file.'''
TINY_NEW_TOKENS = 64
DEMO_PROMPT_TOPIC, DEMO_PROMPT_START, DEMO_NEW_TOKENS = "while", "This repeatedly tests", 32
SPECIAL = {0: "<unk>", 1: "<s>", 2: "</s>", 9: "[TOOL_CALLS]", 10: "<|im_start|>", 11: "<|im_end|>"}
SPECIAL |= {12: "<think>", 13: "</think>"}
SPECIAL_TOKENS = [SPECIAL.get(i, f"<SPECIAL_{i}>") for i in range(14)]

CHAT_TEMPLATE = """\
{%- set has_system = messages and messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' + (messages[0].content if has_system else '') + '<|im_end|>\\n' -}}
{%- for message in (messages[1:] if has_system else messages) -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- if message.reasoning_content and loop.last -%}
      {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n' -}}
    {%- else -%}
      {{- '<think></think>' -}}
    {%- endif -%}
  {%- endif -%}
  {{- message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n<think>' + ('\\n' if enable_thinking | default(true) else '</think>') -}}
{%- endif -%}
"""


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save(model, directory: Path, **options) -> None:
    """`save_pretrained` into an emptied directory, without the traces of a run-time config."""
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, **options)
    for path in directory.iterdir():
        path.chmod(0o644)


def write_reference(
    directory: Path, tokens: np.ndarray, new_tokens: int, *, hidden: bool = True, target: Path | None = None, **extra
) -> None:
    """Runs transformers on what lies in `directory` and stores its answers; refuses a fragile reference."""
    model = oracle.load(directory)
    out = oracle.forward(model, tokens)
    greedy, token_margin = oracle.greedy(model, tokens, new_tokens)
    routing = oracle.routing(model, tokens)
    eos = np.atleast_1d(model.config.eos_token_id)
    facts = f"{directory.name}: logits std {out['logits'].std():.2f}, token margin {token_margin:.1e}, {routing}"
    if routing["margin"] < MIN_ROUTING_MARGIN or token_margin < MIN_TOKEN_MARGIN or np.isin(greedy, eos).any():
        raise SystemExit(f"{facts}: choose another seed or prompt")
    if not hidden:
        del out["hidden_states"]
    target = target or directory
    np.savez_compressed(target / "reference.npz", tokens=tokens.astype(np.int32), greedy=greedy, **out, **extra)
    print(f"{facts}, {sum(f.stat().st_size for f in target.iterdir() if f.is_file()) / 1e3:.0f} kB")


def random_tokens(case: str, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(SEEDS[case]).integers(3, vocab_size, (BATCH, LENGTH))


def make_plain(case: str, keep_weights: bool) -> None:
    """`nano`, `dense`: float32, the released names."""
    config = oracle.make_config(case)
    if not keep_weights:
        save(oracle.build(config, SEEDS[case]), HERE / case)
    write_reference(HERE / case, random_tokens(case, config.vocab_size), NEW_TOKENS)


def make_fused(case: str, keep_weights: bool) -> None:
    """`fused`: `nano` in the layout that transformers 5 has in memory, in shards."""
    config = oracle.make_config("nano")
    if not keep_weights:
        model = oracle.build(config, SEEDS[case])
        save(model, HERE / case, save_original_format=False, max_shard_size="64KB")
    write_reference(HERE / case, random_tokens(case, config.vocab_size), NEW_TOKENS)


def make_super(case: str, keep_weights: bool) -> None:
    """`super`: bfloat16, with the multi-token prediction tensors that transformers would drop."""
    config = oracle.make_config(case)
    if not keep_weights:
        save(oracle.build(config, SEEDS[case], torch.bfloat16), HERE / case)
        path = HERE / case / "model.safetensors"
        tensors = load_file(path)
        tensors |= mtp_tensors(config, tensors, SEEDS[case])
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)
    write_reference(HERE / case, random_tokens(case, config.vocab_size), NEW_TOKENS)


def mtp_tensors(config, backbone: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """A drawn `mtp.*` block "*E"; its layers have the shapes of the backbone's first ones of their kind."""
    h = config.hidden_size
    shapes = {"mtp.layers.0.enorm.weight": (h,), "mtp.layers.0.hnorm.weight": (h,)}
    shapes |= {"mtp.layers.0.eh_proj.weight": (h, 2 * h), "mtp.layers.1.final_layernorm.weight": (h,)}
    for inner, kind in enumerate(("full_attention", "moe")):
        prefix = f"backbone.layers.{config.layers_block_type.index(kind)}."
        for name, tensor in backbone.items():
            if name.startswith(prefix):
                shapes[f"mtp.layers.{inner}.{name.removeprefix(prefix)}"] = tuple(tensor.shape)
    drawn = {name: torch.from_numpy(oracle.draw(name, shape, seed)) for name, shape in shapes.items()}
    return {n: t if n.endswith("e_score_correction_bias") else t.bfloat16() for n, t in drawn.items()}


def help_texts() -> dict[str, str]:
    from pydoc_data.topics import topics

    return topics


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE of 1024 tokens that starts with Nemotron's special ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=DEMO["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(help_texts().values(), trainer)
    for i, token in enumerate(SPECIAL_TOKENS):
        if tokenizer.token_to_id(token) != i:
            raise SystemExit(f"{token} has id {tokenizer.token_to_id(token)}, expected {i}")
    return tokenizer


def write_tokenizer(directory: Path) -> None:
    train_tokenizer().save(str(directory / "tokenizer.json"), pretty=False)
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(i): {"content": t} | flags for i, t in enumerate(SPECIAL_TOKENS)},
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(directory / "tokenizer_config.json", settings)
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def demo_prompt(tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """A paragraph of prose from the help texts, and its ids."""
    paragraphs = help_texts()[DEMO_PROMPT_TOPIC].split("\n\n")
    text = next(p for p in paragraphs if p.startswith(DEMO_PROMPT_START))
    return text, tokenizer.encode(text).ids


def make_demo(case: str, keep_weights: bool) -> None:
    """`demo`: bfloat16, released names, with everything a chat needs beside the weights."""
    directory = HERE / case
    if not keep_weights:
        model = oracle.build(oracle.make_config("nano", **DEMO), SEEDS[case], torch.bfloat16)
        model.generation_config.update(bos_token_id=1, eos_token_id=[2, 11], pad_token_id=0)
        save(model, directory)
        write_tokenizer(directory)
        settings = {"bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 11], "pad_token_id": 0}
        write_json(directory / "generation_config.json", settings | {"temperature": 1.0, "top_p": 1.0})
    prompt, ids = demo_prompt(Tokenizer.from_file(str(directory / "tokenizer.json")))
    write_reference(directory, np.array([ids]), DEMO_NEW_TOKENS, hidden=False, prompt=np.array(prompt))


def make_tiny(case: str, keep_weights: bool) -> None:
    """`tiny`: the reference of the trained model; its weights are made by experiments.train."""
    del case, keep_weights
    ids = Tokenizer.from_file(str(TINY / "model" / "tokenizer.json")).encode(TINY_PROMPT).ids
    write_reference(
        TINY / "model", np.array([ids]), TINY_NEW_TOKENS, hidden=False, target=TINY, prompt=np.array(TINY_PROMPT)
    )


MAKERS = {
    "nano": make_plain,
    "dense": make_plain,
    "fused": make_fused,
    "super": make_super,
    "demo": make_demo,
    "tiny": make_tiny,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", choices=[*MAKERS, []], help="default: all")
    parser.add_argument("--keep-weights", action="store_true", help="only write reference.npz anew")
    arguments = parser.parse_args()
    for case in arguments.cases or MAKERS:
        MAKERS[case](case, arguments.keep_weights)


if __name__ == "__main__":
    main()
