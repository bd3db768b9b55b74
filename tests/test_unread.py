"""Sizes that modules remember and forward does not read: methods other than forward work on the smaller model."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from checks import prune_and_check
from small_models import fresh
from torch import Tensor, nn

import depgraph

BUDGETS: list[dict[str, Any]] = [{"pruning_ratio": 0.5}, {"max_macs": 0.5}]
budgets = pytest.mark.parametrize("options", BUDGETS, ids=["ratio", "budget"])


class Block(nn.Module):
    """Two convolutions around a residual connection where it fits; inner widths that nobody outside sees."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(inside, outside, 3, padding=1),
            nn.Conv2d(outside, outside, 3, padding=1),
        )
        self.fits = inside == outside

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu()).relu()
        return x + y if self.fits else y


class Classifier(nn.Module):
    """Another head can be put on: how wide it must be is in an attribute that forward never reads."""

    def __init__(self, widths: tuple[int, ...] = (8, 12, 18)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.Sequential(*(Block(a, b) for a, b in pairwise(widths)))
        self.num_features = self.hidden_size = widths[-1]
        self.classes = 5
        self.head = nn.Linear(self.num_features, self.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x).relu()).mean((2, 3)))

    def reset_classifier(self, classes: int) -> None:
        self.classes = classes
        self.head = nn.Linear(self.num_features, classes).double()


@budgets
def test_another_head(options: dict[str, Any]) -> None:
    model, x = fresh(Classifier), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    small = prune_and_check(model, x, **options).model
    assert (small.num_features, small.classes) == (small.head.in_features, 5)
    assert small.hidden_size < 18
    small.reset_classifier(7)
    assert small(x).shape == (2, 7)


class Encoder(nn.Module):
    """Returns what each stage gives, and remembers how wide these are; two stages are equally wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Block(a, b) for a, b in ((3, 6), (6, 10), (10, 10), (10, 14)))
        self._out_channels = [3, 6, 10, 10, 14]
        self.info = [{"channels": n, "reduction": 2**i} for i, n in enumerate(self._out_channels)]

    @property
    def out_channels(self) -> list[int]:
        return self._out_channels

    def forward(self, x: Tensor) -> list[Tensor]:
        found = [x]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.reads = nn.ModuleList(nn.Conv2d(n, 8, 1) for n in self.encoder.out_channels)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [read(f) for read, f in zip(self.reads, self.encoder(x), strict=True)]
        return self.head(torch.stack(parts).sum(0).relu())


@budgets
def test_widths_of_stages(options: dict[str, Any]) -> None:
    model, x = fresh(Segmenter), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    small = prune_and_check(model, x, **options).model
    widths = [f.shape[1] for f in small.encoder(x)]
    assert small.encoder.out_channels == widths != [3, 6, 10, 10, 14]
    assert [i["channels"] for i in small.encoder.info] == widths
    assert [i["reduction"] for i in small.encoder.info] == [1, 2, 4, 8, 16]


class Branches(nn.Module):
    """Branches that a method fuses into one convolution; `groups` and `dim` are what forward never asks for."""

    def __init__(self, inside: int, outside: int, groups: int = 1) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = inside, outside, groups
        self.wide = nn.Conv2d(inside, outside, 3, padding=1, groups=groups, bias=False)
        self.narrow = nn.Conv2d(inside, outside, 1, groups=groups, bias=False)
        self.fused: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.fused(x) if self.fused is not None else self.wide(x) + self.narrow(x)

    def switch_to_deploy(self) -> None:
        kernel = self.wide.weight + nn.functional.pad(self.narrow.weight, [1] * 4)
        self.fused = nn.Conv2d(
            self.in_channels, self.out_channels, 3, padding=1, groups=self.groups, bias=False
        )
        self.fused.weight.data = kernel
        del self.wide, self.narrow


class Fusible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Branches(3, 12), nn.ReLU(), Branches(12, 12, 12), nn.ReLU(), Branches(12, 20), nn.ReLU(), nn.Conv2d(20, 4, 1)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@budgets
def test_branches_fuse(options: dict[str, Any]) -> None:
    model, x = fresh(Fusible), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    small = prune_and_check(model, x, **options).model
    before = small(x)
    for layer in small.layers:
        if isinstance(layer, Branches):
            layer.switch_to_deploy()
    assert torch.allclose(small(x), before)


class Halves(nn.Module):
    """Splits what a convolution makes, by a number in forward, and in another method by an attribute."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.c = c
        self.first, self.inner = nn.Conv2d(3, 2 * c, 1), nn.Conv2d(c, c, 3, padding=1)
        self.last = nn.Conv2d(3 * c, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.first(x).relu().chunk(2, 1))
        return self.last(torch.cat([*y, self.inner(y[-1]).relu()], 1))

    def forward_split(self, x: Tensor) -> Tensor:
        y = list(self.first(x).relu().split((self.c, self.c), 1))
        return self.last(torch.cat([*y, self.inner(y[-1]).relu()], 1))


