"""The transformers side of the parity tests: small Nemotron-H models in which every parameter matters.

Weights are drawn by NumPy from the seed and the tensor's name, so that they do not depend on the torch
version or on the order of the modules. Nothing starts at a neutral value (norm weight 1, bias 0, D 1): a
parameter that is dropped, transposed or applied twice changes the logits.
"""

from __future__ import annotations

import os
import zlib
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import GenerationConfig, NemotronHConfig, NemotronHForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
# The models are tiny: a second thread costs more than it gives, and one thread makes sums reproducible.
torch.set_num_threads(1)

TYPES = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}

_COMMON = {
    "conv_kernel": 4,
    "chunk_size": 16,
    "expand": 2,
    "n_groups": 2,
    "ssm_state_size": 8,
    "max_position_embeddings": 4096,
    "intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.5,
}

# Sizes are pairwise different where the model allows it, so that two exchanged axes cannot go unnoticed.
CASES = {
    "nano": {
        "pattern": "MEM*E",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_num_heads": 6,
        "mamba_head_dim": 8,
        "moe_intermediate_size": 14,
        "moe_shared_expert_intermediate_size": 28,
    },
    "dense": {
        "pattern": "M-*M-",
        "vocab_size": 72,
        "hidden_size": 40,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 12,
        "intermediate_size": 56,
    },
    "super": {
        "pattern": "MEM*E",
        "vocab_size": 80,
        "hidden_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 6,
        "n_groups": 4,
        "n_routed_experts": 12,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 24,
        "moe_latent_size": 20,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 5.0,
        "num_nextn_predict_layers": 1,
    },
}


def make_config(case: str, **changes) -> NemotronHConfig:
    """The transformers config of a case, with some keys replaced."""
    fields = _COMMON | CASES[case] | changes
    pattern = fields.pop("pattern")
    return NemotronHConfig(layers_block_type=[TYPES[letter] for letter in pattern], **fields)


def draw(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 values for the named tensor, scaled so that every layer adds to the residual on equal terms."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    normal = rng.standard_normal(shape)
    module, _, leaf = name.removesuffix(".weight").rpartition(".")
    if leaf == "e_score_correction_bias":
        values = 0.2 * normal
    elif leaf == "A_log":
        values = np.log(rng.uniform(0.5, 8.0, shape))
    elif leaf == "D":
        values = 0.3 * normal  # small, else the skip hides the state
    elif leaf == "dt_bias":
        # Heads from 1e-4, far below the 1e-3 where a wrong clamp would hold dt, up to a fast head.
        dt = rng.permutation(np.geomspace(1e-4, 0.5, shape[0]))
        values = np.log(np.expm1(dt))
    elif leaf == "conv1d":
        values = 0.5 * normal
    elif leaf == "bias":
        values = 0.3 * normal
    elif leaf.endswith("norm") or leaf == "norm_f":
        values = rng.uniform(0.5, 1.5, shape)
    else:
        gain = {"embeddings": shape[-1] ** 0.5, "gate": 2.0, "lm_head": 3.0}.get(leaf, 1.0)
        values = gain * normal * shape[-1] ** -0.5
    return values.astype(np.float32)


def lift_dt_floor(model: torch.nn.Module) -> None:
    """Makes the prefill path of transformers obey `config.time_step_limit`, (0, inf) in these models.

    transformers 5.23 clamps dt to at least `time_step_min` (0.001) in the chunked path and not in the cached
    one-token path: `time_step_min` is meant for initialisation only, and neither the released remote code nor
    Megatron clamps there. Without this the oracle contradicts itself.
    """
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))


def build(config: NemotronHConfig, seed: int, dtype: torch.dtype = torch.float32) -> NemotronHForCausalLM:
    """A model with drawn weights; the correction biases stay float32 in any `dtype`, as in the releases."""
    model = NemotronHForCausalLM._from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(torch.from_numpy(draw(name, tuple(tensor.shape), seed)))
    cast(model, dtype)
    lift_dt_floor(model)
    return model.eval()


def cast(model: NemotronHForCausalLM, dtype: torch.dtype) -> None:
    """Casts in place, all but the correction biases."""
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    model.to(dtype)
    for name, bias in biases.items():
        model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = bias


