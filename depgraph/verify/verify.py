"""The proof: the smaller model computes what the original computes with the removed entries zeroed.

The original is run once more with masks beside its tensors (`masked/`), which come from the plan alone; the smaller
model is run as it is; their outputs are compared in float64, with weights that are widened as they are used (`weights.py`).
That is done with the model's own values, and with weights and inputs drawn anew, where nothing is zero or alike on purpose; in
eval mode, and in train mode where code of the model asks for it; and with inputs of other sizes where the original
accepts them. `power.py` tells what could have been noticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..base.errors import VerificationError
from ..base.inputs import Arguments, Examples, fresh_inputs, split_inputs
from ..base.running import WriteGuardMode
from ..base.values import map_tensors, tensor_leaves
from ..plan.names import fitted
from ..plan.plan import Plan
from ..tracing.outputs import Call
from ..tracing.tensors import all_tensors, named_tensors, skeleton
from ..tracing.trace import other_in_training
from ..tracing.wrappers import eagerly
from . import weights
from .compare import apart
from .conditions import drawn_inputs, other_sizes, same_draws
from .masked import Draws, MaskedRun, Unfollowed, Widened
from .power import MOVES, Effects
from .weights import DrawnValues, OnDemand, Use, Values, Weight

Tensor = torch.Tensor
TOLERANCE = 1e-5  # of values computed in float64, relative to the spread of each output
COARSEST = 0.05  # what can't be told at better than this is not compared
KEPT = 400_000_000  # parameters up to which a model is widened as a whole where it can't be as it is used
SPARING = 50_000_000  # parameters from which on a proof takes the fewest runs
TRIED = 16  # tensors that a backward pass does not reach, whose power is tried one by one


@dataclass(frozen=True)
class Verification:
    """What was compared.

    Attributes:
        status: ``"equal"`` (values were compared, and a wrong result would have been noticed but for what `unproved` names),
            ``"shapes"`` (values could not be compared, or comparing them tells nothing: `detail` says why) or ``"skipped"``.
        max_error: largest deviation of an output, relative to the spread of that output's entries.
        detail: a sentence.
        restricted: ops that took a statistic over kept entries only.
        unproved: what moves no output, so that nothing is known of it: names of groups, or without a graph of tensors.
        unseen: classes of what the model returns beside tensors, in which tensors are that were not compared.
    """

    status: str
    max_error: float = 0.0
    detail: str = ""
    restricted: tuple[str, ...] = ()
    unproved: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


class NotFinite(Exception):
    """Weights or inputs drawn anew lead to outputs that are not finite."""


class NotAccepted(Exception):
    """At other sizes the original's outputs are no longer one for each entry of the batch."""


class _Masked(Use):
    """Weights of the masked original: with each comes its mask."""

    def __init__(self, run: MaskedRun) -> None:
        self.run = run

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        before, self.run.paused = self.run.paused, True
        try:
            yield
        finally:
            self.run.paused = before

    def made(self, weight: Weight) -> Tensor:
        with self._quietly():
            value = weight.whole()
            if weight.cut is not None:
                self.run.give(value, weight.mask())
        return value

    def product(self, x: Tensor, weight: Weight) -> Tensor:
        with self._quietly():
            y = weight.times(x)
            known, rows, columns = self.run.mask(x), weight.kept(0), weight.kept(1)
            if known is None and rows is None:
                if columns is not None:
                    alive = torch.zeros(x.shape[-1], device=x.device)
                    alive[columns] = 1
                    self.run.drawn.met((x,), alive.expand(x.shape))
                return y
            alive = torch.ones(y.shape, device=y.device)
            if known is not None:
                alive *= (known if columns is None else known[..., columns]).amax(-1, keepdim=True)
            if rows is not None:
                gone = torch.ones(y.shape[-1], dtype=torch.bool, device=y.device)
                gone[rows] = False
                alive[..., gone] = 0
            self.run.finish(y, alive)
        return y

    def looked_up(self, rows: Tensor, weight: Weight) -> Tensor:
        with self._quietly():
            y = super().looked_up(rows, weight)
            if weight.cut is not None:
                alive = torch.ones(y.shape, device=y.device)
                kept, columns = weight.kept(0), weight.kept(1)
                if columns is not None:
                    gone = torch.ones(y.shape[-1], dtype=torch.bool, device=y.device)
                    gone[columns] = False
                    alive[..., gone] = 0
                if kept is not None:
                    alive *= torch.isin(rows, kept).unsqueeze(-1).float()
                self.run.give(y, alive)
        return y


