"""A small Griffin (arXiv 2402.19427, RecurrentGemma: 2404.07839) to train on a CPU.

Parameters carry the names and shapes of Hugging Face's RecurrentGemma checkpoints, so that the
state dict is the checkpoint. Only whole sequences are run: there is no cache.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from ops import gated_gelu, rglru, window_softmax
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the demo model; `branch` is the width of each of the MLP's two branches."""

    vocab: int = 8192
    width: int = 256
    branch: int = 768
    heads: int = 4
    layers: int = 11
    window: int = 256
    pattern: tuple[str, ...] = ("recurrent", "recurrent", "attention")
    conv: int = 4
    cap: float = 30.0
    eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product in x's precision whatever the parameters are stored in."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Norm(nn.Module):
    """RMS norm with weight 1 + w; returns the precision that the products run in."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.eps = shape.eps
        self.weight = nn.Parameter(torch.zeros(shape.width))

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x: float32 residual stream."""
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * (1 + self.weight)).to(dtype)


class Conv1D(nn.Module):
    """Depthwise causal convolution; the last tap is on the current token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape.width, 1, shape.conv) * shape.conv**-0.5)
        self.bias = nn.Parameter(torch.zeros(shape.width))

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, time, width]."""
        taps = self.weight.shape[-1]
        x = x.float()
        out = self.bias + x * self.weight[:, 0, -1]
        for back in range(1, taps):
            shifted = F.pad(x[:, :-back], (0, 0, back, 0))
            out = out + shifted * self.weight[:, 0, taps - 1 - back]
        return out


class RGLRU(nn.Module):
    """Real-gated linear recurrent unit, block-diagonal gates, float32 recurrence."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        heads, block = shape.heads, shape.head_dim
        # Griffin's start: at a full gate each channel decays by a in [0.9, 0.999] to the 8th.
        radius = torch.empty(shape.width).uniform_(0.9**2, 0.999**2)
        self.recurrent_param = nn.Parameter(torch.log(torch.expm1(-0.5 * torch.log(radius))))
        for gate in ("input_gate", "recurrent_gate"):
            weight = nn.Parameter(torch.randn(heads, block, block) * block**-0.5)
            self.register_parameter(f"{gate}_weight", weight)
            self.register_parameter(f"{gate}_bias", nn.Parameter(torch.zeros(heads, block)))

    def forward(self, u: Tensor, dtype: torch.dtype) -> Tensor:
        """u: [batch, time, width] float32."""
        batch, time, _ = u.shape
        heads, block, _ = self.input_gate_weight.shape
        weight = torch.cat((self.input_gate_weight, self.recurrent_gate_weight), dim=-1)
        bias = torch.cat((self.input_gate_bias, self.recurrent_gate_bias), dim=-1)
        per_head = u.to(dtype).view(batch * time, heads, block).transpose(0, 1)
        gates = torch.bmm(per_head, weight.to(dtype)).view(heads, batch, time, 2 * block)
        return rglru(u, gates, bias, 8.0 * F.softplus(self.recurrent_param))


class Recurrent(nn.Module):
    """Griffin's recurrent block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.linear_x = nn.Linear(width, width)
        self.linear_y = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.conv_1d = Conv1D(shape)
        self.rg_lru = RGLRU(shape)

    def forward(self, h: Tensor) -> Tensor:
        """h: normed input."""
        both = torch.cat((self.linear_x.weight, self.linear_y.weight))
        bias = torch.cat((self.linear_x.bias, self.linear_y.bias))
        x, y = linear(h, both, bias).chunk(2, dim=-1)
        x = self.rg_lru(self.conv_1d(x), h.dtype)
        mixed = (F.gelu(y.float(), approximate="tanh") * x).to(h.dtype)
        return linear(mixed, self.linear_out.weight, self.linear_out.bias)


