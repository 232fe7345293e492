"""Makes the op set differentiable by its inputs; importing this module is enough.

The backward of an op runs its eager reference again, so a layer keeps only its ops' inputs.
"""

from typing import Any

import torch
from torch import Tensor

from rgexport.griffin import ops


def _register(op: Any) -> None:
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.inputs = inputs

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        with torch.enable_grad():
            copies = [
                x.detach().requires_grad_() if is_needed else x
                for x, is_needed in zip(ctx.inputs, needed, strict=True)
            ]
            results = ops.EAGER[op](*copies)
        results = results if isinstance(results, tuple) else (results,)
        used = [(y, g) for y, g in zip(results, grads, strict=True) if g is not None]
        outputs, by_output = zip(*((y, g) for y, g in used if y.requires_grad), strict=True)
        leaves = [x for x, is_needed in zip(copies, needed, strict=True) if is_needed]
        by_leaf = iter(torch.autograd.grad(outputs, leaves, by_output, allow_unused=True))
        gradients = tuple(next(by_leaf) if is_needed else None for is_needed in needed)
        return tuple(map(_finite, gradients)) if op is ops.rg_lru_scan else gradients

    op.register_autograd(backward, setup_context=keep)


def _finite(grad: Tensor | None) -> Tensor | None:
    """Replaces gradients of the RG-LRU's gate by 0 where a is 1: √(1 - a²) has none there."""
    return None if grad is None else grad.nan_to_num(0.0, 0.0, 0.0)


for _op in ops.EAGER:
    _register(_op)
