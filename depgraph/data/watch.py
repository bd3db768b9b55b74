"""A run of a model in which the calls of its consumers are seen, on a copy that shares its parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..axes.nodes import base_name
from ..axes.op_call import Product
from ..base.errors import InputError
from ..base.running import CallMode, WriteGuard
from ..base.switches import eagerly, open_functions, same_random_state
from ..surgery.on_demand import OnDemand, is_fact
from ..tracing.tensors import all_tensors, skeleton
from ..tracing.whole import PACKED, WHOLE, in_order, is_composite
from .aside import Activations
from .calibration import Batch, Calibration
from .consumers import Consumer, Keys, Step, at, form_of, path_to, signature, slot
from .layout import Layout, layout_of
from .patches import patches
from .states import states

Tensor = torch.Tensor


@dataclass(frozen=True)
class Call:
    """One call of a consumer in a run.

    Attributes:
        consumer: whose call it is.
        args: the arguments, in the order of the op's schema.
        out: the result; None before the call.
        choices: stands for the indices by which entries were picked in the run so far: where two runs agree in it, the
            same samples stand at the same places.
        stream: what the result is added to, where the call is seen only then (`Watch.joins`).
    """

    consumer: Consumer
    args: Any
    out: Any
    choices: int
    stream: Any = None

    @property
    def product(self) -> Product:
        """The first recorded call of the consumer."""
        return self.consumer.calls[0]

    @cached_property
    def x(self) -> Tensor:
        """The activation; inside a recurrent layer, which is given none, what the weight meets there."""
        if self.product.activation is None:
            *_, place = path_to(self.product.node.args, self.product.weight) or ()
            return states(self.product.node.target, self.args, int(place))
        return at(self.args, path_to(self.product.node.args, self.product.activation) or ())

    @property
    def weight(self) -> Tensor:
        """The weight operand."""
        return at(self.args, path_to(self.product.node.args, self.product.weight) or ())

    @property
    def result(self) -> Any:
        """What it gives; of a recurrent op, which makes more of its products, this product alone."""
        if not self.consumer.is_recurrent:
            return self.out
        with torch.no_grad():
            return linear(self.x, self.weight)

    @property
    def layout(self) -> Layout:
        """How the call is a matrix product for each stack."""
        letters = self.product.letters
        return layout_of(self.product.node.target, self.args, self.x.shape, self.weight, letters)

    def inputs(self, windows: bool = True) -> Iterator[tuple[int, Tensor]]:
        """The inputs in pieces, each with the stack it belongs to: [samples, width], or [samples, width, positions].

        The groups of a convolution are side by side in one piece of stack 0.
        """
        if self.consumer.is_convolution:
            if windows:
                yield from ((0, piece) for piece in patches(self.args))
            else:
                spatial = self.weight.dim() - 2
                x = self.x if self.x.dim() > spatial + 1 else self.x[None]
                yield 0, x.transpose(0, 1).flatten(1).T
        else:
            for stacks, _, x in self.layout.inputs(self.args, self.x, slice(None)):
                yield from enumerate(x, stacks.start or 0)


class StopRun(BaseException):
    """Raised by what watches a run to end it early."""


# Ops that pick entries by numbers or by a mask: what they pick decides which sample stands where.
PICKS = {"index", "_unsafe_index", "index_select", "gather", "scatter", "scatter_add", "scatter_reduce", "index_add",
         "index_copy", "index_put", "_index_put_impl", "index_fill", "embedding", "take", "masked_select", "masked_scatter",
         "one_hot", "_local_scalar_dense", "_grouped_mm", "repeat_interleave", "select_scatter", "tolist"}  # fmt: skip


class Watch:
    """Runs a model, and sees the calls of consumers in it."""

    def __init__(
        self,
        model: nn.Module,
        wanted: Iterable[Consumer],
        see: Callable[[Call], None],
        before: bool = False,
        choices: bool = False,
        joins: Iterable[Consumer] = (),
    ) -> None:
        """Call `see`, which may raise `StopRun`, after (or `before`) each call of a consumer in `wanted`.

        With `choices`, calls say which entries were picked before (`Call.choices`). Consumers in `joins` are seen when
        their result is about to be added to something, once.
        """
        self.joins = {id(c) for c in joins}
        self.pending: list[Call] = []  # of consumers in `joins`, until their result is added to something
        self.see, self.before = see, before
        keys = Keys()
        self.table: dict[Any, Consumer] = {}
        self.paths: dict[tuple[str, str], list[tuple[Step, ...]]] = {}
        for consumer in wanted:
            for product in () if consumer.reason else consumer.calls:
                place = slot(product, keys)
                self.table[place] = consumer
                paths = self.paths.setdefault(place[:2], [])
                if place[2] not in paths:
                    paths.append(place[2])
        self.keys = keys.known
        self.makers = {form[0] for form in self.keys if isinstance(form, tuple)}
        self.twin, self.tensors = self.copy_of(model)
        held = [p for p in self.twin.parameters() if not isinstance(p, OnDemand)]
        self.kept, self.lazy = WriteGuard(held), len(held) < len(list(self.twin.parameters()))
        self.named = {id(t): self.keys[n] for n, t in self.tensors.items() if n in self.keys}
        self.made: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.noting, self.choices = choices, 0
        self.activations: Activations | None = None  # where those of the run are noted
        self.paused = 0
        self.failure: BaseException | None = None

    gradients = False  # whether the run is recorded for derivatives

    def copy_of(self, model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
        """What is run, and its tensors by name."""
        return twin(model)

    def run(self, batch: Batch) -> Any:
        """Run the model on a batch; what it returns, or None where a callback had enough. What one raises passes through."""
        with prepared():
            return self.run_prepared(batch)

    def run_all(self, calibration: Calibration, text: str) -> None:
        """`run` on each batch; `text` is what a progress bar calls it."""
        with closing(calibration.batches(text)) as batches:
            for batch in batches:
                self.run(batch)

    def run_prepared(self, batch: Batch) -> Any:
        """`run` where `prepared` holds, be it in another thread."""
        self.made.clear()
        self.failure, self.choices, self.pending = None, 0, []
        try:
            with ExitStack() as modes:
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.set_grad_enabled(self.gradients))
                modes.enter_context(open_functions())
                modes.enter_context(_Aten(self))
                modes.enter_context(_Python(self))
                out = batch.run(self.twin)
        except StopRun:
            return None
        except InputError:
            if self.failure is not None:
                raise self.failure from None
            raise
        finally:
            self.made.clear()
            self.kept.restore()
        if self.failure is not None:  # the model's own code caught it
            raise self.failure
        return out

    def number(self, tensor: Tensor) -> int | None:
        """The number of a tensor that is, or is made of, parameters alone."""
        named = self.named.get(id(tensor))
        if named is not None:
            return named
        made = self.made.get(id(tensor))
        return made[1] if made is not None and made[0]() is tensor else None

    def perform(self, op: Any, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        """One call: is it a consumer's, does it pick entries, does it make another tensor of weights?"""
        found = self._whose(op, args)
        joined = [c for c in found if id(c) in self.joins]
        found = [c for c in found if id(c) not in self.joins]
        for consumer in found if self.before else ():
            self._tell(Call(consumer, args, None, self.choices))
        if self.pending and base_name(op) == "add":
            self._join(args)
        if self.noting and base_name(op) in PICKS:
            self.note(args)
        if self.activations is not None:
            self.activations.need((args, kwargs))
        out = run()
        if self.activations is not None:
            self.activations.note((args, kwargs), out)
        for consumer in () if self.before else found:
            self._tell(Call(consumer, args, out, self.choices))
        for consumer in joined:
            self.pending.append(Call(consumer, args, out, self.choices))
        if str(op) in self.makers:
            form = form_of(op, args, kwargs, Tensor, self.number)
            number = None if form is None else self.keys.get(form)
            if number is not None:
                self._made(out, number)
        return out

    def given(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """What `func` is called with, in which consumers' weights that are made on demand are made, and known by their values."""
        if not self.lazy or func is embedding or is_fact(func):  # a table is read by rows
            return args, kwargs

        def made(t: Any) -> Any:
            number = self.named.get(id(t))
            if number is None or not isinstance(t, OnDemand):
                return t
            value = t.use.made(t.weight)
            value = value.detach().requires_grad_() if self.gradients else value
            self.made[id(value)] = weakref.ref(value), number
            return value

        found: tuple[Any, Any] = pytree.tree_map(made, (args, kwargs))
        return found

    def operands(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """What a call that a trace records whole is made with."""
        return args, kwargs

    def note(self, args: Any) -> None:
        """Let `choices` stand for the integers and truth values among `args`, too."""
        self.paused += 1
        for leaf in pytree.tree_leaves(args):
            if isinstance(leaf, Tensor) and not (leaf.is_floating_point() or leaf.is_complex()):
                flat = leaf.detach().reshape(-1).long()
                places = torch.arange(1, flat.numel() + 1, device=flat.device) * 0x9E3779B1
                self.choices = hash((self.choices, tuple(leaf.shape), int((flat * places).sum())))
        self.paused -= 1

    def _whose(self, op: Any, args: Any) -> list[Consumer]:
        kind, found = signature(op, args), []
        for path in self.paths.get(kind, ()):
            try:
                weight = at(args, path)
            except (IndexError, TypeError):
                continue
            number = self.number(weight) if isinstance(weight, Tensor) else None
            consumer = self.table.get((*kind, path, number))
            if consumer is not None:
                found.append(consumer)
        return found

    def _join(self, args: Any) -> None:
        mine = [call for call in self.pending if any(a is call.out for a in args[:2])]
        self.pending = [call for call in self.pending if all(call is not m for m in mine)]
        for call in mine:
            other = args[1] if args[0] is call.out else args[0]
            if isinstance(other, Tensor) and other.shape == call.out.shape:
                self._tell(replace(call, stream=other))

    def _tell(self, call: Call) -> None:
        self.paused += 1
        try:
            with torch.no_grad():
                self.see(call)
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self.paused -= 1

    def _made(self, out: Any, number: int) -> None:
        if isinstance(out, Tensor):
            self.made[id(out)] = weakref.ref(out), number
            return
        for i, tensor in enumerate(t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)):
            item = self.keys.get(("item", number, i))
            if item is not None:
                self.made[id(tensor)] = weakref.ref(tensor), item


def twin(
    model: nn.Module, parameter: Callable[[Tensor], Tensor] = lambda p: p
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of `model` in eval mode with its own parameters and copies of all else, and these tensors by name.

    `parameter` says what stands for a parameter: by default itself.
    """
    every, parameters = all_tensors(model), {id(p) for p in model.parameters()}
    tensors = {n: parameter(t) if id(t) in parameters else t.clone() for n, t in every.items()}
    return skeleton(model, {id(t): tensors[n] for n, t in every.items()}).eval(), tensors


@contextmanager
def prepared() -> Iterator[None]:
    """What a watched run changes for the whole process, put back afterwards."""
    with same_random_state(), eagerly(), open_functions():
        yield


class _Aten(CallMode):
    """Sees each ATen call."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.watch.kept.before(func, args, kwargs)
        if self.watch.paused or func.namespace == "prim":
            return func(*args, **kwargs)
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        return self.watch.perform(func, args, kwargs, lambda: func(*args, **kwargs))


class _Python(TorchFunctionMode):
    """Sees the composite ops that a trace records whole."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watch = self.watch
        args, kwargs = watch.given(func, args, kwargs or {})
        whole = WHOLE.get(func) if func.__hash__ is not None else None
        if whole is None or watch.paused:
            if watch.noting and not watch.paused and getattr(func, "__name__", "") in PICKS:
                watch.note(args[:1])  # tolist()
            return func(*args, **kwargs)
        if whole in PACKED and isinstance(args[3], (list, tuple)):
            whole = PACKED[whole]
        ordered, rest = in_order(whole, args, kwargs)

        def run() -> Any:
            given, named = watch.operands(args, kwargs)
            watch.paused += 1
            try:
                return func(*given, **named)
            finally:
                watch.paused -= 1

        return watch.perform(whole, ordered, rest, run)
