"""The same networks in other states: frozen, half, in train mode, without gradients, checkpointed, reparametrised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from zoo_connections import conv, conv_bn, pooled
from zoo_entry import BATCH, CLASSES, TOKENS, entry, image, tokens, vector, words


class Small(nn.Module):
    """stem -> residual block -> linear, the body of most entries here."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.back = conv_bn(3, 7), conv_bn(7, 11), conv(11, 7)
        self.head = nn.Linear(7, CLASSES)

    def body(self, x):
        return x + self.back(self.block(x))

    def forward(self, x):
        return self.head(pooled(F.gelu(self.body(self.stem(x)))))


SMALL = "stem.0.weight:0 block.0.weight back.weight head.weight:1"


@entry(image(), SMALL)
class Frozen(Small):
    """requires_grad is False everywhere."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


@entry(image(), SMALL)
class PartlyFrozen(Small):
    """requires_grad is False in the block only."""

    def __init__(self):
        super().__init__()
        self.block.requires_grad_(False)


@entry(image(), SMALL, dtype=torch.bfloat16)
class Half(Small):
    """bfloat16 parameters, buffers and inputs."""


@entry(tokens(), "up.weight down.weight", dtype=torch.float16)
class HalfLinear(nn.Module):
    """float16, with float32 inside a norm as Llama has it."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.scale = (
            nn.Linear(5, 11),
            nn.Linear(11, CLASSES),
            nn.Parameter(torch.ones(11)),
        )

    def forward(self, x):
        x = self.up(x)
        wide = x.float() if x.dtype == torch.float16 else x
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.down(self.scale * wide.to(x.dtype))


@entry(image(), SMALL, train=True)
class TrainMode(Small):
    """Left in train mode: batch statistics, and running ones that tracing must not move."""


@entry(image(), "stem.0.weight:0 left.0.weight:0 head.weight:1", train=True)
class MixedModes(nn.Module):
    """In train mode but for one branch that the user put in eval mode; both must come back so."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = conv_bn(3, 5), conv_bn(5, 7), conv_bn(5, 7)
        self.head = nn.Linear(7, CLASSES)

    def train(self, mode: bool = True):
        super().train(mode)
        self.right.eval()
        return self

    def forward(self, x):
        x = self.stem(x)
        return self.head(pooled(self.left(x) + self.right(x)))


@entry(image(), SMALL)
class WithoutGrad(Small):
    """forward runs under torch.no_grad()."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@entry(image(), SMALL)
class InferenceInside(Small):
    """A frozen stem under no_grad, then detach, the rest trains."""

    def forward(self, x):
        with torch.no_grad():
            x = self.stem(x)
        return self.head(pooled(F.gelu(self.body(x.detach()))))


@entry(image(), SMALL)
class Checkpointed(Small):
    """torch.utils.checkpoint without reentrance around the block."""

    def forward(self, x):
        x = checkpoint(self.body, self.stem(x), use_reentrant=False)
        return self.head(pooled(F.gelu(x)))


@entry(image(), SMALL, train=True)
class CheckpointedReentrant(Small):
    """The reentrant checkpoint, in train mode."""

    def forward(self, x):
        x = checkpoint(self.body, self.stem(x), use_reentrant=True)
        return self.head(pooled(F.gelu(x)))


@entry(image(), "stem.0.weight:0 body.0.weight:0 head.weight:1", train=True)
class AuxiliaryHead(nn.Module):
    """GoogLeNet: a second head that runs in train mode only, and is given in train mode."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = conv_bn(3, 7), conv_bn(7, 11)
        self.aux, self.head = nn.Linear(7, CLASSES), nn.Linear(11, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        out = self.head(pooled(self.body(x)))
        return (out, self.aux(pooled(x))) if self.training else out


@entry(image(), "stem.0.weight:0 aux.0.weight body.0.weight:0 head.weight:1", keeps="aux.2.weight:0")
class AuxiliaryHeadInEval(nn.Module):
    """The same given in eval mode: the second head is not reached, yet must follow its input's channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = conv_bn(3, 7), conv_bn(7, 11)
        self.aux = nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.Linear(13, CLASSES))
        self.head = nn.Linear(11, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        out = self.head(pooled(self.body(x)))
        return (out, self.aux(pooled(x))) if self.training else out


@entry(vector(), "used.weight:0 last.weight:1", keeps="unused.weight spare")
class Unreached(nn.Module):
    """A layer and a parameter that no run reaches stay as they are."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.last = nn.Linear(5, 11), nn.Linear(11, 13), nn.Linear(11, CLASSES)
        self.spare = nn.Parameter(torch.zeros(11))

    def forward(self, x):
        return self.last(F.gelu(self.used(x)))


@entry(image(), "a.parametrizations.weight.original1:0 b.parametrizations.weight.original1 head.weight:1")
class WeightNorm(nn.Module):
    """torch.nn.utils.parametrizations.weight_norm on a convolution and on a linear."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (
            parametrizations.weight_norm(conv(3, 7)),
            parametrizations.weight_norm(nn.Linear(7, 11)),
        )
        self.head = nn.Linear(11, CLASSES)

    def forward(self, x):
        return self.head(F.gelu(self.b(pooled(F.gelu(self.a(x))))))


