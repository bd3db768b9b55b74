"""Depth: branches are found in any architecture, go alone or beside widths, and the rest computes the same without them."""

from __future__ import annotations

import copy
import itertools
import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vision_ops  # noqa: F401  # makes torchvision importable, which transformers needs
from checks import random_importance
from depth_checks import check_depth, check_state, random_depth, silenced
from oracle import assert_untouched, snapshot
from random_networks import random_network
from torch import Tensor, nn

import depgraph
from depgraph import Depth, InputError, NothingToPruneError, PlanError
from depgraph.data.calibration import Calibration
from depgraph.depth import choose
from depgraph.depth.branches import Residual
from depgraph.depth.choose import Candidates
from depgraph.depth.rank import Ranking
from depgraph.depth.removing import without

IMAGE = torch.randn(2, 3, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TOKENS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Basic(nn.Module):
    """A residual block that rectifies behind the sum."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out))
        out += x
        return out.relu()


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Basic(8, 5), Basic(8, 7), Basic(8, 8))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(F.max_pool2d(self.stem(x), 2)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.layer_idx, self.heads = layer_idx, config.heads
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cache: dict[int, Any] | None = None) -> tuple[Tensor, None]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if self.layer_idx != len(cache) and self.layer_idx not in cache:
                raise IndexError(f"place {self.layer_idx} of {len(cache)}")
            before = cache.get(self.layer_idx)
            k, v = (
                (k, v)
                if before is None
                else (torch.cat([b, n], 2) for b, n in zip(before, (k, v), strict=True))
            )
            cache[self.layer_idx] = k, v
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), None


class Layer(nn.Module):
    """Pre-norm, attention that returns a tuple, a scale of the feed-forward part by a parameter of its own."""

    def __init__(self, config: Any, number: int):
        super().__init__()
        self.kind = config.kinds[number]
        self.norm1, self.attention = nn.LayerNorm(config.width), Attention(config, number)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.inner), nn.GELU(), nn.Linear(config.inner, config.width)
        )
        self.scale = nn.Parameter(torch.full((config.width,), 0.7))

    def forward(self, x: Tensor, cache: dict[int, Any] | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache=cache)[0] * (2.0 if self.kind == "loud" else 1.0)
        return x + self.scale * self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Built from a config that counts its layers, and lists a kind for each."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.depth))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, 5)

    def forward(self, x: Tensor, cache: dict[int, Any] | None = None) -> Tensor:
        for layer in self.layers[: self.config.depth]:
            x = layer(x, cache)
        return self.head(self.norm(x))


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall, self.norm = nn.Linear(12, 9), nn.Linear(9, 12), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.fall(self.rise(x).relu()))


def decoder(*kinds: str) -> Decoder:
    config = SimpleNamespace(width=12, inner=10, heads=3, depth=len(kinds), kinds=list(kinds))
    return ready(Decoder(config))


def ready(model: nn.Module) -> Any:
    """Random weights and statistics, in float64 and eval mode."""
    dice = torch.Generator().manual_seed(0)
    model = model.double().eval()
    for name, t in itertools.chain(model.named_parameters(), model.named_buffers()):
        if t.is_floating_point():
            drawn = torch.randn(t.shape, generator=dice, dtype=t.dtype)
            t.data.copy_(drawn.abs() + 0.5 if t.dim() < 2 and "bias" not in name else 0.4 * drawn)
    return model


def pruned(model: nn.Module, inputs: Any, **options: Any) -> depgraph.PruneResult:
    """`depgraph.prune`, held against the oracle; the model stays as it is."""
    before = snapshot(model)
    result = depgraph.prune(model, inputs, **options)
    assert_untouched(model, before)
    assert result.report.verification.status == "equal"
    check_depth(model, result, inputs)
    return result


@torch.no_grad()
def distance(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    return float((one(x) - other(x)).square().sum())


# ------------------------------------------------------------------------------------------------- what is found


def test_the_parts_of_layers_are_found_with_their_weights() -> None:
    found = depgraph.branches(decoder("plain", "plain"), TOKENS)
    assert [b.name for b in found] == [
        "layers.0.attention",
        "layers.0.mlp",
        "layers.1.attention",
        "layers.1.mlp",
    ]
    assert "layers.0.norm1.weight" in found[0].weights
    assert found[0].parameters == 4 * 12 * 12 + 4 * 12 + 2 * 12
    assert found[1].macs == 2 * 5 * 2 * 12 * 10


def test_residual_blocks_without_a_projection_are_found() -> None:
    found = depgraph.branches(ready(ResNet()), IMAGE)
    assert [b.name for b in found] == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_norm_behind_the_sum_is_no_part_of_the_branch() -> None:
    model = ready(nn.Sequential(PostNorm(), PostNorm(), nn.Linear(12, 3)))
    found = depgraph.branches(model, TOKENS)
    assert [b.weights for b in found] == [
        tuple(f"{i}.{n}" for n in ("fall.bias", "fall.weight", "rise.bias", "rise.weight")) for i in range(2)
    ]
    result = pruned(model, TOKENS, depth=Depth(keep=1))
    assert len(result.model) == 3  # the norm is left, so the layer stays


def test_what_shares_weights_or_is_read_elsewhere_is_none() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.other, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x + self.block(x)
            x = x + self.block(x)
            inner = self.other(x)
            return self.last(x + inner), inner

    assert depgraph.branches(ready(Twice()), TOKENS) == []
    with pytest.raises(NothingToPruneError, match="block is called several times"):
        depgraph.prune(ready(Twice()), TOKENS, depth=True)


def test_parallel_parts_of_one_sum_are_branches_each() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b, self.last = (
                nn.LayerNorm(12),
                nn.Linear(12, 12),
                nn.Linear(12, 12),
                nn.Linear(12, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.last(self.a(y) + self.b(y) + x)

    model = ready(Parallel())
    assert [b.name for b in depgraph.branches(model, TOKENS)] == ["a", "b"]
    for keep in (0, 1):
        pruned(model, TOKENS, depth=Depth(keep=keep, by="magnitude"))


def test_a_module_may_write_into_what_it_has_made() -> None:
    class Windowed(nn.Module):
        """Makes its mask by writes into slices, as attention in shifted windows does, and keeps a cache that nothing reads."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.out = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x)
            mask = x.new_zeros(x.shape[1], x.shape[1])
            mask[:2, 2:] = -9.0
            self.last = torch.cat([q, q], 1)[:, -3:].shape
            return self.out((q @ q.transpose(1, 2) + mask).softmax(-1) @ q)

    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.last = nn.ModuleList([Windowed(), Windowed()]), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = x + part(x)
            return self.last(x)

    model = ready(Layered())
    assert [b.name for b in depgraph.branches(model, TOKENS)] == ["parts.0", "parts.1"]
    pruned(model, TOKENS, depth=Depth(keep=1))


class InPlace(nn.Module):
    """Writes into what its first layer returns: a module, a function or an operator does."""

    def __init__(self, write: Any):
        super().__init__()
        self.write, self.rise, self.fall = write, nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.rise(x)
        h = self.write(h)
        h = self.fall(h)
        h += x
        return F.relu_(h)


@pytest.mark.parametrize(
    "write", [nn.SiLU(inplace=True), F.relu_, lambda h: h.mul_(2.5)], ids=["module", "relu", "operator"]
)
@pytest.mark.parametrize("compact", [True, False])
def test_what_a_branch_writes_in_place_is_not_the_stream(write: Any, compact: bool) -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Linear(12, 12), InPlace(write), InPlace(write)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.first(x).tanh()))

    kinds = [nn.Linear(12, 12), nn.Tanh(), InPlace(write), InPlace(write), nn.Linear(12, 3)]
    model = ready(nn.Sequential(*kinds) if compact else Apart())
    assert len(depgraph.branches(model, TOKENS)) == 2
    pruned(model, TOKENS, depth=Depth(keep=1, by="magnitude"))  # runs forward and backward in both modes


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("keep", [3, 2])
def test_what_computes_with_weights_of_its_parts_calls_those_that_stand_in(
    norm_first: bool, keep: int
) -> None:
    """torch's encoder layers take the weights of their attention and run one kernel, where no gradient is wanted."""
    layers = [
        nn.TransformerEncoderLayer(12, 4, 20, batch_first=True, norm_first=norm_first) for _ in range(2)
    ]

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = *layers, nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.b(self.a(x)))

    model = ready(Apart())
    attention = ["a.self_attn", "b.self_attn"]  # which the kernel then takes for whole
    result = pruned(model, TOKENS, depth=Depth(keep=keep, by="magnitude"), ignore=attention)
    with torch.no_grad():
        fast = result.model.eval().to(TOKENS.dtype)(TOKENS)
    torch.testing.assert_close(fast, result.model(TOKENS).detach())


