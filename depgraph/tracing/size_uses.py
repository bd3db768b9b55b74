"""The numbers in the user's calls that repeat a size: which argument of which function, and of which dim.

Everything else in the trace is told by the ops; these are what surgery must repair. One function below per family of
torch functions says where their size arguments stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import sizes

Node = torch.fx.Node
Where = tuple[Any, ...]  # position or name of an argument, then index or slice side inside it


@dataclass(frozen=True)
class SizeUse:
    """A number in the user's code that repeats a size: argument `value` of `function`, called by `module`.

    It must equal the number of indices kept among the first `extent` of dim `dim` of `node`, or, where `dim` is None,
    the value that the rule of `node` says (the groups of a convolution). Where `extent` is None, it repeats no size: it is
    an index, a step, the number of parts into which the dim is divided or of its copies, how many of its indices are chosen,
    or by how much it is padded.
    """

    function: str
    value: int
    expr: sizes.Expr
    node: Node
    dim: int | None
    extent: int | None
    module: str
    source: str
    occurrence: int  # this is the n-th call of `function` in one call of `module`
    argument: Where
    negative: bool = False  # counted from the end of the dim
    minus: bool = False  # its value is minus that number


@dataclass(frozen=True)
class ScalarUse:
    """A number that an op computes with (not a size): a scale such as ``head_dim ** -0.5``."""

    value: float
    expr: sizes.Expr
    node: Node
    source: str
    index: int = 0  # its position among the numbers of the call


class Call:
    """One call of a torch function, as the functions below see it."""

    def __init__(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """`name` of the function, its arguments and result."""
        self.name, self.args, self.kwargs, self.out = name, args, kwargs, out
        self.found: list[tuple[int, sizes.Expr, torch.Tensor, int | None, int | None, Where, bool, bool]] = []
        self.limits: set[sizes.Expr] = set()  # what is one less than a size that is in `found`

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """Positional argument `index`, or keyword `name`."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def use(
        self,
        value: Any,
        tensor: Any,
        dim: int | None,
        where: Where,
        extent: int | None = None,
        minus: bool = False,
    ) -> None:
        """`value` counts the first `extent` indices of `dim` of `tensor` (by default: as many as it says).

        With `minus` it is minus their number.
        """
        if not isinstance(value, int) or isinstance(value, bool) or not isinstance(tensor, torch.Tensor):
            return
        number, expr = int(value), sizes.expression(value)
        full = 0 if dim is None else tensor.shape[dim % max(tensor.dim(), 1)]
        reach = -number if minus else number % full if number < 0 and full else number
        reach = reach if extent is None else extent
        if dim is None or 0 <= reach <= full:
            place = None if dim is None else dim % max(tensor.dim(), 1)
            self.found.append((number, expr, tensor, place, reach, where, number < 0 and not minus, minus))

    def divides(self, value: Any, dim: int, where: Where) -> None:
        """A tracked `value` is a step in `dim` of the first argument, an index, a number of parts or indices, or padding."""
        if isinstance(value, sizes.Size) and isinstance(self.args[0], torch.Tensor):
            place = dim % max(self.args[0].dim(), 1)
            self.found.append((int(value), value.expr, self.args[0], place, None, where, False, False))


def _shaped(first: int) -> Callable[[Call], None]:
    """The arguments from `first` on are the result's shape; -1 says nothing."""

    def note(call: Call) -> None:
        args, out = call.args, call.out
        where: Where = (first,)
        given = args[first] if len(args) > first and isinstance(args[first], (tuple, list)) else None
        if given is None:
            key = next((k for k in ("size", "shape", "sizes", "repeats") if k in call.kwargs), None)
            given, where = (call.kwargs[key], (key,)) if key else (args[first:], ())
        if not isinstance(given, (tuple, list)) or not isinstance(out, torch.Tensor):
            return
        offset = out.dim() - len(given)
        for i, value in enumerate(given):
            d = offset + i
            copies = call.name in ("repeat", "tile")  # a number of copies: a size where one entry is copied
            if not 0 <= d < out.dim() or not isinstance(value, int) or int(value) == -1:
                continue
            place = (*where, i) if where else (first + i,)
            if not copies or int(value) == out.shape[d]:
                call.use(value, out, d, place, int(out.shape[d]))
            else:
                call.divides(value, d - out.dim(), place)

    return note


def _strided(call: Call) -> None:
    """Sizes of the result's dims; and steps in memory, which the rule says the meaning of."""
    shape = Call(call.name, call.args[:2], call.kwargs, call.out)
    _shaped(1)(shape)
    call.found += shape.found
    steps = call.arg(2, "stride", ())
    for k, step in enumerate(steps if isinstance(steps, (tuple, list)) else ()):
        call.use(step, call.out, None, (2, k) if len(call.args) > 2 else ("stride", k))


