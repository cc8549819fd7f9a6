"""Llama in NumPy float64: the oracle that every implementation is compared with.

Written from the papers, one row, one query and one head at a time. It shares only the
names in the (unrolled) tree of weights and in the configuration with the library. Slow
on purpose: no masks, no broadcasting over heads, no cache.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling

Floats = np.ndarray


def logits(
    config: LlamaConfig,
    params: Mapping[str, Any],
    tokens: Sequence[Sequence[int]],
    *,
    positions: Sequence[Sequence[int]] | None = None,
    segment_ids: Sequence[Sequence[int]] | None = None,
) -> Floats:
    """Logits of the next token of each token, `[B, T, V]`."""
    hidden = _transformer(config, params["transformer"], tokens, positions, segment_ids)
    if config.tied_embeddings:
        return hidden @ _float64(params["transformer"]["embedding"]).T
    return hidden @ _float64(params["lm_head"])


def scalars(
    config: LlamaConfig, params: Mapping[str, Any], tokens: Sequence[Sequence[int]]
) -> Floats:
    """Scalars of a scalar model for each token, `[B, T]`."""
    hidden = _transformer(config, params["transformer"], tokens, None, None)
    return hidden @ _float64(params["scalar_head"])


def log_softmax(x: Floats) -> Floats:
    """Log-probabilities along the last axis."""
    x = _float64(x)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def attend(
    q: Floats,
    k: Floats,
    v: Floats,
    *,
    q_start: int = 0,
    segments: Sequence[int] | None = None,
) -> Floats:
    """Causal attention of one row: q `[T, N, H]`, k and v `[S, K, H]`."""
    q, k, v = _float64(q), _float64(k), _float64(v)
    out = np.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for query in range(q.shape[0]):
        seen = [
            slot
            for slot in range(min(k.shape[0], q_start + query + 1))
            if segments is None or segments[slot] == segments[query]
        ]
        for head in range(q.shape[1]):
            keys, values = k[seen, head // group], v[seen, head // group]
            score = keys @ q[query, head] / np.sqrt(q.shape[2])
            out[query, head] = np.exp(log_softmax(score)) @ values
    return out


def rotate(
    heads: Floats,
    positions: Sequence[int],
    theta: float,
    scaling: RopeScaling | None = None,
    max_seq_len: int = 0,
) -> Floats:
    """Rotate each head `[T, N, H]` by its position; pairs are (i, i + H/2)."""
    half = heads.shape[-1] // 2
    rotated = _float64(heads).copy()
    if scaling is not None and scaling.kind == "dynamic":
        length = max(max_seq_len, scaling.original_max_seq_len)
        ratio = length / scaling.original_max_seq_len
        stretch = scaling.factor * ratio - (scaling.factor - 1)
        theta, scaling = theta * stretch ** (2 * half / (2 * half - 2)), None
    for time, position in enumerate(positions):
        for i in range(half):
            if scaling is not None and scaling.kind == "yarn":
                frequency = yarn_frequency(i, half, theta, scaling)
            else:
                frequency = scaled_frequency(theta ** (-i / half), scaling)
            angle = position * frequency
            x, y = rotated[time, :, i].copy(), rotated[time, :, i + half].copy()
            rotated[time, :, i] = x * np.cos(angle) - y * np.sin(angle)
            rotated[time, :, i + half] = x * np.sin(angle) + y * np.cos(angle)
    if scaling is not None and scaling.kind == "yarn":
        rotated *= scaling.attention_factor
    return rotated


def yarn_frequency(i: int, half: int, theta: float, scaling: RopeScaling) -> float:
    """The frequency of pair i in radians per position, after YaRN's scaling.

    Pair p turns `original · theta^(-p / half) / 2π` times in the original context. From
    the pair that turns `beta_fast` times to the one that turns `beta_slow` times, the
    frequencies go from unchanged to divided by `factor`.
    """

    def pair(turns: float) -> float:
        ratio = scaling.original_max_seq_len / (2 * np.pi * turns)
        return half * np.log(ratio) / np.log(theta)

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    if first == last:
        last += 0.001
    stretched = min(max((i - first) / (last - first), 0), 1)
    frequency = theta ** (-i / half)
    return stretched * frequency / scaling.factor + (1 - stretched) * frequency


def scaled_frequency(frequency: float, scaling: RopeScaling | None) -> float:
    """A frequency in radians per position, after RoPE scaling for longer contexts."""
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    old = scaling.original_max_seq_len
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * np.pi / frequency
    if wavelength > old / low:
        return frequency / scaling.factor
    if wavelength < old / high:
        return frequency
    smooth = (old / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency


def loss_and_gradient(
    config: LlamaConfig,
    params: Mapping[str, Any],
    tokens: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    weights: Floats,
    *,
    positions: Sequence[Sequence[int]] | None = None,
    segment_ids: Sequence[Sequence[int]] | None = None,
) -> tuple[float, dict[str, Any]]:
    """Weighted mean of -log p of the targets, and its gradient by each weight.

    Derived by hand, by the chain rule, from the forward pass.
    """
    tree = jax.tree.map(_float64, dict(params))
    grads = jax.tree.map(np.zeros_like, tree)
    body, d_body = tree["transformer"], grads["transformer"]
    loss = 0.0
    for row, ids in enumerate(tokens):
        row_positions = range(len(ids)) if positions is None else positions[row]
        segments = [0] * len(ids) if segment_ids is None else segment_ids[row]
        share = _float64(weights[row]) / np.sum(_float64(weights))
        streams = [body["embedding"][np.asarray(ids)]]
        for layer in range(config.num_layers):
            block = body["layers"][str(layer)]
            streams.append(_block(config, block, streams[-1], row_positions, segments))
        normed = _norm(config, body["final_norm"], streams[-1])
        head = body["embedding"].T if config.tied_embeddings else tree["lm_head"]
        logp = log_softmax(normed @ head)
        one_hot = np.eye(config.vocab_size)[np.asarray(targets[row])]
        loss -= np.sum(logp * one_hot * share[:, None])
        d_logits = (np.exp(logp) - one_hot) * share[:, None]
        if config.tied_embeddings:
            d_body["embedding"] += d_logits.T @ normed
        else:
            grads["lm_head"] += normed.T @ d_logits
        g = _norm_back(
            config,
            body["final_norm"],
            streams.pop(),
            d_logits @ head.T,
            d_body["final_norm"],
        )
        for layer in reversed(range(config.num_layers)):
            name = str(layer)
            block, d_block = body["layers"][name], d_body["layers"][name]
            g = _block_back(
                config, block, streams.pop(), row_positions, segments, g, d_block
            )
        np.add.at(d_body["embedding"], np.asarray(ids), g)
    return loss, grads


def _block_back(
    config: LlamaConfig,
    layer: Mapping[str, Any],
    x: Floats,
    positions: Sequence[int],
    segments: Sequence[int],
    g: Floats,
    grads: Mapping[str, Any],
) -> Floats:
    """From the gradient of a block's output to that of its input."""
    T, H = len(x), config.head_dim
    rope = config.rope_theta, config.rope_scaling, config.max_seq_len
    backwards = [-position for position in positions]
    w, d_w = layer["attention"], grads["attention"]
    normed = _norm(config, layer["attention_norm"], x)
    q = rotate((normed @ w["q_proj"]).reshape(T, -1, H), positions, *rope)
    k = rotate((normed @ w["k_proj"]).reshape(T, -1, H), positions, *rope)
    v = (normed @ w["v_proj"]).reshape(T, -1, H)
    out = attend(q, k, v, segments=segments).reshape(T, -1)
    middle = x + out @ w["o_proj"]

    m, d_m = layer["mlp"], grads["mlp"]
    inside = _norm(config, layer["mlp_norm"], middle)
    gate, up = inside @ m["gate_proj"], inside @ m["up_proj"]
    sigmoid = 1 / (1 + np.exp(-gate))
    d_m["down_proj"] += (gate * sigmoid * up).T @ g
    d_hidden = g @ m["down_proj"].T
    d_up = d_hidden * gate * sigmoid
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_m["gate_proj"] += inside.T @ d_gate
    d_m["up_proj"] += inside.T @ d_up
    d_inside = d_gate @ m["gate_proj"].T + d_up @ m["up_proj"].T
    g = g + _norm_back(config, layer["mlp_norm"], middle, d_inside, grads["mlp_norm"])

    d_w["o_proj"] += out.T @ g
    d_out = (g @ w["o_proj"].T).reshape(T, -1, H)
    d_q, d_k, d_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    group = q.shape[1] // k.shape[1]
    for t in range(T):
        seen = [s for s in range(t + 1) if segments[s] == segments[t]]
        for n in range(q.shape[1]):
            kv = n // group
            scores = k[seen, kv] @ q[t, n] / np.sqrt(H)
            p = np.exp(log_softmax(scores))
            d_p = v[seen, kv] @ d_out[t, n]
            d_scores = p * (d_p - p @ d_p) / np.sqrt(H)
            d_v[seen, kv] += np.outer(p, d_out[t, n])
            d_k[seen, kv] += np.outer(d_scores, q[t, n])
            d_q[t, n] += d_scores @ k[seen, kv]
    d_normed = np.zeros_like(x)
    for name, d_heads in (
        ("q_proj", rotate(d_q, backwards, *rope)),
        ("k_proj", rotate(d_k, backwards, *rope)),
        ("v_proj", d_v),
    ):
        d_w[name] += normed.T @ d_heads.reshape(T, -1)
        d_normed += d_heads.reshape(T, -1) @ w[name].T
    norm = layer["attention_norm"]
    return g + _norm_back(config, norm, x, d_normed, grads["attention_norm"])