def test_a_branch_stays_without_which_the_model_does_not_run_as_users_run_it() -> None:
    """torch's encoder asks its first layer's attention for weights, whatever hooks there are, where tokens are padded."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True)
            self.encoder, self.last = nn.TransformerEncoder(layer, 2), nn.Linear(12, 3)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.last(self.encoder(x, src_key_padding_mask=padding))

    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    model = ready(Padded()).float()
    found = [b.name for b in depgraph.branches(model, (TOKENS.float(), padding))]
    assert found == [f"encoder.layers.{part}" for part in ("0.linear1", "1.self_attn", "1.linear1")]


# ------------------------------------------------------------------------------------------------- what is removed


class FusedBlock(nn.Module):
    """Projections in one, taken apart by code of the block itself: what stands in for them has other sizes."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.both, self.down = nn.Linear(width, 14), nn.Linear(7, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.drop(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        gate, up = self.both(self.second(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.blocks = nn.Sequential(*(FusedBlock() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class GatedBlock(nn.Module):
    """Channels that a convolution makes for a gate and for what it gates."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Conv2d(8, 20, 3, padding=1), nn.Conv2d(10, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, 1)
        return x + self.down(gate.sigmoid() * up)


def gated() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), GatedBlock(), GatedBlock(), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize(
    ("make", "sizes", "names", "ends"),
    [
        (Fused, [(2, 6, 5), (3, 9, 5)], [f"blocks.{i}.{n}" for i in range(3) for n in ("qkv", "both")], ("out", "down")),
        (gated, [(2, 3, 9, 9), (1, 3, 7, 12)], ["1", "2"], ("down",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("widths", [None, 0.3])
def test_branches_that_take_a_fused_projection_apart_go(
    make: Any, sizes: Any, names: list[str], ends: tuple[str, ...], widths: float | None, tmp_path: Any
) -> None:
    model = ready(make())
    x, other = (torch.randn(s, dtype=torch.float64) for s in sizes)
    assert [b.name for b in depgraph.branches(model, x)] == names
    keep = len(names) // 2
    result = pruned(model, x, depth=Depth(keep=keep, by="magnitude"), pruning_ratio=widths)
    assert len(result.report.removed) == len(names) - keep
    if widths is None:
        silent = copy.deepcopy(model)
        for name in result.report.removed:
            block, _, part = name.rpartition(".")
            end = ends[["qkv", "both"].index(part)] if part in ("qkv", "both") else "down"
            for p in silent.get_submodule(f"{block or name}.{end}").parameters():
                p.data.zero_()
        torch.testing.assert_close(result.model.train()(other), silent.train()(other), rtol=1e-9, atol=1e-9)
    depgraph.save(result, tmp_path / "small")
    again = depgraph.load(lambda: make().double(), tmp_path / "small")
    assert torch.equal(again.train()(other), result.model.train()(other))


def test_children_of_containers_go_and_the_rest_move_up() -> None:
    model = ready(ResNet())
    result = pruned(model, IMAGE, depth=Depth(keep=1, by="magnitude"))
    gone = [r.path for r in result.plan.removals if r.leaves == "nothing"]
    assert len(result.model.blocks) == 1
    assert len(gone) == 2
    assert [
        result.plan.new_name(f"blocks.{i}.conv1.weight") for i in range(3) if f"blocks.{i}" not in gone
    ] == ["blocks.0.conv1.weight"]
    assert type(result.model.blocks[0]) is Basic


def test_where_something_of_a_child_is_left_zeros_stand_in_the_place_of_the_rest() -> None:
    model = decoder("plain", "plain", "plain")
    result = pruned(model, TOKENS, depth=Depth(keep=3, by="magnitude"), ignore=["*mlp*"])
    assert result.report.removed == [f"layers.{i}.attention" for i in range(3)]
    assert len(result.model.layers) == 3
    assert sum(p.numel() for p in result.model.layers[0].attention.parameters()) == 0


def test_indices_in_a_cache_are_without_gaps_and_the_config_follows() -> None:
    model = decoder("plain", "loud", "quiet", "loud")
    result = pruned(model, TOKENS, depth=Depth(keep=4), uniform=True)
    small = result.model
    left = [i for i in range(4) if result.plan.new_name(f"layers.{i}") is not None]
    assert small.config.depth == len(small.layers) == 2
    assert small.config.kinds == [["plain", "loud", "quiet", "loud"][i] for i in left]
    assert [layer.attention.layer_idx for layer in small.layers] == [0, 1]
    assert model.config.depth == 4
    stock = Decoder(small.config).double()
    stock.load_state_dict(small.state_dict())
    assert torch.equal(stock(TOKENS), small(TOKENS))
    cache: dict[int, Any] = {}
    small(TOKENS, cache)
    assert sorted(cache) == [0, 1]


def test_a_cache_has_no_gap_where_attention_alone_goes() -> None:
    model = decoder(*["plain"] * 4)
    result = pruned(
        model, TOKENS, depth=Depth(keep=6, by="magnitude"), ignore=["*mlp*", "layers.1*", "layers.3*"]
    )
    cache: dict[int, Any] = {}
    result.model(TOKENS, cache)
    assert result.report.removed == ["layers.0.attention", "layers.2.attention"]
    assert sorted(cache) == [0, 1]
    assert len(result.model.layers) == 4


@pytest.mark.slow
def test_code_that_names_layers_by_number_gets_stand_ins() -> None:
    class Numbered(Decoder):
        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            for i in range(3):
                x = self.layers[i](x)
            return self.head(self.norm(x))

    config = SimpleNamespace(width=12, inner=10, heads=3, depth=3, kinds=["plain"] * 3)
    model = ready(Numbered(config))
    result = pruned(model, TOKENS, depth=Depth(keep=4, contiguous=True, by="magnitude"))
    assert len(result.model.layers) == 3


@pytest.mark.slow
def test_inplace_is_the_same_model() -> None:
    model = ready(ResNet())
    expected = depgraph.prune(model, IMAGE, depth=Depth(keep=1), pruning_ratio=0.4)
    result = depgraph.prune(model, IMAGE, depth=Depth(keep=1), pruning_ratio=0.4, inplace=True)
    assert result.model is model
    assert torch.equal(expected.model(IMAGE), model(IMAGE))


# ------------------------------------------------------------------------------------------------ which, how many


@pytest.mark.parametrize("by", ["influence", "taylor", "loss", "magnitude"])
@pytest.mark.parametrize("contiguous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_branch_that_does_nothing_goes_first(by: str, contiguous: bool) -> None:
    model = decoder(*["plain"] * 3)
    idle = model.layers[1].mlp
    with torch.no_grad():
        for p in idle.parameters():
            p.mul_(1e-6)
    batches = [
        (TOKENS, torch.zeros(2, 5, dtype=torch.long)),
        (TOKENS.flip(0), torch.ones(2, 5, dtype=torch.long)),
    ]

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(y, model(TOKENS) if not target.any() else model(TOKENS.flip(0))).add(1e-9)

    if by == "taylor":  # at the original's own outputs there is no slope

        def loss(y: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(y.flatten(0, 1), target.flatten())

    result = pruned(
        model, TOKENS, depth=Depth(keep=5, by=by, contiguous=contiguous), calibration=batches, loss=loss
    )
    assert result.report.removed == ["layers.1.mlp"]
    assert result.report.to_dict()["removed"] == ["layers.1.mlp"]


def test_branches_are_ranked_again_after_each_removal() -> None:
    """A branch doubles the stream, one halves it, one adds six tenths: once the last is gone, the second is the cheapest."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.last = (
                nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(3)),
                nn.Linear(12, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = x + part(x)
            return self.last(x)

    model = ready(Pair())
    with torch.no_grad():
        model.parts[0].weight.copy_(torch.eye(12) * 1.0)
        model.parts[1].weight.copy_(torch.eye(12) * -0.5)
        model.parts[2].weight.copy_(torch.eye(12) * 0.6)
    targets = model(TOKENS).detach()
    result = pruned(
        model,
        TOKENS,
        depth=Depth(keep=1, by="loss"),
        calibration=[(TOKENS, targets)],
        loss=F.mse_loss,
        recover="none",
    )
    assert result.report.removed == ["parts.1", "parts.2"]
    kept = depgraph.prune(
        model,
        TOKENS,
        depth=Depth(keep=1, by="loss", contiguous=True),
        calibration=[(TOKENS, targets)],
        loss=F.mse_loss,
    )
    assert kept.report.removed == ["parts.0", "parts.1"]


def test_the_loss_without_a_branch_costs_what_comes_behind_it() -> None:
    """Modules in front of a candidate run once for a batch; the losses rise as those of whole runs do."""
    model = decoder(*["plain"] * 4)
    calls = [0] * 4
    batch = (TOKENS, torch.zeros(2, 5, dtype=torch.long))

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y.flatten(0, 1), target.flatten())

    residual = Residual(model, TOKENS)
    units = [(b,) for b in residual.branches]
    ranking = Ranking(residual, "loss", Calibration([batch], TOKENS, loss, progress=False))
    for i in range(4):
        ranking.twin.layers[i].register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    scores = ranking.scores((), units)
    wanted = []
    for unit in units:
        plan = depgraph.Plan(removals=list(unit[0].removals))
        with torch.no_grad():
            rise = loss(silenced(model, plan)(TOKENS), batch[1]) - loss(model(TOKENS), batch[1])
            wanted.append(float(rise))
    assert scores == pytest.approx(wanted, abs=1e-12)
    assert (
        calls[0] < calls[3] == 8 + 2
    )  # every candidate runs the last layer, and once each the first run and the check


