"""What the proof makes of each op: with masks it computes what the op computes of the kept entries alone.

Nothing of a model or a plan is used: each row is an op, its tensors with the entries that stay along some dims, and the
entries of the result that those make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from depgraph.verify.masked import MaskedRun

SIX, FOUR, EIGHT, PAIRS = [0, 2, 3, 5], [0, 1, 3], [0, 2, 3, 4, 6, 7], [0, 1, 4, 5]
Kept = Mapping[int, Sequence[int]]  # dim -> indices that stay
NONE: Kept = {}


class Op(NamedTuple):
    """`call` on tensors [shape, what stays of it], and what stays of each result."""

    name: str
    call: Callable[..., Any]
    tensors: Sequence[tuple[tuple[int, ...], Kept]]
    results: Sequence[Kept]
    restricts: bool = False  # whether a statistic is taken over fewer entries
    dtype: torch.dtype = torch.float64


def gradients(call: Callable[..., Tensor], graded: int) -> Callable[..., Any]:
    """The gradients of `call` with respect to its first `graded` arguments; the last argument is that of its result."""

    def of(*tensors: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in tensors[:graded]]
        return torch.autograd.grad(call(*leaves), leaves, tensors[-1])

    return of


def runs(indices: Sequence[int], width: int) -> list[int]:
    """Indices of a dim that is flattened with one of `width` behind it."""
    return [i * width + j for i in indices for j in range(width)]


def image_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.group_norm(x, 2, w, b)


def flat_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b)


def rms(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], w, 1e-6)


def heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.5)


def shared_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)


def written(x: Tensor, y: Tensor) -> Tensor:
    made = torch.zeros_like(x)
    made[torch.tensor([2, 0])] = y
    return made


def between(x: Tensor, y: Tensor) -> Tensor:
    made = x.clone()
    made[:, torch.tensor([1, 3])] = y
    return made


def in_place(x: Tensor, y: Tensor) -> Tensor:
    made = x * 1
    made.mul_(y).sigmoid_()
    return made


def grown(source: Tensor) -> Tensor:
    return torch.zeros(4, source.shape[1], dtype=source.dtype).index_add(0, torch.tensor([1, 3, 1]), source)


def grown_along_1(source: Tensor) -> Tensor:
    return torch.zeros(len(source), 4, dtype=source.dtype).index_add(1, torch.tensor([1, 3, 1]), source)


def observed(axis: int | None) -> Callable[[Tensor], Tensor]:
    """Fake quantisation whose bounds are observed, for each index of `axis`, or for all."""

    def of(x: Tensor) -> Tensor:
        count = 1 if axis is None else x.shape[axis]
        on, scale, zero = (
            torch.ones(1, dtype=torch.long),
            torch.ones(count),
            torch.zeros(count, dtype=torch.int32),
        )
        low, high = torch.full((count,), torch.inf), torch.full((count,), -torch.inf)
        return torch.fused_moving_avg_obs_fake_quant(
            (x + 3), on, on, low, high, scale, zero, 0.01, 0, 255, axis or 0, axis is not None, False
        )  # fmt: skip

    return of


def per_channel(x: Tensor, scale: Tensor) -> Tensor:
    zero = torch.zeros(len(scale), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(x, scale.abs() + 0.1, zero, 1, -8, 7)


ROW, LINE, IMAGE = ((3, 6), {1: SIX}), ((6,), {0: SIX}), ((2, 6, 4, 5), {1: SIX})
HALF = [0, 2, 5, 7]  # of two groups of four, two of each

OPS = [
    # sums of products
    Op("mm", torch.mm, [ROW, ((6, 4), {0: SIX, 1: FOUR})], [{1: FOUR}]),
    Op("mm, rows too", torch.mm, [((6, 6), {0: SIX, 1: SIX}), ((6, 4), {0: SIX})], [{0: SIX}]),
    Op("addmm", torch.addmm, [((4,), {0: FOUR}), ROW, ((6, 4), {0: SIX, 1: FOUR})], [{1: FOUR}]),
    Op("addmm of rows", torch.addmm, [((6, 4), {0: SIX, 1: FOUR}), ((6, 6), {0: SIX, 1: SIX}), ((6, 4), {0: SIX, 1: FOUR})],
       [{0: SIX, 1: FOUR}]),
    Op("linear", F.linear, [ROW, ((4, 6), {0: FOUR, 1: SIX}), ((4,), {0: FOUR})], [{1: FOUR}]),
    Op("linear without bias", F.linear, [((2, 3, 6), {2: SIX}), ((4, 6), {0: FOUR, 1: SIX})], [{2: FOUR}]),
    Op("linear, rows of its bias alone", F.linear, [ROW, ((4, 6), {1: SIX}), ((4,), NONE)], [NONE]),
    Op("bmm", torch.bmm, [((4, 3, 6), {0: FOUR, 2: SIX}), ((4, 6, 5), {0: FOUR, 1: SIX})], [{0: FOUR}]),
    Op("baddbmm", torch.baddbmm, [((4, 3, 4), {2: FOUR}), ((4, 3, 6), {2: SIX}), ((4, 6, 4), {1: SIX, 2: FOUR})], [{2: FOUR}]),
    Op("mv", torch.mv, [((4, 6), {0: FOUR, 1: SIX}), LINE], [{0: FOUR}]),
    Op("addmv", torch.addmv, [((4,), {0: FOUR}), ((4, 6), {0: FOUR, 1: SIX}), LINE], [{0: FOUR}]),
    Op("dot", torch.dot, [LINE, LINE], [NONE]),
    Op("conv1d", lambda x, w, b: F.conv1d(x, w, b, padding=1), [((2, 6, 5), {1: SIX}), ((4, 6, 3), {0: FOUR, 1: SIX}),
       ((4,), {0: FOUR})], [{1: FOUR}]),
    Op("conv2d", lambda x, w: F.conv2d(x, w, stride=2), [IMAGE, ((4, 6, 3, 3), {0: FOUR, 1: SIX})], [{1: FOUR}]),
    Op("conv2d of batches of which one is dead", F.conv2d, [((4, 6, 4, 5), {0: FOUR, 1: SIX}), ((4, 6, 3, 3), {1: SIX})],
       [{0: FOUR}]),
    Op("conv2d, grouped", lambda x, w: F.conv2d(x, w, groups=x.shape[1] // 2), [((2, 6, 4, 5), {1: PAIRS}),
       ((9, 2, 3, 3), {0: [0, 1, 2, 6, 7, 8]})], [{1: [0, 1, 2, 6, 7, 8]}]),
    Op("conv2d, depthwise", lambda x, w: F.conv2d(x, w, groups=x.shape[1]), [IMAGE, ((6, 1, 3, 3), {0: SIX})], [{1: SIX}]),
    Op("conv2d of single pixels", F.conv2d, [((2, 6, 4, 5), {1: SIX}), ((4, 6, 1, 1), {0: FOUR, 1: SIX})], [{1: FOUR}]),
    Op("conv_transpose2d", lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2), [IMAGE, ((6, 4, 3, 3), {0: SIX, 1: FOUR}),
       ((4,), {0: FOUR})], [{1: FOUR}]),
    Op("conv_transpose2d, grouped", lambda x, w: F.conv_transpose2d(x, w, groups=x.shape[1] // 2),
       [((2, 6, 4, 5), {1: PAIRS}), ((6, 2, 3, 3), {0: PAIRS})], [{1: PAIRS}]),
    Op("conv3d", F.conv3d, [((1, 6, 3, 3, 3), {1: SIX}), ((4, 6, 2, 2, 2), {0: FOUR, 1: SIX})], [{1: FOUR}]),
    Op("attention, heads", heads, [((2, 4, 5, 6), {1: FOUR})] * 3, [{1: FOUR}]),
    Op("attention, widths", heads, [((2, 4, 5, 6), {3: SIX}), ((2, 4, 5, 6), {3: SIX}), ((2, 4, 5, 6), {3: SIX})], [{3: SIX}]),
    Op("attention, shared heads", shared_heads, [((2, 4, 5, 6), {3: SIX}), ((2, 2, 5, 6), {3: SIX}), ((2, 2, 5, 6), {3: SIX})],
       [{3: SIX}]),
    Op("attention of one head", heads, [((5, 6), {1: SIX})] * 3, [{1: SIX}]),
    Op("attention of heads without a batch", heads, [((4, 5, 6), {0: FOUR, 2: SIX})] * 3, [{0: FOUR, 2: SIX}]),
    Op("cdist", torch.cdist, [ROW, ((4, 6), {1: SIX})], [NONE]),
    Op("rfft", lambda x: torch.fft.rfft(x).abs(), [((2, 6, 5), {1: SIX})], [{1: SIX}]),
    Op("weight norm", lambda v, g: torch._weight_norm(v, g, 0), [((6, 4), {0: SIX, 1: FOUR}), ((6, 1), {0: SIX})],
       [{0: SIX, 1: FOUR}]),
    Op("weight norm along dim 1", lambda v, g: torch._weight_norm(v, g, 1), [((6, 4), {0: SIX, 1: FOUR}), ((1, 4), {1: FOUR})],
       [{0: SIX, 1: FOUR}]),
    # statistics
    *[
        Op(f"{name} over dim {dim}, keepdim={keep}", lambda x, f=f, dim=dim, keep=keep: f(x, dim, keep), [((4, 6), {0: FOUR, 1: SIX})],
           [{(1 - dim if keep or dim else 0): SIX if dim == 0 else FOUR}], restricts)
        for name, f, restricts in [
            ("sum", lambda x, d, k: x.sum(d, keepdim=k), False),
            ("mean", lambda x, d, k: x.mean(d, keepdim=k), True),
            ("var", lambda x, d, k: x.var(d, keepdim=k), True),
            ("var without correction", lambda x, d, k: x.var(d, correction=0, keepdim=k), True),
            ("std, biased", lambda x, d, k: x.std(d, unbiased=False, keepdim=k), True),
            ("amax", lambda x, d, k: (x - 9).amax(d, keepdim=k), True),
            ("amin", lambda x, d, k: (x + 9).amin(d, keepdim=k), True),
            ("max", lambda x, d, k: (x - 9).max(d, keepdim=k).values, True),
            ("min", lambda x, d, k: (x + 9).min(d, keepdim=k).values, True),
            ("norm", lambda x, d, k: torch.linalg.vector_norm(x, dim=d, keepdim=k), False),
            ("logsumexp", lambda x, d, k: x.logsumexp(d, keepdim=k), True),
            ("prod", lambda x, d, k: x.prod(d, keepdim=k), True),
            ("length", lambda x, d, k: (x * x).sum(d, keepdim=k).sqrt(), False),
        ]
        for dim, keep in ((0, False), (0, True), (1, False), (1, True))
    ],
    Op("var_mean", lambda x: torch.var_mean(x, 1), [ROW], [NONE, NONE], True),
    Op("std_mean", lambda x: torch.std_mean(x, 1, keepdim=True), [ROW], [NONE, NONE], True),
    Op("mean of all", torch.mean, [ROW], [NONE], True),
    Op("mean over what lost nothing", lambda x: x.mean((2, 3)), [IMAGE], [{1: SIX}]),
    Op("mean over two dims", lambda x: x.mean((1, 3)), [IMAGE], [NONE], True),
    Op("softmax", lambda x: x.softmax(1), [ROW], [{1: SIX}], True),
    Op("softmax over what lost nothing", lambda x: x.softmax(0), [ROW], [{1: SIX}]),
    Op("log_softmax", lambda x: x.log_softmax(-1), [ROW], [{1: SIX}], True),
    Op("layer_norm", flat_norm, [((2, 3, 6), {2: SIX}), LINE, LINE], [{2: SIX}], True),
    Op("layer_norm without a weight", lambda x: F.layer_norm(x, x.shape[-1:]), [ROW], [{1: SIX}], True),
    Op("layer_norm over two dims", lambda x: F.layer_norm(x, x.shape[1:]), [((2, 6, 4), {1: SIX, 2: FOUR})], [{1: SIX, 2: FOUR}], True),
    Op("layer_norm over what lost nothing", lambda x: F.layer_norm(x, x.shape[2:]), [((2, 6, 4), {1: SIX})], [{1: SIX}]),
    Op("rms_norm", rms, [((2, 3, 6), {2: SIX}), LINE], [{2: SIX}], True),
    Op("group_norm", image_norm, [((2, 8, 3), {1: HALF}), ((8,), {0: HALF}), ((8,), {0: HALF})], [{1: HALF}], True),
    Op("group_norm of one group", lambda x: F.group_norm(x, 1), [IMAGE], [{1: SIX}], True),
    Op("batch_norm, trains", lambda x, w, b: F.batch_norm(x, None, None, w, b, True), [IMAGE, LINE, LINE], [{1: SIX}]),
    Op("batch_norm, trains, of folded channels", lambda x, w: F.batch_norm(x, None, None, w, w, True), [((2, 4, 6), {2: SIX}), ((4,), NONE)],
       [{2: SIX}], True),
    Op("batch_norm", lambda x, m, w: F.batch_norm(x, m, m * m + 1, w, w), [IMAGE, LINE, LINE], [{1: SIX}]),
    Op("layer_norm, gradients", gradients(flat_norm, 3), [((2, 3, 6), {2: SIX}), LINE, LINE, ((2, 3, 6), {2: SIX})],
       [{2: SIX}, {0: SIX}, {0: SIX}], True),
    Op("group_norm, gradients", gradients(image_norm, 3), [((2, 8, 3), {1: HALF}), ((8,), {0: HALF}), ((8,), {0: HALF}), ((2, 8, 3), {1: HALF})],
       [{1: HALF}, {0: HALF}, {0: HALF}], True),
    Op("cumsum", lambda x: x.cumsum(0), [ROW], [{1: SIX}]),
    Op("cumprod", lambda x: x.cumprod(0), [ROW], [{1: SIX}]),
    Op("sort", lambda x: x.sort(0).values, [ROW], [{1: SIX}]),
    Op("value at argmax", lambda x: (x - 9).gather(1, (x - 9).argmax(1, keepdim=True)), [ROW], [NONE], True),
    Op("value at argmin", lambda x: (x + 9).gather(1, (x + 9).argmin(1, keepdim=True)), [ROW], [NONE], True),
    Op("topk", lambda x: (x - 9).topk(2, 1).values, [ROW], [NONE], True),
    Op("topk, the least", lambda x: (x + 9).topk(2, 1, largest=False).values, [ROW], [NONE], True),
    Op("topk over what lost nothing", lambda x: x.topk(2, 0).values, [ROW], [{1: SIX}]),
    Op("topk of nothing", lambda x: x.topk(2, 1).values, [((0, 6), {1: SIX})], [NONE]),
    Op("mse_loss", F.mse_loss, [ROW, ROW], [NONE], True),
    Op("mse_loss, summed", lambda x, y: F.mse_loss(x, y, reduction="sum"), [ROW, ROW], [NONE]),
    Op("mse_loss of each", lambda x, y: F.mse_loss(x, y, reduction="none"), [ROW, ROW], [{1: SIX}]),
    Op("smooth_l1_loss", F.smooth_l1_loss, [ROW, ROW], [NONE], True),
    # what moves values
    Op("permute", lambda x: x.permute(2, 0, 3, 1), [IMAGE], [{3: SIX}]),
    Op("flatten", lambda x: x.flatten(1), [((2, 6, 3), {1: SIX})], [{1: runs(SIX, 3)}]),
    Op("unflatten", lambda x: x.unflatten(1, (-1, 2)), [((2, 6), {1: PAIRS})], [{1: [0, 2]}]),
    Op("cat", lambda x, y: torch.cat([x, y], 1), [ROW, ((3, 4), {1: FOUR})], [{1: [*SIX, 6, 7, 9]}]),
    Op("stack", lambda x, y: torch.stack([x, y]), [ROW, ROW], [{2: SIX}]),
    Op("select", lambda x: x[1], [ROW], [{0: SIX}]),
    Op("index", lambda x: x[torch.tensor([2, 0])], [ROW], [{1: SIX}]),
    Op("gather", lambda x: x.gather(0, torch.ones(1, x.shape[1], dtype=torch.long)), [ROW], [{1: SIX}]),
    Op("repeat", lambda x: x.repeat(2, 2), [ROW], [{1: [*SIX, *(6 + i for i in SIX)]}]),
    Op("repeat_interleave", lambda x: x.repeat_interleave(2, 1), [ROW], [{1: runs(SIX, 2)}]),
    Op("expand", lambda x: x[:, None].expand(-1, 5, -1), [ROW], [{2: SIX}]),
    Op("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), [((2, 12, 3, 3), {1: runs([0, 2], 4)})], [{1: [0, 2]}]),
    Op("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), [((2, 3, 4, 4), {1: [0, 2]})], [{1: runs([0, 2], 4)}]),
    Op("unfold", lambda x: F.unfold(x, 3), [((2, 4, 5, 5), {1: FOUR})], [{1: runs(FOUR, 9)}]),
    Op("fold", lambda x: F.fold(x, (5, 5), 3), [((2, 36, 9), {1: runs(FOUR, 9)})], [{1: FOUR}]),
    Op("fold of one tap", lambda x: F.fold(x, (3, 3), 1), [((2, 4, 9), {1: FOUR})], [{1: FOUR}]),
    Op("view_as_complex", torch.view_as_complex, [((3, 6, 2), {1: SIX})], [{1: SIX}]),
    Op("view_as_real", lambda x: torch.view_as_real(torch.view_as_complex(x)), [((3, 6, 2), {1: SIX})], [{1: SIX}]),
    *[
        Op(f"pooling and resampling {i}", f, [IMAGE], [{1: SIX}])
        for i, f in enumerate(
            [
                lambda x: F.avg_pool2d(x, 2), lambda x: F.max_pool2d(x - 9, 2), lambda x: F.adaptive_avg_pool2d(x, 2),
                lambda x: F.adaptive_max_pool2d(x - 9, 2), lambda x: F.interpolate(x, scale_factor=2),
                lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
                lambda x: F.pad(x, (1, 2, 1, 0), mode="reflect"), lambda x: F.pad(x, (1, 2, 1, 0), mode="replicate"),
            ]
        )
    ],
    Op("pad pixels", lambda x: F.pad(x, (1, 2, 1, 0), value=0.5), [IMAGE], [{1: SIX}]),
    Op("pad channels", lambda x: F.pad(x, (2, 1), value=0.5), [ROW], [{1: [0, 1, *(2 + i for i in SIX), 8]}]),
    Op("glu", lambda x: F.glu(x, 1), [((3, 8), {1: EIGHT})], [{1: [0, 2, 3]}]),
    Op("glu over a dim in the middle", lambda x: F.glu(x, 1), [((3, 8, 2), {1: EIGHT})], [{1: [0, 2, 3]}]),
    Op("glu over its default dim", torch.ops.aten.glu.default, [((3, 8), {1: EIGHT})], [{1: [0, 2, 3]}]),
    Op("grid_sample", lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), [IMAGE, ((2, 3, 3, 2), NONE)], [{1: SIX}]),
    Op("embedding", lambda w: F.embedding(torch.tensor([[3, 0], [2, 2]]), w), [((4, 6), {1: SIX})], [{2: SIX}]),
    Op("embedding_bag", lambda w: F.embedding_bag(torch.tensor([[3, 0], [2, 2]]), w), [((4, 6), {1: SIX})], [{1: SIX}]),
    Op("index_add", lambda x, y: x.index_add(0, torch.tensor([1, 1]), y), [ROW, ((2, 6), {1: SIX})], [{1: SIX}]),
    Op("index_add to zeros", grown, [((3, 6), {1: SIX})], [{1: SIX}]),
    Op("index_add to zeros along dim 1", grown_along_1, [((6, 3), {0: SIX})], [{0: SIX}]),
    Op("scatter_add", lambda x, y: x.scatter_add(0, torch.ones_like(y, dtype=torch.long), y), [ROW, ((2, 6), {1: SIX})], [{1: SIX}]),
    Op("index_put of rows", written, [ROW, ((2, 6), {1: SIX})], [{1: SIX}]),
    Op("index_put between dims", between, [((4, 5, 6), {0: FOUR, 2: SIX}), ((4, 2, 6), {0: FOUR, 2: SIX})], [{0: FOUR, 2: SIX}]),
    Op("fake quantisation of channels", per_channel, [ROW, LINE], [{1: SIX}], False, torch.float32),
    Op("observed fake quantisation", observed(None), [ROW], [{1: SIX}], True, torch.float32),
    Op("observed fake quantisation of rows", observed(0), [ROW], [{1: SIX}], True, torch.float32),
    # entry by entry, in place, and an op that nothing is known of
    Op("mul", torch.mul, [ROW, LINE], [{1: SIX}]),
    Op("sigmoid", torch.sigmoid, [ROW], [{1: SIX}]),
    Op("in place", in_place, [ROW, LINE], [{1: SIX}]),
    Op("where", lambda x, y: torch.where(x > 0, x, y), [ROW, ROW], [{1: SIX}]),
    Op("polar", lambda x, y: torch.polar(x.exp(), y).real, [ROW, ROW], [{1: SIX}]),
    Op("an op without a handler", lambda x: torch.logcumsumexp(x, 1), [((6, 5), {0: SIX})], [{0: SIX}]),
    Op("one of two arguments", lambda x, y: torch.ops.aten.renorm(x * y, 2, 0, 0.5), [((6, 5), {0: SIX}), ((6, 1), {0: SIX})], [{0: SIX}]),
]  # fmt: skip


def alive(shape: Sequence[int], kept: Kept) -> Tensor:
    """1 at the entries that stay."""
    mask = torch.ones(tuple(shape))
    for dim, indices in kept.items():
        one = torch.zeros(shape[dim])
        one[list(indices)] = 1
        mask = mask * one.view([-1 if d == dim else 1 for d in range(len(shape))])
    return mask


def cut(tensor: Tensor, kept: Kept) -> Tensor:
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, torch.tensor(list(indices)))
    return tensor


def listed(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


@pytest.mark.parametrize("op", OPS, ids=[op.name for op in OPS])
def test_of_the_kept_entries_alone(op: Op) -> None:
    drawn = [torch.randn(shape, dtype=op.dtype) for shape, _ in op.tensors]
    masks = [alive(shape, kept) for shape, kept in op.tensors]
    given = [t * m.to(op.dtype) for t, m in zip(drawn, masks, strict=True)]
    run = MaskedRun()
    for tensor, mask in zip(given, masks, strict=True):
        run.give(tensor, mask)
    with run:
        found = listed(op.call(*given))
    wanted = listed(op.call(*(cut(t, kept) for t, (_, kept) in zip(drawn, op.tensors, strict=True))))
    for tensor, other, kept in zip(found, wanted, op.results, strict=True):
        near = 1e-9 if op.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(cut(tensor, kept), other, rtol=near, atol=near)
        assert torch.equal(run.full(tensor), alive(tensor.shape, kept)), "mask"
        assert not tensor[run.full(tensor) == 0].any(), "dead entries are zero"
    assert bool(run.restricted) == op.restricts


@pytest.mark.parametrize("shape", [(6,), (1, 6), (3, 6), (3, 1)])
def test_what_is_drawn_is_alive_where_it_meets_what_is(shape: tuple[int, ...]) -> None:
    x, mask = torch.randn(3, 6), alive((3, 6), {1: SIX})
    run = MaskedRun()
    run.give(x, mask)
    with run:
        x * torch.rand(shape)
    (draw,) = run.drawn.calls
    kept = [d for d, n in enumerate(shape) if n == 6]
    assert draw.mask is None or torch.equal(draw.mask, alive(shape, dict.fromkeys(kept, SIX)))
    assert (draw.mask is None) == (not kept) or bool(draw.mask.all())