def load(path: Path, dtype: torch.dtype = torch.float32) -> NemotronHForCausalLM:
    """Loads a directory with transformers; fails on any missing, unexpected or mismatched tensor."""
    model, report = NemotronHForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
    )
    problems = {key: value for key, value in report.items() if value}
    if problems:
        raise AssertionError(f"{path}: {problems}")
    lift_dt_floor(model)
    return model.eval()


@contextmanager
def _outputs_of(modules: dict[str, torch.nn.Module]):
    seen: dict[str, list] = {name: [] for name in modules}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: seen[name].append(out))
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def forward(model: NemotronHForCausalLM, tokens: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Logits [B, T, V] and the residual stream after each layer [layers, B, T, D], both float32, no cache."""
    blocks = {str(i): block for i, block in enumerate(model.model.layers)}
    with _outputs_of(blocks) as seen:
        out = model(
            input_ids=torch.from_numpy(np.asarray(tokens, np.int64)),
            attention_mask=None if mask is None else torch.from_numpy(np.asarray(mask, np.int64)),
            use_cache=False,
        )
    hidden = [seen[name][0].float().numpy() for name in blocks]
    return {"logits": out.logits.float().numpy(), "hidden_states": np.stack(hidden)}


@torch.no_grad()
def greedy(
    model: NemotronHForCausalLM, tokens: np.ndarray, count: int, mask: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """`count` new tokens by transformers' own cached loop, int32 [B, count], and the smallest top-1 margin.

    The end-of-text ids are switched off, so that rows never end early.
    """
    tokens = np.asarray(tokens, np.int64)
    mask = np.ones_like(tokens) if mask is None else np.asarray(mask, np.int64)
    settings = GenerationConfig(
        max_new_tokens=count, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    saved, model.generation_config = model.generation_config, settings
    try:
        out = model.generate(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(mask),
            output_logits=True,
            return_dict_in_generate=True,
        )
    finally:
        model.generation_config = saved
    top = torch.stack(out.logits).float().topk(2, dim=-1).values
    margin = float((top[..., 0] - top[..., 1]).min())
    return out.sequences[:, tokens.shape[1] :].numpy().astype(np.int32), margin


@torch.no_grad()
def routing(model: NemotronHForCausalLM, tokens: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float]:
    """How safe and how varied the routing is, in the worst layer: the smallest `margin` by which an expert
    (or a group) beat the next, the share of experts `used`, the share of tokens `moved` by the bias."""
    routers = {n: m for n, m in model.named_modules() if n.endswith("mixer.gate")}
    with _outputs_of(routers) as seen:
        forward(model, tokens, mask)
    keep = np.ones(np.asarray(tokens).size, bool) if mask is None else np.asarray(mask, bool).reshape(-1)
    margins, used, moved = [np.inf], [], []
    for name, router in routers.items():
        scores = seen[name][0][0].float().sigmoid()[torch.from_numpy(keep)]
        chosen = seen[name][0][2][torch.from_numpy(keep)]
        choice = scores + router.e_score_correction_bias
        groups = choice.view(len(choice), router.num_group, -1)
        if router.topk_group < router.num_group:
            ranked = groups.topk(2, dim=-1).values.sum(-1).sort(descending=True).values
            margins.append(float((ranked[:, router.topk_group - 1] - ranked[:, router.topk_group]).min()))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(router.topk_group, dim=-1).indices
        allowed = torch.zeros_like(groups).scatter_(1, best[..., None].expand(-1, -1, groups.shape[-1]), 1.0)
        ranked = choice.masked_fill(allowed.view_as(choice) == 0, -torch.inf).sort(descending=True).values
        margins.append(float((ranked[:, router.top_k - 1] - ranked[:, router.top_k]).min()))
        used.append(len(chosen.unique()) / router.num_experts)
        unbiased = scores.topk(router.top_k, dim=-1).indices.sort().values
        moved.append(float((unbiased != chosen.sort().values).any(-1).float().mean()))
    return {"margin": min(margins), "used": min(used, default=1.0), "moved": min(moved, default=1.0)}


def distance(found: np.ndarray, expected: np.ndarray, floor: float = 0.0) -> float:
    """Largest difference, as a share of the largest expected magnitude (or of `floor` if that is larger)."""
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), floor))
