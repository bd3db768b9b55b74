"""Whether a model does something of its own in train mode, beyond dropout and what torch's modules do there.

Two questions: does any of its code read ``training`` (cheap, and sure to be yes where the second may be), and does a run in
train mode make other calls than one in eval mode?
"""

from __future__ import annotations

import dis
import types
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..base.inputs import Arguments
from ..base.running import CallMode, WriteGuardMode, set_mode
from ..base.switches import eagerly, quiet_fakes, same_random_state
from ..base.values import map_tensors, stored, tensor_leaves
from .caches import nothing_kept
from .fakes import Fakes
from .outputs import Call
from .tensors import all_tensors, skeleton

HELPERS = 64  # functions that a method calls, and those that they call, that are looked into


def differs_in_training(model: nn.Module, examples: list[Arguments], fake: bool = False) -> bool | None:
    """Whether `model` makes other calls in train mode than in eval mode: two bare runs tell, for models that ask.

    Args:
        model: any module; it is not touched.
        examples: the arguments of each call.
        fake: run on fake tensors.

    Returns:
        None where it can't be run in one of the modes.
    """
    if not asks_for_training(model):
        return False
    try:
        return _calls(model, examples, fake, False) != _calls(model, examples, fake, True)
    except Exception:  # noqa: BLE001  the model can't be run in train mode on these inputs (targets are missing ...)
        return None


def _calls(model: nn.Module, examples: list[Arguments], fake: bool, training: bool) -> list[Any]:
    """The ATen calls of a bare run, in order."""
    log = CallLog()
    with ExitStack() as stack:
        mode: Any = WriteGuardMode(model.parameters())
        own: Any = torch.clone
        tensors = all_tensors(model).values()
        if fake:
            stack.enter_context(quiet_fakes())
            mode = Fakes()
            own = mode.given
            twin = skeleton(model, mode.stand_ins(tensors, tensor_leaves(examples)))
        else:
            shares = {id(p) for p in model.parameters()}
            twin = skeleton(model, {id(t): t if id(t) in shares else t.clone() for t in tensors})
        given = map_tensors(examples, own)
        for context in (same_random_state(), torch.inference_mode(False), torch.no_grad(), eagerly(),
                        nothing_kept(model), mode, log, NoDropout()):  # fmt: skip
            stack.enter_context(context)
        torch.default_generator.manual_seed(0)
        set_mode(twin, training)
        for example in given:
            call = Call(twin, example)
            log.give_away(call.outputs(example.run(twin)))
    return log.calls


def asks_for_training(model: nn.Module) -> bool:
    """Whether a method of a module that is not torch's, or a function that it names, reads an attribute ``training``.

    To hand it on as an argument of that name (``F.dropout(x, p, training=self.training)``) is not to ask.
    """
    kinds: dict[Any, None] = dict.fromkeys(type(m) for m in model.modules())
    return any(map(_asks, kinds)) or any(_reads(f, {}) for m in model.modules() for f in _own_functions(m))


def _own_functions(module: nn.Module) -> list[Any]:
    """The functions that one module has by itself: hooks, and a forward that was put in its place."""
    state = vars(module)
    tables = ("_forward_hooks", "_forward_pre_hooks")
    found = [f for table in tables for f in state.get(table, {}).values()]
    found += [state["forward"]] if "forward" in state else []
    plain = [stored(f, "func") or f for f in found]
    return [f if isinstance(_inner(f), types.FunctionType) else _method_of(f) for f in plain]


def _method_of(value: Any) -> Any:
    return stored(value, "__func__") or getattr(type(value), "__call__", None)  # noqa: B004  not whether


@lru_cache(maxsize=4096)
def _asks(kind: Any) -> bool:
    for k in kind.__mro__:
        if k in (object, nn.Module) or k.__module__.partition(".")[0] == "torch":
            continue
        seen: dict[Any, None] = {}
        for name, value in vars(k).items():
            if name in ("train", "eval", "__init__"):
                continue
            function = stored(value, "fget") or stored(value, "__func__") or value
            if _reads(function, seen):
                return True
    return False


def _reads(function: Any, seen: dict[Any, None]) -> bool:
    function = _inner(function)
    if not isinstance(function, types.FunctionType) or function in seen or len(seen) > HELPERS:
        return False
    seen[function] = None
    if function.__module__ is not None and function.__module__.partition(".")[0] == "torch":
        return False
    if _in_code(function.__code__):
        return True
    names = set(function.__code__.co_names)
    cells = [c.cell_contents for c in function.__closure__ or () if _filled(c)]
    helpers = [function.__globals__.get(n) for n in names] + cells
    return any(_reads(h, seen) for h in helpers)


def _inner(function: Any) -> Any:
    while (wrapped := stored(function, "__wrapped__")) is not None:
        function = wrapped
    return function


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


@lru_cache(maxsize=8192)
def _in_code(code: types.CodeType) -> bool:
    """Whether a code object reads ``training`` of anything other than to hand it on as ``training=``."""
    steps = [s for s in dis.get_instructions(code) if s.opname not in ("CACHE", "PRECALL", "EXTENDED_ARG")]
    for i, step in enumerate(steps):
        if step.opname == "LOAD_ATTR" and step.argval == "training":
            after = steps[i + 1] if i + 1 < len(steps) else None
            if not (after is not None and _hands_on(code, after)):
                return True
        if step.opname == "LOAD_CONST" and step.argval == "training":
            return True
    return any(_in_code(c) for c in code.co_consts if isinstance(c, types.CodeType))


def _hands_on(code: types.CodeType, step: dis.Instruction) -> bool:
    """Whether what is on the stack goes into a call as its last argument, ``training=``."""
    if step.opname == "KW_NAMES" and step.arg is not None:
        names: Any = code.co_consts[step.arg]
    elif step.opname == "LOAD_CONST":  # later versions of Python give the names as a tuple
        names = step.argval
    else:
        return False
    return isinstance(names, tuple) and bool(names) and names[-1] == "training"


DROPOUTS = frozenset(
    [
        "dropout",
        "dropout_",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "alpha_dropout_",
        "feature_dropout",
        "feature_dropout_",
        "feature_alpha_dropout",
        "feature_alpha_dropout_",
    ]
)


class NoDropout(TorchFunctionMode):
    """Dropout hands on its input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in DROPOUTS:
            return args[0] if args else kwargs.get("input")
        if name == "scaled_dot_product_attention":
            kwargs = {k: v for k, v in kwargs.items() if k != "dropout_p"}
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        return func(*args, **kwargs)


class CallLog(CallMode):
    """The ATen calls that are made: op, shapes and numbers; of norms over batches, which differ by design, only the op."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.made: dict[int, tuple[Any, int]] = {}  # id of a tensor -> the tensor, and which call made it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        numbers = () if "norm" in name else tuple(a for a in args if isinstance(a, (int, float)))
        shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        counts = shapes == [()] and name == "aten::add_"  # a norm counts its batches
        if not counts:
            self.calls.append((name, tuple(shapes), numbers))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.made[id(t)] = t, len(self.calls)
        return out

    def give_away(self, outputs: list[torch.Tensor]) -> None:
        """The run ends with these."""
        self.calls.append(tuple(self.made.get(id(t), (t, 0))[1] for t in outputs))
