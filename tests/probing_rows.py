"""The table of calls that rules are probed with: every registered name, its overloads, and arguments that matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import vision_ops  # noqa: F401  # declares what rules for ops of any library are about
from probing import Row, size
from torch import Tensor
from versions import NEW_TORCH

aten = torch.ops.aten
DICE = torch.Generator().manual_seed(0)
ROWS: dict[str, Row] = {}


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=DICE, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, generator=DICE, dtype=torch.float64) + 0.3


def single(*shape: int) -> Tensor:
    return torch.randn(shape, generator=DICE)


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape, generator=DICE).bfloat16()


def number(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=DICE)


def yes(*shape: int) -> Tensor:
    return torch.rand(shape, generator=DICE) > 0.4


def at(
    name: str,
    *args: Any,
    run: Callable[..., Any] | None = None,
    random: bool = False,
    buffers: bool = False,
    held: tuple[tuple[int, int], ...] = (),
    **kwargs: Any,
) -> None:
    """Put a call into the table; the overload is the one that torch picks for these arguments."""
    name, _, overload = name.partition(".")
    space, _, rest = name.rpartition("::")
    packet = getattr(getattr(torch.ops, space or "aten"), rest, None)
    if not NEW_TORCH and (packet is None or (overload and overload not in packet.overloads())):
        return
    if not overload:
        given, named = Row(None, args, kwargs).plain
        overload = torch._C._jit_resolve_packet(f"{space or 'aten'}::{rest}", *given, **named) or "default"
    op = getattr(getattr(getattr(torch.ops, space or "aten"), rest), overload)
    label = f"{name}.{overload}"
    count = sum(key.partition(" ")[0] == label for key in ROWS)
    ROWS[f"{label} {count + 1}" if count else label] = Row(op, args, kwargs, run, random, buffers, held)
    DICE.manual_seed(0)  # what a row holds does not depend on the rows before it


def each(names: str, *args: Any, **kwargs: Any) -> None:
    for name in names.split():
        at(name, *args, **kwargs)


# fmt: off

# --- contractions

at("linear", x(2, 3, 5), x(7, 5), x(7))
at("linear", x(5), x(7, 5))
at("linear", x(3, 5), x(5))
at("linalg_solve_triangular", x(2, 5, 5).tril(), x(2, 5, 7), upper=False)
at("linalg_solve_triangular", x(2, 5, 5).triu(), x(2, 7, 5), upper=True, left=False)
at("linear", x(3, 1), x(5, 1), x(5))
at("mm", x(5, 7), x(7, 3))
at("mm", x(1, 7), x(7, 3))
at("mm", x(5, 1), x(1, 3))
at("mm.dtype", bf16(5, 7), bf16(7, 3), torch.float32, run=lambda a, b, d: torch.mm(a.to(d), b.to(d)))
at("bmm", x(2, 5, 7), x(2, 7, 3))
at("bmm", x(1, 5, 7), x(1, 7, 1))
at("bmm.dtype", bf16(2, 5, 7), bf16(2, 7, 3), torch.float32, run=lambda a, b, d: torch.bmm(a.to(d), b.to(d)))
at("mv", x(5, 7), x(7))
each("dot vdot", x(7), x(7))
at("cdist", x(2, 5, 7), x(2, 3, 7))
at("cdist", x(5, 7), x(3, 7), 1.0)
at("cdist", x(5, 1), x(3, 1))
at("_cdist_forward", x(2, 5, 7), x(2, 3, 7), 2.0, None)
at("_euclidean_dist", x(5, 7), x(3, 7))
at("bilinear", x(2, 5), x(2, 7), x(3, 5, 7), x(3))
at("bilinear", x(2, 11, 5), x(2, 11, 7), x(3, 5, 7), None)
at("addmm", x(3), x(5, 7), x(7, 3))
at("addmm", x(5, 1), x(5, 7), x(7, 3))
at("addmm", x(5, 3), x(5, 7), x(7, 3), beta=0.5, alpha=2.0)
at("addmm.dtype", bf16(3), bf16(5, 7), bf16(7, 3), torch.float32, run=lambda c, a, b, d: torch.addmm(c.to(d), a.to(d), b.to(d)))
at("baddbmm", x(2, 1, 3), x(2, 5, 7), x(2, 7, 3))
at("baddbmm", x(3), x(2, 5, 7), x(2, 7, 3), beta=0.3)
at("baddbmm.dtype", bf16(3), bf16(2, 5, 7), bf16(2, 7, 3), torch.float32, run=lambda c, a, b, d: torch.baddbmm(c.to(d), a.to(d), b.to(d)))
at("addbmm", x(5, 3), x(2, 5, 7), x(2, 7, 3))
at("addbmm", x(3), x(2, 5, 7), x(2, 7, 3))
at("addmv", x(5), x(5, 7), x(7))
at("addmv", x(), x(5, 7), x(7))
at("addmv", x(1), x(5, 7), x(7))
at("addr", x(5, 7), x(5), x(7))
for shapes in [((5,), (5,)), ((3, 5), (5,)), ((5,), (5, 7)), ((3, 5), (5, 7)), ((2, 3, 5), (5, 7)), ((2, 3, 5), (5,)),
               ((5,), (2, 5, 7)), ((2, 3, 5), (2, 5, 7)), ((1, 3, 5), (2, 5, 7)), ((11, 2, 3, 5), (2, 5, 7)), ((3, 5), (2, 5, 7)),
               ((2, 3, 1), (2, 1, 7)), ((2, 1, 5), (2, 5, 7))]:
    at("matmul", *(x(*s) for s in shapes))
for text, shapes in {
    "ij,jk->ik": ((3, 5), (5, 7)), "bij,bjk->bik": ((2, 3, 5), (2, 5, 7)), "...i,oi->...o": ((2, 3, 5), (7, 5)),
    "bhid,bhjd->bhij": ((2, 3, 5, 7), (2, 3, 11, 7)), "i,j->ij": ((5,), (7,)), "ij->ji": ((3, 5),), "ij->i": ((3, 5),),
    "ij,ij->i": ((3, 5), (3, 5)), "bi,bi": ((3, 5), (3, 5)), "ij,jk": ((3, 5), (5, 7)), "b i, b j -> b j i": ((2, 5), (2, 7)),
    "btc,btc,cd->btd": ((2, 3, 5), (2, 3, 5), (5, 7)), "ij,kl->il": ((3, 5), (7, 11)), "...ij->...ji": ((2, 3, 5),),
    "b...c,cd->b...d": ((2, 3, 7, 5), (5, 11)), "ii->i": ((5, 5),), "ii": ((5, 5),), "...i->i": ((2, 3, 5),),
    "bc,b->bc": ((2, 5), (2,)), "ij,j->i": ((3, 1), (1,)),
}.items():
    at("einsum", text, [x(*s) for s in shapes])
at("_grouped_mm", bf16(10, 8), bf16(2, 8, 16), torch.tensor([4, 10], dtype=torch.int32), held=((1, 0),))
at("_grouped_mm", bf16(2, 8, 16), bf16(2, 16, 8))

# --- attention

def attend(*args: Any, **kwargs: Any) -> None:
    at("scaled_dot_product_attention", *args, **kwargs)


attend(x(2, 3, 5, 7), x(2, 3, 11, 7), x(2, 3, 11, 13), scale=0.4)
attend(x(2, 3, 5, 7), x(2, 3, 11, 7), x(2, 3, 11, 13))
attend(x(2, 3, 5, 7), x(2, 3, 5, 7), x(2, 3, 5, 13), None, 0.0, True, scale=0.4)
attend(x(2, 3, 5, 7), x(2, 3, 11, 7), x(2, 3, 11, 13), x(3, 5, 11), scale=0.4)
attend(x(2, 3, 5, 7), x(2, 3, 11, 7), x(2, 3, 11, 13), x(2, 1, 1, 11), scale=0.4)
attend(x(2, 3, 5, 7), x(2, 3, 11, 7), x(2, 3, 11, 13), yes(5, 11) | torch.eye(5, 11).bool(), scale=0.4)
attend(x(2, 6, 5, 7), x(2, 2, 11, 7), x(2, 2, 11, 13), scale=0.4, enable_gqa=True)
attend(x(2, 6, 5, 7), x(2, 1, 11, 7), x(2, 1, 11, 13), scale=0.4)
attend(x(3, 5, 7), x(3, 11, 7), x(3, 11, 13), scale=0.4)
attend(x(5, 7), x(11, 7), x(11, 13), scale=0.4)
attend(x(2, 3, 1, 7), x(2, 3, 11, 7), x(2, 3, 11, 13), scale=0.4)
flash = lambda q, k, v, *rest, scale=None, **named: (aten._scaled_dot_product_attention_math(q, k, v, scale=scale)[0])  # noqa: E731
same = [x(2, 3, 5, 7), x(2, 3, 11, 7), x(2, 3, 11, 7)]
at("_scaled_dot_product_flash_attention_for_cpu", *same, scale=0.4)
at("_scaled_dot_product_flash_attention.default", *same, scale=0.4, run=flash)
at("_scaled_dot_product_flash_attention.quantized", *same, x(1), x(1), x(1), scale=0.4, run=flash)
at("_scaled_dot_product_efficient_attention", *same, None, False, scale=0.4, run=flash)
at("_scaled_dot_product_fused_attention_overrideable", *same, scale=0.4, run=flash)

# --- convolutions


def conv(inputs: tuple[int, ...], weight: tuple[int, ...], stride: int = 1, padding: int = 0, dilation: int = 1,
         transposed: bool = False, groups: int = 1, bias: bool = True, output_padding: int = 0) -> None:
    k = len(weight) - 2
    out = weight[1] * groups if transposed else weight[0]
    at("convolution", x(*inputs), x(*weight), x(out) if bias else None, [stride] * k, [padding] * k, [dilation] * k,
       transposed, [output_padding] * k, size(groups) if groups > 1 else 1)


conv((2, 5, 8, 6), (7, 5, 3, 3))
conv((2, 5, 8, 6), (7, 5, 1, 1))
conv((2, 5, 8, 6), (7, 5, 1, 1), stride=2)
conv((2, 5, 8, 6), (7, 5, 3, 2), stride=2, padding=1, dilation=2, bias=False)
conv((2, 5, 13), (7, 5, 3))
conv((2, 5, 4, 5, 3), (7, 5, 2, 2, 2))
conv((2, 1, 8, 6), (7, 1, 3, 3))
conv((2, 5, 8, 6), (1, 5, 3, 3))
conv((2, 5, 8, 6), (5, 1, 3, 3), groups=5)
conv((2, 5, 8, 6), (15, 1, 3, 3), groups=5)
conv((2, 15, 8, 6), (5, 3, 3, 3), groups=5)
conv((2, 15, 8, 6), (21, 5, 3, 3), groups=3)
conv((2, 10, 13), (6, 5, 3), groups=2, padding=1)
conv((2, 5, 8, 6), (5, 7, 3, 3), transposed=True)
conv((2, 5, 8, 6), (5, 7, 2, 2), transposed=True, stride=2, padding=1, output_padding=1)
conv((2, 5, 8, 6), (5, 1, 2, 2), transposed=True, groups=5)
conv((2, 5, 8, 6), (5, 3, 2, 2), transposed=True, groups=5)
conv((2, 15, 8, 6), (15, 1, 2, 2), transposed=True, groups=5)
conv((2, 10, 8, 6), (10, 7, 2, 2), transposed=True, groups=2)
conv((2, 5, 13), (5, 7, 1), transposed=True)
image, kernel = x(2, 5, 8, 6), x(7, 5, 3, 3)
at("_convolution", image, kernel, x(7), [1, 1], [0, 0], [1, 1], False, [0, 0], 1, False, False, False, False)
at("convolution_overrideable", image, kernel, x(7), [1, 1], [0, 0], [1, 1], False, [0, 0], 1, run=aten.convolution.default)

for n in (1, 2, 3):
    y = x(2, 5, *[8, 6, 4][:n])
    where = f"{n}d"
    if n > 1:
        each(f"avg_pool{where} max_pool{where}_with_indices", y, [2] * n)
        at(f"avg_pool{where}", y[0], [3] * n, [2] * n, [1] * n)
        each(f"_adaptive_avg_pool{where} adaptive_max_pool{where}", y, [3, 2, 3][:n])
    each(f"upsample_nearest{where} _upsample_nearest_exact{where}", y, [11, 7, 5][:n])
    at(f"upsample_{['', 'linear', 'bilinear', 'trilinear'][n]}{where}", y, [11, 7, 5][:n], False)
    each(f"reflection_pad{where} replication_pad{where}", y, [1, 2] * n)
    at(f"reflection_pad{where}", y[0], [1, 2] * n)
at("max_pool2d_with_indices", x(5, 8, 6), [3, 3], [1, 1], [0, 0], [2, 2])
at("upsample_bicubic2d", x(2, 5, 8, 6), [11, 7], False)
each("_upsample_bilinear2d_aa _upsample_bicubic2d_aa", x(2, 5, 8, 6), [11, 7], False)
at("fractional_max_pool2d", x(2, 5, 8, 6), [2, 2], [3, 2], x(2, 5, 2).sigmoid())
at("fractional_max_pool3d", x(2, 5, 8, 6, 4), [2, 2, 2], [3, 2, 2], x(2, 5, 3).sigmoid())
at("max_unpool2d", x(2, 5, 4, 3), torch.arange(12).mul(4).view(4, 3).expand(2, 5, 4, 3).contiguous(), [8, 6])
at("max_unpool3d", x(2, 5, 2, 2, 2), torch.arange(8).mul(8).view(2, 2, 2).expand(2, 5, 2, 2, 2).contiguous(), [4, 4, 4], [2, 2, 2], [0, 0, 0])
at("grid_sampler_2d", x(2, 5, 8, 6), x(2, 7, 3, 2).tanh(), 0, 0, False)
at("grid_sampler_3d", x(2, 5, 8, 6, 4), x(2, 7, 3, 5, 3).tanh(), 0, 1, True)
at("im2col", x(2, 5, 8, 6), [3, 2], [1, 1], [0, 0], [1, 1])
at("im2col", x(2, 1, 8, 6), [3, 2], [1, 1], [1, 1], [2, 2])
at("im2col", x(2, 5, 8, 6), [1, 1], [1, 1], [0, 0], [2, 2])
at("im2col", x(5, 8, 6), [3, 2], [1, 1], [0, 0], [1, 1])
at("col2im", x(2, 30, 30), [8, 6], [3, 2], [1, 1], [0, 0], [1, 1])
at("col2im", x(2, 6, 30), [8, 6], [3, 2], [1, 1], [0, 0], [1, 1])
at("col2im", x(2, 5, 48), [8, 6], [1, 1], [1, 1], [0, 0], [1, 1])
at("col2im", x(30, 30), [8, 6], [3, 2], [1, 1], [0, 0], [1, 1])

# --- entries chosen by an index

at("embedding", x(11, 5), number(11, 2, 3))
at("embedding", x(11, 5), number(11, 3), 3)
at("_embedding_bag", x(11, 5), number(11, 7), torch.tensor([0, 2, 5]), False, 0)
at("_embedding_bag", x(11, 5), number(11, 7), torch.tensor([0, 2, 5]), False, 1)
at("_embedding_bag", x(11, 5), number(11, 7), torch.tensor([0, 2, 5]), False, 2)
at("_embedding_bag", x(11, 5), number(11, 7), torch.tensor([0, 2, 5]), False, 0, False, x(7))
at("_embedding_bag_forward_only", x(11, 5), number(11, 7), torch.tensor([0, 2, 5]), False, 1)
ORDER = torch.tensor([3, 0, 6, 1, 5, 2, 4])
for i in (ORDER, torch.tensor([2, 5, 0]), torch.tensor([2, 2, 5]), torch.tensor([4])):
    for buffers in (False, True):
        at("index_select", x(3, 7, 5), 1, i, buffers=buffers)
        at("index_select", x(3, 7, 5), -2, i, buffers=buffers)
        each("index _unsafe_index", x(3, 7, 5), [None, i], buffers=buffers)
    at("gather", x(3, 7, 5), 1, i[None, :, None].expand(3, -1, 5).contiguous())
at("gather", x(3, 7, 5), -2, number(7, 3, 2, 5))
at("gather", x(3, 7, 5), 1, number(7, 2, 2, 5))
at("gather", x(3, 7, 5), 0, number(3, 1, 7, 5))
at("index", x(7, 5), [ORDER])
at("index", x(3, 7, 5), [number(3, 2, 11)])
at("index", x(3, 7, 5), [number(3, 2), number(7, 2)])
at("index", x(3, 7, 5), [number(3, 2), None, number(5, 2)])
at("index", x(3, 7, 5), [None, number(7, 13, 1), number(5, 2)])
at("index", x(3, 7, 5), [yes(3)])
at("index", x(3, 7, 5), [None, yes(7)])
at("index", x(3, 7, 5), [yes(3, 7)])
at("index", x(3, 7, 5), [number(3, 1), None, None])
at("index", x(3, 7, 5, 2), [None, number(7, 3), None, number(2, 3)])
rows = torch.tensor([2, 0])
each("index_put _unsafe_index_put", x(3, 7, 5), [rows], x(2, 7, 5))
at("_index_put_impl", x(3, 7, 5), [rows], x(2, 7, 5), True)
at("index_put", x(3, 7, 5), [rows], x(7, 1))
at("index_put", x(3, 7, 5), [rows], x())
at("index_put", x(3, 7, 5), [None, ORDER], x(3, 7, 5), True)
at("index_put", x(3, 7, 5), [rows, rows], x(2, 5), True)
at("index_put", x(3, 7, 5), [None, rows], x(3, 2, 5))
at("index_put", x(3, 7, 5), [yes(3, 7)], x(5))
at("index_put", x(3, 7, 5), [None, None, torch.tensor([1])], x(3, 7, 1))
at("index_put", x(3, 7, 5), [rows, None, rows], x(2, 7))
for i in (number(3, 2, 7, 5), number(3, 1, 7, 5), number(3, 2, 6, 5)):
    at("scatter", x(3, 7, 5), 0, i, x(*i.shape))
    at("scatter", x(3, 7, 5), 0, i, 0.5)
    at("scatter_add", x(3, 7, 5), -3, i, x(*i.shape))
    at("scatter_reduce", x(3, 7, 5), 0, i, x(*i.shape), "amax")
at("scatter", x(3, 7, 5), 1, number(7, 3, 2, 5), x(3, 2, 5), reduce="add")
at("scatter", x(3, 7, 5), 1, number(7, 3, 2, 5), 0.5, reduce="multiply")
at("scatter_add", x(3, 7, 5), 0, number(3, 2, 7, 5), x(4, 7, 5))
at("scatter_add", x(3, 7, 5), 0, number(3, 2, 7, 5), x(2, 11, 5))
at("scatter_reduce", x(3, 7, 5), 0, number(3, 2, 7, 5), x(2, 7, 5), "sum", include_self=False)
at("scatter_reduce", x(3, 7, 5), 0, number(3, 2, 7, 5), x(2, 7, 5), "mean")
at("index_add", x(3, 7, 5), 0, rows, x(2, 7, 5))
at("index_add", x(3, 7, 5), -2, rows, x(3, 2, 5), alpha=0.5)
at("index_copy", x(3, 7, 5), 1, rows, x(3, 2, 5))
at("index_reduce", x(3, 7, 5), 1, rows, x(3, 2, 5), "amax")
at("index_fill", x(3, 7, 5), 1, rows, 0.5)
at("index_fill", x(3, 7, 5), -1, rows, x())
at("masked_select", x(3, 7), yes(3, 7))
at("nonzero", x(3, 7))
at("unique_dim", x(3, 7), 0)
at("_unique2", x(7))
at("unique_consecutive", x(7))
at("searchsorted", x(7).sort().values, x(3))
at("searchsorted", x(7).sort().values, 0.3)
at("histc", x(7), 5)
at("one_hot", number(5, 3, 7), 5)
at("bincount", number(5, 11), positive(11))
at("multinomial", positive(3, 7), 2, random=True)
at("isin", x(3, 7), x(5))
at("isin", x(3, 7), 0.5)
at("isin", 0.5, x(5))
at("take", x(3, 7), number(21, 5))
at("masked_scatter", x(3, 7), yes(3, 7), x(3, 7))
at("masked_scatter", x(3, 7), yes(3, 1), x(3, 7))

# --- entries moved

at("view", x(2, 21), [size(2, 0), size(3, 1), size(7, 2)])
at("view", x(2, 3, 7), [-1, size(21, 1)])
at("view", x(2, 3, 7), [size(6, 0), size(7, 1)])
at("view", x(2, 3, 7), [-1])
at("view", x(6, 35), [size(2, 0), size(3, 1), size(5, 2), size(7, 3)])
at("view", x(4, 9), [size(6, 0), size(6, 1)])
at("view", x(2, 3, 1, 7), [-1, 1, size(3, 2), 1, size(7, 4)])
at("view", x(2, 3, 5, 7), [size(2, 0), size(15, 1), size(7, 2)])
at("view", x(5, 6), [size(10, 0), size(3, 1)])
at("view.dtype", x(3, 7), torch.int64)
at("view.dtype", x(3, 7), torch.int32)
at("_unsafe_view", x(2, 3, 7), [-1, size(21, 1)])
at("_reshape_alias", x(2, 3, 7), [size(2, 0), size(21, 1)], [21, 1], run=lambda a, shape, strides: a.reshape(shape))
at("t", x(3, 7))
at("t", x(7))
at("transpose", x(2, 3, 7), 1, 2)
at("transpose", x(2, 3, 7), -1, 0)
at("permute", x(2, 3, 7), [2, 0, 1])
at("permute", x(2, 3, 7), [-1, 0, -2])
at("squeeze", x(5, 1, 7, 1))
at("squeeze", x(2, 1, 7, 1), 1)
at("squeeze", x(2, 1, 7, 1), -2)
at("squeeze", x(2, 1, 7, 1), [1, -1])
at("unsqueeze", x(2, 7), 1)
at("unsqueeze", x(2, 7), -1)
at("expand", x(3, 1), [2, -1, size(7, 2)])
at("expand", x(3, 1), [size(5, 0), size(3, 1), 7])
at("expand", x(3, 7), [size(3, 0), size(7, 1)])
at("expand_as", x(3, 1), x(2, 3, 7))
each("view_as reshape_as", x(2, 21), x(2, 3, 7))
at("repeat", x(3, 7), [2, 1, 3])
at("repeat", x(3, 1), [2, size(11, 1)])
at("repeat", x(3, 1), [1, 11])
at("repeat_interleave", x(3, 7), 2, 1)
at("repeat_interleave", x(3, 7), 2, -2)
at("repeat_interleave", x(3, 1), 2, 1)
at("repeat_interleave", x(3, 7), 2)
at("repeat_interleave.Tensor", torch.tensor([2, 0, 3]))
at("cat", [x(2, 3, 7), x(2, 5, 7)], 1)
at("cat", [x(2, 3, 7), x(2, 3, 1), x(2, 3, 5)], -1)
at("cat", [x(2, 3), x(0), x(2, 5)], 1)
at("cat", [x(2, 3)], 1)
at("cat", [x(3), x(5)])
at("stack", [x(3, 7), x(3, 7)])
at("stack", [x(3, 7), x(3, 7), x(3, 7)], -1)
at("stack", [x(3, 7), x(3, 7)], 1)
at("unbind", x(3, 7))
at("unbind", x(3, 7), -1)
at("select", x(3, 7, 5), 1, 2)
at("select", x(3, 7, 5), -1, -2)
each("split unsafe_split", x(3, 14), size(7, 1), 1)
each("split unsafe_split", x(3, 15), 7, -1)
each("split unsafe_split", x(3, 17), 7, -1)
each("split unsafe_split", x(3, 14), size(2, 1), 1)
each("split unsafe_split", x(3, 14), 1, 1)
each("split unsafe_split", x(3, 14), 14, 1)
at("chunk", x(3, 14), 2, 1)
at("chunk", x(3, 15), 4, -1)
at("chunk", x(4, 3), 2)
at("tensor_split", x(3, 14), 2, 1)
at("tensor_split", x(3, 14), 4, 1)
at("tensor_split", x(3, 14), [size(3, 1, 0), size(10, 1, 0)], 1)
at("tensor_split", x(14, 3), [size(-4, 0, 0)])
at("hsplit", x(3, 14), 2)
at("hsplit", x(14), 2)
at("hsplit", x(3, 14), [size(3, 1, 0)])
at("vsplit", x(14, 3), 2)
at("vsplit", x(14, 3), [size(3, 0, 0), size(10, 0, 0)])
at("dsplit", x(3, 5, 14), 2)
at("dsplit", x(3, 5, 14), [size(3, 2, 0)])
each("split_with_sizes unsafe_split_with_sizes split_with_sizes_copy", x(3, 10), [size(2, 1), size(5, 1, None, 1), size(3, 1, None, 2)], 1)
at("split_with_sizes", x(10, 3), [size(1, 0), size(9, 0, None, 1)], -2)
at("slice", x(3, 13), 1, size(4, 1, 0), size(9, 1, 0))
at("slice", x(3, 13), 1, 0, size(9, 1, 0))
at("slice", x(3, 13), -1, size(-5, 1, 0), 9223372036854775807)
at("slice", x(3, 13), 1, 0, size(-5, 1, 0))
at("slice", x(3, 13), 1, 0, 9223372036854775807)
at("slice", x(3, 13), 1, size(3, 1, 0), size(4, 1, 0))
at("narrow_copy", x(3, 13), 1, size(4, 1, 0), size(5, 1))
at("narrow_copy", x(3, 13), -1, size(-5, 1, 0), size(3, 1))
at("slice", x(13, 3))
at("slice", x(3, 14), 1, 0, 9223372036854775807, 2)
at("slice", x(3, 14), 1, 1, 9223372036854775807, 2)
at("slice", x(3, 13), 1, 1, 9, 2)
at("slice", x(3, 13), 1, 0, 9223372036854775807, 2)
at("slice", x(3, 7), 1, 2, 9223372036854775807, 7)
at("slice", x(3, 13), 1, 5, 5)
at("slice_scatter", x(3, 13), x(3, 5), 1, size(4, 1, 0), size(9, 1, 0))
at("slice_scatter", x(3, 13), x(3, 13), 1)
at("slice_scatter", x(3, 13), x(2, 13), -2, size(1, 0, 0))
at("slice_scatter", x(3, 14), x(3, 7), 1, 0, 14, 2)
at("slice_scatter", x(3, 13), x(3, 1), 1, size(4, 1, 0), size(5, 1, 0))
for name in ("pad", "constant_pad_nd"):
    at(name, x(2, 7, 5), [0, 0, 1, 2])
    at(name, x(2, 7, 5), [1, 0])
    at(name, x(2, 7, 5), [1, 2, size(-2, 1, 0, minus=True), 1])
    at(name, x(2, 7, 5), [0, 0, size(-2, 1, 0, minus=True), size(-1, 1, 0)])
    at(name, x(2, 7, 1), [2, 0])
    at(name, x(2, 7, 5), [0, 0, 1, 2], value=0.5)
for mode in ("reflect", "replicate", "circular"):
    at("pad", x(2, 7, 5), [1, 2], mode)
at("roll", x(3, 7), [size(2, 1, partly=True)], [1])
at("roll", x(5, 7), [size(-1, 1, partly=True), size(2, 0, partly=True)], [-1, 0])
at("roll", x(3, 7), [9], [1])
at("roll", x(3, 7), [7], [1])
at("roll", x(3, 7), [2])
at("flip", x(3, 7, 5), [1])
at("flip", x(3, 7, 5), [0, -1])
at("pixel_shuffle", x(2, 12, 3, 5), 2)
at("pixel_shuffle", x(4, 3, 5), 2)
at("pixel_shuffle", x(2, 3, 3, 5), 1)
at("pixel_unshuffle", x(2, 3, 6, 4), 2)
at("pixel_unshuffle", x(1, 6, 4), 2)
at("channel_shuffle", x(2, 15, 3, 4), 3)
at("channel_shuffle", x(2, 15, 3, 4), 15)
at("unfold", x(2, 11, 3), 1, 3, 2)
at("unfold", x(2, 11, 3), -2, 2, 2)
at("diag_embed", x(3, 7))
at("diag_embed", x(3, 5, 7), 0, 0, -2)
at("diag_embed", x(3, 7), 1, 0, 2)
at("broadcast_tensors", [x(3, 1), x(1, 7), x(2, 3, 7), x()])
at("meshgrid", [x(3), x(5), x(7)])
at("meshgrid", [x(3), x(5), x(7)], indexing="xy")
at("meshgrid", [x(3), x()], indexing="ij")
at("trace", x(7, 7))
at("rot90", x(3, 7, 5), 1, [0, 1])
at("rot90", x(3, 7, 5), 2, [1, 2])
at("rot90", x(3, 7, 5), 3, [-1, 0])
at("rot90", x(3, 7, 5), 4, [0, 1])
at("as_strided", x(3, 7), [size(7, 0), size(3, 1)], [1, size(7, 0)])
at("as_strided", x(3, 1, 7), [size(3, 0), size(7, 1), 1], [size(7, 1), 1, 4])
at("as_strided", x(3, 7), [2, size(7, 1)], [size(7, 1), 1])
at("as_strided", x(3, 7), [size(3, 0), size(7, 1)], [size(7, 1), 1], 0)
at("as_strided", x(3, 7), [2, 7], [7, 1], 7)
at("as_strided", x(3, 7), [size(21, 0)], [1])
at("as_strided", x(4, 7), [2, 2, size(7, 2)], [size(7, 2), size(7, 2), 1])
at("as_strided_", x(3, 7), [size(7, 0), size(3, 1)], [1, size(7, 0)])
at("transpose_", x(3, 5, 7), 0, -1)
at("t_", x(5, 7))
at("unsqueeze_", x(5, 7), 1)
at("squeeze_", x(5, 1, 7))
at("squeeze_", x(5, 1, 7), 1)
at("squeeze_", x(5, 1, 7), [0, 1])
at("diagonal", x(3, 7, 7), 0, 1, 2)
at("diagonal", x(7, 3, 7), 0, -1, 0)
at("diagonal", x(7, 7))
at("diagonal", x(3, 7, 7), 1, 1, 2)
at("diagonal", x(3, 7, 5), 0, 1, 2)

# --- norms

V = [positive(5) for _ in range(4)]
batch_norms = {
    "batch_norm": lambda train: ([*V], [train, 0.1, 1e-5, False]), "native_batch_norm": lambda train: ([*V], [train, 0.1, 1e-5]),
    "_native_batch_norm_legit": lambda train: ([*V], [train, 0.1, 1e-5]), "instance_norm": lambda train: ([*V], [train, 0.1, 1e-5, False]),
    "cudnn_batch_norm": lambda train: ([*V], [train, 0.1, 1e-5]), "miopen_batch_norm": lambda train: ([*V], [train, 0.1, 1e-5]),
}
native = {"run": aten.native_batch_norm.default}
for name, given in batch_norms.items():
    for train in (False, True):
        at(name, x(3, 5, 4), *given(train)[0], *given(train)[1], **(native if name.startswith(("cudnn", "mi")) else {}))
at("batch_norm", x(3, 5), *V, False, 0.1, 1e-5, False)
at("batch_norm", x(3, 5, 4), None, None, V[0], V[1], False, 0.1, 1e-5, False)
at("batch_norm", x(3, 5, 4), V[0], V[1], None, None, True, 0.1, 1e-5, False)
at("native_batch_norm", x(3, 5, 4), V[0], None, V[0], V[1], False, 0.1, 1e-5)
at("_native_batch_norm_legit", x(3, 5, 4), V[0], V[1], True, 0.1, 1e-5)
at("_native_batch_norm_legit_no_training", x(3, 5, 4), *V, 0.1, 1e-5)
at("_batch_norm_with_update", x(3, 5, 4), *V, 0.1, 1e-5)
at("_batch_norm_no_update", x(3, 5, 4), *V, 0.1, 1e-5)
at("instance_norm", x(3, 5, 4), None, None, None, None, True, 0.1, 1e-5, False)
at("layer_norm", x(2, 3, 7), [size(7, 2)], x(7), x(7))
at("layer_norm", x(2, 3, 7), [size(3, 1), size(7, 2)], x(3, 7))
at("layer_norm", x(2, 3, 7), [size(7, 2)])
at("native_layer_norm", x(2, 3, 7), [size(7, 2)], x(7), x(7), 1e-5)
at("native_layer_norm", x(2, 3, 7), [size(7, 2)], None, x(7), 1e-5)
at("rms_norm", x(2, 3, 7), [size(7, 2)], x(7))
at("rms_norm", x(2, 3, 7), [size(3, 1), size(7, 2)])
at("group_norm", x(2, 15, 4), 3, x(15), x(15))
at("group_norm", x(2, 15, 4), 1)
at("group_norm", x(2, 5, 4), size(5), x(5))
at("group_norm", x(2, 1, 4), 1, x(1))
at("native_group_norm", x(2, 15, 4), x(15), x(15), size(2, 0), size(15, 1), size(4, 2), 3, 1e-5)
at("native_group_norm", x(2, 15, 4), None, None, size(2, 0), size(15, 1), size(4, 2), 1, 1e-5)
at("native_group_norm", x(2, 5), x(5), None, size(2, 0), size(5, 1), 1, size(5), 1e-5)
at("_weight_norm_interface", x(5, 7, 3), x(5, 1, 1), 0)
at("_weight_norm_interface", x(5, 7), x(1, 7), 1)

# --- reductions

CALLS = [((), {}), (([1],), {}), (([-1, 0],), {}), (([1], True), {}), (([0, 1, 2],), {})]
for name in ("sum", "mean", "amax", "amin", "logsumexp"):
    for args, _ in CALLS if name != "logsumexp" else CALLS[1:]:
        at(name, x(3, 7, 5), *args)
each("nansum", x(3, 7, 5), [1])
each("nansum", x(3, 7, 5), None, True)
at("count_nonzero", x(3, 7, 5))
at("count_nonzero", x(3, 7, 5), [1])
for name in ("var", "std", "var_mean", "std_mean"):
    at(name, x(3, 7, 5), [1], correction=1)
    at(name, x(3, 7, 5), [0, -1], correction=0, keepdim=True)
    at(name, x(3, 7, 5), correction=None)
at("norm", x(3, 7, 5))
at("norm", x(3, 7, 5), 2, [1])
at("norm", x(3, 7, 5), 1, [0, -1], True)
at("norm", x(3, 7, 5), 2, [1], False, dtype=torch.float64)
at("norm", x(3, 7, 5), 2, dtype=torch.float64)
for args, _ in CALLS:
    at("linalg_vector_norm", x(3, 7, 5), 2, *args)
at("linalg_vector_norm", x(3, 7, 5), float("inf"), [1])
at("prod", x(3, 7, 5))
at("prod", x(3, 7, 5), 1)
at("prod", x(3, 7, 5), -2, True)
for name in ("_is_any_true", "_is_all_true"):
    at(name, yes(3, 7))
for name in ("any", "all"):
    at(name, x(3, 7, 5))
    at(name, x(3, 7, 5), 1)
    at(name, x(3, 7, 5), [0, -1], True)
at("aminmax", x(3, 7, 5), dim=1)
at("aminmax", x(3, 7, 5))
at("aminmax", x(3, 7, 5), dim=-1, keepdim=True)
for name in ("median", "nanmedian", "max", "min"):
    at(name, x(3, 7, 5))
    at(name, x(3, 7, 5), 1)
    at(name, x(3, 7, 5), -1, True)
for name in ("argmax", "argmin"):
    at(name, x(3, 7, 5))
    at(name, x(3, 7, 5), 1)
    at(name, x(3, 7, 5), -1, True)
at("max", -positive(3, 7, 5))
at("min", positive(3, 7, 5))
at("mode", x(3, 7, 5), 1)
at("mode", x(3, 7, 5))
at("kthvalue", x(3, 7, 5), 2, 1)
at("kthvalue", x(3, 7, 5), 2)
each("_softmax _log_softmax", x(3, 7, 5), 1, False)
each("_softmax _log_softmax", x(3, 7, 5), -1, False)
at("_safe_softmax", x(3, 7, 5), 1)
each("cumsum cumprod cummax cummin logcumsumexp", x(3, 7, 5), 1)
each("cumsum cumprod cummax cummin logcumsumexp", x(3, 7, 5), -1)
at("_fft_r2c", x(3, 7, 5), [1], 0, True)
at("_fft_r2c", x(3, 7, 5), [1, 2], 0, False)
at("_fft_c2r", torch.complex(x(3, 4, 5), x(3, 4, 5)), [1], 2, 7)
at("_fft_c2c", torch.complex(x(3, 7, 5), x(3, 7, 5)), [0, 2], 0, True)
at("sort", x(3, 7, 5))
at("sort", x(3, 7, 5), 1)
at("sort", x(3, 7, 5), 1, True)
at("sort", x(3, 7, 5), stable=True, dim=0)
at("topk", x(3, 7, 5), 2)
at("topk", x(3, 7, 5), 2, 1)
at("topk", x(3, 7, 5), 2, -2, False)
at("renorm", x(3, 7, 5), 2, 1, 1.0)

# --- entry by entry

for pair in [(x(3, 7), x(3, 7)), (x(3, 7), x(7)), (x(3, 1), x(1, 7)), (x(3, 7), x()), (x(7), x(3, 1))]:
    each("add mul maximum atan2 copysign logaddexp", *pair)
    at("polar", pair[0].abs(), pair[1])
    at("complex", *pair)
    at("where", yes(3, 7), *pair)
at("where", yes(3, 1), x(3, 7), x(7))
each("exp sigmoid tanh gelu silu neg relu hardswish hardsigmoid hardtanh mish softplus alias clone detach lift lift_fresh _to_copy "
     "zeros_like ones_like nan_to_num log_sigmoid_forward", x(3, 7))
at("_conj", torch.complex(x(3, 7), x(3, 7)))
each("rand_like randn_like empty_like bernoulli", positive(3, 7).clamp(max=1), random=True)
at("full_like", x(3, 7), 0.5)
each("rand_like.generator randn_like.generator", x(3, 7), generator=None, random=True)
at("randint_like", x(3, 7), 5, random=True)
at("randint_like.Tensor", x(3, 7), torch.tensor(5), random=True)
at("randint_like", x(3, 7), 2, 5, random=True)
at("randint_like.generator", x(3, 7), 5, generator=None, random=True)
at("randint_like.Tensor_generator", x(3, 7), torch.tensor(5), generator=None, random=True)
at("randint_like.low_generator_dtype", x(3, 7), 2, 5, generator=None, random=True)
at("bernoulli", x(3, 7), 0.5, random=True)
at("bernoulli.Tensor", x(3, 7), positive(3, 7).clamp(max=1), random=True)
at("copy", x(3, 7), x(7))
at("fill", x(3, 7), 0.5)
at("fill", x(3, 7), x())
at("zero", x(3, 7))
at("uniform", x(3, 7), random=True)
at("exponential", x(3, 7), random=True)
at("geometric", x(3, 7), 0.5, random=True)
at("log_normal", x(3, 7), random=True)
at("cauchy", x(3, 7), random=True)
at("poisson", positive(3, 7), random=True)
at("_standard_gamma", positive(3, 7), random=True)
at("binomial", positive(3, 7).ceil(), positive(7).clamp(max=1), random=True)
at("random", x(3, 7), random=True)
at("random", x(3, 7), 5, random=True)
at("random", x(3, 7), 2, 5, random=True)
at("normal", x(3, 7), 1.0, random=True)
at("normal", 1.0, positive(3, 7), random=True)
at("normal", x(3, 7), positive(7), random=True)
at("normal.float_float", 1.0, 2.0, [3, 7], random=True)
at("masked_fill", x(3, 7), yes(3, 7), 0.5)
at("masked_fill", x(3, 7), yes(7), x())
at("clamp", x(3, 7), -0.5, 0.5)
at("clamp", x(3, 7), x(7), None)
at("lerp", x(3, 7), x(3, 7), 0.3)
at("lerp", x(3, 7), x(7), x(3, 1))
each("addcmul addcdiv", x(3, 7), x(7), positive(3, 1), value=0.5)
at("rrelu_with_noise", x(3, 7), positive(3, 7), 0.1, 0.3, False)
at("native_dropout", x(3, 7), 0.5, False)
at("native_dropout", x(3, 7), 0.5, True, random=True)
at("alpha_dropout", x(3, 7), 0.5, False)
at("alpha_dropout", x(3, 7), 0.5, True, random=True)
at("feature_dropout", x(3, 7, 5), 0.5, False)
at("feature_dropout", x(3, 7, 5), 0.5, True, random=True)
at("native_dropout_backward", x(3, 7), yes(3, 7), 2.0)
at("bucketize", x(3, 7), x(5).sort().values)
at("bucketize", x(3, 7), x(7).sort().values)
at("bucketize", 0.5, x(5).sort().values)
at("_assert_async", torch.tensor(True))
at("_assert_async", torch.tensor(True), "text")
for reduction in (0, 1, 2):
    each("mse_loss smooth_l1_loss", x(3, 7), x(3, 7), reduction)
at("_prelu_kernel", x(3, 7, 5), x(1, 7, 1))
at("_prelu_kernel", x(3, 7, 5), x(1, 1, 1))
at("glu", x(3, 14), 1)
at("glu", x(6, 5), -2)
at("glu", x(3, 2))
each("tril triu", x(3, 7, 5), 1)
at("view_as_real", torch.complex(x(3, 7), x(3, 7)))
at("view_as_complex", x(3, 7, 2))
at("scalar_tensor", 0.5)
each("zeros ones empty rand randn", [3, size(7, 1)], random=True)
at("full", [3, 7], 0.5)
each("new_zeros new_ones new_empty", x(5), [3, size(7, 1)], random=True)
at("new_full", x(5), [3, size(7, 1)], 0.5)
at("empty_strided", [3, 7], [7, 1], random=True)
at("new_empty_strided", x(5), [3, 7], [7, 1], random=True)
at("empty_permuted", [3, 7], [1, 0], random=True)
at("arange", 7)
at("arange", 1, 7)
at("arange", 1, 7, 2)
each("linspace logspace", 0.0, 1.0, 7)
each("linspace logspace", x(), x(), 7)
each("linspace logspace", x(), 1.0, 7)
each("linspace logspace", 0.0, x(), 7)
each("randn.generator rand.generator", [3, 7], generator=None, random=True)
at("randint", 5, [3, 7], random=True)
at("randint", 2, 5, [3, 7], random=True)
at("randint.generator", 5, [3, 7], generator=None, random=True)
at("randint.low_generator", 2, 5, [3, 7], generator=None, random=True)
at("eye", 7)
at("eye", 7, 5)
at("randperm", 7, random=True)
at("randperm.generator", 7, generator=None, random=True)
each("hann_window hamming_window bartlett_window kaiser_window", 7)
each("hann_window hamming_window bartlett_window kaiser_window", 7, True)
at("hamming_window", 7, True, 0.5)
at("hamming_window", 7, True, 0.5, 0.4)
at("kaiser_window", 7, True, 9.0)
each("tril_indices triu_indices", 5, 7)
at("_local_scalar_dense", x(1))
each("equal is_same_size allclose", x(3, 7), x(3, 7))
at("is_same_size", x(3, 7), x(3, 5))

# --- recurrent layers


def weights(gates: int, width: int, inputs: int, project: int = 0, bias: bool = True) -> list[Tensor]:
    out = [x(gates * width, inputs), x(gates * width, project or width)]
    out += [x(gates * width), x(gates * width)] if bias else []
    return [*out, *([x(project, width)] if project else [])]


for name, gates in {"lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}.items():
    state = [x(3, 7), x(3, 7)] if gates == 4 else x(3, 7)
    at(name, x(3, 5), state, *weights(gates, 7, 5))
    at(name, x(3, 5), state, *weights(gates, 7, 5)[:2])
for name, gates in {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}.items():
    def states(n: int, gates: int = gates) -> Any:
        return [x(n, 3, 7), x(n, 3, 7)] if gates == 4 else x(n, 3, 7)
    at(f"{name}.input", x(2, 3, 5), states(1), weights(gates, 7, 5), True, 1, 0.0, False, False, False)
    at(f"{name}.input", x(3, 2, 5), states(1), weights(gates, 7, 5, bias=False), False, 1, 0.0, False, False, True)
    at(f"{name}.input", x(2, 3, 5), states(2), [*weights(gates, 7, 5), *weights(gates, 7, 7)], True, 2, 0.0, False, False, False)
    at(f"{name}.input", x(2, 3, 5), states(2), [*weights(gates, 7, 5), *weights(gates, 7, 5)], True, 1, 0.0, False, True, False)
    at(f"{name}.data", x(5, 5), torch.tensor([3, 2]), states(1), weights(gates, 7, 5), True, 1, 0.0, False, False)
at("lstm.input", x(2, 3, 5), [x(1, 3, 4), x(1, 3, 7)], weights(4, 7, 5, 4), True, 1, 0.0, False, False, False)
at("_pack_padded_sequence", x(5, 3, 7), torch.tensor([5, 4, 2]), False)
at("_pack_padded_sequence", x(3, 5, 7), torch.tensor([5, 4, 2]), True)
at("_pad_packed_sequence", x(11, 7), torch.tensor([3, 3, 2, 2, 1]), True, 0.0, 5)
# --- derivatives

each("sigmoid_backward tanh_backward", x(3, 7), x(3, 7))
each("silu_backward hardswish_backward hardsigmoid_backward gelu_backward", x(3, 7), x(3, 7))
each("softshrink_backward hardshrink_backward threshold_backward", x(3, 7), x(3, 7), 0.5)
at("hardtanh_backward", x(3, 7), x(3, 7), -1.0, 1.0)
at("leaky_relu_backward", x(3, 7), x(3, 7), 0.1, False)
at("elu_backward", x(3, 7), 1.0, 1.0, 1.0, False, x(3, 7))
at("softplus_backward", x(3, 7), x(3, 7), 1.0, 20.0)
at("logit_backward", x(3, 7), positive(3, 7))
at("log_sigmoid_backward", x(3, 7), x(3, 7), x(3, 7))
for name in ("add", "sub", "mul", "div"):
    at(f"prims::{name}", x(3, 7), x(3, 7))
at("prims::neg", x(3, 7))
at("_efficientzerotensor", [size(3, 0), size(7, 1)], run=torch.zeros)

# --- quantisation, segments, ops of any library

at("fake_quantize_per_tensor_affine_cachemask", x(3, 7), 0.1, 0, -8, 7)
at("fake_quantize_per_channel_affine_cachemask", single(3, 7), positive(7).float(), number(3, 7).int(), 1, -8, 7, buffers=True)
at("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", single(3, 7), positive(1).float(), number(3, 1).int(), yes(1).long() * 0 + 1, -8, 7)
at("_fake_quantize_learnable_per_tensor_affine", single(3, 7), positive(1).float(), positive(1).float(), -8, 7)
at("_fake_quantize_learnable_per_channel_affine", single(3, 7), positive(7).float(), positive(7).float() * 0, 1, -8, 7)
at("_fused_moving_avg_obs_fq_helper", single(3, 7), number(1, 1) + 1, number(1, 1) + 1, single(1), single(1), positive(1).float(), number(2, 1).int(), 0.1, -8, 7, -1, buffers=True)
at("_fused_moving_avg_obs_fq_helper", single(3, 7), number(1, 1) + 1, number(1, 1) + 1, single(3), single(3), positive(3).float(), number(2, 3).int(), 0.1, -8, 7, 0, True, True, buffers=True)
at("_fused_moving_avg_obs_fq_helper", single(3, 7), number(1, 1) + 1, number(1, 1) + 1, single(0), single(0), single(0), number(2, 0).int(), 0.1, -8, 7, 0, True, True, buffers=True)
at("_fused_moving_avg_obs_fq_helper_functional", single(3, 7), number(1, 1) + 1, number(1, 1) + 1, single(3), single(3), positive(3).float(), number(2, 3).int(), 0.1, -8, 7, 0, True, True, buffers=True)
at("segment_reduce", x(6, 7), "sum", lengths=torch.tensor([2, 4]))
at("segment_reduce", x(3, 6, 7), "max", lengths=torch.tensor([[2, 4]] * 3), axis=1)
at("_sparse_addmm", x(3, 5), x(3, 4), x(4, 5), run=torch.addmm)
at("torchvision::deform_conv2d", x(2, 5, 4, 4), x(7, 5, 3, 3), x(2, 18, 4, 4), positive(2, 9, 4, 4), x(7), 1, 1, 1, 1, 1, 1, 1, 1, True)
at("torchvision::roi_align", x(2, 7, 8, 6), positive(2, 5) * 4, 1.0, 2, 2, 2, False,
   run=lambda f, r, *a: torch.ops.torchvision.roi_align(f, torch.cat([r[:, :1] * 0, r[:, 1:].clamp(0, 6)], 1), *a))
# fmt: on
