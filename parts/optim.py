"""Optimizers that torch lacks in a form that is fast on every device."""

from collections import defaultdict

import torch


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024): same update and same state, in types and batches that suit the device.

    torch multiplies in bfloat16, one matrix at a time. A CPU without bfloat16 instructions emulates that fifty times
    slower than float32. Here matrices of one shape, or of its transpose, are orthogonalised in one batch, in bfloat16
    only where the device multiplies in it natively. The learning rate is scaled as match_rms_adamw, so that AdamW's
    serves for both.
    """

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.device, *sorted(p.shape)].append(p)
            for (device, _, long), matrices in alike.items():
                updates = torch.stack([self._momentum(p, group) for p in matrices])  # (B, m, n), m <= n
                updates = orthogonal(updates.to(fast_type(device)), group["ns_coefficients"], group["ns_steps"])
                for p, update in zip(matrices, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    update = update if p.shape == update.shape else update.mT
                    p.add_(update, alpha=-0.2 * long**0.5 * group["lr"])
        return loss

    def _momentum(self, p, group):
        """The gradient of p with Nesterov's momentum, its shorter side first."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        mean = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(mean, group["momentum"])
        return update if p.shape[0] <= p.shape[1] else update.mT


def orthogonal(matrices, coefficients, steps):
    """Matrices (B, m, n), m <= n, with singular values near 1 in place of their own, by Newton-Schulz iteration."""
    a, b, c = coefficients
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (B, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def fast_type(device):
    """bfloat16 where the device multiplies in it natively, else float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32
