"""Running a model with a mask beside every tensor: what it computes when removed entries are zero.

A mask (1 alive, 0 dead) goes through each op by the op's own meaning: an entry is dead if everything it depends on,
other than through a sum, is dead. Dead entries are set to zero; means, norms, maxima and softmax are taken over the
entries alive. Nothing of the dependency graph is used here, so a wrong rule can't hide behind itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...base.running import CallMode, WriteGuard, tensors_in
from ...rules import STATED, is_pointwise
from ...tracing.whole import is_composite
from .draws import Draws, is_random

aten = torch.ops.aten
Tensor = torch.Tensor


NARROWER = {
    torch.float64: frozenset((torch.float32, torch.float16, torch.bfloat16, torch.complex64)),
    torch.float32: frozenset((torch.float16, torch.bfloat16)),
}  # the types that a run in the key's type has none of


class Widened(CallMode):
    """What runs inside computes in `dtype`, whatever narrower types forward names or constants have."""

    def __init__(self, dtype: torch.dtype | None, draws: Draws | None = None) -> None:
        """`dtype`: float64, float32, or None: types stay as they are. `draws`: what another run drew at random."""
        super().__init__()
        self.dtype, self.draws = dtype, draws
        self.narrow = NARROWER.get(dtype, frozenset()) if dtype is not None else frozenset()

    def _wide(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype not in self.narrow or self.dtype is None:
            return value
        return value.to(self.dtype.to_complex() if value.is_complex() else self.dtype)

    def given(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments of a call, none of a narrower type; what the call writes into stays."""
        if not self.narrow:
            return args, kwargs
        kind = kwargs.get("dtype")
        if kind in self.narrow and self.dtype is not None:
            kwargs = {**kwargs, "dtype": self.dtype.to_complex() if kind.is_complex else self.dtype}
        if any(t.dtype in self.narrow for t in tensors_in(args, kwargs)):
            into, rest = (args[:1], args[1:]) if func._schema.is_mutable else ((), args)
            if not any(t.dtype in self.narrow for t in tensors_in(into, {})):
                rest, kwargs = pytree.tree_map(self._wide, (rest, kwargs))
            args = (*into, *rest)
        return args, kwargs

    def computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """`func(*args, **kwargs)`, also where torch has a kernel for narrower float types only, or makes a narrower one."""
        call = DOUBLE.get(func._schema.name, func) if self.dtype == torch.float64 else func
        out = call(*args, **kwargs)
        if self.narrow and not func._schema.is_mutable:
            if isinstance(out, Tensor):
                return self._wide(out)
            if isinstance(out, (tuple, list)):
                return type(out)(map(self._wide, out))
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.given(func, args, kwargs or {})
        if self.draws is not None and is_random(func):
            if is_composite(func):
                with self:
                    return func.decompose(*args, **kwargs)
            return self.draws.again(func, args, kwargs, self.computed)
        return self.computed(func, args, kwargs)


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


DOUBLE: dict[str, Callable[..., Any]] = {
    "aten::_grouped_mm": _grouped_mm
}  # by name: older versions of torch lack it


def all_alive(shape: Any, device: torch.device) -> Tensor:
    """A mask of ones: float32, as all masks are, whatever the type of the values."""
    return torch.ones(shape, dtype=torch.float32, device=device)


def dead_of(mask: Tensor) -> Tensor | None:
    """Where a mask is 0; None where it is nowhere, which most masks are and which is told at once."""
    return mask == 0 if mask.numel() and not float(mask.amin()) else None


PROBES = 8  # other inputs that an op of the user's is tried on


class Unfollowed(Exception):
    """An op whose effect on masks is not known."""


Handler = Callable[["MaskedRun", Any, Any, Any], Any]
HANDLERS: dict[str, Handler] = {}  # op name -> what it makes of masks


