"""Running a model with a mask beside every tensor: what it computes when removed entries are zero.

A mask (1 alive, 0 dead) goes through each op by the op's own meaning: an entry is dead if everything it depends on,
other than through a sum, is dead. Dead entries are set to zero; means, norms, maxima and softmax are taken over the
entries alive. Nothing of the dependency graph is used here, so a wrong rule can't hide behind itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .record import is_composite
from .rules import STATED, is_pointwise

aten = torch.ops.aten
Tensor = torch.Tensor


def widened_cast(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments in which a narrower float type, which forward may have written down, is float64."""
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    return {k: torch.float64 if k == "dtype" and v in narrow else v for k, v in (kwargs or {}).items()}


def in_double(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`, also where torch has a kernel for narrower float types only."""
    wide = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args)
    return DOUBLE.get(func, func)(*args, **kwargs) if wide else func(*args, **kwargs)


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Matrix products of groups: `offs` are the ends of the groups in the dim that both or the 2-D operand has."""
    if offs is None:
        return a @ b
    spans = list(zip([0, *offs.tolist()[:-1]], offs.tolist(), strict=True))
    if a.dim() == 2 and b.dim() == 3:
        out = a.new_zeros(a.shape[0], b.shape[2])
        for matrix, (i, j) in zip(b, spans, strict=True):
            out[i:j] = a[i:j] @ matrix
        return out
    if a.dim() == 3:
        out = a.new_zeros(a.shape[1], b.shape[1])
        for matrix, (i, j) in zip(a, spans, strict=True):
            out[:, i:j] = matrix @ b[:, i:j]
        return out
    return torch.stack([a[:, i:j] @ b[i:j] for i, j in spans])


DOUBLE: dict[Any, Callable[..., Any]] = {aten._grouped_mm.default: _grouped_mm}


def _alive(shape: Any, device: torch.device) -> Tensor:
    """A mask of ones: float32, as all masks are, whatever the type of the values."""
    return torch.ones(shape, dtype=torch.float32, device=device)


PROBES = 8  # other inputs that an op of the user's is tried on


class Unfollowed(Exception):
    """An op whose effect on masks is not known."""


class MaskedRun(TorchDispatchMode):
    """Runs ATen ops with a mask (1 alive, 0 dead, in the tensor's own shape) beside each tensor."""

    def __init__(self, double: bool = False) -> None:
        """`double`: casts of values to a narrower float type become casts to float64."""
        super().__init__()
        self.double = double
        self.masks: dict[int, Tensor] = {}
        self.alive: list[Any] = []
        self.restricted: set[str] = set()
        self.probed: set[str] = set()

    def give(self, tensor: Tensor, mask: Tensor) -> None:
        """`tensor` has `mask` from now on."""
        self.masks[id(tensor)] = mask
        self.alive.append(tensor)

    def mask(self, tensor: Any) -> Tensor | None:
        """The mask of `tensor`, or None where nothing of it can be dead."""
        return self.masks.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def full(self, tensor: Tensor) -> Tensor:
        """The mask of `tensor`, all ones where it has none."""
        mask = self.masks.get(id(tensor))
        return _alive(tensor.shape, tensor.device) if mask is None else mask

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = widened_cast(kwargs) if self.double else kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        flat = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if func.namespace == "prim" or name in FACTORIES or not any(id(a) in self.masks for a in flat):
            out = in_double(func, args, kwargs)
            if name in FACTORIES and isinstance(out, Tensor):  # a later write may bring dead entries in
                self.give(out, _alive(out.shape, out.device))
            return out
        in_place = name.endswith("_") and not name.endswith("__") and name[:-1] not in ("",)
        handler = HANDLERS.get(name) or (HANDLERS.get(name[:-1]) if in_place else None)
        if name in STATED:
            handler = stated
        if handler is None and is_pointwise(func):
            handler = pointwise
        if handler is None:
            masks = [self.masks[id(a)] for a in flat if id(a) in self.masks]
            if all(bool(m.all()) for m in masks):  # nothing dead goes in, so nothing dead comes out
                return func(*args, **kwargs)
            if name in ("_local_scalar_dense", "item", "equal", "is_nonzero"):
                return func(*args, **kwargs)
            handler = probed
        return handler(self, func, args, kwargs)

    def finish(self, out: Any, mask: Tensor, *, zero: bool = True) -> Any:
        """Zero the dead entries of `out` and remember its mask."""
        if not isinstance(out, Tensor):
            return out
        if zero and (out.is_floating_point() or out.is_complex()):
            dead = mask == 0
            if dead.any():
                out.masked_fill_(dead, 0) if not _overlaps(out) else None
        self.give(out, mask)
        return out


def _overlaps(tensor: Tensor) -> bool:
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def pointwise(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Alive where every operand is; an operand that the op changes in place changes its mask in place."""
    name = func._schema.name
    operands = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    out = func(*args, **kwargs)
    results = out if isinstance(out, (tuple, list)) else [out]
    in_place = name.endswith("_") and not name.endswith("__")
    for result in results:
        if not isinstance(result, Tensor):
            continue
        sources = operands[1:] if name in ("aten::copy_", "aten::copy") else operands
        mask = _alive(result.shape, result.device)
        for a in sources:
            known = run.mask(a)
            if known is not None and len(torch.broadcast_shapes(known.shape, result.shape)) == result.dim():
                mask = mask * known
        if in_place and run.mask(args[0]) is not None:
            run.full(args[0]).copy_(mask)
            dead = mask == 0
            if dead.any() and result.is_floating_point():
                result.masked_fill_(dead, 0)
            return result
        if (
            (result.is_floating_point() or result.is_complex()) and not in_place and mask.min() == 0
            if mask.numel()
            else False
        ):
            result = result.masked_fill(mask == 0, 0)
            if isinstance(out, Tensor):
                out = result
        run.give(result, mask)
    return out


def stated(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """An op that a user stated a rule for: alive is what changes when the alive entries of its inputs do.

    It is run on zeroed inputs, or as the user says, in either case without a look at the rule.
    """
    own = STATED[func._schema.name]
    inputs = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    alive = {"masks": [run.full(a) > 0 for a in inputs]} if own is not None else {}

    def call(given: Any) -> Any:
        values, named = given
        return (own or func)(*values, **named, **alive)

    def listed(out: Any) -> list[Any]:
        return list(out) if isinstance(out, (tuple, list)) else [out]

    dice = torch.Generator().manual_seed(0)

    def other(a: Any) -> Any:
        if not isinstance(a, Tensor) or not (a.is_floating_point() or a.is_complex()):
            return a
        drawn = torch.randn(a.shape, generator=dice).to(a) * (1 + a.detach().abs().mean())
        return drawn * run.full(a).to(a.dtype)

    out = call((args, kwargs))
    results = listed(out)
    masks = [torch.zeros(r.shape, device=r.device) if isinstance(r, Tensor) else None for r in results]
    for _ in range(PROBES):
        again = listed(call(pytree.tree_map(other, (args, kwargs))))
        masks = [
            None if m is None else m.logical_or(a != b).float()
            for m, a, b in zip(masks, again, results, strict=True)
        ]
    for result, mask in zip(results, masks, strict=True):
        if mask is not None:
            run.finish(result, mask)
    return out


def patches(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """im2col and col2im: channels pass, in runs of the patch's size; what no patch covers is zero and alive."""
    out = func(*args, **kwargs)
    mask = run.full(args[0])
    if "im2col" in func._schema.name:
        alive = mask.flatten(-2).amax(-1)
        alive = alive.repeat_interleave(out.shape[-2] // alive.shape[-1], -1).unsqueeze(-1)
    else:
        alive = mask.amax(-1).unflatten(-1, (out.shape[-3], -1)).amax(-1)[..., None, None]
    return run.finish(out, alive.expand(out.shape).clone())


def probed(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """An op without a handler: alive is what changes when the alive entries of its inputs do."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    masked = [a for a in tensors if id(a) in run.masks]
    if func._schema.is_mutable or not all(a.is_floating_point() or a.is_complex() for a in masked):
        raise Unfollowed(name)
    out = func(*args, **kwargs)
    results = out if isinstance(out, (tuple, list)) else [out]
    if not all(isinstance(r, Tensor) and (r.is_floating_point() or r.is_complex()) for r in results):
        raise Unfollowed(name)
    masks = [torch.zeros(r.shape, device=r.device) for r in results]
    dice = torch.Generator().manual_seed(0)

    def moved(a: Any) -> Any:
        if not isinstance(a, Tensor) or not (a.is_floating_point() or a.is_complex()):
            return a
        return a * (1 + 0.1 * torch.rand(a.shape, generator=dice).to(a))

    for _ in range(2):
        again = func(*pytree.tree_map(moved, args), **pytree.tree_map(moved, kwargs))
        again = again if isinstance(again, (tuple, list)) else [again]
        if any(a.shape != b.shape for a, b in zip(again, results, strict=True)):
            raise Unfollowed(name)
        masks = [m.logical_or(a != b).float() for m, a, b in zip(masks, again, results, strict=True)]
    run.probed.add(name)
    for result, mask in zip(results, masks, strict=True):
        run.finish(result, mask)
    return out


def movement(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """The op moves masks as it moves values."""
    try:
        out = func(*args, **kwargs)
    except RuntimeError:  # values may lie in memory otherwise than those of the run without masks
        if func is not aten.view.default:
            raise
        out = args[0].reshape(args[1])
    mask_args, mask_kwargs = pytree.tree_map_only(Tensor, run.full, (args, kwargs))
    name = func._schema.name
    if func is aten.repeat_interleave.Tensor:  # of counts: the result is an index
        return out
    if name == "aten::view_as_real":
        run.give(out, run.full(args[0]).unsqueeze(-1).expand(out.shape).clone())
        return out
    if name == "aten::view_as_complex":
        run.give(out, run.full(args[0]).amax(-1))
        return out
    if name.removeprefix("aten::") in (
        "index",
        "_unsafe_index",
        "index_select",
        "gather",
        "repeat_interleave",
    ):  # an index is no value
        mask_args = (mask_args[0], *args[1:])
    if name in (
        "aten::view",
        "aten::_unsafe_view",
        "aten::_reshape_alias",
    ):  # a mask may lie differently in memory
        masks = mask_args[0].reshape(out.shape)
    elif name == "aten::as_strided" and mask_args[0].stride() != args[0].stride():
        raise Unfollowed("as_strided")
    else:
        masks = func(*mask_args, **mask_kwargs)
    pairs = zip(out, masks, strict=True) if isinstance(out, (tuple, list)) else [(out, masks)]
    for tensor, mask in pairs:
        run.give(tensor, mask)
    return out


def pack(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Steps of a packed sequence: moved like the sequence itself."""
    out = func(*args, **kwargs)
    run.give(out[0], func(run.full(args[0]), *args[1:], **kwargs)[0])
    return out


def passing(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Pooling, resampling: positions are mixed, channels are not."""
    out = func(*args, **kwargs)
    masks = func(run.full(args[0]), *args[1:], **kwargs)
    first = out[0] if isinstance(out, (tuple, list)) else out
    mask = masks[0] if isinstance(masks, (tuple, list)) else masks
    run.finish(first, (mask > 0).float())
    return out


def padding(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """What is filled in is alive, but not beside entries that are all dead: padded pixels of a dead channel."""
    out = func(*args, **kwargs)
    mask = run.full(args[0])
    padded = [mask.dim() - 1 - i for i in range(len(args[1]) // 2) if args[1][2 * i] or args[1][2 * i + 1]]
    filled = aten.constant_pad_nd.default(mask, args[1], 1.0)
    return run.finish(out, filled * mask.amax(padded, keepdim=True) if padded else filled)


def contraction(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Alive where some pair of alive entries is summed."""
    out = in_double(func, args, kwargs)
    values = [isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex()) for a in args]
    tensors = [run.full(a) if value else a for a, value in zip(args, values, strict=True)]
    name = func._schema.name
    bias = None
    if name == "aten::convolution":
        bias, tensors[2] = args[2], None
    elif name == "aten::_sparse_addmm":
        func, tensors[0] = aten.addmm.default, torch.zeros_like(run.full(args[0]))
    elif name in ("aten::addmm", "aten::baddbmm", "aten::addmv", "aten::addbmm"):
        bias, tensors[0] = args[0], torch.zeros_like(run.full(args[0]))
    elif name == "aten::linear":
        bias = args[2] if len(args) > 2 else None
        tensors = tensors[:2]
    mask = (func(*tensors, **kwargs) > 0).float()
    if bias is not None and run.mask(bias) is not None:
        known = run.full(bias)
        mask = mask * (known.view(1, -1, *[1] * (mask.dim() - 2)) if name == "aten::convolution" else known)
    return run.finish(out, mask)


def _dims(value: Any, rank: int) -> list[int]:
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return list(range(rank))
    return [d % rank for d in (value if isinstance(value, (list, tuple)) else [value])]


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    values = {a.name: a.default_value for a in func._schema.arguments}
    values.update(zip(values, args, strict=False))
    values.update(kwargs)
    return values


def reduction(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Sums of zeroed entries are exact; other statistics are taken over the alive ones."""
    x, mask = args[0], run.full(args[0])
    given = _named(func, args, kwargs)
    name = func._schema.name.removeprefix("aten::")
    dims, keep = _dims(given.get("dim"), x.dim()), bool(given.get("keepdim", False))
    alive = mask.amax(dims, keepdim=keep) if dims else mask
    uniform = (
        not (mask.amax(dims, keepdim=True) - mask.amin(dims, keepdim=True)).any() if mask.numel() else True
    )
    if not dims or uniform:
        out = func(*args, **kwargs)
        for t in out if isinstance(out, tuple) else [out]:
            if t.shape == alive.shape:
                run.finish(t, alive)
        return out
    run.restricted.add(name)
    m = mask.to(x.dtype)
    n = m.sum(dims, keepdim=True).clamp(min=1)

    def mean_and_var() -> tuple[Tensor, Tensor]:
        mean = (x * m).sum(dims, keepdim=True) / n
        correction = given.get("correction")
        correction = (1 if given.get("unbiased", True) else 0) if correction is None else correction
        var = (((x - mean) * m) ** 2).sum(dims, keepdim=True) / (n - correction).clamp(min=0)
        return mean, var

    def shaped(t: Tensor) -> Tensor:
        return t if keep else t.squeeze(tuple(dims)) if dims else t

    if name in ("sum", "nansum", "norm", "linalg_vector_norm", "any", "count_nonzero"):
        run.restricted.discard(name)
        out = func(*args, **kwargs)
    elif name == "mean":
        out = shaped((x * m).sum(dims, keepdim=True) / n)
    elif name in ("var", "std", "var_mean", "std_mean"):
        mean, var = mean_and_var()
        spread = var.sqrt() if name.startswith("std") else var
        if name.endswith("_mean"):
            out = (shaped(spread), shaped(mean))
            for t in out:
                run.finish(t, alive)
            return out
        out = shaped(spread)
    else:
        fill = {"amax": float("-inf"), "max": float("-inf"), "amin": float("inf"), "min": float("inf"), "prod": 1.0,
                "logsumexp": float("-inf")}.get(name)  # fmt: skip
        if fill is None:
            raise Unfollowed(f"{name} over a pruned dim")
        out = func(x.masked_fill(mask == 0, fill), *args[1:], **kwargs)
        if isinstance(out, tuple):  # with positions, which are those among the alive entries
            run.finish(out[0], alive)
            return out
    return run.finish(out, alive)


def softmax(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Over the alive entries of its dim."""
    x, mask = args[0], run.full(args[0])
    dead = mask == 0
    out = func(x.masked_fill(dead, float("-inf")), *args[1:], **kwargs)
    if (mask.amax(args[1], keepdim=True) != mask.amin(args[1], keepdim=True)).any():
        run.restricted.add("softmax")
    return run.finish(out.masked_fill(dead, 0), mask)


def layer_norm(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Mean and variance over the alive entries of the normalised dims."""
    x, shape = args[0], args[1]
    given = _named(func, args, kwargs)
    mask = run.full(x)
    dims = list(range(x.dim() - len(shape), x.dim()))
    m = mask.to(x.dtype)
    n = m.sum(dims, keepdim=True).clamp(min=1)
    rms = "rms" in func._schema.name
    mean = torch.zeros_like(n) if rms else (x * m).sum(dims, keepdim=True) / n
    var = (((x - mean) * m) ** 2).sum(dims, keepdim=True) / n
    eps = given.get("eps")
    rstd = torch.rsqrt(var + (torch.finfo(x.dtype).eps if eps is None else eps))
    out = (x - mean) * rstd
    if given.get("weight") is not None:
        out = out * given["weight"]
    if given.get("bias") is not None:
        out = out + given["bias"]
    run.restricted.add("layer_norm")
    out = run.finish(out * m, mask)
    return (out, rstd) if rms else (out, mean, rstd)


def group_norm(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Mean and variance over the alive entries of each group."""
    x, weight, bias, n, c, _, groups, eps = args
    mask = run.full(x)
    flat, m = x.reshape(n, groups, -1), mask.reshape(n, groups, -1).to(x.dtype)
    count = m.sum(-1, keepdim=True).clamp(min=1)
    mean = (flat * m).sum(-1, keepdim=True) / count
    var = (((flat - mean) * m) ** 2).sum(-1, keepdim=True) / count
    rstd = torch.rsqrt(var + eps)
    out = ((flat - mean) * rstd).reshape(x.shape)
    spread = [1, c, *[1] * (x.dim() - 2)]
    if weight is not None:
        out = out * weight.view(spread)
    if bias is not None:
        out = out + bias.view(spread)
    run.restricted.add("group_norm")
    return run.finish(out * mask.to(x.dtype), mask), mean.reshape(n, groups), rstd.reshape(n, groups)


def batch_norm(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Per channel: alive where the input and the channel's parameters are."""
    x = args[0]
    out = func(*args, **kwargs)
    mask = run.full(x)
    for vector in args[1:5]:
        if run.mask(vector) is not None:
            mask = mask * run.full(vector).view(1, -1, *[1] * (x.dim() - 2))
    training = any(a is True for a in args) or (args[3] is None and args[4] is None)
    if training:
        dims = [d for d in range(x.dim()) if d != 1]
        if (
            mask.amax(dims) != mask.amin(dims)
        ).any():  # a norm over folded channels: dead ones inside a statistic
            m = mask.to(x.dtype)
            n = m.sum(dims, keepdim=True).clamp(min=1)
            mean = (x * m).sum(dims, keepdim=True) / n
            var = (((x - mean) * m) ** 2).sum(dims, keepdim=True) / n
            spread = [1, -1, *[1] * (x.dim() - 2)]
            y = (x - mean) * torch.rsqrt(var + args[7])
            y = y * args[1].view(spread) if args[1] is not None else y
            y = y + args[2].view(spread) if args[2] is not None else y
            run.restricted.add("batch_norm")
            out = (y * m, *out[1:])
    run.finish(out[0], mask)
    return out


def embedding(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Rows of the mask are looked up as rows of the weight."""
    out = func(*args, **kwargs)
    run.give(out, func(run.full(args[0]), *args[1:], **kwargs))
    return out


def attention(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """A head's output is alive where its values are; dead widths of q and k are zero and add nothing."""
    out = func(*args, **kwargs)
    q, k, v = (run.full(a) for a in args[:3])
    if (k.amax((-1, -2), keepdim=True) != k.amax(-1, keepdim=True)).any():
        raise Unfollowed("attention over pruned keys")
    heads = v.amax(-2, keepdim=True)
    if heads.dim() > 3 and heads.shape[-3] != q.shape[-3]:  # one key head serves a run of query heads
        heads = heads.repeat_interleave(q.shape[-3] // heads.shape[-3], -3)
    mask = heads.expand(*q.shape[:-1], v.shape[-1]).clone()
    mask = mask * q.amax(-1, keepdim=True)
    run.finish(out[0] if isinstance(out, tuple) else out, mask)
    return out


def writing(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Scatter, index_add, index_put: what is dead in the target or, whatever the index, in the source."""
    name = func._schema.name.removeprefix("aten::")
    target = args[0]
    mask = run.full(target).clone()
    before = run.mask(target)
    out = func(*args, **kwargs)
    source = args[2] if "index_put" in name else args[3] if len(args) > 3 else None
    if isinstance(source, Tensor) and run.mask(source) is not None and source.numel():
        known = run.full(source)
        if "index_put" in name:
            mask = mask * _beside(known, args[1], target.dim())
        elif known.shape[: args[1]] == mask.shape[: args[1]]:
            mask = mask * known.amin(args[1], keepdim=True)
    if name.endswith("_") and before is not None:
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


def along(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Ops along dims that lost nothing: the mask of one index there is that of every one."""
    out = func(*args, **kwargs)
    given = _named(func, args, kwargs)
    x, mask = args[0], run.full(args[0])
    d = given.get("dim", given.get("dims", -1))
    if (mask.amax(d, keepdim=True) != mask.amin(d, keepdim=True)).any():
        raise Unfollowed(f"{func._schema.name} along a pruned dim")
    one = mask.amax(d, keepdim=True)
    for t in out if isinstance(out, (tuple, list)) else [out]:
        if t.dim() == x.dim():
            run.give(t, one.expand(t.shape).clone())
        else:
            run.give(t, one.squeeze(d).clone())
    return out


def topk(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """The largest of the alive entries."""
    given = _named(func, args, kwargs)
    x, mask, d = args[0], run.full(args[0]), given["dim"]
    if not x.numel():
        return func(*args, **kwargs)
    alive = mask.sum(d, keepdim=True)
    if ((alive > 0) & (alive < given["k"])).any():
        raise Unfollowed("topk over fewer entries than it takes")
    if (mask.amax(d, keepdim=True) != mask.amin(d, keepdim=True)).any():
        run.restricted.add("topk")
    out = func(
        x.masked_fill(mask == 0, float("-inf") if given["largest"] else float("inf")), *args[1:], **kwargs
    )
    run.finish(out[0], (alive > 0).float().expand(out[0].shape).clone())
    return out


def cdist(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Distances sum over the width: dead widths are zero on both sides."""
    out = func(*args, **kwargs)
    return run.finish(out, _alive(out.shape, out.device))


def spectrum(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Linear along its dims: alive where anything is."""
    out = func(*args, **kwargs)
    alive = run.full(args[0]).amax(tuple(args[1]), keepdim=True)
    return run.finish(out, alive.expand(out.shape).clone())


def weight_norm(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """v * g / |v| over all dims but one; a row that is gone stays zero."""
    v, g = args[0], args[1]
    d = args[2] if len(args) > 2 else 0
    dims = [i for i in range(v.dim()) if i != d % v.dim()]
    norm = (v.square().sum(dims, keepdim=True)).sqrt()
    mask = run.full(v) * run.full(g)
    out = run.finish(torch.where(mask > 0, v * (g / norm.clamp(min=1e-300)), torch.zeros_like(v)), mask)
    return (out, norm) if "interface" in func._schema.name else out


def loss(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """A mean is taken over the alive entries; where both sides are dead they are zero, and so is their distance."""
    given = _named(func, args, kwargs)
    mode = given.pop("reduction")
    x, y = given.pop("self"), given.pop("target")
    mask = torch.maximum(*torch.broadcast_tensors(run.full(x), run.full(y)))
    distance = func(x, y, reduction=0, **given)
    if mode == 0:
        return run.finish(distance, mask)
    if mode == 1 and bool((mask == 0).any()):
        run.restricted.add(func._schema.name.removeprefix("aten::"))
    out = distance.sum() / (mask.sum().clamp(min=1).to(x.dtype) if mode == 1 else 1)
    return run.finish(out, _alive(out.shape, out.device))


def _table(rows: dict[Callable[..., Any], str]) -> dict[str, Callable[..., Any]]:
    return {name: handler for handler, names in rows.items() for name in names.split()}


FACTORIES = {"zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "rand", "randn",
             "empty_strided", "new_empty_strided"}  # fmt: skip
HANDLERS = _table(
    {
        pointwise: "copy _to_copy clone contiguous detach alias lift_fresh where masked_fill bernoulli zeros_like ones_like "
        "empty_like full_like rand_like randn_like native_dropout dropout clamp prelu _prelu_kernel nan_to_num lerp addcmul "
        "addcdiv hardswish hardsigmoid hardtanh mish fill zero glu_jvp type_as log_sigmoid_forward softplus uniform normal tril triu polar complex",
        movement: "view reshape _unsafe_view _reshape_alias t transpose permute numpy_T squeeze unsqueeze expand repeat cat "
        "stack split split_with_sizes unbind select slice unsafe_split index index_select gather roll flip pixel_shuffle "
        "pixel_unshuffle channel_shuffle native_channel_shuffle unfold diagonal slice_scatter select_scatter "
        "as_strided repeat_interleave narrow narrow_copy diag_embed chunk _unsafe_index view_as_real view_as_complex movedim tensor_split unsafe_split_with_sizes",
        patches: "im2col col2im",
        passing: "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d "
        "adaptive_avg_pool3d _adaptive_avg_pool3d max_pool2d_with_indices max_pool3d_with_indices max_pool2d max_pool3d "
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d "
        "upsample_trilinear3d _upsample_nearest_exact2d reflection_pad1d reflection_pad2d replication_pad1d "
        "replication_pad2d replication_pad3d adaptive_max_pool2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
        padding: "constant_pad_nd pad",
        contraction: "_sparse_addmm mm bmm addmm baddbmm convolution linear matmul mv dot vdot addmv addbmm _grouped_mm",
        reduction: "sum nansum mean amax amin max min var std var_mean std_mean norm linalg_vector_norm logsumexp prod any",
        softmax: "_softmax softmax _log_softmax log_softmax _safe_softmax",
        layer_norm: "native_layer_norm _fused_rms_norm rms_norm",
        group_norm: "native_group_norm",
        batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm",
        embedding: "embedding",
        attention: "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention _scaled_dot_product_attention_math",
        writing: "scatter scatter_add scatter_reduce index_add index_copy index_put index_reduce _index_put_impl "
        "_unsafe_index_put",
        along: "_fft_r2c _fft_c2c _fft_c2r cumsum cumprod sort argsort argmax argmin",
        topk: "topk",
        cdist: "_cdist_forward _euclidean_dist cdist",
        loss: "mse_loss smooth_l1_loss",
        spectrum: "_fft_r2c _fft_c2r _fft_c2c",
        weight_norm: "_weight_norm _weight_norm_interface",
    }
)


def filled(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """masked_scatter: the mask of the source goes where its values go."""
    out = func(*args, **kwargs)
    return run.finish(out, func(run.full(args[0]), args[1], run.full(args[2])))


def solve_triangular(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Each column of the right-hand side by itself; what is dead of the matrix is not followed."""
    a, b = run.full(args[0]), run.full(args[1])
    along = -2 if kwargs.get("left", True) else -1
    alive = b.amax(along, keepdim=True)
    if not bool(a.all()) or (alive != b.amin(along, keepdim=True)).any():
        raise Unfollowed("linalg_solve_triangular")
    out = func(*args, **kwargs)
    return run.finish(out, alive.expand(out.shape).clone())


def glu(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Halves of a dim: alive where both are."""
    out = func(*args, **kwargs)
    a, b = run.full(args[0]).chunk(2, args[1] if len(args) > 1 else -1)
    return run.finish(out, a * b)


def grid_sample(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Channels pass."""
    out = func(*args, **kwargs)
    x = run.full(args[0])
    alive = x.amax(tuple(range(2, x.dim())), keepdim=True)
    return run.finish(out, alive.expand(out.shape).clone())


HANDLERS.update(masked_scatter=filled, linalg_solve_triangular=solve_triangular)
HANDLERS.update(_pack_padded_sequence=pack, glu=glu, grid_sampler_2d=grid_sample, grid_sampler_3d=grid_sample)