def _unflatten(call: Call) -> None:
    dim = int(call.arg(1, "dim")) % call.args[0].dim()
    for i, value in enumerate(call.arg(2, "sizes", ())):
        if int(value) != -1:
            call.use(value, call.out, dim + i, (2, i))


def _split(call: Call) -> None:
    given = call.arg(
        1, "split_size_or_sections", call.kwargs.get("split_size", call.kwargs.get("split_sizes"))
    )
    dim = int(call.arg(2, "dim", 0))
    for i, piece in enumerate(call.out):
        if isinstance(given, (list, tuple)):
            call.use(given[i], piece, dim, (1, i))
        elif isinstance(given, int) and piece.shape[dim] == int(given):
            call.use(given, piece, dim, (1,))


def _narrow(call: Call) -> None:
    if len(call.args) > 3:
        call.use(call.args[2], call.args[0], call.args[1], (2,))
        call.use(call.args[3], call.out, call.args[1], (3,), call.out.shape[call.args[1]])


def _slice_op(call: Call) -> None:
    """``aten.slice(tensor, dim, start, end, step)``, as exported programs write it."""
    tensor, dim = call.args[0], int(call.arg(1, "dim", 0))
    for i, name in ((2, "start"), (3, "end")):
        bound = call.arg(i, name)
        if isinstance(bound, int) and int(bound) and abs(int(bound)) <= tensor.shape[dim]:
            call.use(bound, tensor, dim, (i,) if len(call.args) > i else (name,))


def _slice_scatter(call: Call) -> None:
    tensor, dim = call.args[0], int(call.arg(2, "dim", 0))
    for i, name in ((3, "start"), (4, "end")):
        bound = call.arg(i, name)
        if isinstance(bound, int) and int(bound) and abs(int(bound)) <= tensor.shape[dim]:
            call.use(bound, tensor, dim, (i,) if len(call.args) > i else (name,))


def _split_at(dim: int | None) -> Callable[[Call], None]:
    """Places where a tensor is cut along `dim` (None: the call says it)."""

    def note(call: Call) -> None:
        key = "indices" if "indices" in call.kwargs else "indices_or_sections"
        given = call.arg(1, key, call.kwargs.get("sections"))
        tensor = call.args[0]
        d = int(call.arg(2, "dim", 0)) if dim is None else min(dim, tensor.dim() - 1)
        call.divides(given, d, (1,) if len(call.args) > 1 else (key,))
        for i, place in enumerate(given if isinstance(given, (list, tuple)) else ()):
            call.use(place, tensor, d, (1, i) if len(call.args) > 1 else (key, i))

    return note


def _normalised(call: Call) -> None:
    shape = call.arg(1, "normalized_shape", ())
    for i, value in enumerate(shape if isinstance(shape, (tuple, list)) else ()):
        call.use(value, call.args[0], i - len(shape), (1, i))


def _groups(call: Call) -> None:
    value = call.arg(6, "groups")
    if value is not None and int(value) > 1:
        call.use(value, call.out, None, (6,))


def _padding(call: Call) -> None:
    """Negative amounts cut as many indices: of the first ones, or counted from the end. Tracked ones shift the rest."""
    tensor, amounts = call.args[0], call.arg(1, "pad", ())
    for i, amount in enumerate(amounts):
        dim, where = tensor.dim() - 1 - i // 2, (1, i) if len(call.args) > 1 else ("pad", i)
        call.divides(amount, dim, where)
        if int(amount) < 0:
            call.use(amount, tensor, dim, where, minus=i % 2 == 0)


def _chunks(call: Call) -> None:
    call.divides(call.arg(1, "chunks"), int(call.arg(2, "dim", 0)), (1,))


def _interleaved(call: Call) -> None:
    """A tracked number of copies; and how many indices there are with them, which callers may state."""
    dim = call.arg(2, "dim")
    if dim is not None:
        call.divides(call.arg(1, "repeats"), int(dim), (1,) if len(call.args) > 1 else ("repeats",))
        size = call.kwargs.get("output_size")
        call.use(size, call.out, int(dim), ("output_size",), size)


def _norm_groups(call: Call) -> None:
    """As many groups as channels: their number follows the channels."""
    value = call.arg(1, "num_groups")
    call.divides(value, 1, (1,))
    if value is not None and call.out.dim() > 1 and int(value) == call.out.shape[1] > 1:
        call.use(value, call.out, None, (1,))