class Uneven(nn.Module):
    """Narrow branches that add little each, and a wide one, which adds more, but less for each of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(12, n), nn.Linear(n, 12)) for n in (2, 40, 2, 2, 2)
        )
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x)
        return self.last(x)


@pytest.mark.parametrize(
    ("by", "budget"),
    [("influence", "max_params"), ("taylor", "max_params"), ("loss", "max_bytes"), ("loss", "max_macs")],
)
def test_budgets_take_branches_by_score_for_what_they_save(by: str, budget: str) -> None:
    model = ready(Uneven())
    with torch.no_grad():
        for i, part in enumerate(model.parts):
            for p in part.parameters():
                p.mul_(0.02)
            part[1].bias.fill_(0.06 if i == 1 else 0.05)
    targets = torch.zeros(2, 5, dtype=torch.long)

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y.flatten(0, 1), target.flatten())

    with torch.no_grad():  # what the branches add makes the answer surer
        model.last.weight.copy_(torch.tensor([[1.0], [-1.0], [-1.0]]).expand(3, 12))

    def gone(**how_much: Any) -> list[str]:
        depth = Depth(by=by, alone="keep" not in how_much, keep=how_much.pop("keep", None))
        options = {"calibration": [(TOKENS, targets)], "loss": loss, "recover": "none"}
        return pruned(model, TOKENS, depth=depth, **options, **how_much).report.removed

    assert "parts.1" not in gone(keep=4)  # by score alone
    assert "parts.1" not in gone(keep=4, **{budget: 0.8})
    assert gone(**{budget: 0.4}) == ["parts.1"]  # the narrow ones together would not do
    assert len(few := gone(**{budget: 0.99})) == 1  # more than is asked for is worth nothing
    assert few != ["parts.1"]


class Nested(nn.Module):
    """A branch in a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.second = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return x + self.second(h + self.inner(h))