def handles(names: str) -> Callable[[Handler], Handler]:
    """Register a handler for the ops in `names`, separated by spaces."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names.split(), handler))
        return handler

    return register


FACTORIES = {"zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "rand", "randn",
             "empty_strided", "new_empty_strided"}  # fmt: skip


class MaskedRun(Widened):
    """Runs ATen ops with a mask (1 alive, 0 dead, in the tensor's own shape) beside each tensor."""

    def __init__(
        self, dtype: torch.dtype | None = None, shared: Iterable[Tensor] = (), drawn: Draws | None = None
    ) -> None:
        """`dtype`: as for `Widened`; `shared` stay as they are; `drawn`: where its draws are noted."""
        super().__init__(dtype)
        self.kept = WriteGuard(shared)
        self.masks: dict[int, Tensor] = {}
        self.alive: dict[int, weakref.ref[Tensor]] = {}
        self.restricted: set[str] = set()
        self.raised = False  # whether an op made dead entries something else than zero, as a sigmoid does
        self.probed: set[str] = set()
        self.drawn = Draws() if drawn is None else drawn
        self.paused = False  # what runs is no op of the model's

    def give(self, tensor: Tensor, mask: Tensor) -> None:
        """`tensor` has `mask` from now on, as long as it lives."""
        key = id(tensor)
        self.masks[key] = mask
        self.alive[key] = weakref.ref(
            tensor, lambda _: (self.masks.pop(key, None), self.alive.pop(key, None))
        )

    def mask(self, tensor: Any) -> Tensor | None:
        """The mask of `tensor`, or None where nothing of it can be dead."""
        return self.masks.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def full(self, tensor: Tensor) -> Tensor:
        """The mask of `tensor`, all ones where it has none."""
        mask = self.masks.get(id(tensor))
        return all_alive(tensor.shape, tensor.device) if mask is None else mask

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        if is_composite(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        args, kwargs = self.given(func, args, kwargs or {})
        out = self._masked(func, args, kwargs)
        if is_random(func):
            self.drawn.note(func, args, out, self)
        return out

    def _masked(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.kept.before(func, args, kwargs)
        flat = tensors_in(args, kwargs)
        if func.namespace == "prim" or name in FACTORIES or not any(id(a) in self.masks for a in flat):
            out = self.computed(func, args, kwargs)
            if name in FACTORIES and isinstance(out, Tensor):  # a later write may bring dead entries in
                self.give(out, all_alive(out.shape, out.device))
            return out
        in_place = name.endswith("_") and not name.endswith("__")
        handler = HANDLERS.get(name) or (HANDLERS.get(name[:-1]) if in_place else None)
        if name in STATED:
            handler = stated
        if handler is None and is_pointwise(func):
            handler = pointwise
        if handler is None:
            masks = [self.masks[id(a)] for a in flat if id(a) in self.masks]
            if all(bool(m.all()) for m in masks):  # nothing dead goes in, so nothing dead comes out
                return self.computed(func, args, kwargs)
            if name in ("_local_scalar_dense", "item", "equal", "is_nonzero"):
                return func(*args, **kwargs)
            handler = probed
        return handler(self, func, args, kwargs)

    def finish(self, out: Any, mask: Tensor, *, zero: bool = True) -> Any:
        """Zero the dead entries of `out` and remember its mask."""
        if not isinstance(out, Tensor):
            return out
        if zero and (out.is_floating_point() or out.is_complex()):
            dead = dead_of(mask)
            if dead is not None and not _overlaps(out):
                self.emptied(out, dead)
        self.give(out, mask)
        return out

    def emptied(self, out: Tensor, dead: Tensor) -> None:
        """Make the `dead` entries of `out` zero, in place."""
        before = None if self.raised else out.count_nonzero()
        out.masked_fill_(dead, 0)
        self.raised = before is None or bool(before != out.count_nonzero())


def _overlaps(tensor: Tensor) -> bool:
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


@handles(
    "copy _to_copy clone contiguous lift_fresh where masked_fill bernoulli zeros_like ones_like "
    "empty_like full_like rand_like randn_like native_dropout dropout clamp prelu _prelu_kernel nan_to_num "
    "lerp addcmul addcdiv hardswish hardsigmoid hardtanh mish fill zero glu_jvp type_as log_sigmoid_forward "
    "softplus uniform normal exponential geometric log_normal cauchy random poisson "
    "binomial _standard_gamma tril triu polar complex"
)
def pointwise(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """Alive where every operand is; an operand that the op changes in place changes its mask in place."""
    name = func._schema.name
    operands = tensors_in(args, kwargs)
    out = func(*args, **kwargs)
    results = out if isinstance(out, (tuple, list)) else [out]
    in_place = name.endswith("_") and not name.endswith("__")
    for result in results:
        if not isinstance(result, Tensor):
            continue
        sources = operands[1:] if name in ("aten::copy_", "aten::copy") else operands
        mask = _of_all(run, sources, result)
        run.drawn.met(sources, mask)
        if in_place and run.mask(args[0]) is not None:
            run.full(args[0]).copy_(mask)
            dead = dead_of(mask) if result.is_floating_point() else None
            if dead is not None:
                run.emptied(result, dead)
            return result
        numbers = result.is_floating_point() or result.is_complex()
        dead = dead_of(mask) if numbers and not in_place else None
        if dead is not None:
            if _overlaps(result) or any(_is_memory_of(result, a) for a in operands):
                result = result.clone(memory_format=torch.contiguous_format)
            run.emptied(result, dead)
            if isinstance(out, Tensor):
                out = result
        run.give(result, mask)
    return out


def _of_all(run: MaskedRun, sources: list[Tensor], result: Tensor) -> Tensor:
    """The mask of `result`, a tensor of its own: alive where all `sources` are that have a mask."""
    known = [m for m in map(run.mask, sources) if m is not None and m.dim() <= result.dim()]
    whole = next((m for m in known if m.shape == result.shape), None)
    if whole is None:
        mask = all_alive(result.shape, result.device)
    else:
        mask = whole.clone(memory_format=torch.contiguous_format)
    for other in known:
        if other is not whole:
            mask = mask * other
    return mask


def _is_memory_of(result: Tensor, operand: Tensor) -> bool:
    if result is operand or {result.layout, operand.layout} != {torch.strided}:
        return result is operand
    return result.untyped_storage().data_ptr() == operand.untyped_storage().data_ptr()


@handles("detach alias")
def alias(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """The same entries: what is written into one is written into the other, values and masks."""
    out = func(*args, **kwargs)
    run.give(out, run.full(args[0]))
    return out


def stated(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """An op that a user stated a rule for: alive is what changes when the alive entries of its inputs do.

    It is run on zeroed inputs, or as the user says, in either case without a look at the rule.
    """
    own = STATED[func._schema.name]
    inputs = tensors_in(args, kwargs)
    alive = {"masks": [run.full(a) > 0 for a in inputs]} if own is not None else {}

    def call(given: Any) -> Any:
        values, named = given
        return (own or func)(*values, **named, **alive)

    def listed(out: Any) -> list[Any]:
        return list(out) if isinstance(out, (tuple, list)) else [out]

    generator = torch.Generator().manual_seed(0)

    def other(a: Any) -> Any:
        if not isinstance(a, Tensor) or not (a.is_floating_point() or a.is_complex()):
            return a
        drawn = torch.randn(a.shape, generator=generator).to(a) * (1 + a.detach().abs().mean())
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


def probed(run: MaskedRun, func: Any, args: Any, kwargs: Any) -> Any:
    """An op without a handler: dead is what changes when dead entries of its inputs do, and not when the others do."""
    name = func._schema.name.removeprefix("aten::")
    tensors = tensors_in(args, kwargs)
    masked = [a for a in tensors if id(a) in run.masks]
    if func._schema.is_mutable or not all(a.is_floating_point() or a.is_complex() for a in masked):
        raise Unfollowed(name)
    out = func(*args, **kwargs)
    results = out if isinstance(out, (tuple, list)) else [out]
    if not all(isinstance(r, Tensor) and (r.is_floating_point() or r.is_complex()) for r in results):
        raise Unfollowed(name)
    generator = torch.Generator().manual_seed(0)

    def moved(a: Any) -> Any:
        if not isinstance(a, Tensor) or not (a.is_floating_point() or a.is_complex()):
            return a
        return a * (1 + 0.1 * torch.rand(a.shape, generator=generator).to(a))

    def revived(a: Any) -> Any:
        if run.mask(a) is None:
            return a
        return torch.where(run.full(a) == 0, torch.randn(a.shape, generator=generator).to(a), a)

    def changed(change: Callable[[Any], Any]) -> list[Tensor]:
        found = [torch.zeros(r.shape, dtype=torch.bool, device=r.device) for r in results]
        for _ in range(2):
            again = func(*pytree.tree_map(change, args), **pytree.tree_map(change, kwargs))
            again = again if isinstance(again, (tuple, list)) else [again]
            if any(a.shape != b.shape for a, b in zip(again, results, strict=True)):
                raise Unfollowed(name)
            found = [f | (a != b) for f, a, b in zip(found, again, results, strict=True)]
        return found

    alive, dead = changed(moved), changed(revived)
    run.probed.add(name)
    for result, moves, hidden in zip(results, alive, dead, strict=True):
        run.finish(result, (moves | _alive_constants(moves, hidden & ~moves)).float())
    return out


def _alive_constants(alive: Tensor, dead: Tensor) -> Tensor:
    """Which entries, of those that nothing moves, stay: all but those that share an index with dead entries, and no alive one."""
    constant = ~(alive | dead)
    for d in range(constant.dim()):
        others = [e for e in range(constant.dim()) if e != d]
        lost = ~alive.any(others, keepdim=True) & dead.any(others, keepdim=True) if others else dead
        constant = constant & ~lost
    return constant


def named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by the names that its schema gives them, defaults filled in."""
    values = {a.name: a.default_value for a in func._schema.arguments}
    values.update(zip(values, args, strict=False))
    values.update(kwargs)
    return values


def dims_of(value: Any, rank: int) -> list[int]:
    """The dims that an argument names, counted from the front; all where it names none."""
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return list(range(rank))
    return [d % rank for d in (value if isinstance(value, (list, tuple)) else [value])]
