"""Muon for the matrices: momentum whose update has all singular values near one.

Keller Jordan's optimizer (https://kellerjordan.github.io/posts/muon); matrices of one shape are
orthogonalized together, and AdamW takes every other parameter.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz on [n, rows, columns]: U·S·Vᵀ becomes about U·Vᵀ."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.transpose(1, 2) if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, with decoupled weight decay."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every matrix; a [n, rows, columns] parameter holds n of them."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(state["momentum"], momentum)
                by_shape[p.shape[-2:]].append((p, update.reshape(-1, *p.shape[-2:])))
            for (rows, columns), members in by_shape.items():
                updates = orthogonalize(torch.cat([update for _, update in members]))
                scale = max(1, rows / columns) ** 0.5
                sizes = [len(update) for _, update in members]
                for (p, _), update in zip(members, updates.split(sizes), strict=True):
                    p.mul_(1 - lr * group["decay"])
                    p.add_(update.view_as(p), alpha=-lr * scale)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices and gates; AdamW for embedding, norms, biases, the rest."""
    matrices, embedding, others = [], [], []
    for name, p in model.named_parameters():
        if name == "embed_tokens.weight":
            embedding.append(p)
        elif p.ndim >= 2 and min(p.shape[-2:]) >= 16:  # not the convolution, not gate biases
            matrices.append(p)
        else:
            others.append(p)
    adam = torch.optim.AdamW(
        [{"params": embedding, "lr": 3e-3}, {"params": others, "lr": 3e-3}],
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=True,
    )
    # In halves, for two threads to step; both halves have the same mix of shapes.
    halves = (matrices[::2], matrices[1::2])
    return [*(Muon(half, lr=0.02, decay=0.1) for half in halves), adam]
