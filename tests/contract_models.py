"""Small networks, and what is compared, for the tests of the public contract."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph


class Residual(nn.Module):
    """stem -> two blocks with residual sums -> pooled linear head; the stream is 32 wide, the blocks 48 and 20."""

    def __init__(self, stream: int = 32, middle: int = 48, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stream, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(stream, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
            nn.Conv2d(middle, stream, 3, padding=1),
        )
        self.second = nn.Sequential(nn.Conv2d(stream, 20, 1), nn.ReLU(), nn.Conv2d(20, stream, 1))
        self.head = nn.Linear(stream, classes)
        self.note = ("a tuple", 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.block(x))
        x = x + self.second(x)
        return self.head(x.mean(dim=(2, 3)))


class Tied(nn.Module):
    """A language model in miniature: the output layer shares the embedding's weight, [vocabulary 23, width 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 16)
        self.up = nn.Linear(16, 40)
        self.down = nn.Linear(40, 16)
        self.out = nn.Linear(16, 23, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.out(x + self.down(F.gelu(self.up(x))))


class Picky(Residual):
    """Refuses what it is given, in its own words."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("the moon is not full tonight")


@torch.library.custom_op("depgraph_contract::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    """An op that no library knows a rule for."""
    return x.clone()


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 9, 11, generator=torch.Generator().manual_seed(1))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and statistic drawn anew, so that no zero bias or unit variance can hide a wrong index."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value.copy_(0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.abs_().add_(0.5)
    return model


def residual(**widths: int) -> nn.Module:
    return randomised(Residual(**widths)).eval()


def as_bytes(value: Tensor) -> bytes | None:
    """Raw memory, so that NaN equals NaN and 0.0 differs from -0.0. None on the meta device, which has no values."""
    if value.is_meta:
        return None
    return value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a pruner could leave changed, in a form that `==` compares exactly."""
    seen: dict[str, Any] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, value in tensors:
        seen[f"tensor {name}"] = (
            id(value),
            value.shape,
            value.stride(),
            value.dtype,
            value.device,
            value.requires_grad,
            value.grad is None,
            as_bytes(value),
        )
    seen["state"] = list(model.state_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        seen[f"class {name}"] = type(module)
        seen[f"training {name}"] = module.training
        seen[f"hooks {name}"] = {kind: list(getattr(module, kind)) for kind in HOOKS}
        seen[f"children {name}"] = {key: id(child) for key, child in module.named_children()}
        seen[f"attributes {name}"] = {
            key: copy.deepcopy(value)
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str, tuple, list, type(None))) and key not in HOOKS
        }
        seen[f"names {name}"] = sorted(vars(module))
        seen[f"forward {name}"] = getattr(module.forward, "__func__", module.forward)
    return seen


def masked(model: nn.Module, plan: depgraph.Plan) -> nn.Module:
    """The original with every removed entry of every parameter and buffer set to zero."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in twin.state_dict(keep_vars=True).items():
            mask = plan.mask(name)
            if not mask.all():
                value.mul_(mask)
    return twin


def assert_replays(pruned: nn.Module, original: nn.Module, plan: depgraph.Plan) -> None:
    """The contract of `mask`: what is left is the original's entries where the mask is True, in order."""
    left, before = pruned.state_dict(), original.state_dict()
    assert list(left) == list(before)
    for name, value in before.items():
        mask = plan.mask(name)
        assert mask.dtype == torch.bool, name
        assert mask.shape == value.shape, name
        torch.testing.assert_close(
            left[name].flatten(), value[mask], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_function(
    pruned: nn.Module, original: nn.Module, plan: depgraph.Plan, *inputs: Tensor
) -> None:
    """In float64: the pruned model computes what the masked original does. Holds without statistics over channels."""
    pruned, twin = copy.deepcopy(pruned).double().eval(), masked(original, plan).double().eval()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        torch.testing.assert_close(pruned(*inputs), twin(*inputs), rtol=1e-9, atol=1e-9)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def on_meta() -> nn.Module:
    return residual().to("meta")


def picky() -> nn.Module:
    return randomised(Picky()).eval()
