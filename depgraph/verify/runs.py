"""The two runs of a proof: the masked original and the smaller model, on the same weights, inputs and draws, in one type."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..base.inputs import Arguments, fresh_inputs
from ..base.running import WriteGuardMode, set_mode
from ..base.switches import eagerly, same_random_state, without_fast_attention, without_mkldnn
from ..base.values import map_tensors, tensor_leaves
from ..base.weights import InMemory, Weights
from ..plan.plan import SILENT, Plan
from ..surgery.on_demand import OnDemand, Use, Weight
from ..tracing.caches import nothing_kept
from ..tracing.outputs import Call
from ..tracing.tensors import all_tensors, skeleton
from ..tracing.training import NoDropout
from .conditions import seed_all
from .masked import Draws, MaskedRun, Widened
from .power import Effects
from .weights import DrawnValues, too_large, widened

Tensor = torch.Tensor


class _Masked(Use):
    """Weights of the masked original: with each comes its mask."""

    def __init__(self, run: MaskedRun) -> None:
        self.run = run

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """What runs inside is no op of the model's: it has no masks."""
        before, self.run.paused = self.run.paused, True
        try:
            yield
        finally:
            self.run.paused = before

    def made(self, weight: Weight) -> Tensor:
        with self.quietly():
            value = weight.whole()
            if weight.cut is not None:
                self.run.give(value, weight.mask())
        return value

    def product(self, x: Tensor, weight: Weight) -> Tensor:
        with self.quietly():
            y = weight.times(x)
            known, rows, columns = self.run.mask(x), weight.kept(0), weight.kept(1)
            if known is None and columns is not None:
                self.run.drawn.met((x,), alive_at(columns, x))
            if known is None and rows is None:
                return y
            alive = torch.ones(y.shape, device=y.device)
            if known is not None:
                alive *= (known if columns is None else known[..., columns]).amax(-1, keepdim=True)
            if rows is not None:
                alive *= alive_at(rows, y)
            self.run.finish(y, alive)
        return y

    def looked_up(self, rows: Tensor, weight: Weight) -> Tensor:
        with self.quietly():
            y = super().looked_up(rows, weight)
            kept, columns = weight.kept(0), weight.kept(1)
            alive = torch.ones(y.shape, device=y.device)
            if columns is not None:
                alive *= alive_at(columns, y)
            if kept is not None:
                alive *= torch.isin(rows, kept).unsqueeze(-1).float()
            if weight.cut is not None:
                self.run.give(y, alive)
        return y


def alive_at(kept: Tensor, y: Tensor) -> Tensor:
    """The mask of `y` [..., n], alive at the indices `kept` of its last dim."""
    return torch.zeros(y.shape[-1], device=y.device).index_fill_(0, kept, 1).expand(y.shape)


def masked_outputs(model: nn.Module, plan: Plan, example_inputs: Any) -> tuple[list[Tensor], MaskedRun]:
    """The tensors that `model` gives away with the entries that `plan` removes zeroed, and statistics taken over what is kept.

    Args:
        model: the original; it is run in eval mode, in its own type, and not touched.
        plan: what is removed.
        example_inputs: as for `prune`, a single one.

    Returns:
        the tensors, and the run, which knows the ops whose statistics were `restricted` and those whose effect on
        masks had to be `probed`, and the masks of tensors that are alive.
    """
    with same_random_state():
        return run_masked(model, plan, Setup(fresh_inputs(example_inputs)))


