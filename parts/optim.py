"""Optimisation: AdamW, Muon and SparseAdam as one optimizer, averaged weights.

- `Optimizer` shares the trained parameters out among torch's AdamW, the Muon below and torch's SparseAdam. It scales
  the loss (float16), clips the gradient, and skips a step whose loss or gradient is not finite.
- The host never waits for the device: what it counts stays there as tensors.

Letters in shapes: B matrices of one shape, m rows, n columns.
"""

import copy
from collections import defaultdict
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn

from parts.files import need
from parts.tensors import fault

# What each optimizer keeps of every parameter, by name in its state_dict
MEMORY = {
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "SparseAdam": {"step", "exp_avg", "exp_avg_sq"},
    "Muon": {"momentum_buffer"},
}


class Optimizer:
    """Every trained parameter of a model, moved by the optimizer that suits it.

    Keys of cfg: learning_rate, weight_decay (of matrices only), beta1, beta2, muon (for the matrices inside the
    transformers), sparse_embeddings, grad_clip, step_in_backward. loss_scaling: for float16. `skipped` () counts the
    steps that were left out because loss or gradient was not finite, `in_a_row` () those since the last good one.
    """

    def __init__(self, model, cfg, device, loss_scaling=False, world=1):
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = share_out(model, cfg)
        self.scaler = torch.amp.GradScaler(device.type, enabled=loss_scaling)
        self.clip = cfg.grad_clip
        self.world = world
        self.loss = 0.0
        self.skipped, self.in_a_row = torch.zeros(2, device=device)
        self.norms = [] if cfg.step_in_backward else None  # of the gradients that are already freed
        if cfg.step_in_backward:
            self._step_in_backward()

    def set_lr(self, lr):
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def backward(self, loss, parts=1):
        """Add the gradient of one of the equal parts (micro-batches) of a step."""
        self.loss = self.loss + loss.detach()
        self.scaler.scale(loss / parts).backward()

    def step(self):
        """Move the parameters and free the gradients. Returns the gradient's norm before clipping and 1.0 where the
        step was skipped (0.0 where it was not), tensors ()."""
        if self.norms is not None:
            norm = torch.stack(self.norms).norm()
            self.norms.clear()
        else:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            norm = clip_gradients(self.trained, self.clip)
        bad = self._not_finite(norm)
        if self.world > 1:  # all ranks skip, or none
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if self.norms is None:
            for optimizer in self.optimizers:
                self._move(optimizer, bad)
        self.scaler.update()
        for p in self.trained:
            p.grad = None
        self.skipped = self.skipped + bad
        self.in_a_row = (self.in_a_row + 1) * bad
        self.loss = 0.0
        return norm, bad

    def _not_finite(self, norm):
        return (~(norm.isfinite() & self.loss.isfinite())).float()

    def _move(self, optimizer, bad):
        optimizer.found_inf = bad  # the fused AdamW reads this on the device, and then changes nothing
        if isinstance(optimizer, torch.optim.AdamW) or not bad:
            self.scaler.step(optimizer)

    def _step_in_backward(self):
        """Update each weight in backward, then free its gradient (LOMO, Lv et al. 2023): 4 bytes a weight less.

        A weight whose gradient is not finite stays; others may have moved before. An optimizer moves what has a
        gradient, which is one parameter at a time here, so its state is that of any other run.
        """

        def moved(optimizer, p):
            self.norms.append(clip_gradients([p], 0))
            self._move(optimizer, self._not_finite(self.norms[-1]))
            p.grad = None

        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.register_post_accumulate_grad_hook(partial(moved, optimizer))

    def state_dict(self):
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "skipped": torch.stack([self.skipped, self.in_a_row]),
        }

    def load_state_dict(self, state, path):
        """Take the state from the checkpoint `path`; learning rate, betas and the like stay those of this run.

        Raises ValueError, one line, where it is damaged.
        """
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            check_memory(optimizer, saved, path)
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"] or self.scaler.state_dict())
        self.skipped, self.in_a_row = state["skipped"].to(self.skipped.device)


def share_out(model, cfg):
    """torch's optimizers for the trained parameters of a model, each parameter in one of them."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rate = cfg.learning_rate
    betas = cfg.beta1, cfg.beta2
    tables = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    inside = [name for name, p in trained.items() if ".layers." in name and ".lora_" not in name and p.ndim == 2]
    inside = [trained.pop(name) for name in inside if cfg.muon]
    for name, table in tables.items():
        table.sparse = cfg.sparse_embeddings and name in trained
    sparse = [trained.pop(name) for name, table in tables.items() if table.sparse]
    groups = [
        {"params": [p for p in trained.values() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, rate, betas, fused=True)]
    if inside:
        optimizers.append(Muon(inside, rate, cfg.weight_decay))
    if sparse:  # only the rows that a step looks up move; no weight decay, which would move them all
        optimizers.append(torch.optim.SparseAdam(sparse, rate, betas))
    return optimizers


def check_memory(optimizer, saved, path):
    """Raise ValueError where `saved` is not a state_dict of this optimizer."""
    kind = type(optimizer).__name__
    need(saved, {"state": dict}, f"{path}, optimizer {kind},")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, memory in saved["state"].items():
        if i not in range(len(parameters)) or not isinstance(memory, dict) or memory.keys() != MEMORY[kind]:
            raise ValueError(f"{path} is damaged: it holds no memory of {kind} for parameter {i!r:.40}")
        for name, x in memory.items():
            like = torch.zeros(()) if name == "step" else parameters[i]
            if wrong := fault(torch.tensor(float(x)) if type(x) is int else x, like):
                raise ValueError(f"{path} is damaged: {name} of {kind} for parameter {i} {wrong}")


def clip_gradients(parameters, largest):
    """Scale the gradients down to a norm of at most `largest`; 0: leave them. Returns the norm before, a tensor ()."""
    sparse = [p for p in parameters if p.grad is not None and p.grad.is_sparse]
    for p in sparse:
        p.grad = p.grad.coalesce()  # adds up rows that occur twice
    values = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
    values += [p.grad.values() for p in sparse]
    norm = nn.utils.get_total_norm(values)
    if largest:
        torch._foreach_mul_(values, (largest / (norm + 1e-6)).clamp(max=1))
    return norm


class Average:
    """Exponential moving average of a model's weights: `model` is the averaged copy."""

    def __init__(self, model, decay):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model, step):
        decay = min(self.decay, (1 + step) / (10 + step))  # early averages forget the initialisation quickly
        for mean, p in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(p.detach(), 1 - decay)


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
