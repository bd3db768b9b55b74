"""The proof: the smaller model computes what the original computes with the removed entries zeroed.

The original is run once more with masks beside its tensors (`masked/`), which come from the plan alone; the smaller
model is run as it is; their outputs are compared in float64, with weights that are widened as they are used (`weights.py`).
`power.py` tells which kept entries that comparison could have noticed. For the others both are run on weights drawn anew, and
the tensors themselves are compared with what the plan keeps. Small models are compared on other inputs, too (`conditions.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..base.checks import a_module, number, of_kind
from ..base.errors import VerificationError
from ..base.inputs import Arguments, Outputs, checked_outputs, each_example, with_outputs
from ..base.switches import same_random_state
from ..base.values import tensor_leaves
from ..base.weights import Weights
from ..plan.names import fitted
from ..plan.plan import Plan
from ..surgery.apply import apply
from ..surgery.on_demand import Use
from ..tracing.caches import nothing_kept
from ..tracing.tensors import all_tensors, named_tensors
from ..tracing.training import differs_in_training
from .compare import apart
from .conditions import drawn_inputs, other_sizes
from .masked import Draws, Unfollowed
from .power import MOVES, Effects, Place, places
from .runs import Setup, is_number, run_masked, run_smaller
from .weights import DrawnValues

Tensor = torch.Tensor
TOLERANCE = 1e-5  # of values computed in float64, relative to the spread of each output
COARSEST = 0.05  # what can't be told at better than this is not compared
SINGLE = torch.finfo(torch.float32).eps
KEPT = 400_000_000  # parameters up to which a model is widened as a whole where it can't be as it is used
SPARING = 50_000_000  # parameters from which on a proof takes the fewest runs
SMALL = 1_000_000  # parameters up to which a run costs next to nothing
# Times that values are drawn anew while entries move no output yet, by the parameters of a model.
TURNS = {SMALL: 5, SPARING: 3}
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
        unproved: what moves no output, or has kept units that move none, so that not all of it is known: names of groups,
            or without a graph of tensors.
        unseen: classes of what the model returns beside tensors, in which tensors are that were not compared.
    """

    status: str
    max_error: float = 0.0
    detail: str = ""
    restricted: tuple[str, ...] = ()
    unproved: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


class _NotAccepted(Exception):
    """The original's outputs on inputs of our own tell nothing: not finite, or of another batch than its inputs."""


def verify(
    model: nn.Module, small: nn.Module, plan: Plan, example_inputs: Any, tolerance: float = TOLERANCE,
    outputs: Outputs | None = None, *,
    weights: Weights | None = None, smaller: Weights | None = None,
) -> Verification:  # fmt: skip
    """Compare `small` with the masked original.

    Args:
        model: the original; it is not changed.
        small: the model that `plan` made of it; neither is it.
        plan: what was removed.
        example_inputs: as for `prune`; with `Examples`, all are compared.
        tolerance: largest deviation relative to the spread of an output's entries, in float64.
        outputs: what counts of what the models return, as for `prune`.
        weights: where tensors of `model` that are on the meta device have their values (see `base/weights.py`); those of
            `small` are cut out of them.
        smaller: where tensors of `small` that are on the meta device have theirs instead. The two are then compared on the
            examples alone: all else has been shown without it.

    Returns:
        What was compared, and how close it is.

    Raises:
        VerificationError: the smaller model fails to run, or computes something else.
    """
    a_module("model", model)
    a_module("small", small)
    of_kind("plan", plan, Plan, "a depgraph.Plan")
    number("tolerance", tolerance, 0)
    example_inputs = with_outputs(example_inputs, checked_outputs(outputs))
    if weights is None and any(t.is_meta for t in named_tensors(model)[0].values()):
        return Verification("skipped", detail="the model is on the meta device: it has no values")
    plan = fitted(plan, model)
    if plan.factors:
        return Verification(
            "shapes", detail="layers became two factors, whose product need not be the layer's weight"
        )
    if (
        plan.entries or plan.fusions or plan.scales
    ):  # no size changes: the original is the model that has the zeros, or the fused layers
        model = apply(model, replace(plan, cuts={}, repairs=[], rewrites=[], removals=[]))
        plan = replace(plan, entries={}, fusions=[], scales=[])
    with same_random_state(), nothing_kept(model):
        sources = {"values": weights, "smaller": smaller}
        return _Proof(model, small, plan, tolerance, sources).of(example_inputs)


