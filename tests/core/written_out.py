"""The published model written out step by step, as slowly and plainly as the formulas read, to hold the real one to.

Nothing here is shared with the model: weights come as a state dict under the published keys, orders are recomputed
cell by cell, the scan is a loop over tokens, attention a softmax of a matrix.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def zigzag(index, n_rows, n_columns):
    """Zigzag `index` cell by cell: corner, then rows or columns, turning round at each line's end."""
    corner, by_columns = divmod(index, 2)
    lines, length = (n_columns, n_rows) if by_columns else (n_rows, n_columns)
    order = []
    for a in range(lines):
        for b in range(length):
            turned = b if a % 2 == 0 else length - 1 - b
            row, column = (turned, a) if by_columns else (a, turned)
            row = n_rows - 1 - row if corner in (2, 3) else row
            column = n_columns - 1 - column if corner in (1, 3) else column
            order.append(row * n_columns + column)
    return torch.tensor(order)


def norm(x, state, name, eps):
    if f"{name}.bias" in state:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * state[f"{name}.weight"]


def plain_norm(x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-6)


def state_space(x, z, state, key, suffix):
    """One direction on x, z (b, l, e) that are already in the order of the scan."""
    names = {"A": f"A{suffix}_log", "D": f"D{suffix}"}
    w, conv_bias = state[f"{key}conv1d{suffix}.weight"], state.get(f"{key}conv1d{suffix}.bias")
    b, l, e = x.shape
    width = w.shape[-1]
    padded = torch.cat([x.new_zeros(b, width - 1, e), x], dim=1)
    x = sum(padded[:, k : k + l] * w[:, 0, k] for k in range(width))
    x = F.silu(x if conv_bias is None else x + conv_bias)
    rank, n = state[f"{key}dt_proj{suffix}.weight"].shape[1], state[key + names["A"]].shape[1]
    dt, B, C = (x @ state[f"{key}x_proj{suffix}.weight"].T).split([rank, n, n], dim=-1)
    dt = F.softplus(dt @ state[f"{key}dt_proj{suffix}.weight"].T + state[f"{key}dt_proj{suffix}.bias"])
    A, s, y = -torch.exp(state[key + names["A"]]), x.new_zeros(b, e, n), []
    for k in range(l):
        s = torch.exp(dt[:, k, :, None] * A) * s + (dt[:, k] * x[:, k])[..., None] * B[:, k, None, :]
        y.append((s * C[:, k, None, :]).sum(-1) + state[key + names["D"]] * x[:, k])
    return torch.stack(y, 1) * F.silu(z)


def mixer(u, state, key, read, write, v2):
    """u (b, l, d) -> (b, l, d): out[:, j] is what the scan gave at step write[j]."""
    xz = u @ state[f"{key}in_proj.weight"].T + state.get(f"{key}in_proj.bias", 0)
    e = xz.shape[-1] // 2
    x, z = xz[..., :e][:, read], xz[..., e:][:, read]
    y = state_space(x, z, state, key, "")
    if v2:
        y = y + state_space(x.flip(1), z.flip(1), state, key, "_b").flip(1)
    return (y @ state[f"{key}out_proj.weight"].T + state.get(f"{key}out_proj.bias", 0))[:, write]


def cross_attention(v, Y, state, key):
    q, k, w = (t @ state[f"{key}to_{n}.weight"].T for t, n in ((v, "q"), (Y, "k"), (Y, "v")))
    heads = []
    for h in range(8):
        part = slice(64 * h, 64 * h + 64)
        heads.append(torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 8, -1) @ w[..., part])
    return torch.cat(heads, -1) @ state[f"{key}to_out.0.weight"].T + state[f"{key}to_out.0.bias"]


