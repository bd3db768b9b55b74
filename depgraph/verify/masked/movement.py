"""Ops that move values: masks move as they do."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...axes.nodes import base_name, op_name
from .run import MaskedRun, Unfollowed, handles

aten = torch.ops.aten
Tensor = torch.Tensor


@handles(
    "view reshape _unsafe_view _reshape_alias t transpose permute numpy_T squeeze unsqueeze expand repeat cat "
    "stack split split_with_sizes unbind select slice unsafe_split index index_select gather roll flip "
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle unfold diagonal slice_scatter "
    "select_scatter as_strided repeat_interleave narrow narrow_copy diag_embed chunk _unsafe_index "
    "view_as_real view_as_complex movedim tensor_split unsafe_split_with_sizes"
)
def movement(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """The op moves masks as it moves values."""
    try:
        out = func(*args, **kwargs)
    except RuntimeError:  # values may lie in memory otherwise than those of the run without masks
        if func is not aten.view.default:
            raise
        out = args[0].reshape(args[1])
    mask_args, mask_kwargs = pytree.tree_map_only(Tensor, run.full, (args, kwargs))
    name = op_name(func)
    if func is aten.repeat_interleave.Tensor:  # of counts: the result is an index
        return out
    if name == "view_as_real":
        run.give(out, run.full(args[0]).unsqueeze(-1).expand(out.shape).clone())
        return out
    if name == "view_as_complex":
        run.give(out, run.full(args[0]).amax(-1))
        return out
    if name in (
        "index",
        "_unsafe_index",
        "index_select",
        "gather",
        "repeat_interleave",
    ):  # an index is not a value
        mask_args = (mask_args[0], *args[1:])
    if name in (
        "view",
        "_unsafe_view",
        "_reshape_alias",
    ):  # a mask may lie differently in memory
        masks = mask_args[0].reshape(out.shape)
    elif name == "as_strided" and mask_args[0].stride() != args[0].stride():
        raise Unfollowed("as_strided")
    else:
        masks = func(*mask_args, **mask_kwargs)
    pairs = zip(out, masks, strict=True) if isinstance(out, (tuple, list)) else [(out, masks)]
    for tensor, mask in pairs:
        run.give(tensor, mask)
    return out


@handles("_pack_padded_sequence")
def pack(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Steps of a packed sequence: moved like the sequence itself."""
    out = func(*args, **kwargs)
    run.give(out[0], func(run.full(args[0]), *args[1:], **kwargs)[0])
    return out