def test_what_branches_save_is_what_the_model_has_less() -> None:
    nested = nn.Sequential(nn.Linear(12, 12), Nested(), Nested(), nn.Linear(12, 3))
    for model, x, own in ((ready(ResNet()), IMAGE, 0), (ready(nested), TOKENS, 2)):
        found = Candidates(model, x, Depth(by="magnitude"), None, ignored=set(), whole=False)
        assert sum(len(found._inner[b.name]) for b in found.branches) == own
        for count in range(1, len(found.branches) + 1):
            for chosen in itertools.combinations(found.branches, count):
                if found.cuts_off(chosen):
                    continue
                small = depgraph.apply(model, without(found.residual, chosen, x))
                saved = found.saved(chosen)
                gone = depgraph.parameter_count(model) - depgraph.parameter_count(small)
                assert saved["parameters"] == gone, chosen
                assert saved["macs"] == depgraph.count_macs(model, x) - depgraph.count_macs(small, x), chosen


def test_what_is_better_gone_goes_first_and_the_more_of_it() -> None:
    """Score and saving of each, in the order in which they should go."""
    ranked = [(-0.2, 0.9), (-0.2, 0.1), (0.0, 0.5), (0.1, 0.9), (0.1, 0.1), (0.1, 0.0)]
    others = [ranked[i] for i in (3, 0, 5, 1, 4, 2)]
    assert sorted(others, key=lambda pair: choose._value(*pair)) == ranked


