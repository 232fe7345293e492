"""The float32 ops in float64, token by token, without any of our code."""

import numpy as np

Arrays = dict[str, np.ndarray]


def rg_lru_scan(
    x, input_weight, input_bias, recurrence_weight, recurrence_bias, decay, position_ids, state
) -> Arrays:
    """The RG-LRU of arXiv 2402.19427, eq. 1–4; decay = -8 softplus(a)."""
    input_gate = _block_diagonal_linear(x, input_weight, input_bias)
    recurrence_gate = _block_diagonal_linear(x, recurrence_weight, recurrence_bias)
    log_a = decay.astype(np.float64) * _sigmoid(recurrence_gate)
    first = (position_ids == 0)[..., None]
    a = np.where(first, 0, np.exp(log_a))
    scale = np.where(first, 1, np.sqrt(-np.expm1(2 * log_a)))
    b = x * _sigmoid(input_gate) * scale
    h, steps = state.astype(np.float64), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + b[:, t]
        steps.append(h)
    gates = {"input_gate": input_gate, "recurrence_gate": recurrence_gate}
    return {"h": np.stack(steps, 1), "present": h} | gates


def _block_diagonal_linear(x, weight, bias) -> np.ndarray:
    """One matrix [in, out] per block of channels."""
    heads, block = bias.shape
    blocks = x.astype(np.float64).reshape(*x.shape[:2], heads, block)
    y = np.stack([blocks[:, :, h] @ weight[h] + bias[h] for h in range(heads)], 2)
    return y.reshape(x.shape)


def causal_conv1d(x, weight, bias, state) -> Arrays:
    """A depthwise convolution whose last tap meets the current token."""
    taps = weight.shape[2]
    window = np.concatenate([state, x], 1).astype(np.float64)
    y = np.zeros(x.shape) + bias
    for t in range(x.shape[1]):
        for tap in range(taps):
            y[:, t] += window[:, t + tap] * weight[:, 0, tap]
    return {"y": y, "present": window[:, window.shape[1] - (taps - 1) :]}


def local_attention(q, k, v, past_key, past_value, position_ids, heads) -> Arrays:
    """Every query sees its own key and those of the `window` positions before.

    The ring has the key of position p in slot p modulo window; other slots are undefined.
    """
    batch, tokens, dim = k.shape
    window = past_key.shape[2]
    y = np.zeros((batch, tokens, heads * dim))
    present = {"present_key": past_key.copy(), "present_value": past_value.copy()}
    for row in range(batch):
        start = int(position_ids[row, 0])
        keys, values = {}, {}
        for p in range(max(0, start - window), start):
            keys[p], values[p] = past_key[row, 0, p % window], past_value[row, 0, p % window]
        for t in range(tokens):
            p = start + t
            keys[p], values[p] = k[row, t], v[row, t]
            seen = range(max(0, p - window), p + 1)
            key_rows = np.array([keys[s] for s in seen], np.float64)
            value_rows = np.array([values[s] for s in seen], np.float64)
            for head in range(heads):
                part = slice(head * dim, (head + 1) * dim)
                scores = key_rows @ q[row, t, part].astype(np.float64) / np.sqrt(dim)
                weights = np.exp(scores - scores.max())
                y[row, t, part] = weights @ value_rows / weights.sum()
        for p in range(start + max(0, tokens - window), start + tokens):
            present["present_key"][row, 0, p % window] = keys[p]
            present["present_value"][row, 0, p % window] = values[p]
    return {"y": y, **present}


def gelu_mul(gate, up) -> Arrays:
    """GELU in its tanh form."""
    x = gate.astype(np.float64)
    gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return {"y": gelu * up}


def rms_norm(x, weight, eps) -> Arrays:
    """Over the last axis; a weight of 0 keeps the size."""
    x = x.astype(np.float64)
    return {"y": x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (1 + weight)}


def soft_cap(x, cap) -> Arrays:
    """Limits values to the cap, by tanh."""
    return {"y": cap * np.tanh(x.astype(np.float64) / cap)}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))