@handles("im2col col2im")
def patches(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """im2col and col2im: channels pass, in runs of the patch's size; what no patch covers is zero and alive."""
    out = func(*args, **kwargs)
    mask = run.full(args[0])
    if op_name(func) == "im2col":
        alive = mask.flatten(-2).amax(-1)
        alive = alive.repeat_interleave(out.shape[-2] // alive.shape[-1], -1).unsqueeze(-1)
    else:
        alive = mask.amax(-1).unflatten(-1, (out.shape[-3], -1)).amax(-1)[..., None, None]
    return run.finish(out, alive.expand(out.shape).clone())


@handles(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d "
    "adaptive_avg_pool3d _adaptive_avg_pool3d max_pool2d_with_indices max_pool3d_with_indices max_pool2d "
    "max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
    "upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_nearest_exact2d reflection_pad1d "
    "reflection_pad2d replication_pad1d replication_pad2d replication_pad3d adaptive_max_pool2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
def passing(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Pooling, resampling: positions are mixed, channels are not."""
    out = func(*args, **kwargs)
    masks = func(run.full(args[0]), *args[1:], **kwargs)
    first = out[0] if isinstance(out, (tuple, list)) else out
    mask = masks[0] if isinstance(masks, (tuple, list)) else masks
    run.finish(first, (mask > 0).float())
    return out


@handles("constant_pad_nd pad")
def padding(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """What is filled in is alive, but not beside entries that are all dead: padded pixels of a dead channel."""
    out = func(*args, **kwargs)
    mask = run.full(args[0])
    padded = [mask.dim() - 1 - i for i in range(len(args[1]) // 2) if args[1][2 * i] or args[1][2 * i + 1]]
    filled = aten.constant_pad_nd.default(mask, args[1], 1.0)
    return run.finish(out, filled * mask.amax(padded, keepdim=True) if padded else filled)


@handles("glu")
def glu(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Halves of a dim: alive where both are."""
    out = func(*args, **kwargs)
    a, b = run.full(args[0]).chunk(2, args[1] if len(args) > 1 else -1)
    return run.finish(out, a * b)


@handles("grid_sampler_2d grid_sampler_3d")
def grid_sample(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Channels pass."""
    out = func(*args, **kwargs)
    x = run.full(args[0])
    alive = x.amax(tuple(range(2, x.dim())), keepdim=True)
    return run.finish(out, alive.expand(out.shape).clone())


@handles("embedding")
def embedding(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Rows of the mask are looked up as rows of the weight."""
    out = func(*args, **kwargs)
    run.give(out, func(run.full(args[0]), *args[1:], **kwargs))
    return out


@handles("_embedding_bag _embedding_bag_forward_only")
def embedding_bag(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Bags of rows have the channels that all rows have."""
    rows = run.full(args[0])
    channels = rows.amax(0)
    others = [a for a in args[1:] if isinstance(a, Tensor)]
    if (rows != channels).any() or any((run.full(a) == 0).any() for a in others):
        raise Unfollowed(f"{op_name(func)} of rows that are not alike")
    out = func(*args, **kwargs)
    for t in out:
        if t.dim() == 2:
            run.give(t, channels.expand(t.shape).clone())
    return out


PUTS = frozenset({"index_put", "_index_put_impl", "_unsafe_index_put"})


@handles(
    "scatter scatter_add scatter_reduce index_add index_copy index_put index_reduce _index_put_impl "
    "_unsafe_index_put"
)
def writing(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Scatter, index_add, index_put: what is dead in the target or, whatever the index, in the source."""
    puts = base_name(func) in PUTS
    target = args[0]
    mask = run.full(target).clone()
    before = run.mask(target)
    out = func(*args, **kwargs)
    source = args[2] if puts else args[3] if len(args) > 3 else None
    if isinstance(source, Tensor) and run.mask(source) is not None and source.numel():
        known = run.full(source)
        if puts:
            mask = mask * _beside(known, args[1], target.dim())
        elif known.shape[: args[1]] == mask.shape[: args[1]]:
            mask = mask * known.amin(args[1], keepdim=True)
    if base_name(func) != op_name(func) and before is not None:
        before.copy_(mask)
        if out.is_floating_point():
            out.masked_fill_(mask == 0, 0)
        return out
    return run.finish(out, mask)


def _beside(known: Tensor, indices: Any, rank: int) -> Tensor:
    """The mask of values written to ``x[indices]``, in the dims of x that are not indexed (the others are 1)."""
    taken: list[int] = []
    d = made = 0
    for entry in indices:
        chooses = entry is not None and entry.dtype in (torch.bool, torch.uint8)
        width = entry.dim() if chooses else 1
        taken.extend(range(d, d + width) if entry is not None else ())
        made = max(made, 0 if entry is None else 1 if chooses else entry.dim())
        d += width
    passing = [i for i in range(rank) if i not in taken]
    together = taken == list(range(taken[0], taken[0] + len(taken)))
    lead = sum(i < taken[0] for i in passing) if together else 0
    known = known.reshape(*[1] * (len(passing) + made - known.dim()), *known.shape)
    known = known.amin(tuple(range(lead, lead + made))) if made else known
    sizes = iter(known.shape)
    return known.reshape([1 if i in taken else next(sizes) for i in range(rank)])


@handles("masked_scatter")
def filled(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """masked_scatter: the mask of the source goes where its values go."""
    out = func(*args, **kwargs)
    return run.finish(out, func(run.full(args[0]), args[1], run.full(args[2])))