def test_losses_are_looked_at_again_as_long_as_one_may_be_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(*["plain"] * 4)
    batch = (TOKENS, torch.zeros(2, 5, dtype=torch.long))

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(y.flatten(0, 1), target.flatten())

    monkeypatch.setattr(choose, "LOOKED", 1)
    data = Calibration([batch], TOKENS, loss, progress=False)
    found = Candidates(model, TOKENS, Depth(by="loss"), data, ignored=set(), whole=False)
    runs: list[Any] = []
    scores = found.ranking.scores
    monkeypatch.setattr(
        found.ranking, "scores", lambda chosen, units: runs.append(len(units)) or scores(chosen, units)
    )
    gone: list[Any] = []
    for count in range(1, 5):
        found.first(count)
        taken = found._order[-1]
        assert found._seen[taken] == scores(gone, [taken])[0]  # not what was seen when others were there
        assert found._seen[taken] == min(v for unit, v in found._seen.items() if unit[0] not in gone)
        gone += taken
    assert runs[0] == 8
    assert set(runs[1:]) == {1}
    assert 8 + 3 <= sum(runs) < 8 + 7 + 6 + 5


def test_neighbours_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[int] = []
    scores = Ranking.scores
    monkeypatch.setattr(
        Ranking, "scores", lambda self, gone, units: ranked.append(len(units)) or scores(self, gone, units)
    )
    result = pruned(decoder(*["plain"] * 4), TOKENS, depth=Depth(keep=5, contiguous=True))
    order = [b.name for b in depgraph.branches(decoder(*["plain"] * 4), TOKENS)]
    places = [order.index(name) for name in result.report.removed]
    assert places == list(range(places[0], places[0] + 3))
    assert ranked == [6]  # once


@pytest.mark.slow
def test_branches_alone_meet_a_budget() -> None:
    model = decoder(*["plain"] * 2)
    for how_much in ({"max_params": 0.7}, {"pruning_ratio": 0.5}):
        result = pruned(model, TOKENS, depth=Depth(alone=True, by="magnitude"), **how_much)
        assert result.report.removed
        assert not any(cut.keep for cut in result.plan.cuts.values())
    with pytest.raises(depgraph.BudgetError, match="branches alone can't meet max_params"):
        depgraph.prune(model, TOKENS, depth=Depth(alone=True, by="magnitude"), max_params=0.01)


@pytest.mark.slow
def test_a_budget_takes_branches_and_widths_together() -> None:
    model = decoder(*["plain"] * 3)
    with torch.no_grad():
        for layer in model.layers[:2]:
            for p in [*layer.mlp.parameters(), *layer.attention.out.parameters()]:
                p.mul_(1e-4)
    result = pruned(model, TOKENS, depth=True, max_params=0.4)
    assert result.report.removed
    assert result.report.parameters[1] <= 0.4 * result.report.parameters[0]
    alone = depgraph.prune(model, TOKENS, max_params=0.4)
    off = [distance(m, model, TOKENS) for m in (result.model, alone.model)]
    assert off[0] < off[1]


def test_no_depth_is_an_answer() -> None:
    model = ready(ResNet())
    with torch.no_grad():  # inner channels that do nothing: widths are free
        for block in model.blocks:
            for part in (block.conv1.weight, block.bn1.weight, block.bn1.bias):
                part[2:] *= 1e-9
    result = pruned(model, IMAGE, depth=True, max_params=0.5, importance="l1")
    assert result.report.removed == []
    assert result.plan.removals == []
    assert any("no branch was removed" in note for note in result.report.notes)