@budgets
def test_another_forward(options: dict[str, Any]) -> None:
    """The inner convolution has the same width, and keeps another one under a budget: the other method tells which it is."""
    model, x = fresh(Halves), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    result = prune_and_check(
        model, x, importance=lambda g: torch.rand(g.units) + ("inner" in g.name), **options
    )
    assert torch.allclose(result.model.forward_split(x), result.model(x))
    assert result.model.c < 8
    assert (
        result.report.macs
        == depgraph.Report.of(
            depgraph.analyze(model, x), result.plan, result.model, result.report.verification, x
        ).macs
    )


class TwoOfOneSize(nn.Module):
    """Two layers of one size that become different, a number that says either, and a method that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.width, self.unused = 12, 12

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())

    def extra(self) -> nn.Module:
        return nn.Linear(self.width, 2)


def test_what_cannot_be_told_is_named() -> None:
    model, x = fresh(TwoOfOneSize), torch.randn(2, 5, dtype=torch.float64)
    result = prune_and_check(model, x, pruning_ratio={"a": 0.5, "b": 0.25})
    assert (result.model.width, result.model.unused) == (12, 12)
    remark = next(r for r in result.report.remarks if "repeat sizes" in r)
    assert remark.startswith("width repeat")  # nothing reads `unused`
    same = prune_and_check(model, x, pruning_ratio=0.5)
    assert same.model.width == 6
    assert same.report.remarks == []


class Reading(nn.Module):
    """Forward does read these numbers, in ways that no traced number shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)
        self.repeats = self.scale = self.times = 6

    def helped(self, x: Tensor) -> Tensor:
        for _ in range(self.repeats):
            x = x + 1
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.helped(self.a(x)).relu()) * sum(1 for _ in range(self.scale)) + often(self)


def often(net: Reading) -> int:
    return len([0] * net.times)


def test_what_forward_reads_stays() -> None:
    result = prune_and_check(fresh(Reading), torch.randn(2, 5, dtype=torch.float64), pruning_ratio=0.5)
    assert result.model.a.out_features == 3
    assert (result.model.repeats, result.model.scale, result.model.times) == (6, 6, 6)


class Square(nn.Module):
    """As wide inside as outside: only its class says which of the two a number repeats."""

    def __init__(self, width_in: int, width_out: int, bias: bool = True, stride: int = 1) -> None:
        super().__init__()
        self.inside, self.outside, self.stride = width_in, width_out, stride
        self.layer = nn.Linear(width_in, width_out, bias=bias)
        self.narrow = nn.Linear(width_out, width_out // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.layer(x[..., :: self.stride] if self.stride > 1 else x).relu())

    def transposed(self) -> nn.Module:
        return nn.Linear(self.outside, self.inside)


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.square, self.last = nn.Linear(5, 12), Square(12, 12), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.square(self.first(x).relu()).relu())


def test_the_class_tells_equal_sizes_apart() -> None:
    model, x = fresh(Squares), torch.randn(2, 5, dtype=torch.float64)
    result = prune_and_check(model, x, pruning_ratio={"first": 0.5, "square.layer": 0.25})
    square = result.model.square
    assert (square.inside, square.outside) == (6, 9)
    assert result.report.remarks == []
    again = depgraph.apply(model, depgraph.Plan.from_json(result.plan.to_json()))
    assert (again.square.inside, again.square.outside) == (6, 9)


class FromTable(nn.Module):
    """Built from a dict, which only the method that puts another head on reads again."""

    def __init__(self, table: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.table = table or {"widths": [10, 10, 14], "head": {"inside": 14, "classes": 5}}
        a, b, c = self.table["widths"]
        self.a, self.b, self.c = nn.Conv2d(3, a, 3), nn.Conv2d(a, b, 3), nn.Conv2d(b, c, 3)
        self.head = nn.Linear(c, self.table["head"]["classes"])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))

    def reset_classifier(self, classes: int) -> None:
        self.table["head"]["classes"] = classes
        self.head = nn.Linear(self.table["head"]["inside"], classes).double()


@budgets
def test_a_dict_follows(options: dict[str, Any]) -> None:
    model, x = fresh(FromTable), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    small = prune_and_check(model, x, **options).model
    assert model.table["widths"] == [10, 10, 14]
    assert small.table["widths"] == [m.out_channels for m in (small.a, small.b, small.c)]
    small.reset_classifier(7)
    assert small(x).shape == (2, 7)


class ByDefault(nn.Module):
    """Widths are the defaults of its class, one of them as large as what it is compared with."""

    def __init__(self, width: int = 12, longest: int = 12, words: int = 20) -> None:
        super().__init__()
        self.wide = width
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(longest, width)
        self.up, self.down = nn.Linear(width, longest), nn.Linear(longest, width)
        self.out = nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.out(x + self.down(self.up(x).relu()))

    def more_words(self, words: int) -> None:
        self.words, self.out = nn.Embedding(words, self.wide), nn.Linear(self.wide, words)
        self.double()


