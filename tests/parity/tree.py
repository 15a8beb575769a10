"""nemojax's parameter tree <-> the names and shapes inside transformers' `NemotronHForCausalLM`.

Written for the tests, from the two layouts alone, and not through `convert`: a mistake in the product's name
table cannot cancel against itself here. Works on values and on gradients alike. No multi-token prediction:
transformers has none.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Tree = Mapping[str, object]


def layer_name(index: int) -> str:
    return f"layers_{index:02d}"


def _gather(rows: np.ndarray, groups: int, sizes: list[int]) -> np.ndarray:
    """[sum(G * s), ...], one part after the other -> [G, sum(s), ...], one group after the other."""
    parts = np.split(rows, np.cumsum([groups * s for s in sizes])[:-1])
    return np.concatenate([p.reshape(groups, s, *p.shape[1:]) for p, s in zip(parts, sizes, strict=True)], axis=1)


def _scatter(grouped: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Inverse of `_gather`."""
    parts = np.split(grouped, np.cumsum(sizes)[:-1], axis=1)
    return np.concatenate([p.reshape(-1, *p.shape[2:]) for p in parts])


def _mamba_sizes(config) -> tuple[int, list[int], list[int]]:
    """Groups, and the parts of one group in the convolution (x, B, C) and in `in_proj` (z, x, B, C, dt)."""
    heads = config.mamba_num_heads // config.n_groups
    conv = [heads * config.mamba_head_dim, config.ssm_state_size, config.ssm_state_size]
    return config.n_groups, conv, [conv[0], *conv, heads]


def _mamba_to_torch(p: Tree, config) -> dict[str, np.ndarray]:
    _, conv, projection = _mamba_sizes(config)
    return {
        "in_proj.weight": _scatter(p["in_proj"], projection),
        "conv1d.weight": _scatter(p["conv_weight"], conv)[:, None],
        "conv1d.bias": _scatter(p["conv_bias"], conv),
        **{name: p[name].reshape(-1) for name in ("A_log", "D", "dt_bias")},
        "norm.weight": p["norm"].reshape(-1),
        "out_proj.weight": p["out_proj"].reshape(len(p["out_proj"]), -1),
    }


def _mamba_from_torch(p: Mapping[str, np.ndarray], config) -> dict[str, np.ndarray]:
    groups, conv, projection = _mamba_sizes(config)
    return {
        "in_proj": _gather(p["in_proj.weight"], groups, projection),
        "conv_weight": _gather(p["conv1d.weight"][:, 0], groups, conv),
        "conv_bias": _gather(p["conv1d.bias"], groups, conv),
        **{name: p[name].reshape(groups, -1) for name in ("A_log", "D", "dt_bias")},
        "norm": p["norm.weight"].reshape(groups, -1),
        "out_proj": p["out_proj.weight"].reshape(len(p["out_proj.weight"]), groups, -1),
    }


def _attention_to_torch(p: Tree, config) -> dict[str, np.ndarray]:
    width = config.hidden_size
    out = {f"{name}.weight": p[name].reshape(-1, width) for name in ("q_proj", "k_proj", "v_proj")}
    return out | {"o_proj.weight": p["o_proj"].reshape(width, -1)}


def _attention_from_torch(p: Mapping[str, np.ndarray], config) -> dict[str, np.ndarray]:
    width, head = config.hidden_size, config.head_dim
    out = {name: p[f"{name}.weight"].reshape(-1, head, width) for name in ("q_proj", "k_proj", "v_proj")}
    return out | {"o_proj": p["o_proj.weight"].reshape(width, -1, head)}


def _mlp_to_torch(p: Tree, config) -> dict[str, np.ndarray]:
    return {"up_proj.weight": p["up_proj"], "down_proj.weight": p["down_proj"].T}


def _mlp_from_torch(p: Mapping[str, np.ndarray], config) -> dict[str, np.ndarray]:
    return {"up_proj": p["up_proj.weight"], "down_proj": p["down_proj.weight"].T}