class Attention(nn.Module):
    """Sliding-window attention with one key/value head; a query sees `window` keys before it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, dim = shape.width, shape.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, dim, bias=False)
        self.v_proj = nn.Linear(width, dim, bias=False)
        self.o_proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        """h: normed input."""
        batch, time, width = h.shape
        heads, dim = self.shape.heads, self.shape.head_dim
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        q, k, v = linear(h, weight).view(batch, time, heads + 2, dim).split((heads, 1, 1), dim=2)
        q, k = self.rotate(q), self.rotate(k)
        # In blocks of `window`, a query sees the block before from its own place on, and its own
        # block up to itself: two blocks of keys, which all heads share.
        block = self.shape.window
        blocks = math.ceil(time / block)
        pad = blocks * block - time
        q = F.pad(q, (0, 0, 0, 0, 0, pad)).view(batch * blocks, block * heads, dim)
        k, v = (F.pad(t.squeeze(2), (0, 0, block, pad)) for t in (k, v))
        k, v = (t.view(batch, blocks + 1, block, dim) for t in (k, v))
        k, v = (
            torch.cat((t[:, :-1], t[:, 1:]), dim=2).view(batch * blocks, 2 * block, dim)
            for t in (k, v)
        )
        scores = torch.bmm(q, k.transpose(1, 2)).view(batch, blocks, block, heads, 2 * block)
        weights = window_softmax(scores, dim**-0.5)
        mixed = torch.bmm(weights.view(batch * blocks, block * heads, 2 * block), v)
        mixed = mixed.view(batch, blocks * block, width)[:, :time]
        return linear(mixed, self.o_proj.weight, self.o_proj.bias)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions on the first half of the head's dimensions, rotate-half style."""
        quarter = self.shape.head_dim // 4
        frequency = self.shape.rope_theta ** (-torch.arange(quarter) / quarter)
        angle = torch.arange(x.shape[1])[:, None, None] * frequency
        sin, cos = angle.sin(), angle.cos()
        a, b, rest = x.float().split((quarter, quarter, 2 * quarter), dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)


class Mlp(nn.Module):
    """Gated GELU feed-forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.branch)
        self.up_proj = nn.Linear(shape.width, shape.branch)
        self.down_proj = nn.Linear(shape.branch, shape.width)

    def forward(self, h: Tensor) -> Tensor:
        """h: normed input."""
        both = torch.cat((self.gate_proj.weight, self.up_proj.weight))
        bias = torch.cat((self.gate_proj.bias, self.up_proj.bias))
        hidden = gated_gelu(linear(h, both, bias))
        return linear(hidden, self.down_proj.weight, self.down_proj.bias)


class Layer(nn.Module):
    """Temporal block and MLP, each with a norm before it and a residual around it."""

    def __init__(self, shape: Shape, kind: str) -> None:
        super().__init__()
        self.temporal_pre_norm = Norm(shape)
        self.temporal_block = Recurrent(shape) if kind == "recurrent" else Attention(shape)
        self.channel_pre_norm = Norm(shape)
        self.mlp_block = Mlp(shape)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x: float32 residual stream."""
        x = x + self.temporal_block(self.temporal_pre_norm(x, dtype))
        return x + self.mlp_block(self.channel_pre_norm(x, dtype))


class Griffin(nn.Module):
    """Tokens to the final hidden states; the tied embedding makes the logits of them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.width)
        kinds = [shape.pattern[i % len(shape.pattern)] for i in range(shape.layers)]
        self.layers = nn.ModuleList(Layer(shape, kind) for kind in kinds)
        self.final_norm = Norm(shape)
        self.embedding_scale = float(torch.tensor(math.sqrt(shape.width)).bfloat16())
        initialize(self)

    def forward(self, tokens: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """tokens: [batch, time] ids; returns [batch, time, width] in `dtype`."""
        x = self.embed_tokens(tokens) * self.embedding_scale
        for layer in self.layers:
            x = layer(x, dtype)
        return self.final_norm(x, dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits."""
        cap = self.shape.cap
        return cap * torch.tanh(linear(hidden, self.embed_tokens.weight) / cap)


def initialize(model: Griffin) -> None:
    """Small embeddings, unit-gain inputs, and residual branches that start at zero."""
    nn.init.normal_(model.embed_tokens.weight, std=0.02)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.endswith(("linear_out", "o_proj", "down_proj")):
                nn.init.zeros_(module.weight)
