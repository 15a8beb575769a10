"""Reference forward pass of Nemotron-H / Nemotron 3 in plain NumPy float64: slow, literal, one document.

A second oracle for the tests, next to transformers (which has no forward pass for multi-token prediction and
clamps dt wrongly). It imports no nemojax code. Weights go by their released names, `backbone.*`,
`lm_head.weight` and `mtp.*`, in any float dtype, with the linear layout [out, in].

Dimension key: B batch, T tokens, D model, H heads, P head dim, N state, G groups, E experts, F expert width,
K top-k. Further: V vocabulary, L latent width, I = H*P Mamba channels, C = I + 2*G*N convolved channels.
"""

import numpy as np

Tensors = dict[str, np.ndarray]
KIND_OF_SYMBOL = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
KIND_OF_NEW_NAME = {"linear_attention": "mamba", "full_attention": "attention"}


def layer_kinds(pattern: str | list[str]) -> list[str]:
    """Layer kinds from a pattern string ("ME*-") or a list of type names, old or new."""
    if isinstance(pattern, str):
        return [KIND_OF_SYMBOL[symbol] for symbol in pattern]
    kinds = [KIND_OF_NEW_NAME.get(name, name) for name in pattern]
    if unknown := set(kinds) - set(KIND_OF_SYMBOL.values()):
        raise ValueError(f"unknown layer types {sorted(unknown)}")
    return kinds


def refuse_unsupported(config: dict) -> None:
    """Raise on options no released model uses: an oracle must not silently compute something else."""
    for key in ("use_bias", "mlp_bias", "attention_bias", "mamba_proj_bias", "sliding_window"):
        if config.get(key):
            raise ValueError(f"{key}={config[key]!r} is not covered by the reference")
    for key, expected in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu"), ("n_shared_experts", 1)):
        if config.get(key, expected) != expected:
            raise ValueError(f"{key}={config[key]!r} is not covered by the reference, only {expected!r}")


def time_step_limit(config: dict) -> tuple[float, float]:
    """(low, high) clamp of dt; (0, inf) when absent. transformers writes inf as {"__float__": "Infinity"}."""
    low, high = config.get("time_step_limit") or (0.0, np.inf)
    return tuple(float(v["__float__"] if isinstance(v, dict) else v) for v in (low, high))


def f64(tensors: Tensors, name: str) -> np.ndarray:
    """The named tensor in float64."""
    return np.asarray(tensors[name]).astype(np.float64)


def linear(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    """[..., in] -> [..., out]: x W^T. No linear layer of a released model has a bias."""
    return x @ f64(tensors, f"{name}.weight").T


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), through log(1 + exp(-x)) so that large |x| cannot overflow."""
    return np.exp(-np.logaddexp(0.0, -x))


def silu(x: np.ndarray) -> np.ndarray:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x))."""
    return np.logaddexp(0.0, x)


def normalise(config: dict, x: np.ndarray) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) over the last axis; no weight."""
    eps = config["layer_norm_epsilon"] if "layer_norm_epsilon" in config else config["norm_eps"]
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def rms_norm(config: dict, tensors: Tensors, prefix: str, x: np.ndarray) -> np.ndarray:
    """[T, D] -> [T, D]: x / sqrt(mean(x^2) + eps) * weight, with `{prefix}.weight` [D]."""
    return normalise(config, x) * f64(tensors, f"{prefix}.weight")


def causal_conv(config: dict, tensors: Tensors, prefix: str, x: np.ndarray) -> np.ndarray:
    """[T, C] -> [T, C]: silu(bias + sum_j w[:, j] x[t - (k-1) + j]); the last tap meets the current token."""
    kernel = config["conv_kernel"]
    w = f64(tensors, f"{prefix}.weight")  # [C, 1, k], depthwise
    out = np.zeros_like(x)
    for t in range(len(x)):
        for j in range(kernel):
            source = t - (kernel - 1) + j
            if source >= 0:  # before the document there are zeros
                out[t] += w[:, 0, j] * x[source]
    if config.get("use_conv_bias", True):
        out += f64(tensors, f"{prefix}.bias")
    return silu(out)


def ssm_recurrence(
    x: np.ndarray, dt: np.ndarray, A: np.ndarray, b: np.ndarray, c: np.ndarray, skip: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Token-by-token state space: S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t ; y_t = S_t C_t + D x_t.

    x [T, H, P], dt [T, H], A [H], b and c [T, G, N], skip (the D) [H] -> y [T, H, P], final state [H, P, N].
    """
    (T, H, P), (_, G, N) = x.shape, b.shape
    state = np.zeros((H, P, N))
    y = np.zeros((T, H, P))
    for t in range(T):
        for h in range(H):
            g = h // (H // G)  # consecutive heads share one B and C
            state[h] = np.exp(dt[t, h] * A[h]) * state[h] + dt[t, h] * np.outer(x[t, h], b[t, g])
            y[t, h] = state[h] @ c[t, g] + skip[h] * x[t, h]
    return y, state


