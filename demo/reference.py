"""The model in plain float32 PyTorch, read from a Hugging Face folder: the figures come from it.

It shares no code with the training model, so that it also checks the exported weights.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


class Reference:
    """Runs whole sequences from position 0."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        weights = load_file(folder / "model.safetensors")
        self.weights = {name: w.float() for name, w in weights.items()}

    def logits(self, tokens: Tensor) -> Tensor:
        """Soft-capped logits [batch, time, vocab] of tokens [batch, time]."""
        embedding = self.weights["model.embed_tokens.weight"]
        scale = torch.tensor(math.sqrt(self.config["hidden_size"])).bfloat16().float()
        x = embedding[tokens] * scale
        kinds = self.config["block_types"]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            block = self.attention if kinds[i % len(kinds)] == "attention" else self.recurrent
            x = x + block(layer + "temporal_block.", self.norm(layer + "temporal_pre_norm", x))
            x = x + self.mlp(layer + "mlp_block.", self.norm(layer + "channel_pre_norm", x))
        cap = self.config["logits_soft_cap"]
        return cap * torch.tanh(self.norm("model.final_norm", x) @ embedding.T / cap)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMS norm with 1 + weight."""
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * (1 + self.weights[name + ".weight"])

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x·Wᵀ, and the bias where the layer has one."""
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def mlp(self, name: str, h: Tensor) -> Tensor:
        """Gated GELU."""
        gate = F.gelu(self.linear(name + "gate_proj", h), approximate="tanh")
        return self.linear(name + "down_proj", gate * self.linear(name + "up_proj", h))

    def recurrent(self, name: str, h: Tensor) -> Tensor:
        """Convolution, RG-LRU and the gated branch."""
        y = F.gelu(self.linear(name + "linear_y", h), approximate="tanh")
        taps = self.weights[name + "conv_1d.weight"]
        x = self.linear(name + "linear_x", h).transpose(1, 2)
        x = F.pad(x, (taps.shape[-1] - 1, 0))
        x = F.conv1d(x, taps, self.weights[name + "conv_1d.bias"], groups=len(taps))
        return self.linear(name + "linear_out", y * self.rglru(name + "rg_lru.", x.transpose(1, 2)))

    def rglru(self, name: str, u: Tensor) -> Tensor:
        """The recurrence, one step at a time."""

        def gate(kind: str) -> Tensor:
            weight, bias = self.weights[f"{name}{kind}_weight"], self.weights[f"{name}{kind}_bias"]
            heads = u.unflatten(-1, bias.shape)
            return torch.sigmoid(torch.einsum("bthi,hij->bthj", heads, weight) + bias).flatten(-2)

        rate = 8 * F.softplus(self.weights[name + "recurrent_param"])
        log_a = -rate * gate("recurrent_gate")
        x = u * gate("input_gate")
        a, scaled = torch.exp(log_a), x * torch.sqrt(-torch.expm1(2 * log_a))
        states = [x[:, 0]]
        for t in range(1, u.shape[1]):
            states.append(a[:, t] * states[-1] + scaled[:, t])
        return torch.stack(states, dim=1)

    def attention(self, name: str, h: Tensor) -> Tensor:
        """Every head shares one key and value; a query sees `window` keys before itself."""
        dim, window = self.config["head_dim"], self.config["attention_window_size"]
        q = self.rotate(self.linear(name + "q_proj", h).unflatten(-1, (-1, dim)).transpose(1, 2))
        k = self.rotate(self.linear(name + "k_proj", h)[:, None])
        v = self.linear(name + "v_proj", h)[:, None]
        at = torch.arange(h.shape[1])
        back = at[:, None] - at
        mask = (back >= 0) & (back <= window)
        k, v = k.expand_as(q), v.expand_as(q)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.linear(name + "o_proj", mixed.transpose(1, 2).flatten(-2))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions on the first half of [..., time, head_dim]."""
        half = x.shape[-1] // 2
        inverse = self.config["rope_theta"] ** (-torch.arange(0, half, 2) / half)
        angle = torch.arange(x.shape[-2])[:, None] * torch.cat((inverse, inverse))
        rotated, kept = x[..., :half], x[..., half:]
        first, second = rotated.chunk(2, dim=-1)
        swapped = torch.cat((-second, first), dim=-1)
        return torch.cat((rotated * angle.cos() + swapped * angle.sin(), kept), dim=-1)