@dataclass
class Setup:
    """How both models are run.

    Attributes:
        arguments: of the call.
        dtype: what they compute in; None: the types they have.
        values: of the original's weights, and of the smaller model's that are cut out of these; None: what the tensors hold.
        smaller: values of the smaller model's weights, where they are neither.
        training: the mode.
        whole: no weight is made on demand.
        named: id of a model -> its tensors by name, as far as they were asked for.
        batch: the size of the example's batch, where this is another.
        unseen: classes of objects in which tensors are that are not looked at.
    """

    arguments: Arguments
    dtype: torch.dtype | None = None
    values: Weights | None = None
    smaller: Weights | None = None
    training: bool = False
    whole: bool = False
    named: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    batch: int | None = None
    unseen: tuple[str, ...] = ()

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of `model` by name."""
        if id(model) not in self.named:
            self.named[id(model)] = all_tensors(model)
        return self.named[id(model)]

    def on_demand(self, model: nn.Module) -> set[str]:
        """The tensors of `model` that are made when they are used."""
        tensors = self.tensors(model)
        if self.dtype is None:
            tensors = {n: t for n, t in tensors.items() if t.is_meta}
        elsewhere = self.values is not None and any(t.is_meta for t in tensors.values())
        room = self.values.room // 8 if elsewhere and self.values is not None else sys.maxsize
        return set() if self.whole else too_large(tensors, room)

    def values_of_smaller(self, original: Tensor | None, held: Tensor, name: str) -> Weights | None:
        """Where the smaller model's tensor `name` gets its values from that are cut out of the original's; None: has its own."""
        if original is None or (held.is_meta and self.smaller is not None):
            return None
        drawn = isinstance(self.values, DrawnValues) and name in self.values.names
        return self.values if drawn or held.is_meta else None

    def call(self, model: nn.Module) -> list[Tensor]:
        """The tensors that `model`, a copy, gives away."""
        example = self.given()
        call = Call(model, example)
        found = call.outputs(example.run(model))
        self.unseen = call.unseen
        return found

    def type_of(self, tensor: Tensor) -> torch.dtype:
        """What `tensor` is computed with in."""
        wide = self.dtype is None or tensor.dtype == torch.float64 or not is_number(tensor)
        return tensor.dtype if wide or self.dtype is None else self.dtype

    def given(self) -> Arguments:
        """The arguments, copied, in the run's type."""
        arranged: Arguments = map_tensors(self.arguments, lambda t: widened(t, self.dtype))
        return arranged

    def __str__(self) -> str:
        """Under which conditions other than the user's own."""
        if self.batch is None:
            return ""
        shapes = ", ".join(str(list(t.shape)) for t in tensor_leaves(self.arguments))
        drawn = "weights and inputs" if isinstance(self.values, DrawnValues) else "inputs"
        return f" in {'train' if self.training else 'eval'} mode, with {drawn} drawn anew (of shape {shapes})"