def layer_paths(config, h, w, frames, orders):
    """(axis, read, write) of every layer."""
    kind, spatial, temporal, result = config.scan_type, 0, 0, []
    for layer in range(config.depth):
        if "video_" in kind:
            pattern = kind.split("video_")[1]
            if pattern[layer % len(pattern)] == "s":
                order = zigzag(spatial % 8, h, w)
                result.append(("s", order, torch.argsort(order)))
                spatial += 1
            else:
                forward, backward = torch.arange(frames), torch.arange(frames).flip(0)
                read = backward if temporal % 2 else forward
                right = config.corrected_time_order
                result.append(("t", read, read if right else (forward if temporal % 2 else backward)))
                temporal += 1
            continue
        if kind == "v2":
            order = torch.arange(max(frames, 1) * h * w)
        elif orders is not None:
            order = orders[layer]
        else:
            order = zigzag(layer % int(kind.removeprefix("zigzagN")), h, w)
        result.append(("a", order, order if config.legacy_permutation else torch.argsort(order)))
    return result


def zigma(config, state, x, t, y=None, orders=None):
    """The velocity at x (b, c, H, W) or (b, f, c, H, W)."""
    video = x.dim() == 5
    frames = x if video else x[:, None]
    b, f, c, H, W = frames.shape
    p, d = config.patch_size, config.embed_dim
    h, w = H // p, W // p
    weight = state["x_embedder.proj.weight"].reshape(d, -1)
    tokens = []
    for i in range(f):
        for r in range(h):
            for q in range(w):
                patch = frames[:, i, :, r * p : r * p + p, q * p : q * p + p].reshape(b, -1)
                tokens.append(patch @ weight.T + state["x_embedder.proj.bias"])
    tokens = torch.stack(tokens, 1)
    tokens = tokens + state.get("pos_embed", 0)
    if "temporal_pos_embedding" in state:
        tokens = tokens + state["temporal_pos_embedding"].repeat_interleave(h * w, 1)

    angles = 1000 * t[:, None] * torch.tensor([10000 ** (-k / 128) for k in range(128)])
    features = torch.cat([torch.cos(angles), torch.sin(angles)], 1)
    hidden = F.silu(features @ state["t_embedder.mlp.0.weight"].T + state["t_embedder.mlp.0.bias"])
    condition = hidden @ state["t_embedder.mlp.2.weight"].T + state["t_embedder.mlp.2.bias"]
    Y = None
    if config.has_text:
        Y = y @ state["y_embedder.weight"].T + state["y_embedder.bias"]
        condition = condition + Y.mean(1)
    elif config.num_classes > 0:
        condition = condition + state["y_embedder.embedding_table.weight"][y]

    stream, residual = tokens, 0
    for i, (axis, read, write) in enumerate(layer_paths(config, h, w, f if video else 0, orders)):
        key = f"blocks.{i}."
        residual = residual + stream
        u = norm(residual, state, f"{key}norm", config.norm_epsilon)
        m = F.silu(condition) @ state[f"{key}adaLN_modulation.1.weight"].T + state[f"{key}adaLN_modulation.1.bias"]
        m = m[:, None].split(d, -1)
        modulated = u * (1 + m[1]) + m[0]
        mixer_key = f"{key}mixer."
        if axis == "s":
            parts = [mixer(part, state, mixer_key, read, write, False) for part in modulated.split(h * w, 1)]
            mixed = torch.cat(parts, 1)
        elif axis == "t":
            mixed = torch.empty_like(modulated)
            for place in range(h * w):
                mixed[:, place :: h * w] = mixer(modulated[:, place :: h * w], state, mixer_key, read, write, False)
        else:
            mixed = mixer(modulated, state, mixer_key, read, write, config.scan_type == "v2")
        stream = u + m[2] * mixed
        if config.has_text:
            v = plain_norm(stream)
            stream = stream + m[5] * cross_attention(v * (1 + m[4]) + m[3], Y, state, f"{key}msa.")
    final = plain_norm(norm(residual + stream, state, "norm_f", config.norm_epsilon))
    final = final @ state["final_layer.linear.weight"].T + state["final_layer.linear.bias"]
    out = torch.empty_like(frames)
    for index in range(f * h * w):
        i, place = divmod(index, h * w)
        r, q = divmod(place, w)
        values = final[:, index].reshape(b, p, p, c)
        for row in range(p):
            for column in range(p):
                out[:, i, :, r * p + row, q * p + column] = values[:, row, column]
    assert math.isfinite(float(out.sum()))
    return out if video else out[:, 0]