def masked_outputs(model: nn.Module, plan: Plan, example_inputs: Any) -> tuple[Any, MaskedRun]:
    """What `model` returns with the entries that `plan` removes zeroed, and statistics taken over what is kept.

    Args:
        model: the original; it is run in eval mode, in its own type, and not touched.
        plan: what is removed.
        example_inputs: as for `prune`, a single one.

    Returns:
        the model's output, and the run, which knows the ops whose statistics were `restricted` and those whose effect on
        masks had to be `probed`, and the masks of tensors that are alive.
    """
    out, run, _ = _masked(model, plan, _Run(fresh_inputs(example_inputs)))
    return out, run


@dataclass
class _Run:
    """How both models are run.

    Attributes:
        arguments: of the call.
        dtype: what they compute in; None: the types they have.
        values: of their weights.
        training: the mode.
        power: whether gradients are recorded.
        whole: no weight is made on demand.
        named: id of a model -> its tensors by name, as far as they were asked for.
        batches: the size of the example's batch, and of this run's.
    """

    arguments: Arguments
    dtype: torch.dtype | None = None
    values: Values = field(default_factory=Values)
    training: bool = False
    power: bool = False
    whole: bool = False
    named: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    batches: tuple[int, int] = (1, 1)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of `model` by name."""
        if id(model) not in self.named:
            self.named[id(model)] = all_tensors(model)
        return self.named[id(model)]

    def given(self) -> Arguments:
        """The arguments, copied, in the run's type."""
        arranged: Arguments = map_tensors(self.arguments, lambda t: weights.widened(t, self.dtype))
        return arranged