def test_a_ratio_for_a_part_that_goes_says_nothing_of_the_rest() -> None:
    model = ready(ResNet())
    gone = depgraph.prune(model, IMAGE, depth=Depth(keep=2, by="magnitude")).report.removed[0]
    result = pruned(model, IMAGE, depth=Depth(keep=2, by="magnitude"), pruning_ratio={f"{gone}.conv1": 0.5})
    assert result.plan.cuts == {}
    scopes = [depgraph.Scope(f"{gone}.*", ratio=0.5), depgraph.Scope("stem.*", ratio=0.5)]
    result = pruned(model, IMAGE, depth=Depth(keep=2, by="magnitude"), scope=scopes)
    assert result.plan.new_shape("stem.0.weight")[0] == 4


def test_what_is_found_with_ignore_and_constraints_is_found_anew() -> None:
    model = ready(ResNet())
    with pytest.raises(InputError, match="graph has no effect with depth"):
        depgraph.prune(model, IMAGE, depth=True, graph=depgraph.analyze(model, IMAGE))
    gone = depgraph.prune(model, IMAGE, depth=Depth(keep=2, by="magnitude")).report.removed[0]
    with pytest.raises(InputError, match="ignore what constraints are about"):
        depgraph.prune(
            model, IMAGE, depth=Depth(keep=2, by="magnitude"), pruning_ratio=0.3,
            constraints=lambda graph: graph.lock(f"{gone}.conv1.weight:0"),
        )  # fmt: skip


def test_no_statistic_is_restricted_by_depth_alone() -> None:
    result = pruned(decoder("plain", "plain"), TOKENS, depth=Depth(keep=3))
    assert result.report.verification.restricted == ()


@pytest.mark.slow
def test_a_ratio_is_the_share_of_branches_too() -> None:
    result = pruned(decoder(*["plain"] * 4), TOKENS, depth=True, pruning_ratio=0.25)
    assert len(result.report.removed) == 2
    assert result.plan.cuts


@pytest.mark.slow
def test_uniform_takes_whole_layers_so_that_the_config_says_it() -> None:
    model = decoder(*["plain"] * 4)
    result = pruned(model, TOKENS, depth=True, max_params=0.45, uniform=True)
    assert result.report.config_mismatches == []
    stock = Decoder(result.model.config).double()
    stock.load_state_dict(result.model.state_dict())
    assert torch.equal(stock(TOKENS), result.model(TOKENS))


class Asking(Decoder):
    """Asks for the values of its input: a trace follows the other answer, too, and so records each layer twice."""

    def forward(self, x: Tensor, cache: dict[int, Any] | None = None) -> Tensor:
        if bool((x > 1e9).any()):
            x = x.clamp(max=1e9)
        return super().forward(x, cache)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Decoder, Asking])
