"""The optimiser of the bundled model: Muon for matrices, AdamW for the rest, shared out over the workers.

Parameters and every worker's gradients lie in shared memory. A worker averages the gradients of those
parameters that are its own, updates them in place and keeps their moments; nothing else is exchanged.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor, nn

MOMENTUM, BETAS = 0.95, (0.9, 0.98)
MUON_DECAY, ADAM_DECAY = 0.05, 0.01
ROUTER_RATE = 0.3  # a router that learns faster than its experts settles on a few of them


def orthogonal(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to g [n, rows, cols], by five Newton-Schulz steps in bfloat16."""
    x = g.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = (x.mT if tall else x).contiguous()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = torch.bmm(x, x.mT)
        b = torch.baddbmm(a, a, a, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.mT if tall else x).float()


@attrs.define
class Part:
    """A parameter with every worker's gradient of it; a matrix updated by Muon counts as `pieces` of them."""

    value: nn.Parameter
    gradients: list[Tensor]
    muon: bool
    pieces: int
    rate: float
    first: Tensor
    second: Tensor

    def muon_step(self, lr: float, g: Tensor) -> None:
        self.first.lerp_(g, 1 - MOMENTUM)
        g = g.lerp(self.first, MOMENTUM)
        *_, rows, cols = g.shape
        update = orthogonal(g.view(-1, rows // self.pieces, cols))
        scale = max(1.0, update.shape[-2] / cols) ** 0.5
        self.value.mul_(1 - lr * MUON_DECAY).add_(update.reshape(self.value.shape), alpha=-lr * scale)

    def adam_step(self, lr: float, g: Tensor, steps: int) -> None:
        self.first.lerp_(g, 1 - BETAS[0])
        self.second.lerp_(g.square(), 1 - BETAS[1])
        mean, square = self.first / (1 - BETAS[0] ** steps), self.second / (1 - BETAS[1] ** steps)
        if self.value.dim() > 1:
            self.value.mul_(1 - lr * ADAM_DECAY)
        self.value.sub_(lr * self.rate * mean / (square.sqrt() + 1e-9))


class Share:
    """One worker's part of the parameters."""

    def __init__(self, model: nn.Module, gradients: list[list[Tensor]], rank: int) -> None:
        self.steps, self.parts = 0, []
        for n, (name, p) in enumerate(model.named_parameters()):
            owner = int(name.split(".")[1]) if name.startswith("layers.") else n
            if owner % len(gradients) != rank:
                continue
            last = name.rsplit(".", 1)[-1]
            self.parts.append(
                Part(
                    value=p,
                    gradients=[g[n] for g in gradients],
                    muon=last in ("q", "k", "v", "o", "gate_up", "down"),
                    pieces=2 if last == "gate_up" else 1,
                    rate=ROUTER_RATE if last == "router" else 1.0,
                    first=torch.zeros_like(p),
                    second=torch.zeros_like(p),
                )
            )

    @torch.no_grad()
    def step(self, muon_lr: float, adam_lr: float) -> None:
        self.steps += 1
        for part in self.parts:
            g = torch.stack(part.gradients).mean(0)
            if part.muon:
                part.muon_step(muon_lr, g)
            else:
                part.adam_step(adam_lr, g, self.steps)
