"""Ops that few networks have: of other libraries, of quantisation-aware training, and backwards of one's own."""

from __future__ import annotations

import copy
import math
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vision_ops  # noqa: F401  # makes torchvision importable
from checks import InFloat64, as_float64, in_float64, prune_and_check
from oracle import assert_equal_to_masked, expected_output
from torch import Tensor, nn

import depgraph

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


def reasons(result: depgraph.PruneResult) -> str:
    return " ".join(str(f.reason) for f in result.report.frozen)


def left(result: depgraph.PruneResult) -> float:
    before, after = result.report.parameters
    return after / before


# ------------------------------------------------------------------------------------------- ops of any library


class Deformed(nn.Module):
    def __init__(self, groups: int = 1, offset_groups: int = 1) -> None:
        super().__init__()
        from torchvision.ops import DeformConv2d

        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.offset = nn.Conv2d(12, 18 * offset_groups, 3, padding=1)
        self.mask = nn.Conv2d(12, 9 * offset_groups, 3, padding=1)
        self.deformed = DeformConv2d(12, 10, 3, padding=1, groups=groups)
        self.further, self.last = nn.Conv2d(10, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.last(self.further(self.deformed(x, self.offset(x), self.mask(x).sigmoid()).relu()))


needs_torchvision = pytest.mark.skipif(
    find_spec("torchvision") is None, reason="torchvision is not installed"
)


@needs_torchvision
def test_channels_pass_a_deformed_convolution() -> None:
    model, x = Deformed().double().eval(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.report.verification.status == "equal"
    assert result.model.deformed.weight.shape == (5, 6, 3, 3)
    assert result.model.offset.weight.shape == (18, 6, 3, 3)
    torch.testing.assert_close(result.model(x), expected_output(model, result.plan, x), rtol=0, atol=1e-9)


def pruned(model: nn.Module, x: Tensor) -> depgraph.PruneResult:
    """Pruned by half, and compared by the oracle; the op may have no backward here."""
    result = depgraph.prune(model.double(), x.double(), pruning_ratio=0.5)
    assert result.report.verification.status == "equal"
    assert_equal_to_masked(model, result, x.double())
    return result


@needs_torchvision
@pytest.mark.parametrize(("groups", "offset_groups"), [(2, 1), (1, 2), (2, 2), (2, 4)])
def test_groups_of_a_deformed_convolution_lose_the_same_channels(groups: int, offset_groups: int) -> None:
    model, x = Deformed(groups, offset_groups), torch.randn(1, 3, 6, 5)
    try:
        model.eval()(x)
    except NotImplementedError:
        pytest.skip("these torchvision operators have no groups")
    result = pruned(model, x)
    outputs = 6 if groups == 2 else 5  # of ten, whole ones of each group
    assert result.model.deformed.weight.shape[0] == outputs
    assert result.model.stem.weight.shape[0] < 12


@needs_torchvision
def test_a_depthwise_deformed_convolution_is_cut_like_its_input() -> None:
    from torchvision.ops import deform_conv2d

    class Depthwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.offset, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 18, 1), nn.Conv2d(8, 4, 1)
            self.weight = nn.Parameter(torch.randn(8, 1, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(deform_conv2d(self.stem(x), self.offset(x), self.weight, padding=1))

    result = pruned(Depthwise().eval(), torch.randn(1, 3, 6, 5))
    assert result.model.weight.shape == (4, 1, 3, 3)


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12 * 4, 5)

    def forward(self, x: Tensor, boxes: Tensor) -> Tensor:
        from torchvision.ops import roi_align

        return self.last(roi_align(self.stem(x).relu(), boxes, 2, 1.0, 2).flatten(1))


@needs_torchvision
def test_channels_pass_the_pooling_of_regions() -> None:
    boxes = torch.tensor([[0, 1.0, 1.0, 5.0, 4.0], [1, 0.0, 0.0, 4.0, 5.0]], dtype=torch.float64)
    inputs = torch.randn(2, 3, 8, 6, dtype=torch.float64), boxes
    result = prune_and_check(Regions().double().eval(), inputs, pruning_ratio=0.5)
    assert result.model.last.weight.shape == (5, 6 * 4)


def test_an_op_of_the_same_name_with_other_arguments_is_another_op() -> None:
    with torch.library._scoped_library("elsewhere", "DEF") as library:
        library.define("roi_align(Tensor x, Tensor boxes) -> Tensor")
        library.impl("roi_align", lambda x, boxes: x.flip(1) + boxes.sum(), "CompositeExplicitAutograd")

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.b(torch.ops.elsewhere.roi_align(self.a(x), x))

        with pytest.raises(depgraph.NothingToPruneError, match="has no argument 'input'"):
            depgraph.prune(Net().eval(), torch.randn(1, 3, 4, 4))


# ------------------------------------------------------------------------------------ quantisation-aware training


def prepared(observed: bool, calibrated: bool, backend: str) -> nn.Module:
    """A network in which weights and activations are rounded while it trains."""
    import torch.ao.quantization as tq

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
            self.c1, self.b1, self.r1 = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU()
            self.c2, self.fc = nn.Conv2d(12, 16, 3), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.r1(self.b1(self.c1(self.quant(x))))
            return self.dequant(self.fc(self.c2(x).mean((2, 3))))

    model = Net().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = tq.get_default_qat_qconfig(backend)
        model = tq.prepare_qat(tq.fuse_modules_qat(model, [["c1", "b1", "r1"]]))
    if calibrated:
        for _ in range(3):
            model(torch.randn(4, 3, 8, 8))
    if not observed:
        model.apply(tq.disable_observer)
    return model.eval()


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack"])  # weights per channel, and as a whole
@pytest.mark.parametrize(("observed", "calibrated"), [(False, True), (True, True), (True, False)])
def test_channels_pass_fake_quantisation(backend: str, observed: bool, calibrated: bool) -> None:
    torch.manual_seed(0)
    model, x = prepared(observed, calibrated, backend), torch.randn(2, 3, 8, 8)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    small = result.model
    assert small.c1.weight.shape == (6, 3, 3, 3)
    assert small.c2.weight.shape == (8, 6, 3, 3)
    scale = small.c2.weight_fake_quant.scale
    assert scale.shape == ((8,) if backend == "fbgemm" and calibrated else (1,))
    assert result.report.verification.status == "equal"
    if not observed:
        wide = in_float64(model), InFloat64(result)
        assert_equal_to_masked(*wide, as_float64(x))
    else:  # extremes over the entries alive, in training too
        assert depgraph.verify(model.train(), small.train(), result.plan, x).status == "equal"
    small.train()(x).sum().backward()


@pytest.mark.parametrize("per_channel", [False, True])
def test_channels_pass_the_functions_of_fake_quantisation(per_channel: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 12), nn.Linear(12, 4)
            self.register_buffer("scale", torch.full((12,), 0.02))
            self.register_buffer("zero", torch.zeros(12, dtype=torch.int32))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.a.weight
            if per_channel:
                weight = torch.fake_quantize_per_channel_affine(weight, self.scale, self.zero, 0, -128, 127)
            else:
                weight = torch.fake_quantize_per_tensor_affine(weight, 0.02, 0, -128, 127)
            return self.b(F.linear(x, weight, self.a.bias).relu())

    model, x = Net().eval(), torch.randn(2, 5)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.model.a.weight.shape == (6, 5)
    assert result.model.scale.shape == ((6,) if per_channel else (12,)) == result.model.zero.shape
    torch.testing.assert_close(result.model(x), expected_output(model, result.plan, x), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- backwards of one's own


class Step(torch.autograd.Function):
    """A learned step of quantisation, whose gradient is scaled by a number that depends on the size of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(weight, step)
        ctx.scale = scale
        return (weight / step).round().clamp(-8, 7) * step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight, step = ctx.saved_tensors
        ratio = weight / step
        inside = (ratio.abs() <= 8).to(gradient)
        by_step = (gradient * (ratio.round() - ratio) * ctx.scale).sum((1, 2, 3), keepdim=True)
        return gradient * inside, by_step, None


class Stepped(nn.Conv2d):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.step = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 0.05))

    def forward(self, x: Tensor) -> Tensor:
        weight = Step.apply(self.weight, self.step, 1 / math.sqrt(self.weight.numel() * 7))
        return F.conv2d(x, weight, self.bias)


def test_a_number_that_only_scales_gradients_locks_nothing() -> None:
    model = nn.Sequential(Stepped(3, 12, 3), nn.ReLU(), Stepped(12, 10, 3), nn.ReLU(), nn.Conv2d(10, 2, 1))
    x = torch.randn(1, 3, 7, 7, dtype=torch.float64)
    result = prune_and_check(model.double().eval(), x, pruning_ratio=0.5)
    assert result.model[2].weight.shape == (5, 6, 3, 3)
    assert result.model[2].step.shape == (5, 1, 1, 1)


def rows_of(weight: Tensor) -> int:
    """Outside of the modules, where no read of a size can become a number."""
    return weight.shape[0]


def test_a_number_that_forward_computes_with_locks_though_backward_does_too() -> None:
    class Both(Step):
        @staticmethod
        def forward(ctx: Any, weight: Tensor, step: Tensor, scale: float) -> Tensor:
            return Step.forward(ctx, weight, step, scale) * scale

    class Scaled(Stepped):
        def forward(self, x: Tensor) -> Tensor:
            weight = Both.apply(self.weight, self.step, 1 / math.sqrt(rows_of(self.weight)))
            return F.conv2d(x, weight, self.bias)

    model = nn.Sequential(Scaled(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
    result = depgraph.prune(model.eval(), torch.randn(1, 3, 7, 7))
    assert result.model[0].weight.shape == (12, 3, 3, 3)
    assert "sets a number that the op computes with" in reasons(result)


class Checkpoint(torch.autograd.Function):
    """Forward once more in the backward, as libraries of diffusion models write it."""

    @staticmethod
    def forward(ctx: Any, run: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.inputs, ctx.parameters = run, list(tensors[:count]), list(tensors[count:])
        with torch.no_grad():
            return ctx.run(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inputs = [x.detach().requires_grad_(True) for x in ctx.inputs]
        with torch.enable_grad():
            out = ctx.run(*[x.view_as(x) for x in inputs])
        found = torch.autograd.grad(out, [*inputs, *ctx.parameters], gradients, allow_unused=True)
        return None, None, *found


def attention(block: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in block.qkv(block.norm(x)).chunk(3, 2))
    y = (q @ k.transpose(2, 3) * 0.3).softmax(-1) @ v
    return x + block.out(y.transpose(1, 2).flatten(2))


def gated(block: nn.Module, x: Tensor) -> Tensor:
    y, gate = block.rise(block.norm(x)).chunk(2, dim=-1)
    return x + block.fall(F.dropout(y * F.gelu(gate), 0.1, block.training))


def fused(block: nn.Module, x: Tensor) -> Tensor:
    q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in block.qkv(block.norm(x)).tensor_split(3, 2))
    return x + block.out(F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2))


def convolved(block: nn.Module, x: Tensor) -> Tensor:
    y = block.conv(F.group_norm(x.transpose(1, 2), 1))
    y = F.interpolate(F.avg_pool2d(y[:, :, None], (1, 2))[:, :, 0], scale_factor=2.0)
    return x + block.back(F.max_pool2d(F.silu(y)[:, :, None, :], (1, 1))[:, :, 0, :9]).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run, self.norm = run, nn.LayerNorm(12)
        if run in (attention, fused):
            self.qkv, self.out = nn.Linear(12, 3 * 2 * 6), nn.Linear(12, 12)
        elif run is gated:
            self.rise, self.fall = nn.Linear(12, 28), nn.Linear(14, 12)
        else:
            self.norm, self.conv, self.back = (
                nn.Identity(),
                nn.Conv1d(12, 10, 4, padding=2),
                nn.Conv1d(10, 12, 1),
            )

    def forward(self, x: Tensor) -> Tensor:
        run = self.run
        return Checkpoint.apply(lambda y: run(self, y), 1, x, *self.parameters())


@pytest.mark.parametrize("run", [attention, gated, fused, convolved], ids=lambda f: f.__name__)
def test_a_checkpoint_of_ones_own_is_followed_through(run: Any) -> None:
    """What autograd makes in its backward locks no more than the block itself does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), Block(run), nn.Linear(12, 3)).double().eval()
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    with torch.no_grad():
        plain = copy.deepcopy(model)
        plain[1].forward = lambda y: run(plain[1], y)  # the block without the checkpoint
        expected = left(depgraph.prune(plain, x, pruning_ratio=0.5))
    result = prune_and_check(model, x, pruning_ratio=0.5)
    assert left(result) == pytest.approx(expected, abs=0.02)
    assert not result.report.unknown_ops
    by_loss = depgraph.prune(
        model, x, pruning_ratio=0.5, importance="taylor",
        calibration=[(x, torch.randn(2, 9, 3, dtype=torch.float64))], loss=F.mse_loss,
    )  # fmt: skip
    assert by_loss.report.verification.status == "equal"