def _norm_back(
    config: LlamaConfig,
    weights: Mapping[str, Any],
    x: Floats,
    g: Floats,
    grads: Mapping[str, Any],
) -> Floats:
    root = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + config.norm_eps)
    grads["scale"][...] += np.sum(g * x * root, axis=0)
    g = g * weights["scale"]
    return g * root - x * root**3 * np.mean(g * x, axis=-1, keepdims=True)


def _transformer(
    config: LlamaConfig,
    tree: Mapping[str, Any],
    tokens: Sequence[Sequence[int]],
    positions: Sequence[Sequence[int]] | None,
    segment_ids: Sequence[Sequence[int]] | None,
) -> Floats:
    rows = []
    for number, row in enumerate(tokens):
        row_positions = range(len(row)) if positions is None else positions[number]
        segments = None if segment_ids is None else segment_ids[number]
        x = _float64(tree["embedding"])[np.asarray(row)]
        for layer in range(config.num_layers):
            x = _block(config, tree["layers"][str(layer)], x, row_positions, segments)
        rows.append(_norm(config, tree["final_norm"], x))
    return np.stack(rows)


def _block(
    config: LlamaConfig,
    layer: Mapping[str, Any],
    x: Floats,
    positions: Sequence[int],
    segments: Sequence[int] | None,
) -> Floats:
    weights = {name: _float64(w) for name, w in layer["attention"].items()}
    normed = _norm(config, layer["attention_norm"], x)
    shape = (len(x), -1, config.head_dim)
    q, k, v = (
        (normed @ weights[name]).reshape(shape)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    rope = config.rope_theta, config.rope_scaling, config.max_seq_len
    q, k = rotate(q, positions, *rope), rotate(k, positions, *rope)
    out = attend(q, k, v, segments=segments)
    x = x + out.reshape(len(x), -1) @ weights["o_proj"]
    weights = {name: _float64(w) for name, w in layer["mlp"].items()}
    normed = _norm(config, layer["mlp_norm"], x)
    gate = normed @ weights["gate_proj"]
    up = normed @ weights["up_proj"]
    return x + (gate / (1 + np.exp(-gate)) * up) @ weights["down_proj"]


def _norm(config: LlamaConfig, weights: Mapping[str, Any], x: Floats) -> Floats:
    mean_square = np.mean(x**2, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + config.norm_eps) * _float64(weights["scale"])


def _float64(x: Any) -> Floats:
    return np.asarray(x).astype(np.float64)