def _roll(call: Call) -> None:
    given = call.arg(1, "shifts"), call.arg(2, "dims")
    shifts, dims = ([g] if isinstance(g, int) else g for g in given)
    for i, (shift, dim) in enumerate(zip(shifts or (), dims or (), strict=False)):
        call.use(shift, call.out, dim, (1, i) if isinstance(given[0], (tuple, list)) else (1,))


def _arange(call: Call) -> None:
    ends = [a for a in call.args if isinstance(a, int)]
    if len(ends) == 1:
        call.use(ends[0], call.out, 0, (0,))


def _topk(call: Call) -> None:
    dim = int(call.arg(2, "dim", -1))
    call.divides(call.arg(1, "k"), dim, (1,))
    call.use(call.arg(1, "k"), call.out[0], dim, (1,))


def _one_hot(call: Call) -> None:
    call.use(call.arg(1, "num_classes", -1), call.out, -1, (1,))


def _histc(call: Call) -> None:
    """The number of bins; and the upper limit, which must be tracked so that it follows."""
    limit = call.arg(3, "max")
    if isinstance(limit, sizes.Size):
        call.use(call.arg(1, "bins"), call.out, 0, (1,))
        call.use(limit + 1, call.out, 0, (3,))
        call.limits.add(limit.expr)


def _width(entry: Any) -> int:
    """How many dims of the tensor an entry of an index takes."""
    if entry is None or entry is Ellipsis:
        return 0
    return entry.dim() if isinstance(entry, torch.Tensor) and entry.dtype == torch.bool else 1


def _slices(call: Call) -> None:
    """Bounds of ``tensor[index]``: each is a position on the dim it slices."""
    tensor, index = call.args[:2]
    entries = index if isinstance(index, tuple) else (index,)
    dim = 0
    for i, entry in enumerate(entries):
        if isinstance(entry, slice):
            call.divides(entry.step, dim, (1, i, "step") if isinstance(index, tuple) else (1, "step"))
        if isinstance(entry, slice) and entry.step in (None, 1):
            for side, bound in (("start", entry.start), ("stop", entry.stop)):
                place = (1, i, side) if isinstance(index, tuple) else (1, side)
                if isinstance(bound, int) and int(bound) != 0 and abs(int(bound)) <= tensor.shape[dim]:
                    call.use(bound, tensor, dim, place)
                else:
                    call.divides(bound, dim, place)
        for k, one in enumerate(entry if isinstance(entry, list) else [entry]):
            call.divides(one, dim, (1, i, k) if isinstance(index, tuple) else (1, k))
        dim += tensor.dim() - sum(map(_width, entries)) if entry is Ellipsis else _width(entry)


# Functions that copy entries, and that make tensors, as often and as large as the call says.
COPYING = ("expand", "broadcast_to", "repeat", "tile")
MADE_BY_TENSOR, MADE = ("new_zeros", "new_ones", "new_empty", "new_full"), ("zeros", "ones", "empty", "full")
MAKING = frozenset((*COPYING, *MADE_BY_TENSOR, *MADE, "repeat_interleave"))

NOTES: dict[str, Callable[[Call], None]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "resize_", *COPYING, *MADE_BY_TENSOR), _shaped(1)),
    **dict.fromkeys((*MADE, "rand", "randn"), _shaped(0)),
    "normal": _shaped(2),
    **dict.fromkeys(("as_strided", "as_strided_"), _strided),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _groups),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _groups),
    "randint": _shaped(2),
    "unflatten": _unflatten,
    "split": _split,
    "split_with_sizes": _split,
    "unsafe_split": _split,
    "unsafe_split_with_sizes": _split,
    "split_with_sizes_copy": _split,
    "tensor_split": _split_at(None),
    "hsplit": _split_at(1),
    "vsplit": _split_at(0),
    "dsplit": _split_at(2),
    "narrow": _narrow,
    "narrow_copy": _narrow,
    "slice": _slice_op,
    "slice_scatter": _slice_scatter,
    "__getitem__": _slices,
    "__setitem__": _slices,
    "layer_norm": _normalised,
    "rms_norm": _normalised,
    "native_layer_norm": _normalised,
    "group_norm": _norm_groups,
    "pad": _padding,
    "repeat_interleave": _interleaved,
    "roll": _roll,
    "arange": _arange,
    "topk": _topk,
    "one_hot": _one_hot,
    "histc": _histc,
}

# Those of which nothing repeats a size: what is computed with them must stay what it was.
DIVIDING: dict[str, Callable[[Call], None]] = dict.fromkeys(("chunk", "unsafe_chunk"), _chunks)

# Functions that put numbers into a tensor: name -> index of the first argument that is a value.
VALUED = {
    "tensor": 0, "as_tensor": 0, "scalar_tensor": 0, "new_tensor": 1, "full": 1, "new_full": 2, "fill_": 1, "full_like": 1,
}  # fmt: skip
