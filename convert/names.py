"""THE table of names: every parameter of ours and the Hugging Face tensor(s) it corresponds to, both directions.

A rule gives the tensor's name below its layer and an einops pattern from our leaf to that tensor; read from right to
left the same rule converts back. Nothing but the order of elements changes, so a round trip is exact in every bit.

Two layouts exist. `released` is what every published checkpoint has: prefix `backbone.`, one tensor an expert. `fused`
is what transformers 5 holds in memory: prefix `model.`, the experts of a layer stacked in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import numpy as np
from einops import parse_shape, rearrange

from nemojax.config import Config
from nemojax.errors import InputError
from nemojax.specs import ParamSpec, flatten, model_specs

LAYOUTS = {"released": "backbone", "fused": "model"}


@dataclass(frozen=True)
class Rule:
    """How one leaf is written in Hugging Face's layout.

    Attributes:
      name: tensor name below the layer; `{expert}` where the leaf is split over its first axis.
      pattern: einops pattern from the leaf (of one expert, where split) to the tensor.
      parts: row counts that the second axis of the leaf consists of in every group; the tensor has each part of all
        groups together instead ([z | x | B | C | dt], not group by group). None where there is nothing to regroup.
    """

    name: str
    pattern: str
    parts: Callable[[Config], tuple[int, ...]] | None = None

    @property
    def per_expert(self) -> bool:
        """Whether the leaf is one tensor an expert in the released layout."""
        return "{expert}" in self.name

    def tensor_shape(self, leaf: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor that a leaf of this shape becomes."""
        abstract = jax.ShapeDtypeStruct(leaf, np.uint8)
        return jax.eval_shape(lambda a: rearrange(a, self.pattern), abstract).shape

    def to_tensor(self, leaf: np.ndarray, config: Config) -> np.ndarray:
        """Leaf (of one expert, where split) -> tensor."""
        if self.parts is None:
            return rearrange(leaf, self.pattern)
        cuts = np.cumsum(self.parts(config))[:-1]
        return np.concatenate([rearrange(part, self.pattern) for part in np.split(leaf, cuts, axis=1)])

    def to_leaf(self, tensor: np.ndarray, shape: tuple[int, ...], config: Config) -> np.ndarray:
        """Tensor -> leaf of the given shape (of one expert, where split)."""
        left, right = self.pattern.split("->")
        inverse = f"{right}->{left}"
        axes = parse_shape(np.broadcast_to(np.uint8(0), shape), left)
        if self.parts is None:
            return rearrange(tensor, inverse, **axes)
        groups, axis = shape[0], left.split()[1]
        cuts = np.cumsum(self.parts(config))[:-1] * groups
        sizes = self.parts(config)
        return np.concatenate(
            [
                rearrange(part, inverse, **(axes | {axis: size}))
                for part, size in zip(np.split(tensor, cuts), sizes, strict=True)
            ],
            axis=1,
        )


def _conv_parts(config: Config) -> tuple[int, ...]:
    return config.mamba_inner // config.n_groups, config.ssm_state_size, config.ssm_state_size


def _in_proj_parts(config: Config) -> tuple[int, ...]:
    inner, *states = _conv_parts(config)
    return inner, inner, *states, config.mamba_heads_per_group


_SAME = "a b -> a b"
_VECTOR = "a -> a"

MIXER_RULES: dict[str, dict[str, Rule]] = {
    "M": {
        "in_proj": Rule("in_proj.weight", "g r d -> (g r) d", _in_proj_parts),
        "conv_weight": Rule("conv1d.weight", "g c w -> (g c) 1 w", _conv_parts),
        "conv_bias": Rule("conv1d.bias", "g c -> (g c)", _conv_parts),
        "A_log": Rule("A_log", "g h -> (g h)"),
        "D": Rule("D", "g h -> (g h)"),
        "dt_bias": Rule("dt_bias", "g h -> (g h)"),
        "norm": Rule("norm.weight", "g i -> (g i)"),
        "out_proj": Rule("out_proj.weight", "d g i -> d (g i)"),
    },
    "*": {
        "q_proj": Rule("q_proj.weight", "h p d -> (h p) d"),
        "k_proj": Rule("k_proj.weight", "g p d -> (g p) d"),
        "v_proj": Rule("v_proj.weight", "g p d -> (g p) d"),
        "o_proj": Rule("o_proj.weight", "d h p -> d (h p)"),
    },
    "-": {
        "up_proj": Rule("up_proj.weight", "f d -> f d"),
        "down_proj": Rule("down_proj.weight", "f d -> d f"),
    },
    "E": {
        "gate": Rule("gate.weight", _SAME),
        "correction_bias": Rule("gate.e_score_correction_bias", _VECTOR),
        "experts_up_proj": Rule("experts.{expert}.up_proj.weight", "f l -> f l"),
        "experts_down_proj": Rule("experts.{expert}.down_proj.weight", "f l -> l f"),
        "shared_up_proj": Rule("shared_experts.up_proj.weight", "f d -> f d"),
        "shared_down_proj": Rule("shared_experts.down_proj.weight", "f d -> d f"),
        "latent_in_proj": Rule("fc1_latent_proj.weight", _SAME),
        "latent_out_proj": Rule("fc2_latent_proj.weight", _SAME),
    },
}
# Leaves outside the layers. `{backbone}` is the layout's prefix.
_TOP_RULES = {
    "embed": Rule("{backbone}.embeddings.weight", _SAME),
    "norm_f": Rule("{backbone}.norm_f.weight", _VECTOR),
    "lm_head": Rule("lm_head.weight", _SAME),
    # The block before its first layer and after its last one, as the released checkpoints number it.
    "mtp/enorm": Rule("mtp.layers.0.enorm.weight", _VECTOR),
    "mtp/hnorm": Rule("mtp.layers.0.hnorm.weight", _VECTOR),
    "mtp/eh_proj": Rule("mtp.layers.0.eh_proj.weight", _SAME),
    "mtp/final_layernorm": Rule("mtp.layers.{last}.final_layernorm.weight", _VECTOR),
}
_NORM_RULE = Rule("norm.weight", _VECTOR)
# Spellings of very old checkpoints -> the released one.
_OLD_NAMES = {"backbone.embedding.weight": "backbone.embeddings.weight"}