def _held(source: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(source, nn.Parameter) else value


def _weight(run: _Run, name: str, source: Tensor, plan: Plan, zeroed: bool, values: Values) -> Weight:
    return Weight(name, source, plan.cuts.get(name), zeroed, values, run.dtype or source.dtype)


def _is_number(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and (tensor.is_floating_point() or tensor.is_complex())


def _made_on_demand(weight: Weight, run: _Run) -> bool:
    large = weight.source.numel() >= weights.WHOLE and not weight.source.is_complex()
    return large and not run.whole and run.dtype is not None and isinstance(weight.source, nn.Parameter)


def _masked(model: nn.Module, plan: Plan, run: _Run) -> tuple[Any, MaskedRun, Call]:
    """The masked original's output, the run of masks, and the call."""
    tensors = run.tensors(model)
    replaced: dict[int, Any] = {}
    shared: list[Tensor] = []
    masks: list[tuple[Tensor, Tensor]] = []
    for name, source in tensors.items():
        cut = plan.cuts.get(name)
        if cut is None and (run.dtype is None or not _is_number(source)):
            if isinstance(source, nn.Parameter):
                shared.append(source)
                replaced[id(source)] = source
            continue
        if not _is_number(source):
            if cut is not None:
                replaced[id(source)] = source.detach().masked_fill(~cut.mask().to(source.device), 0)
                masks.append((replaced[id(source)], cut.mask().to(source.device).float()))
            continue
        weight = _weight(run, name, source, plan, True, run.values)
        if _made_on_demand(weight, run):
            replaced[id(source)] = weight
            continue
        replaced[id(source)] = _held(source, weight.whole())
        if cut is not None:
            masks.append((replaced[id(source)], weight.mask()))
    record = MaskedRun(run.dtype, shared)
    use = _Masked(record)
    for held, mask in masks:
        record.give(held, mask)
    lazy = {key: OnDemand(value, use) for key, value in replaced.items() if isinstance(value, Weight)}
    twin = skeleton(model, {**replaced, **lazy}).train(run.training)
    args, kwargs = run.given()
    call = Call(twin, args, kwargs)
    try:
        with (
            torch.set_grad_enabled(run.power),
            eagerly(),
            torch.backends.mkldnn.flags(enabled=False, allow_tf32=None),
            _no_fast_attention(),
            same_draws(),
            record,
        ):
            out = twin(*args, **kwargs)
    finally:
        record.kept.restore()
    return out, record, call


def _small(
    model: nn.Module, small: nn.Module, plan: Plan, run: _Run, draws: Draws, use: Use
) -> tuple[Any, Call]:
    """The smaller model's output in a wider type, and the call; what the masked original drew at random is drawn again."""
    originals = run.tensors(model)
    replaced: dict[int, Any] = {}
    power = use if isinstance(use, Effects) else None
    shared = list(small.parameters()) if run.dtype is None else []
    replaced.update((id(p), p) for p in shared)
    for name, own in run.tensors(small).items() if run.dtype is not None else ():
        if not _is_number(own):
            continue
        drawn = isinstance(run.values, DrawnValues) and name in run.values.names and name in originals
        if drawn:
            weight = _weight(run, name, originals[name], plan, False, run.values)
        else:
            weight = Weight(name, own, None, False, Values(), run.dtype or own.dtype)
        if _made_on_demand(weight, run):
            replaced[id(own)] = OnDemand(weight, use)
            continue
        value = weight.whole()
        if power is not None and name in plan.cuts and isinstance(own, nn.Parameter):
            value = power.watched(value, name)
            value._is_param = True  # type: ignore[attr-defined]
            replaced[id(own)] = value
        else:
            replaced[id(own)] = _held(own, value)
    twin = skeleton(small, replaced).train(run.training)
    args, kwargs = run.given()
    call = Call(twin, args, kwargs)
    draws.done = 0
    with (
        torch.set_grad_enabled(run.power),
        eagerly(),
        _no_fast_attention(),
        same_draws(),
        WriteGuardMode(shared),
        Widened(run.dtype, draws),
    ):
        return twin(*args, **kwargs), call


@contextmanager
def _no_fast_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def verify(
    model: nn.Module, small: nn.Module, plan: Plan, example_inputs: Any, tolerance: float = TOLERANCE
) -> Verification:
    """Compare `small` with the masked original.

    Args:
        model: the original; it is not changed.
        small: the model that `plan` made of it; neither is it.
        plan: what was removed.
        example_inputs: as for `prune`; with `Examples`, all are compared.
        tolerance: largest deviation relative to the spread of an output's entries, in float64.

    Returns:
        What was compared, and how close it is.

    Raises:
        VerificationError: the smaller model fails to run, or computes something else.
    """
    if any(t.device.type == "meta" for t in named_tensors(model)[0].values()):
        return Verification("skipped", detail="the model is on the meta device: it has no values")
    return _Proof(model, small, fitted(plan, model), tolerance).of(example_inputs)


class _Proof:
    """One proof: what is compared, and what it has shown so far."""

    def __init__(self, model: nn.Module, small: nn.Module, plan: Plan, tolerance: float) -> None:
        self.model, self.small, self.plan, self.tolerance = model, small, plan, tolerance
        self.whole, self.dtype = False, torch.float64
        self.named: dict[int, dict[str, Tensor]] = {}
        tensors = self._run(((), {})).tensors(model)
        self.count = sum(p.numel() for p in model.parameters())
        self.names = {n for n, t in tensors.items() if _redrawn(n, t, plan)}
        parameters = {n for n, p in model.named_parameters()}
        self.unmoved = [n for n in plan.cuts if n in parameters and _is_number(tensors[n])]
        self.restricted: set[str] = set()
        self.unseen: dict[str, None] = {}
        self.error = 0.0
        self.outputs: list[Tensor] = []
        self.remarks: list[str] = []

    def _run(self, arguments: Arguments, dtype: torch.dtype | None = None, **how: Any) -> _Run:
        return _Run(arguments, dtype, whole=self.whole, named=self.named, **how)

    def of(self, example_inputs: Any) -> Verification:
        """The proof on all examples."""
        several = example_inputs.examples if isinstance(example_inputs, Examples) else (example_inputs,)
        cut = list(self.unmoved)
        for example in several:
            shapes = self._on(split_inputs(example))
            if shapes is not None:
                return shapes
        for example in several:
            if self.unmoved:
                self._own_power(split_inputs(example))
        known = tuple(sorted(self.restricted)), tuple(self.unmoved), tuple(self.unseen)
        in_type = ["values compared in float64"] if self.dtype == torch.float64 else []
        detail = "; ".join([*in_type, *dict.fromkeys(self.remarks)])
        if cut and len(known[1]) == len(cut):
            why = "values were not compared: nothing that was cut moves an output"
            return Verification("shapes", self.error, why, *known)
        return Verification("equal", self.error, detail, *known)

    def _on(self, arguments: Arguments) -> Verification | None:
        """Compare on one example; what to say instead where values can't be compared."""
        try:
            self._compare(self._run(arguments, torch.float64))
        except VerificationError:
            raise
        except Unfollowed as why:
            return self._shapes_only(arguments, f"values were not compared: {why}")
        except Exception as error:  # noqa: BLE001  kernels for narrower types only, code that insists on a type ...
            return self._in_own_type(arguments, error)
        self._check_shapes(arguments, self.outputs)
        if not self.outputs:
            return Verification("shapes", detail="values were not compared: the model returns no tensors")
        self._drawn(arguments)
        return None

    def _compare(self, run: _Run, effects: Effects | None = None) -> None:
        """Run both; what they return must be equal.

        Raises:
            VerificationError: it is not.
            Exception: the masked original does not run.
        """
        try:
            wanted, record, call = _masked(self.model, self.plan, run)
        except Unfollowed:
            raise
        except Exception:
            if self.whole or self.count > KEPT or isinstance(run.values, DrawnValues):
                raise
            self.whole = run.whole = True
            wanted, record, call = _masked(self.model, self.plan, run)
        expected = call.outputs(wanted)
        self.unseen.update(dict.fromkeys(call.unseen))
        self.restricted |= record.restricted
        drawn = isinstance(run.values, DrawnValues)
        if drawn and not _kept_apart(self.outputs, expected, run.batches):
            raise NotAccepted
        if drawn and not all(bool(torch.isfinite(t).all()) for t in expected if _is_number(t)):
            raise NotFinite
        got, call = self._of_smaller(run, record, effects)
        found = call.outputs(got)
        try:
            error = apart(found, expected)
        except VerificationError as problem:
            if drawn and record.probed:
                return
            raise VerificationError(f"{problem}{_where(run)}") from problem
        if not error <= self.tolerance and record.probed:
            unknown = ", ".join(sorted(record.probed))
            raise Unfollowed(f"they differ, but what {unknown} make of removed entries is not known")
        if not error <= self.tolerance:
            raise VerificationError(_deviates(error, self.tolerance) + _where(run))
        self.error = max(self.error, error)
        if not drawn:
            self.outputs = expected
        if effects is not None and run.power:
            self._note(effects, found)

    def _of_smaller(self, run: _Run, record: MaskedRun, effects: Effects | None) -> tuple[Any, Call]:
        """The smaller model's output; where its code can't be run with gradients, without, and then `run` has no power."""
        if effects is not None:
            try:
                return _small(self.model, self.small, self.plan, run, record.drawn, effects)
            except Exception:  # noqa: BLE001  in-place changes, numpy ...: what fails without gradients, too, is told below
                run.power = False
        try:
            return _small(self.model, self.small, self.plan, run, record.drawn, Use())
        except Exception as error:
            raise VerificationError(_failed("the smaller model", error) + _where(run)) from error

    def _note(self, effects: Effects, outputs: list[Tensor]) -> None:
        """Take from `unmoved` what moves `outputs`."""
        try:
            effects.measure(outputs)
        except Exception:  # noqa: BLE001  an op without a derivative: what moves is found by trying
            return
        self.unmoved = [n for n in self.unmoved if not effects.sizes.get(n, 0.0) > MOVES]

    def _drawn(self, arguments: Arguments) -> None:
        """Compare on weights and inputs drawn anew, also of other sizes, and in train mode."""
        shown = self._attempt(arguments, False)
        if self._asks_for_training(arguments):
            shown = self._attempt(arguments, True) and shown
        if not shown:
            self.remarks.append("on the model's own weights alone: drawn anew, they gave nothing to compare")

    def _asks_for_training(self, arguments: Arguments) -> bool:
        """Whether train mode must be looked at: one of the models makes other calls there, or can't be run on the example."""
        both = (self.model, self.small)
        return any(other_in_training(m, [arguments]) is not False for m in both)

    def _attempt(self, arguments: Arguments, training: bool) -> bool:
        """Compare on weights drawn anew, on the first inputs that the original accepts; whether there were any."""
        values = DrawnValues(1, self.names)
        for sizes in (*other_sizes(arguments, self.plan, self.count), arguments):
            for free in (True, False):
                inputs = drawn_inputs(sizes, 1, free)
                batches = _batch(arguments), _batch(sizes)
                run = self._run(inputs, torch.float64, values=values, training=training, batches=batches)
                run.power = bool(self.unmoved)
                try:
                    self._compare(run, Effects() if run.power else None)
                except VerificationError:
                    raise
                except NotFinite:
                    continue
                except Exception:  # noqa: BLE001  the original does not accept these inputs
                    break
                self._try_one_by_one(run)
                return True
        return False

    def _try_one_by_one(self, run: _Run) -> None:
        """Draw what no gradient reached once more, and look whether an output changes."""
        if not self.unmoved or not isinstance(run.values, DrawnValues):
            return

        def outputs(names: Iterable[str]) -> list[Tensor]:
            values = DrawnValues(1, self.names, frozenset(names))
            other = self._run(run.arguments, run.dtype, values=values, training=run.training)
            got, call = _small(self.model, self.small, self.plan, other, Draws(), Use())
            return call.outputs(got)

        def moves(names: list[str]) -> bool:
            try:
                return apart(outputs(names), before) > MOVES
            except VerificationError:  # other integers, other places of what is not finite
                return True

        before = outputs(())
        if moves(self.unmoved):
            one_by_one = self.unmoved[: TRIED if self.count <= SPARING else 0]
            moved = {n for n in one_by_one if moves([n])}
            self.unmoved = [n for n in self.unmoved if n not in moved]

    def _own_power(self, arguments: Arguments) -> None:
        """Take from `unmoved` what moves the outputs with the model's own weights."""
        run = self._run(arguments, self.dtype, power=True)
        effects = Effects()
        try:
            got, call = _small(self.model, self.small, self.plan, run, Draws(), effects)
        except Exception:  # noqa: BLE001  code that can't be run with gradients
            return
        self._note(effects, call.outputs(got))

    def _in_own_type(self, arguments: Arguments, problem: Exception) -> Verification | None:
        """Compare in the model's own type, as well as that can be told; what to say instead where it can't."""
        why = f"float64 can't run ({type(problem).__name__}: {str(problem).partition(chr(10))[0][:120]})"
        try:
            wanted, record, call = _masked(self.model, self.plan, self._run(arguments))
        except Unfollowed as unknown:
            return self._shapes_only(arguments, f"values were not compared: {unknown}")
        except Exception as error:
            raise VerificationError(_failed("the masked original", error)) from error
        expected = call.outputs(wanted)
        limit = self._told(arguments, expected)
        if limit > COARSEST:
            text = "values were not compared: " + why
            return self._shapes_only(
                arguments, f"{text}, and the model's own type tells nothing better than 5 %"
            )
        try:
            got, call = _small(self.model, self.small, self.plan, self._run(arguments), record.drawn, Use())
        except Exception as error:
            raise VerificationError(_failed("the smaller model", error)) from error
        error_ = apart(call.outputs(got), expected)
        if not error_ <= limit and record.probed:
            unknown_ops = ", ".join(sorted(record.probed))
            return self._shapes_only(
                arguments, f"values differ, but what {unknown_ops} make of removed entries is not known"
            )
        if not error_ <= limit:
            raise VerificationError(_deviates(error_, limit))
        self.error = max(self.error, error_)
        self.dtype = torch.float32
        self.restricted |= record.restricted
        self.remarks.append(f"values compared in the model's own type, within {limit:.1g}: {why}")
        return None

    def _told(self, arguments: Arguments, expected: list[Tensor]) -> float:
        """What deviation the model's own type can tell: a multiple of what it makes of the masked original itself."""
        kinds = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        coarsest = max((torch.finfo(k).eps for k in kinds), default=SINGLE)
        if coarsest <= SINGLE:
            return max(self.tolerance, 1000 * coarsest)
        run = self._run(arguments, torch.float32)
        try:
            exact, _, call = _masked(self.model, self.plan, run)
            return max(self.tolerance, 4 * apart(expected, call.outputs(exact)))
        except Exception:  # noqa: BLE001  kernels for one type only: nothing to measure it against
            return float("inf")

    def _shapes_only(self, arguments: Arguments, why: str) -> Verification:
        before = _as_it_is(self.model, arguments)
        self._check_shapes(arguments, before)
        return Verification("shapes", detail=why)

    def _check_shapes(self, arguments: Arguments, wanted: list[Tensor]) -> None:
        """Run the smaller model as it is: kernels may ask more of strides and sizes than their float64 counterparts do."""
        try:
            found = _as_it_is(self.small, arguments)
        except Exception as error:
            raise VerificationError(_failed("the smaller model", error)) from error
        shapes = [[tuple(t.shape) for t in outputs] for outputs in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise VerificationError(
                f"the smaller model's outputs have shapes {shapes[0]}, the original's {shapes[1]}"
            )


SINGLE = torch.finfo(torch.float32).eps


def _redrawn(name: str, tensor: Tensor, plan: Plan) -> bool:
    """Whether a tensor is drawn anew: parameters, and what is cut of buffers where all entries are alike."""
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.itemsize < 2:
        return False
    if isinstance(tensor, nn.Parameter):
        return True
    if name not in plan.cuts or not tensor.dim() or not tensor.numel():
        return False
    return bool((tensor.amax() - tensor.amin()) <= 1e-6 * tensor.abs().amax())


def _batch(arguments: Arguments) -> int:
    return next((t.shape[0] for t in tensor_leaves(arguments) if t.dim()), 1)


def _kept_apart(before: list[Tensor], now: list[Tensor], batches: tuple[int, int]) -> bool:
    """Whether outputs of another batch are as many for each of its entries as those of the example's were."""
    if len(before) != len(now):  # train mode returns more
        return True
    old, new = batches
    return all(
        a.dim() == b.dim() and (not a.dim() or a.shape[0] != old or b.shape[0] == new)
        for a, b in zip(before, now, strict=True)
    )


def _failed(what: str, error: Exception) -> str:
    return f"{what} failed to run: {type(error).__name__}: {error}"


def _deviates(error: float, limit: float) -> str:
    return f"the smaller model deviates from the masked original by {error:.2g} (tolerance {limit:.2g})"


def _where(run: _Run) -> str:
    """Under which conditions other than the user's own a comparison failed."""
    if not isinstance(run.values, DrawnValues):
        return ""
    shapes = ", ".join(str(list(t.shape)) for t in tensor_leaves(run.arguments))
    return f" in {'train' if run.training else 'eval'} mode, with weights drawn anew and inputs {shapes}"


def _as_it_is(model: nn.Module, arguments: Arguments) -> list[Tensor]:
    """What `model` gives away in eval mode, unchanged by what forward writes."""
    parameters = {id(p): p for p in model.parameters()}
    twin = skeleton(model, parameters).eval()
    args, kwargs = _Run(arguments).given()
    call = Call(twin, args, kwargs)
    with torch.no_grad(), eagerly(), same_draws(), WriteGuardMode(parameters.values()):
        return call.outputs(twin(*args, **kwargs))