def mamba2_mixer(config: dict, tensors: Tensors, prefix: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[T, D] -> out [T, D], final SSM state [H, P, N].

    [z | xBC | dt] = in_proj(x); [x | B | C] = silu(conv(xBC)); dt = clamp(softplus(dt + dt_bias));
    A = -exp(A_log); y = recurrence; out = out_proj(RMSNorm_per_group(y * silu(z)) * weight).
    """
    T = len(x)
    H, P = config["mamba_num_heads"], config["mamba_head_dim"]
    G, N = config["n_groups"], config["ssm_state_size"]
    inner = H * P  # `expand` is ignored: the released values do not agree with it
    z, xbc, dt = np.split(linear(tensors, f"{prefix}.in_proj", x), [inner, 2 * inner + 2 * G * N], axis=1)
    xbc = causal_conv(config, tensors, f"{prefix}.conv1d", xbc)
    u, b, c = np.split(xbc, [inner, inner + G * N], axis=1)
    dt = np.clip(softplus(dt + f64(tensors, f"{prefix}.dt_bias")), *time_step_limit(config))
    y, state = ssm_recurrence(
        u.reshape(T, H, P),
        dt,
        -np.exp(f64(tensors, f"{prefix}.A_log")),
        b.reshape(T, G, N),
        c.reshape(T, G, N),
        f64(tensors, f"{prefix}.D"),
    )
    y = y.reshape(T, inner) * silu(z)  # the gate comes before the norm
    y = normalise(config, y.reshape(T, G, inner // G)).reshape(T, inner)
    return linear(tensors, f"{prefix}.out_proj", y * f64(tensors, f"{prefix}.norm.weight")), state


def attention_mixer(config: dict, tensors: Tensors, prefix: str, x: np.ndarray) -> np.ndarray:
    """[T, D] -> [T, D]: o_proj(softmax(q k^T / sqrt(P) + causal mask) v), grouped queries.

    No positional encoding: the rope_* keys of the configs are unused.
    """
    T = len(x)
    H, kv_heads, P = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    q = linear(tensors, f"{prefix}.q_proj", x).reshape(T, H, P)
    k = linear(tensors, f"{prefix}.k_proj", x).reshape(T, kv_heads, P)
    v = linear(tensors, f"{prefix}.v_proj", x).reshape(T, kv_heads, P)
    mixed = np.zeros((T, H, P))
    for h in range(H):
        g = h // (H // kv_heads)  # consecutive query heads share one key/value head
        scores = q[:, h] @ k[:, g].T / np.sqrt(P)  # [T query, T key]
        scores[np.triu(np.ones((T, T), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
        mixed[:, h] = weights / weights.sum(axis=1, keepdims=True) @ v[:, g]
    return linear(tensors, f"{prefix}.o_proj", mixed.reshape(T, H * P))


def top_k(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest values, largest first; among equals the lower index first."""
    return np.argsort(-values, kind="stable")[:k]


def router(config: dict, tensors: Tensors, prefix: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[T, D] -> ids [T, K], weights [T, K]: s = sigmoid(gate(x)); choose top-k of s + bias; weigh by s alone.

    Group limit: a group scores the sum of its two best choices; experts outside the `topk_group` best groups
    cannot be chosen. w = s[ids] / (sum s[ids] + 1e-20) * routed_scaling_factor.
    """
    K, n_group = config["num_experts_per_tok"], config.get("n_group", 1)
    scores = sigmoid(linear(tensors, prefix, x))
    choice = scores + f64(tensors, f"{prefix}.e_score_correction_bias")
    ids = np.zeros((len(x), K), np.int64)
    weights = np.zeros((len(x), K))
    for t in range(len(x)):
        groups = choice[t].reshape(n_group, -1)
        group_scores = np.sort(groups, axis=1)[:, -2:].sum(axis=1)
        # -inf rather than 0: a bias may make an admitted choice negative, and a masked expert must not win.
        limited = np.full_like(groups, -np.inf)
        for g in top_k(group_scores, config.get("topk_group", 1)):
            limited[g] = groups[g]
        ids[t] = top_k(limited.reshape(-1), K)
        weights[t] = scores[t, ids[t]]
        if config.get("norm_topk_prob", True):
            weights[t] /= weights[t].sum() + 1e-20
    return ids, weights * config["routed_scaling_factor"]


def mlp_mixer(config: dict, tensors: Tensors, prefix: str, x: np.ndarray) -> np.ndarray:
    """[T, D] -> [T, D]: down_proj(relu(up_proj(x))^2), not gated. Also the form of every expert."""
    up = linear(tensors, f"{prefix}.up_proj", x)
    return linear(tensors, f"{prefix}.down_proj", np.maximum(up, 0.0) ** 2)


def moe_mixer(config: dict, tensors: Tensors, prefix: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[T, D] -> out [T, D], router ids [T, K], router weights [T, K].

    out = fc2_latent(sum_k w_k expert_k(fc1_latent(x))) + shared(x). The router and the shared expert see x
    itself at full width D; without `moe_latent_size` the two latent projections are the identity.
    """
    ids, weights = router(config, tensors, f"{prefix}.gate", x)
    latent = config.get("moe_latent_size") is not None
    u = linear(tensors, f"{prefix}.fc1_latent_proj", x) if latent else x
    routed = np.zeros_like(u)
    for t in range(len(x)):
        for expert, weight in zip(ids[t], weights[t], strict=True):
            routed[t] += weight * mlp_mixer(config, tensors, f"{prefix}.experts.{expert}", u[t])
    if latent:
        routed = linear(tensors, f"{prefix}.fc2_latent_proj", routed)
    return routed + mlp_mixer(config, tensors, f"{prefix}.shared_experts", x), ids, weights


def layer(
    config: dict, tensors: Tensors, prefix: str, kind: str, x: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """[T, D] -> [T, D]: x + Mixer(RMSNorm(x)), and what else the mixer reports, named as in `forward`."""
    u = rms_norm(config, tensors, f"{prefix}.norm", x)
    mixer = f"{prefix}.mixer"
    if kind == "mamba":
        out, state = mamba2_mixer(config, tensors, mixer, u)
        return x + out, {"ssm_state": state}
    if kind == "moe":
        out, ids, weights = moe_mixer(config, tensors, mixer, u)
        return x + out, {"router_ids": ids, "router_weights": weights}
    return x + {"attention": attention_mixer, "mlp": mlp_mixer}[kind](config, tensors, mixer, u), {}


def mtp_block(config: dict, tensors: Tensors, embedding: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """One multi-token prediction step, [T, D] each -> m [T, D]; lm_head(m) at t predicts token t + 2.

    m = RMSNorm_final(MoE(Attention(eh_proj([RMSNorm_e(embedding) ; RMSNorm_h(hidden)])))), pre-norm residual
    layers. Row t: `embedding` of token t + 1, `hidden` of position t after the backbone's norm_f. A further
    step takes m as `hidden` and the embedding of one more token on.
    """
    both = [
        rms_norm(config, tensors, "mtp.layers.0.enorm", embedding),
        rms_norm(config, tensors, "mtp.layers.0.hnorm", hidden),
    ]
    x = linear(tensors, "mtp.layers.0.eh_proj", np.concatenate(both, axis=1))
    pattern = config.get("mtp_layers_block_type") or config.get("mtp_hybrid_override_pattern") or "*E"
    kinds = layer_kinds(pattern)
    for i, kind in enumerate(kinds):
        x, _ = layer(config, tensors, f"mtp.layers.{i}", kind, x)
    return rms_norm(config, tensors, f"mtp.layers.{len(kinds) - 1}.final_layernorm", x)


def forward(config: dict, tensors: Tensors, tokens: np.ndarray) -> dict[str, np.ndarray | dict[int, np.ndarray]]:
    """Whole forward pass over one unpadded document, tokens [T]; everything returned in float64.

    x = Emb(tokens); x += Mixer(RMSNorm(x)) per layer; hidden = RMSNorm_f(x); logits = lm_head(hidden).
    Returns logits [T, V], hidden [T, D] (after norm_f), residual [layers, T, D] (after each layer),
    ssm_state {layer: [H, P, N]} (final), router_ids and router_weights {layer: [T, K]}, and with `mtp.*`
    weights mtp_logits [T-1, V], whose row t uses hidden t and token t + 1 and predicts token t + 2.
    """
    refuse_unsupported(config)
    embeddings = f64(tensors, "backbone.embeddings.weight")
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not len(tokens) or tokens.min() < 0 or tokens.max() >= len(embeddings):
        raise ValueError(f"tokens must be a non-empty vector of ids below {len(embeddings)}")
    kinds = layer_kinds(config.get("layers_block_type") or config["hybrid_override_pattern"])
    if config.get("num_hidden_layers") not in (None, len(kinds)):
        raise ValueError(f"num_hidden_layers={config['num_hidden_layers']} but {len(kinds)} layer types")
    head = tensors["backbone.embeddings.weight" if config.get("tie_word_embeddings") else "lm_head.weight"]
    out = {"ssm_state": {}, "router_ids": {}, "router_weights": {}}
    x = embeddings[tokens]
    residual = []
    for i, kind in enumerate(kinds):
        x, reported = layer(config, tensors, f"backbone.layers.{i}", kind, x)
        residual.append(x)
        for key, value in reported.items():
            out[key][i] = value
    hidden = rms_norm(config, tensors, "backbone.norm_f", x)
    out |= {"residual": np.stack(residual), "hidden": hidden}
    out["logits"] = linear({"head.weight": head}, "head", hidden)
    if any(name.startswith("mtp.") for name in tensors):
        m = mtp_block(config, tensors, embeddings[tokens[1:]], hidden[:-1])
        out["mtp_logits"] = linear({"head.weight": head}, "head", m)
    return out