@dataclass(frozen=True)
class Entry:
    """One leaf and the tensors it is made of.

    Attributes:
      leaf: path in our tree. spec: its declaration. rule: the conversion.
      tensors: names in the released or fused layout, in order of the leaf's first axis where there are several.
      stacked: whether one tensor holds all experts (fused layout).
      shape: shape of each tensor.
    """

    leaf: str
    spec: ParamSpec
    rule: Rule
    tensors: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]


def entries(config: Config, layout: str = "released") -> list[Entry]:
    """Every leaf of a model and its tensors, in the order of the tree."""
    return [
        _entry(config, leaf, spec, LAYOUTS[layout], layout == "fused") for leaf, spec in flatten(model_specs(config))
    ]


def _entry(config: Config, leaf: str, spec: ParamSpec, prefix: str, fused: bool) -> Entry:
    rule = _rule(config, leaf)
    name = _scope(config, leaf, prefix) + rule.name.replace("{backbone}", prefix)
    name = name.replace("{last}", str(len(config.mtp_pattern) - 1))
    if not rule.per_expert:
        return Entry(leaf, spec, rule, (name,), False, rule.tensor_shape(spec.shape))
    shape = rule.tensor_shape(spec.shape[1:])
    if fused:
        whole = name.replace("{expert}.", "").removesuffix(".weight")
        return Entry(leaf, spec, rule, (whole,), True, (spec.shape[0], *shape))
    names = tuple(name.replace("{expert}", str(e)) for e in range(spec.shape[0]))
    return Entry(leaf, spec, rule, names, False, shape)


def _layer(leaf: str) -> tuple[bool, int] | None:
    """Whether the leaf belongs to a layer of the MTP block, and the layer's index; None outside layers."""
    in_mtp, parts = leaf.startswith("mtp/"), leaf.removeprefix("mtp/").split("/")
    return (in_mtp, int(parts[0].removeprefix("layers_"))) if parts[0].startswith("layers_") else None


def _rule(config: Config, leaf: str) -> Rule:
    layer = _layer(leaf)
    if layer is None:
        return _TOP_RULES[leaf]
    in_mtp, index = layer
    name = leaf.rsplit("/", 1)[1]
    if "/mixer/" not in leaf:
        return _NORM_RULE
    return MIXER_RULES[(config.mtp_pattern if in_mtp else config.pattern)[index]][name]


def _scope(config: Config, leaf: str, prefix: str) -> str:
    layer = _layer(leaf)
    if layer is None:
        return ""
    in_mtp, index = layer
    root = "mtp" if in_mtp else prefix
    return f"{root}.layers.{index}." + ("mixer." if "/mixer/" in leaf else "")


def match(config: Config, names: Iterable[str]) -> tuple[list[Entry], list[str], list[str]]:
    """Finds the layout of a checkpoint, leaf by leaf.

    Args:
      config: the model's configuration. names: the checkpoint's tensor names.

    Returns:
      The entries (with the checkpoint's own names), the names that are missing, and those that no rule uses.
    """
    names = list(names)
    old = {name: new for name, new in _OLD_NAMES.items() if new not in names}  # both: one of them is left over
    present = {old.get(name, name): name for name in names}
    layout = "fused" if any(name.startswith("model.") for name in present) else "released"
    found, missing, used = [], [], set()
    for leaf, spec in flatten(model_specs(config)):
        forms = [_entry(config, leaf, spec, LAYOUTS[layout], fused) for fused in (layout == "fused", layout != "fused")]
        entry = next((e for e in forms if e.tensors[0] in present), forms[0])
        missing += [name for name in entry.tensors if name not in present]
        used |= set(entry.tensors)
        found.append(
            Entry(leaf, spec, entry.rule, tuple(present.get(n, n) for n in entry.tensors), entry.stacked, entry.shape)
        )
    extra = [original for name, original in present.items() if name not in used]
    return found, missing, extra


def require(config: Config, names: Iterable[str], where: str) -> list[Entry]:
    """Like `match`, but every name must be there and every tensor must be used.

    Raises:
      InputError: names the first few missing or unused tensors.
    """
    found, missing, extra = match(config, names)
    if missing:
        advice = f"correct its config.json ({config.num_layers} layers, pattern {config.pattern})"
        if all(name.startswith("mtp.") for name in missing):
            advice = "set num_nextn_predict_layers to 0 in its config.json to do without multi-token prediction"
        raise InputError(
            f"{where}: {len(missing)} tensors are missing, first {_some(missing)}; download the checkpoint again, or "
            f"{advice}"
        )
    if extra:
        advice = (
            "the config.json does not describe this checkpoint, or it is of a kind that is not supported (quantised, "
            "adapters, other layers)"
        )
        if config.tie_word_embeddings and extra == ["lm_head.weight"]:
            advice = "set tie_word_embeddings to false in its config.json to use it, or remove it from the checkpoint"
        raise InputError(f"{where}: {len(extra)} tensors are not part of this model, first {_some(extra)}; {advice}")
    return found


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(sorted(names)[:count])
