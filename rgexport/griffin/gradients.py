"""Makes the op set differentiable by its inputs; importing this module is enough.

The backward of an op runs its eager reference again under autograd, so that a layer keeps no more
than the inputs of its ops.
"""

from typing import Any

import torch
from torch import Tensor

from rgexport.griffin import ops

_Inputs = tuple[Any, ...]
_Grads = tuple[Tensor | None, ...]


def _register(op: Any) -> None:
    def keep(ctx: Any, inputs: _Inputs, output: Any) -> None:
        ctx.inputs = inputs

    def backward(ctx: Any, *grads: Tensor | None) -> _Grads:
        found = _again(op, ctx.inputs, ctx.needs_input_grad, grads)
        return tuple(map(_in_the_limit, found)) if op is ops.rg_lru_scan else found

    op.register_autograd(backward, setup_context=keep)


def _again(op: Any, inputs: _Inputs, needed: tuple[bool, ...], grads: _Grads) -> _Grads:
    """The gradients of an op's inputs (those that are needed) from those of its results."""
    with torch.enable_grad():
        again = [
            x.detach().requires_grad_() if wanted else x
            for x, wanted in zip(inputs, needed, strict=True)
        ]
        found = ops.EAGER[op](*again)
    results = found if isinstance(found, tuple) else (found,)
    used = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None]
    outputs, by_output = zip(*((y, g) for y, g in used if y.requires_grad), strict=True)
    leaves = [x for x, wanted in zip(again, needed, strict=True) if wanted]
    by_leaf = iter(torch.autograd.grad(outputs, leaves, by_output, allow_unused=True))
    return tuple(next(by_leaf) if wanted else None for wanted in needed)


def _in_the_limit(grad: Tensor | None) -> Tensor | None:
    """0 where the gradient of the RG-LRU's gate is not finite, because a is 1 in float32.

    The root of 1 - a² has no derivative there, but the gate moves a ever less as a nears 1.
    """
    return None if grad is None else grad.nan_to_num(0.0, 0.0, 0.0)


for _op in ops.EAGER:
    _register(_op)