def _held(source: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(source, nn.Parameter) else value


def is_number(tensor: Tensor) -> bool:
    """Whether a tensor holds real or complex numbers, in strided memory."""
    return tensor.layout is torch.strided and (tensor.is_floating_point() or tensor.is_complex())


def run_masked(
    model: nn.Module, plan: Plan, run: Setup, drawn: Draws | None = None, *, absent: bool = True
) -> tuple[list[Tensor], MaskedRun]:
    """The tensors that the masked original gives away under `run`, and the run of masks, whose draws `drawn` takes.

    Where what is removed is not `absent`, its weights are zeros, and that is all: a sigmoid makes halves of it.
    """
    on_demand = run.on_demand(model)
    replaced: dict[int, Any] = {}
    shared: list[Tensor] = []
    masks: list[tuple[Tensor, Tensor]] = []
    values = run.values or InMemory(run.tensors(model))
    for name, source in run.tensors(model).items():
        cut = plan.cuts.get(name)
        if cut is None and not source.is_meta and (run.dtype is None or not is_number(source)):
            if isinstance(source, nn.Parameter):
                shared.append(source)
                replaced[id(source)] = source
            continue
        if not is_number(source) and not source.is_meta:
            if cut is not None:
                mask = cut.mask().to(source.device)
                replaced[id(source)] = source.detach().masked_fill(~mask, 0)
                masks.append((replaced[id(source)], mask.float()))
            continue
        weight = Weight(name, source, cut, True, values, run.type_of(source))
        if name in on_demand:
            replaced[id(source)] = weight
            continue
        replaced[id(source)] = _held(source, weight.whole())
        if cut is not None:
            masks.append((replaced[id(source)], weight.mask()))
    record = MaskedRun(run.dtype, shared, drawn)
    record.raised = run.batch is not None  # the examples tell: not looked for on other inputs
    masked = _Masked(record)
    use = masked if absent else Use()
    for held, mask in masks:
        if absent:
            record.give(held, mask)
    lazy = {key: OnDemand(value, use) for key, value in replaced.items() if isinstance(value, Weight)}
    twin = skeleton(model, {**replaced, **lazy})
    set_mode(twin, run.training)
    silence(twin, plan, masked.quietly)
    seed_all()
    try:
        with (
            torch.no_grad(),
            eagerly(),
            without_mkldnn(),
            without_fast_attention(),
            nothing_kept(model),
            NoDropout() if run.training else nullcontext(),
            record,
        ):
            out = run.call(twin)
    finally:
        record.kept.restore()
    return out, record


def silence(
    model: nn.Module, plan: Plan, quietly: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    """Let each module of `model` that `plan` replaces by zeros yield zeros, whatever it computes, in place.

    They are made `quietly`: not by an op of the model's, so nothing of them is dead.

    What else the plan removes stays: where anything but a silenced branch used it, the smaller model lacks it.
    """

    def hook(returns: tuple[int, int] | None) -> Any:
        def zeroed(module: nn.Module, args: Any, out: Any) -> Any:
            with quietly():
                if returns is None:
                    return torch.zeros_like(out)
                return tuple(torch.zeros_like(t) if i == returns[1] else t for i, t in enumerate(out))

        return zeroed

    for removal in plan.removals:
        if removal.leaves in SILENT:
            model.get_submodule(removal.path).register_forward_hook(hook(removal.returns))


def run_smaller(
    model: nn.Module, small: nn.Module, plan: Plan, run: Setup, draws: Draws, use: Use
) -> list[Tensor]:
    """The smaller model's output; what the masked original drew at random is drawn again."""
    originals, on_demand = run.tensors(model), run.on_demand(small)
    own_values = run.smaller or InMemory(run.tensors(small))
    effects = use if isinstance(use, Effects) else None
    shared: list[Tensor] = []
    replaced: dict[int, Any] = {}
    for name, held in run.tensors(small).items():
        watched = (
            effects is not None and name in plan.cuts and isinstance(held, nn.Parameter) and is_number(held)
        )
        if run.dtype is None and isinstance(held, nn.Parameter) and not held.is_meta:
            shared.append(held)
            replaced[id(held)] = held
        if run.dtype is None and not watched and not held.is_meta:
            continue
        if not is_number(held) and not held.is_meta:
            continue
        original = originals.get(name)
        values = run.values_of_smaller(original, held, name)
        if values is not None and original is not None:
            weight = Weight(name, original, plan.cuts.get(name), False, values, run.type_of(original))
        else:
            weight = Weight(name, held, None, False, own_values, run.type_of(held))
        if name in on_demand:
            replaced[id(held)] = OnDemand(weight, use)
            continue
        value = held.detach() if run.dtype is None and not held.is_meta else weight.whole()
        if watched and effects is not None:
            replaced[id(held)] = effects.watched(value, name)
            replaced[id(held)]._is_param = True
        else:
            replaced[id(held)] = _held(held, value)
    twin = skeleton(small, replaced)
    set_mode(twin, run.training)
    draws.done = 0
    seed_all()
    with (
        torch.set_grad_enabled(effects is not None),
        eagerly(),
        without_fast_attention(),
        nothing_kept(small),
        NoDropout() if run.training else nullcontext(),
        WriteGuardMode(shared) if run.dtype is None else Widened(run.dtype, draws),
    ):
        out = run.call(twin)
        if effects is not None:
            effects.measure(out)
    return out