def test_least_squares_on_what_follows(kind: type[Decoder]) -> None:
    model = ready(kind(SimpleNamespace(width=12, inner=10, heads=3, depth=3, kinds=["plain"] * 3)))
    batches = [
        torch.randn(4, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i in range(6)
    ]
    options = {"depth": Depth(keep=4), "calibration": batches}
    plain = depgraph.prune(model, TOKENS, recover="none", **options)
    result = depgraph.prune(model, TOKENS, recover="reconstruction", **options)
    assert result.report.removed == plain.report.removed
    before, after = result.report.recovery.output
    assert after < 0.9 * before
    assert result.report.recovery.skipped == []
    held_out = torch.randn(8, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    off = [distance(m, model, held_out) for m in (plain.model, result.model)]
    assert off[1] < off[0]


# ------------------------------------------------------------------------------------------------- plans and names


def test_plans_with_removals_compose_and_replay_on_a_fresh_model() -> None:
    model = decoder(*["plain"] * 4)
    first = depgraph.prune(model, TOKENS, depth=Depth(keep=5, by="magnitude"))
    second = depgraph.prune(first.model, TOKENS, depth=Depth(keep=3, by="magnitude"), pruning_ratio=0.3)
    both = depgraph.Plan.from_json(first.plan.then(second.plan).to_json())
    at_once = depgraph.apply(model, both)
    assert torch.equal(at_once(TOKENS), second.model(TOKENS))
    assert depgraph.verify(model, at_once, both, TOKENS).status == "equal"
    check_state(model, at_once, both)
    fresh = depgraph.apply(ready(Decoder(copy.deepcopy(model.config))), both)
    assert fresh.state_dict().keys() == at_once.state_dict().keys()


def test_a_saved_folder_loads(tmp_path: Any) -> None:
    model = decoder("plain", "loud", "quiet", "loud")
    result = depgraph.prune(model, TOKENS, depth=Depth(keep=5), pruning_ratio=0.3)
    depgraph.save(result, tmp_path / "small")
    again = depgraph.load(lambda: Decoder(copy.deepcopy(model.config)).double(), tmp_path / "small")
    assert torch.equal(again(TOKENS), result.model(TOKENS))


def test_an_optimizer_goes_on_with_what_is_left() -> None:
    model = decoder(*["plain"] * 3).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(TOKENS).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    result = depgraph.prune(model, TOKENS, depth=Depth(keep=4, contiguous=True))
    result.plan.apply_to_optimizer(optimizer, model, result.model)
    left = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in left} == {id(p) for p in result.model.parameters()}
    result.model(TOKENS).square().sum().backward()
    optimizer.step()


@pytest.mark.slow
def test_weights_are_rewound_by_their_old_names() -> None:
    model = decoder(*["plain"] * 3)
    early = copy.deepcopy(model)
    with torch.no_grad():
        for p in early.parameters():
            p.add_(0.1)
    result = depgraph.prune(model, TOKENS, depth=Depth(keep=4, contiguous=True), pruning_ratio=0.3)
    back = depgraph.rewind(result.plan, early, result.model)
    check_state(early, back, result.plan)


def test_distilling_pairs_hidden_states_by_their_old_names() -> None:
    model = decoder(*["plain"] * 3)
    result = depgraph.prune(model, TOKENS, depth=Depth(keep=4, by="magnitude"), uniform=True)
    last = next(f"layers.{i}" for i in (2, 1) if result.plan.new_name(f"layers.{i}"))
    depgraph.distill(result.model, model, [TOKENS], plan=result.plan, hidden=[last], steps=1, progress=False)
    gone = next(r.path for r in result.plan.removals if r.leaves == "nothing")
    with pytest.raises(InputError, match="not in both models"):
        depgraph.distill(
            result.model, model, [TOKENS], plan=result.plan, hidden=[gone], steps=1, progress=False
        )


def test_a_plan_of_other_layers_is_refused() -> None:
    result = depgraph.prune(decoder(*["plain"] * 3), TOKENS, depth=Depth(keep=4))
    with pytest.raises(PlanError, match="is not in this model"):
        depgraph.apply(decoder("plain", "plain"), result.plan)


@pytest.mark.parametrize(
    "row",
    [
        ["a", "ones", None, []],
        ["", "zeros", None, []],
        ["a", "zeros", [1, 2], []],
        ["a", "zeros", None],
        ["a", "nothing", None, [[["x"], 1]]],
    ],
)
def test_an_invalid_removal_in_json_is_refused(row: list[Any]) -> None:
    data = json.loads(depgraph.Plan().to_json()) | {"removals": [row]}
    with pytest.raises(PlanError, match="invalid removal"):
        depgraph.Plan.from_json(json.dumps(data))


def test_plans_from_before_are_read() -> None:
    text = '{"format": 3, "request": {}, "shapes": {"a": [2]}, "aliases": {}, "sets": [], "cuts": {}, "repairs": [], "rewrites": []}'
    assert depgraph.Plan.from_json(text).removals == []


# ----------------------------------------------------------------------------------------------------- bad input


class Query(nn.Module):
    """Without its cross-attention, the output does not depend on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 5, 12))
        self.cross, self.mlp, self.last = nn.Bilinear(12, 12, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query.expand(x.shape[0], -1, -1)
        q = q + self.cross(q.contiguous(), x)
        return self.last(q + self.mlp(q))


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (ResNet, {"depth": Depth(keep=4)}, "more than the 3 branches"),
        (ResNet, {"depth": "deep"}, "depth must be True, False or depgraph.Depth"),
        (ResNet, {"depth": Depth(keep=1, by="taylor")}, "give calibration="),
        (ResNet, {"depth": Depth(keep=1, by="loss")}, "give calibration="),
        (ResNet, {"depth": True, "threshold": 0.1}, "Depth\\(keep=...\\)"),
        (ResNet, {"depth": Depth(keep=1), "ignore": ["blocks.*"]}, "ignore holds all of them"),
    ],
)
def test_bad_input_is_refused(make: Any, options: dict[str, Any], text: str) -> None:
    model = ready(make())
    before = snapshot(model)
    with pytest.raises((InputError, NothingToPruneError), match=text):
        depgraph.prune(model, IMAGE, **options)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "wrong", [{"keep": -1}, {"keep": 2.5}, {"keep": True}, {"by": "size"}, {"by": 3}, {"contiguous": 1}]
)
def test_a_depth_that_is_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Depth(**wrong)


def test_an_output_stays_dependent_on_the_input() -> None:
    model = ready(Query())
    assert [b.name for b in depgraph.branches(model, TOKENS)] == ["cross", "mlp"]
    assert pruned(model, TOKENS, depth=Depth(keep=1)).report.removed == ["mlp"]
    with pytest.raises(InputError, match="would not depend on the input"):
        depgraph.prune(model, TOKENS, depth=Depth(keep=0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_language_model_generates_and_its_folder_is_stock(tmp_path: Any) -> None:
    pytest.importorskip("transformers")
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    from depgraph.integrations import hugging_face

    sizes = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    sliding = Gemma2Config(**sizes, head_dim=4, sliding_window=4)
    words = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))

    def said(model: Any, cache: bool) -> Tensor:
        options = {
            "max_new_tokens": 8,
            "do_sample": False,
            "use_cache": cache,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        with torch.no_grad():
            return model.generate(words, **options)

    for i, (model, options) in enumerate(
        (
            (
                LlamaForCausalLM(LlamaConfig(**sizes)),
                {"uniform": True, "max_params": 0.7, "ignore": ["model.embed_tokens*"]},
            ),
            (LlamaForCausalLM(LlamaConfig(**sizes)), {"ignore": ["*mlp*", "*layers.3*"]}),
            (Gemma2ForCausalLM(sliding), {"ignore": ["model.layers.3*"], "contiguous": False}),
        )
    ):
        with torch.no_grad():
            for p in model.eval().parameters():
                p.mul_(8 if p.dim() > 1 else 1)
        depth = Depth(keep=6, contiguous=options.pop("contiguous", False), by="magnitude")
        result = depgraph.prune(model, {"input_ids": words}, depth=depth, **options)
        small = result.model
        assert result.report.verification.status == "equal"
        assert torch.equal(said(small, True), said(small, False))
        wrong = hugging_face.save_pretrained(result, tmp_path / str(i))
        whole = len(small.model.layers) < 4
        assert (wrong == []) == whole
        if whole:
            stock = type(model).from_pretrained(tmp_path / str(i))
            assert stock.config.num_hidden_layers == len(small.model.layers) == 3
            with torch.no_grad():
                assert torch.equal(stock(input_ids=words).logits, small(input_ids=words).logits)
        again = hugging_face.load_pretrained(type(model), tmp_path / str(i))
        with torch.no_grad():
            assert torch.equal(again(input_ids=words).logits, small(input_ids=words).logits)


@pytest.mark.slow
def test_a_wrong_plan_is_noticed() -> None:
    """The proof covers removals: a branch of another layer is none of this plan's."""
    model = decoder("plain", "plain", "plain")
    plans = [
        depgraph.prune(
            model, TOKENS, depth=Depth(keep=5), ignore=[f"layers.{i}*" for i in range(3) if i != n]
        ).plan
        for n in (0, 1)
    ]
    with pytest.raises(depgraph.VerificationError):
        depgraph.verify(model, depgraph.apply(model, plans[0]), plans[1], TOKENS)


# --------------------------------------------------------------------------------------------- random networks


COUNT = int(os.environ.get("DEPGRAPH_RANDOM_NETWORKS", "60"))  # about half of these networks have a branch
SEEDS, AT_ONCE = range(COUNT), 5


def problem(seed: int) -> str:
    """What is wrong with the random network of that seed without some of its branches, or nothing."""
    model, inputs = random_network(seed)
    found = depgraph.branches(model, inputs)
    if not found:
        return ""
    options = random_depth(seed, len(found))
    try:
        result = depgraph.prune(model, inputs, importance=random_importance(seed), **options)
        check_depth(model, result, inputs, tol=1e-8)
    except Exception as error:  # noqa: BLE001
        return f"seed {seed}, {' -> '.join(model.kinds)}, {options}: {type(error).__name__}: {error}"
    return ""


def test_one_random_network() -> None:
    assert problem(2) == ""


@pytest.mark.slow
@pytest.mark.parametrize("start", SEEDS[::AT_ONCE])
def test_never_wrong(start: int) -> None:
    wrong = [text for seed in range(start, start + AT_ONCE) if (text := problem(seed))]
    assert not wrong, "\n".join(wrong)


class Added(nn.Module):
    """A loop that adds what each child of a list returns."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 12)) for _ in range(4))
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x)
        return self.last(x)


class Scaled(Added):
    """What is added is scaled by a number that depends on the child's place: no child may move."""

    def forward(self, x: Tensor) -> Tensor:
        for i, part in enumerate(self.parts):
            x = x + part(x) / (1 + i)
        return self.last(x)


@pytest.mark.parametrize(("kind", "left"), [(Added, 2), (Scaled, 4)])
def test_children_that_a_loop_adds_go_where_the_rest_may_move_up(kind: type[Added], left: int) -> None:
    result = pruned(ready(kind()), TOKENS, depth=Depth(keep=2, by="magnitude"))
    assert len(result.model.parts) == left
    assert len(result.report.removed) == 2


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(12, 7), nn.Linear(7, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fall(self.rise(x).relu())


class Mixture(nn.Module):
    """Modules in a list, the two best of which a router chooses for each token."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(12, experts), nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, rows, weights[rows, place].unsqueeze(-1) * expert(x[rows]))
        return out


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.layers = nn.ModuleList(Mixture(4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_experts_in_a_list_go_all_together_with_their_router_or_get_narrower() -> None:
    """One alone stays: its row of the router can't go, as forward compares what the router chose with plain numbers."""
    model, x = ready(Mixed()), torch.randn(40, 5, dtype=torch.float64)
    assert [b.name for b in depgraph.branches(model, x)] == ["layers.0", "layers.1"]
    result = pruned(model, x, depth=Depth(keep=1))
    assert len(result.model.layers) == 1
    narrower = pruned(model, x, pruning_ratio=0.4)
    assert narrower.model.layers[0].experts[2].rise.out_features < 7
    assert narrower.model.layers[0].router.out_features == len(narrower.model.layers[0].experts) == 4
    with pytest.raises(InputError, match=r"layers.0.router.*numbered by values that go into aten.eq"):
        depgraph.prune(model, x, pruning_ratio={"layers.0.router": 0.5})