class _Proof:
    """One proof: what is compared, and what it has shown so far."""

    def __init__(
        self,
        model: nn.Module,
        small: nn.Module,
        plan: Plan,
        tolerance: float,
        sources: dict[str, Weights | None],
    ) -> None:
        self.model, self.small, self.plan, self.tolerance = model, small, plan, tolerance
        self.sources = sources
        self.whole, self.dtype = False, torch.float64
        self.named: dict[int, dict[str, Tensor]] = {}
        if plan.removals:  # what is left of the smaller model's tensors in the original's names
            self.named[id(small)] = {plan.moves.old(n): t for n, t in all_tensors(small).items()}
        tensors = self._run(Arguments()).tensors(model)
        self.count = sum(p.numel() for p in model.parameters())
        self.tensors = tensors
        self.names = {n for n, t in tensors.items() if _redrawn(n, t, plan)}
        parameters = {n for n, p in model.named_parameters() if is_number(p)}
        watched = [p for n, cut in plan.cuts.items() if n in parameters for p in places(n, cut)]
        self.unmoved: dict[Place, Tensor | None] = dict.fromkeys(watched)  # which indices; None: all
        self.refused: set[Any] = set()  # inputs and weights that told nothing of this example
        self.narrow = torch.float32  # in which others are compared: float64 once rounding was too coarse
        self.restricted: set[str] = set()
        self.unseen: dict[str, None] = {}
        self.error = 0.0
        self.outputs: list[Tensor] = []
        self.remarks: list[str] = []

    def _run(self, arguments: Arguments, dtype: torch.dtype | None = None, **how: Any) -> Setup:
        return Setup(arguments, dtype, whole=self.whole, named=self.named, **{**self.sources, **how})

    def of(self, example_inputs: Any) -> Verification:
        """The proof on all examples."""
        several = each_example(example_inputs)
        watched = {n for n, _ in self.unmoved}
        for example in several:
            shapes = self._on(example)
            if shapes is not None:
                return shapes
        if self.sources["smaller"] is not None:
            return Verification("equal", self.error, "; ".join(["compared in float64", *self.remarks]))
        for example in several if self.dtype == torch.float64 else ():
            self._elsewhere(example)
        known = (
            tuple(sorted(self.restricted)),
            tuple(dict.fromkeys(n for n, _ in self.unmoved)),
            tuple(self.unseen),
        )
        if watched and len(self._unreached()) == len(watched):
            why = "values were not compared: nothing that was cut moves an output"
            return Verification("shapes", self.error, why, *known)
        in_type = ["values compared in float64"] if self.dtype == torch.float64 else []
        return Verification("equal", self.error, "; ".join([*in_type, *dict.fromkeys(self.remarks)]), *known)

    def _unreached(self) -> list[str]:
        """The tensors of which nothing moves an output along a dim that was cut."""
        return list(dict.fromkeys(n for (n, _), left in self.unmoved.items() if left is None))

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
        return None

    def _compare(self, run: Setup) -> None:
        """Run both; what they return must be equal.

        Raises:
            VerificationError: it is not.
            Exception: the masked original does not run.
        """
        try:
            expected, record = run_masked(self.model, self.plan, run)
        except Unfollowed:
            raise
        except Exception:
            if self.whole or self.count > KEPT or run.batch is not None or not run.on_demand(self.model):
                raise
            self.whole = run.whole = True
            expected, record = run_masked(self.model, self.plan, run)
        if run.training and (others := record.restricted - self.restricted) and self._ranges(run, expected):
            text = f"in train mode alone {', '.join(sorted(others))} would range over fewer entries"
            raise VerificationError(text)
        self.restricted |= record.restricted
        if run.batch is not None and not _tells(self.outputs, expected, run):
            raise _NotAccepted
        power = run.batch is not None and isinstance(run.values, DrawnValues)
        found = self._of_smaller(run, record.drawn, power)
        if record.drawn.short:
            expected, record = run_masked(self.model, self.plan, run, Draws(record.drawn.short))
            found = self._of_smaller(run, record.drawn, power)
        try:
            error = apart(found, expected)
        except VerificationError as problem:
            if run.batch is not None and record.probed:
                return
            raise VerificationError(f"{problem}{run}") from problem
        if not error <= self.tolerance and record.probed:
            unknown = ", ".join(sorted(record.probed))
            raise Unfollowed(f"they differ, but the effect of {unknown} on removed entries is not known")
        if not error <= self.tolerance:
            raise VerificationError(_deviates(error, self.tolerance) + str(run))
        if run.batch is None:
            if record.raised and not record.restricted and self._ranges(run, expected):
                self.restricted.add("sum")
            self.error, self.outputs = max(self.error, error), expected
            self.unseen.update(dict.fromkeys(run.unseen))

    def _ranges(self, run: Setup, expected: list[Tensor]) -> bool:
        """Whether more than the kept entries would count where nothing but weights is zero, as after a sigmoid."""
        try:
            return (
                not apart(run_masked(self.model, self.plan, run, absent=False)[0], expected) <= self.tolerance
            )
        except Exception:  # noqa: BLE001  other integers, other places of what is not finite; or it does not run so
            return True

    def _hidden(self) -> int:
        """How many entries move no output yet, of tensors of which others do."""
        return sum(int(left.sum()) for left in self.unmoved.values() if left is not None)

    def _of_smaller(self, run: Setup, draws: Draws, power: bool) -> list[Tensor]:
        """The smaller model's output; with `power` noted, where its code can be run with gradients."""
        models = self.model, self.small, self.plan
        if power and self.unmoved:
            effects = Effects(self.plan.cuts)
            try:
                out = run_smaller(*models, run, draws, effects)
            except Exception:  # noqa: BLE001  in-place changes, numpy, no derivative ...: tried without below
                pass
            else:
                self._note(effects)
                return out
        try:
            return run_smaller(*models, run, draws, Use())
        except Exception as error:
            raise VerificationError(_failed("the smaller model", error) + str(run)) from error

    def _note(self, effects: Effects) -> None:
        """Take from `unmoved` what moves the outputs."""
        for place, before in list(self.unmoved.items()):
            sizes = effects.sizes.get(place)
            if sizes is None or not bool((sizes > MOVES).any()):
                continue
            left = ~(sizes > MOVES) if before is None else before & ~(sizes > MOVES)
            if bool(left.any()):
                self.unmoved[place] = left
            else:
                del self.unmoved[place]

    def _elsewhere(self, arguments: Arguments) -> None:
        """Compare on other inputs, in train mode where code asks for it, and for what moves no output on weights drawn anew."""
        if self.unmoved and self.sources["values"] is None:
            self._check_values()
        own, shown = self.sources["values"], True
        self.refused, self.narrow = set(), torch.float32
        if self.count <= SPARING or self.unmoved:
            shown = self._attempt(arguments, [*self._anew(), own])
        turns = next((n for most, n in TURNS.items() if self.count <= most), 0)
        for turn in range(1, turns):  # what a closed gate or a dead unit hides, other values show
            before = self._hidden()
            if not before:
                break
            self._attempt(arguments, [*self._anew(turn), own], turn=turn)
            if self.count > SMALL and self._hidden() == before:
                break
        if any(differs_in_training(m, [arguments]) is not False for m in (self.model, self.small)):
            self.refused.clear()  # train mode may accept what eval mode does not
            if not self._attempt(arguments, [own], training=True):
                self.remarks.append("in eval mode alone: train mode gave nothing to compare on such inputs")
            self._attempt(arguments, self._anew(), training=True)
        if not shown:
            self.remarks.append(
                "on the example alone: other inputs, or weights drawn anew, gave nothing to compare"
            )

    def _check_values(self) -> None:
        """The tensors of the smaller model must be what the plan keeps of the original's: not all of that shows in outputs."""
        originals = named_tensors(self.model)[0]
        moves = self.plan.moves
        for name, held in ((moves.old(n), t) for n, t in named_tensors(self.small)[0].items()):
            cut, source = self.plan.cuts.get(name), originals.get(name)
            if source is None or held.layout is not torch.strided:
                continue
            kept = source if cut is None else cut.slice(source.detach())
            if kept.shape != held.shape or (kept is not held and not _same(kept, held)):
                try:
                    error = apart([held], [kept])
                except VerificationError as problem:
                    raise VerificationError(
                        f"{name} is not what the plan keeps of it: {problem}"
                    ) from problem
                if not error <= self.tolerance:
                    raise VerificationError(f"{name} is off what the plan keeps of it by {error:.2g}")

    def _anew(self, turn: int = 0) -> list[Weights | None]:
        """Weights drawn anew, where some move no output."""
        return (
            [DrawnValues(self.tensors, self.names, turn=turn)] if self.unmoved or self.plan.removals else []
        )

    def _attempt(
        self, arguments: Arguments, weights: list[Weights | None], training: bool = False, turn: int = 0
    ) -> bool:
        """Compare on the first inputs and weights that the original accepts; whether there were any.

        Args:
            arguments: what the inputs are like.
            weights: where values come from, those to be tried first at the front; None: from the models.
            training: in train mode.
            turn: which inputs are drawn.
        """
        own = self.sources["values"]
        sizes = other_sizes(arguments) if self.count <= SPARING else ()
        for place, resized in enumerate((*sizes, arguments)):
            for values, free in [(v, f) for v in weights for f in (True, False)]:
                way = place, values is own, free
                if way in self.refused or place in self.refused:
                    continue
                inputs = drawn_inputs(resized, 1 + turn, free)
                how: dict[str, Any] = {"values": values, "training": training, "batch": _batch(arguments)}
                if values is not own:
                    how["smaller"] = None
                run = self._run(inputs, self.narrow, **how)
                try:
                    try:
                        self._compare(run)
                    except VerificationError:  # rounding alone?
                        if self.narrow == torch.float64:
                            raise
                        run.dtype = self.narrow = torch.float64
                        self._compare(run)
                except VerificationError:
                    raise
                except _NotAccepted:
                    self.refused.add(way)
                    continue
                except Exception:  # noqa: BLE001  the original does not accept these inputs
                    self.refused.add(place)
                    break
                self._try_one_by_one(run)
                return True
        self.refused.clear()  # other inputs may tell
        return False

    def _try_one_by_one(self, run: Setup) -> None:
        """Draw what no gradient reached once more, and look whether an output changes."""
        names = self._unreached()
        if not names or self.count > SPARING or not isinstance(run.values, DrawnValues):
            return

        def outputs(others: Iterable[str]) -> list[Tensor]:
            values = DrawnValues(self.tensors, self.names, frozenset(others))
            other = self._run(run.arguments, run.dtype, values=values, training=run.training)
            return run_smaller(self.model, self.small, self.plan, other, Draws(), Use())

        def moves(others: list[str]) -> bool:
            try:
                return apart(outputs(others), before) > MOVES
            except VerificationError:  # other integers, other places of what is not finite
                return True

        before = outputs(())
        if moves(names):
            moved = {n for n in names[:TRIED] if moves([n])}
            self.unmoved = {p: left for p, left in self.unmoved.items() if p[0] not in moved}

    def _in_own_type(self, arguments: Arguments, problem: Exception) -> Verification | None:
        """Compare in the model's own type, as well as that can be told; what to say instead where it can't."""
        why = f"float64 can't run ({type(problem).__name__}: {str(problem).partition(chr(10))[0][:120]})"
        run = self._run(arguments)
        try:
            expected, record = run_masked(self.model, self.plan, run)
        except Unfollowed as unknown:
            return self._shapes_only(arguments, f"values were not compared: {unknown}")
        except Exception as error:
            raise VerificationError(_failed("the masked original", error)) from error
        limit = self._told(arguments, expected)
        if limit > COARSEST:
            text = f"values were not compared: {why}, and the model's own type tells nothing better than 5 %"
            return self._shapes_only(arguments, text)
        try:
            got = run_smaller(self.model, self.small, self.plan, run, record.drawn, Use())
        except Exception as error:
            raise VerificationError(_failed("the smaller model", error)) from error
        error_ = apart(got, expected)
        if not error_ <= limit and record.probed:
            unknown_ops = ", ".join(sorted(record.probed))
            text = f"values differ, but the effect of {unknown_ops} on removed entries is not known"
            return self._shapes_only(arguments, text)
        if not error_ <= limit:
            raise VerificationError(_deviates(error_, limit))
        if self.sources["values"] is None:
            self._check_values()
        self.unmoved.clear()  # not known
        self.error, self.dtype = max(self.error, error_), torch.float32
        self.restricted |= record.restricted
        self.remarks.append(f"values compared in the model's own type, within {limit:.1g}: {why}")
        return None

    def _told(self, arguments: Arguments, expected: list[Tensor]) -> float:
        """What deviation the model's own type can tell: a multiple of what it makes of the masked original itself."""
        kinds = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        coarsest = max((torch.finfo(k).eps for k in kinds), default=SINGLE)
        if coarsest <= SINGLE:
            return max(self.tolerance, 1000 * coarsest)
        try:
            exact, _ = run_masked(self.model, self.plan, self._run(arguments, torch.float32))
            return max(self.tolerance, 4 * apart(expected, exact))
        except Exception:  # noqa: BLE001  kernels for one type only: nothing to measure it against
            return float("inf")

    def _shapes_only(self, arguments: Arguments, why: str) -> Verification:
        own = {"smaller": self.sources["values"]}
        before = run_smaller(
            self.model, self.model, Plan(), self._run(arguments, None, **own), Draws(), Use()
        )
        self._check_shapes(arguments, before)
        return Verification("shapes", detail=why)

    def _check_shapes(self, arguments: Arguments, wanted: list[Tensor]) -> None:
        """Run the smaller model as it is: kernels may ask more of strides and sizes than their float64 counterparts do."""
        found = self._of_smaller(self._run(arguments), Draws(), power=True)
        shapes = [[tuple(t.shape) for t in outputs] for outputs in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise VerificationError(
                f"the smaller model's outputs have shapes {shapes[0]}, the original's {shapes[1]}"
            )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are the same bit for bit; of some types torch compares nothing else."""
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a, b))
    a, b = (t.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


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


def _tells(before: list[Tensor], now: list[Tensor], run: Setup) -> bool:
    """Whether outputs are finite, and as many for each entry of another batch as those of the example's were."""
    if not all(bool(torch.isfinite(t).all()) for t in now if is_number(t)):
        return False
    new = _batch(run.arguments)
    return len(before) != len(now) or all(  # train mode returns more
        a.dim() == b.dim() and (not a.dim() or a.shape[0] != run.batch or b.shape[0] == new)
        for a, b in zip(before, now, strict=True)
    )


def _failed(what: str, error: Exception) -> str:
    return f"{what} failed to run: {type(error).__name__}: {error}"


def _deviates(error: float, limit: float) -> str:
    return f"the smaller model deviates from the masked original by {error:.2g} (tolerance {limit:.2g})"