class Symmetric(nn.Module):
    """A square weight made symmetric: its rows and columns are the same channels."""

    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)


@entry(vector(), "enter.weight:0 reduce.weight:1")
class HandMadeParametrization(nn.Module):
    """A user's parametrization: symmetric, by triu, which mixes positions; those may stay."""

    def __init__(self):
        super().__init__()
        self.enter, self.middle, self.head = nn.Linear(5, 11), nn.Linear(7, 7), nn.Linear(7, CLASSES)
        self.reduce = nn.Linear(11, 7)
        parametrize.register_parametrization(self.middle, "weight", Symmetric())

    def forward(self, x):
        return self.head(F.gelu(self.middle(F.gelu(self.reduce(F.gelu(self.enter(x)))))))


def standardise(module: nn.Module, inputs: tuple) -> None:
    """An old-style pre-hook: computes a plain attribute `weight` from the parameter `raw` before each call."""
    module.weight = module.raw * module.gain[:, None]


@entry(vector(), "middle.raw middle.gain head.weight:1 enter.weight:0")
class OldStyleHook(nn.Module):
    """The weight is made by a forward pre-hook, as old weight_norm and spectral_norm did."""

    def __init__(self):
        super().__init__()
        self.enter, self.middle, self.head = nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, CLASSES)
        self.middle.raw, self.middle.gain = (
            nn.Parameter(self.middle.weight.detach()),
            nn.Parameter(torch.ones(11)),
        )
        del self.middle.weight
        self.middle.register_forward_pre_hook(standardise)

    def forward(self, x):
        return self.head(F.gelu(self.middle(F.gelu(self.enter(x)))))


def double(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    """A forward hook that changes what the module returns."""
    return torch.cat([output, output.tanh()], dim=1)


@entry(image(), "stem.0.weight:0 last.weight")
class ForwardHook(nn.Module):
    """A forward hook that concatenates; hooks must live on the pruned model."""

    def __init__(self):
        super().__init__()
        self.stem, self.last, self.head = conv_bn(3, 7), conv(14, 11), nn.Linear(11, CLASSES)
        self.stem.register_forward_hook(double)

    def forward(self, x):
        return self.head(pooled(F.gelu(self.last(self.stem(x)))))


@entry(
    lambda: (torch.randn(BATCH, TOKENS, 5), {"mask": torch.rand(BATCH, TOKENS) > 0.2}),
    "enter.weight:0 last.weight:1",
)
class NestedInputs(nn.Module):
    """A dict among the inputs, nested containers and a number among the outputs."""

    def __init__(self):
        super().__init__()
        self.enter, self.last, self.other = nn.Linear(5, 11), nn.Linear(11, CLASSES), nn.Linear(11, 2)

    def forward(self, x, options):
        x = F.gelu(self.enter(x)) * options["mask"][..., None]
        return {"logits": self.last(x), "more": [(self.other(x).sum(1), 3)], "loss": None}


@entry(words(), "embed.weight:1 out.weight:1")
class EmbeddingBags(nn.Module):
    """Embedding with a padding index, EmbeddingBag, and a lookup with the parameter itself."""

    def __init__(self):
        super().__init__()
        self.embed, self.bag = nn.Embedding(17, 7, padding_idx=0), nn.EmbeddingBag(17, 11, mode="mean")
        self.table, self.out = nn.Parameter(torch.randn(17, 13)), nn.Linear(31, CLASSES)

    def forward(self, ids):
        parts = [self.embed(ids).mean(1), self.bag(ids), self.table[ids].amax(1)]
        return self.out(torch.cat(parts, -1))


@entry(image(), "first.0.weight:0 block.convs.*.0.weight:0 last.weight:1")
class ControlFlow(nn.Module):
    """Loops, conditions on shapes, a module called through getattr, *args and a nested class with attributes."""

    class Inner(nn.Module):
        """Two convolutions that insist on their width."""

        def __init__(self, width: int):
            super().__init__()
            self.width, self.convs = width, nn.ModuleDict({"a": conv_bn(width, 11), "b": conv_bn(11, width)})

        def forward(self, x, *extra):
            assert x.shape[1] == self.width, f"expected {self.width} channels, got {x.shape[1]}"
            for name in ("a", "b"):
                x = self.convs[name](x)
            return x + sum(extra)

    def __init__(self):
        super().__init__()
        self.first, self.block, self.last = conv_bn(3, 7), self.Inner(7), nn.Linear(7, CLASSES)

    def forward(self, x):
        x = getattr(self, "first")(x)  # noqa: B009
        x = self.block(x, x, x.tanh())
        return self.last(pooled(x) if x.dim() == 4 else x)
