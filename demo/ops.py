"""The C kernels as differentiable PyTorch operations."""

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.library import CustomOpDef

_LOSS_ROWS = 1024  # rows of logits at a time: 16 MB of them stay in cache


def _load() -> ctypes.CDLL:
    """Compiles kernels.c next to its source when the library is older than the source."""
    source = Path(__file__).with_name("kernels.c")
    library = source.with_suffix(".so")
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math"]
        flags += ["-fopenmp", "-shared", "-fPIC"]
        command = ["cc", *flags, str(source), "-o", str(library), "-lm"]
        subprocess.run(command, check=True)
    # PyTorch is imported first, so both share the one OpenMP runtime and its threads.
    return ctypes.CDLL(str(library))


_C = _load()


def _call(name: str, *arguments: Tensor | int | float) -> None:
    converted = [
        ctypes.c_void_p(a.data_ptr())
        if isinstance(a, Tensor)
        else (ctypes.c_float(a) if isinstance(a, float) else ctypes.c_long(a))
        for a in arguments
    ]
    getattr(_C, name)(*converted)


def _operation(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    return torch.library.custom_op(f"demo::{name}", mutates_args=())


@_operation("rglru")
def rglru(u: Tensor, gates: Tensor, bias: Tensor, rate: Tensor) -> Tensor:
    """RG-LRU; see kernels.c for the shapes. u, bias and rate are float32, the gates bf16."""
    u, gates = u.contiguous(), gates.contiguous()
    h = torch.empty_like(u)
    _call("rglru_forward", u, gates, bias.contiguous(), rate, h, *u.shape[:2], *_blocks(gates))
    return h


@_operation("rglru_backward")
def _rglru_backward(
    u: Tensor, gates: Tensor, bias: Tensor, rate: Tensor, h: Tensor, dh: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    u, gates, bias, dh = u.contiguous(), gates.contiguous(), bias.contiguous(), dh.contiguous()
    du, dgates = torch.empty_like(u), torch.empty_like(gates)
    dbias, drate = torch.empty(len(u), *bias.shape), torch.empty(len(u), *rate.shape)
    sizes = (*u.shape[:2], *_blocks(gates))
    _call("rglru_backward", u, gates, bias, rate, h, dh, du, dgates, dbias, drate, *sizes)
    return du, dgates, dbias.sum(0), drate.sum(0)


def _blocks(gates: Tensor) -> tuple[int, int]:
    return gates.shape[0], gates.shape[-1] // 2


@_operation("gated_gelu")
def gated_gelu(both: Tensor) -> Tensor:
    """gelu(gate) · up for bf16 [..., 2 · width], the gate first."""
    both = both.contiguous()
    out = both.new_empty(*both.shape[:-1], both.shape[-1] // 2)
    _call("gated_gelu_forward", both, out, out.numel() // out.shape[-1], out.shape[-1])
    return out


@_operation("gated_gelu_backward")
def _gated_gelu_backward(both: Tensor, dout: Tensor) -> Tensor:
    both, dout = both.contiguous(), dout.contiguous()
    dboth = torch.empty_like(both)
    rows = dout.numel() // dout.shape[-1]
    _call("gated_gelu_backward", both, dout, dboth, rows, dout.shape[-1])
    return dboth


@_operation("window_softmax")
def window_softmax(scores: Tensor, scale: float) -> Tensor:
    """Softmax over the keys that a window shows; [batch, blocks, block, heads, 2 · block] bf16."""
    weights = scores.clone(memory_format=torch.contiguous_format)
    _call("window_softmax_forward", weights, *weights.shape[:4], float(scale))
    return weights


@_operation("window_softmax_backward")
def _window_softmax_backward(weights: Tensor, dweights: Tensor, scale: float) -> Tensor:
    dscores = dweights.clone(memory_format=torch.contiguous_format)
    _call("window_softmax_backward", weights, dscores, *weights.shape[:4], float(scale))
    return dscores


def _like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype) for t in tensors]


def _register() -> None:
    """Tells PyTorch the results' shapes and which operation is whose gradient."""
    rglru.register_fake(lambda u, gates, bias, rate: _like(u)[0])
    _rglru_backward.register_fake(
        lambda u, gates, bias, rate, h, dh: tuple(_like(u, gates, bias, rate))
    )
    rglru.register_autograd(
        lambda ctx, dh: _rglru_backward(*ctx.saved_tensors, dh),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
    )
    gated_gelu.register_fake(lambda both: both.new_empty(*both.shape[:-1], both.shape[-1] // 2))
    _gated_gelu_backward.register_fake(lambda both, dout: _like(both)[0])
    gated_gelu.register_autograd(
        lambda ctx, dout: _gated_gelu_backward(*ctx.saved_tensors, dout),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    window_softmax.register_fake(lambda scores, scale: _like(scores)[0])
    _window_softmax_backward.register_fake(lambda weights, dweights, scale: _like(weights)[0])

    def keep_weights(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.scale = inputs[1]

    window_softmax.register_autograd(
        lambda ctx, grad: (_window_softmax_backward(*ctx.saved_tensors, grad, ctx.scale), None),
        setup_context=keep_weights,
    )


_register()


class CappedLoss(torch.autograd.Function):
    """Mean cross entropy of soft-capped logits x·Eᵀ; its gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, embedding: Tensor, targets: Tensor, cap: float
    ) -> Tensor:
        """x: [rows, width] bf16, embedding: [vocab, width] float32, targets: [rows] int64."""
        table = embedding.bfloat16()
        losses = torch.empty(len(x))
        dx = torch.empty_like(x)
        dtable = torch.zeros_like(embedding)
        for at in range(0, len(x), _LOSS_ROWS):
            rows = slice(at, min(at + _LOSS_ROWS, len(x)))
            logits = x[rows] @ table.T
            n, vocab = logits.shape
            _call("capped_loss", logits, targets[rows], losses[rows], n, vocab, cap, 1.0 / len(x))
            torch.mm(logits, table, out=dx[rows])
            dtable += logits.T @ x[rows]
        ctx.save_for_backward(dx, dtable)
        return losses.mean()

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Scales the stored gradients."""
        dx, dtable = ctx.saved_tensors
        return dx * upstream, dtable * upstream, None, None