def test_defaults_tell_equal_sizes_apart() -> None:
    model, tokens = fresh(ByDefault), torch.randint(20, (2, 7))
    small = prune_and_check(model, tokens, pruning_ratio={"words": 0.5, "up": 0.25}).model
    assert (small.words.embedding_dim, small.up.out_features) == (6, 9)
    small.more_words(30)
    assert small(tokens).shape == (2, 7, 30)


class Wrapping(nn.Module):
    """A layer in a module that repeats its sizes under the same names, with an update of low rank beside it."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        self.rank = {"default": rank}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 2.0 * self.up(self.down(x))

    def another(self) -> nn.Module:
        return Wrapping(nn.Linear(self.in_features, self.out_features), self.rank["default"])


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 12)
        self.second = Wrapping(nn.Linear(12, 12))
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu())


def test_ranks_of_updates_stay() -> None:
    model, x = fresh(Adapted), torch.randn(2, 5, dtype=torch.float64)
    for options in ({"pruning_ratio": 0.5}, {"max_params": 0.5}, {"pruning_ratio": 0.5, "scope": "global"}):
        result = prune_and_check(model, x, **options)
        assert result.model.second.down.out_features == 4
        again = result.model.second.another().double()
        again.load_state_dict(result.model.second.state_dict())
    assert "rank of an update" in str(result.report)


def test_ranks_that_are_named_are_cut() -> None:
    model, x = fresh(Adapted), torch.randn(2, 5, dtype=torch.float64)
    by_name = prune_and_check(model, x, pruning_ratio={"second.down": 0.5})
    by_scope = prune_and_check(model, x, scope=[depgraph.Scope("second.down", ratio=0.5)], pruning_ratio=0.25)
    assert by_name.model.second.down.out_features == by_scope.model.second.down.out_features == 2


def test_a_wrapper_follows_its_layer() -> None:
    model, x = fresh(Adapted), torch.randn(2, 5, dtype=torch.float64)
    second = prune_and_check(model, x, pruning_ratio={"first": 0.5, "second.layer": 0.25}).model.second
    assert (second.in_features, second.out_features) == (6, 9)


class Bent(Adapted):
    """The same weights with an activation between: a hidden layer, which shrinks."""

    def forward(self, x: Tensor) -> Tensor:
        x, second = self.first(x).relu(), self.second
        return self.last((second.layer(x) + second.up(second.down(x).relu())).relu())


def test_a_hidden_layer_is_no_rank() -> None:
    model, x = fresh(Bent), torch.randn(2, 5, dtype=torch.float64)
    assert prune_and_check(model, x, pruning_ratio=0.5).model.second.down.out_features == 2


IMAGE = torch.randn(1, 3, 64, 64)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenetv3_small_050", "efficientnet_lite0", "convnext_atto", "densenet121", "regnetx_002", "repvgg_a0"],
)  # fmt: skip
def test_another_head_on_known_models(name: str) -> None:
    timm = known("timm")
    small = depgraph.prune(timm.create_model(name).eval(), IMAGE, pruning_ratio=0.5, verify=False).model
    small.reset_classifier(7)
    assert small(IMAGE).shape == (1, 7)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
@budgets
def test_known_models_fuse(name: str, options: dict[str, Any]) -> None:
    timm = known("timm")
    from timm.utils.model import reparameterize_model

    small = depgraph.prune(timm.create_model(name).eval(), IMAGE, verify=False, **options).model
    before = small(IMAGE)
    assert (reparameterize_model(small)(IMAGE) - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@budgets
def test_known_encoders_say_their_widths(options: dict[str, Any]) -> None:
    smp = known("segmentation_models_pytorch")
    for encoder in ("resnet18", "mobilenet_v2"):
        model = smp.Unet(encoder, encoder_weights=None, classes=2).eval()
        small = depgraph.prune(model, IMAGE, verify=False, **options).model
        assert list(small.encoder.out_channels) == [f.shape[1] for f in small.encoder(IMAGE)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@budgets
def test_the_export_path_of_a_known_detector(options: dict[str, Any]) -> None:
    model = known("ultralytics").YOLO("yolov8n.yaml").model.eval()
    small = depgraph.prune(model, IMAGE, verify=False, **options).model
    for module in small.modules():
        if hasattr(module, "forward_split"):
            x = torch.randn(1, module.cv1.conv.in_channels, 4, 4)
            assert torch.equal(module.forward_split(x), module(x))


def known(library: str) -> Any:
    """A library that some machines have; torchvision, which it imports, is made importable first."""
    import vision_ops  # noqa: F401

    return pytest.importorskip(library)