# ours -> transformers, and whether the last two axes change places
_MOE = {
    "gate": ("gate.weight", False),
    "correction_bias": ("gate.e_score_correction_bias", False),
    "experts_up_proj": ("experts.up_proj", False),
    "experts_down_proj": ("experts.down_proj", True),
    "shared_up_proj": ("shared_experts.up_proj.weight", False),
    "shared_down_proj": ("shared_experts.down_proj.weight", True),
    "latent_in_proj": ("fc1_latent_proj.weight", False),
    "latent_out_proj": ("fc2_latent_proj.weight", False),
}


def _moe_to_torch(p: Tree, config) -> dict[str, np.ndarray]:
    return {_MOE[n][0]: np.swapaxes(v, -1, -2) if _MOE[n][1] else v for n, v in p.items()}


def _moe_from_torch(p: Mapping[str, np.ndarray], config) -> dict[str, np.ndarray]:
    ours = {theirs: (name, swap) for name, (theirs, swap) in _MOE.items()}
    return {ours[n][0]: np.swapaxes(v, -1, -2) if ours[n][1] else v for n, v in p.items()}


_TO_TORCH = {"M": _mamba_to_torch, "*": _attention_to_torch, "-": _mlp_to_torch, "E": _moe_to_torch}
_FROM_TORCH = {"M": _mamba_from_torch, "*": _attention_from_torch, "-": _mlp_from_torch, "E": _moe_from_torch}


def mixer_to_torch(mixer: Tree, kind: str, config) -> dict[str, np.ndarray]:
    """Leaves of one mixer by transformers' names inside the mixer; a leaf too many fails here by its name."""
    mixer = {name: np.asarray(value) for name, value in mixer.items()}
    out = _TO_TORCH[kind](mixer, config)
    assert sum(v.size for v in out.values()) == sum(v.size for v in mixer.values()), sorted(mixer)
    return out


def mixer_from_torch(mixer: Mapping[str, np.ndarray], kind: str, config) -> dict[str, np.ndarray]:
    """Inverse of `mixer_to_torch`, C-contiguous."""
    return {n: np.ascontiguousarray(v) for n, v in _FROM_TORCH[kind](mixer, config).items()}


def to_torch(params: Tree, config) -> dict[str, np.ndarray]:
    """The whole tree by the names of `NemotronHForCausalLM.state_dict()`. `config` is nemojax's."""
    out = {"model.embeddings.weight": params["embed"], "model.norm_f.weight": params["norm_f"]}
    out["lm_head.weight"] = params["lm_head"]
    for index, kind in enumerate(config.pattern):
        layer, prefix = params[layer_name(index)], f"model.layers.{index}"
        out[f"{prefix}.norm.weight"] = layer["norm"]
        for name, value in mixer_to_torch(layer["mixer"], kind, config).items():
            out[f"{prefix}.mixer.{name}"] = value
    return {name: np.asarray(value) for name, value in out.items()}


def from_torch(state: Mapping[str, np.ndarray], config) -> dict[str, object]:
    """Inverse of `to_torch`: every tensor must find its place."""
    rest = {name.removeprefix("model."): value for name, value in state.items()}
    params: dict[str, object] = {"embed": rest.pop("embeddings.weight"), "norm_f": rest.pop("norm_f.weight")}
    params["lm_head"] = rest.pop("lm_head.weight")
    for index, kind in enumerate(config.pattern):
        norm, prefix = rest.pop(f"layers.{index}.norm.weight"), f"layers.{index}.mixer."
        names = [name for name in rest if name.startswith(prefix)]
        mixer = {name.removeprefix(prefix): rest.pop(name) for name in names}
        params[layer_name(index)] = {"norm": norm, "mixer": mixer_from_torch(mixer, kind, config)}
    assert not rest, sorted(rest)
    return params
