"""The module that has all sizes: one set of weights, and for each size the sub-model on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..base.checks import a_module, flag, function, is_number, shown
from ..base.errors import InputError, NothingToPruneError, suggestions
from ..base.inputs import each_example, split_inputs
from ..base.running import Score, score_of
from ..base.values import tensor_leaves
from ..costs import cost as costs
from ..costs.latency import latencies
from ..data.calibration import Calibration, Loss, loss_value
from ..depth.request import Depth
from ..exploring.sweep import Row, Sweep
from ..grouping.build import build_plan
from ..grouping.naming import given_names, name_in
from ..importance import Importance, normalisation, scores_of
from ..plan.plan import Plan
from ..prune import OF_ANALYZE, analyze, as_module
from ..recover.changes import Changes
from ..recover.statistics import estimate
from ..recover.task import Task
from ..select import nothing_text
from ..select.budget_kinds import budget_kind
from ..surgery.apply import apply
from ..surgery.lineage import plans_of
from ..tracing.tensors import named_tensors
from ..tracing.wrappers import inner_name
from ..training.train import check_mix, logits_of, soft_loss
from ..verify.verify import Verification
from .cascade import Cascade, fitted
from .nested import Nested, checked_options, checked_sizes, falling, in_order
from .parts import Link, linked


@dataclass(frozen=True)
class Served:
    """The size that fits a limit of latency; called as the model is.

    Attributes:
        size: the largest whose latency is within the limit.
        model: its sub-model.
        table: size -> median seconds of one forward pass on this machine, as measured.
    """

    size: float
    model: nn.Module
    table: Mapping[float, float]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the sub-model returns."""
        return self.model(*args, **kwargs)


class Elastic(nn.Module):
    """One model of which every size runs on the same weights.

    The units of each group stand in the order of their importance, so that a smaller size is the first rows and columns of
    each tensor: a view, no copy. What a smaller size keeps, each larger one keeps. The module itself runs the size
    it is switched to, at first the whole.

    Source: slimmable networks (Yu et al., ICLR 2019) and their training by the sandwich rule with the largest as the
    teacher (Yu and Huang, "Universally Slimmable Networks and Improved Training Techniques", ICCV 2019), for any
    architecture that can be traced.

    Attributes:
        model: the whole: of the class of the model that was given, with its units in order. Train these parameters.
        sizes: the sizes that were asked for, falling from 1.
        example_inputs: what it was made with; None in one that was loaded: give it, and what is measured can be.
        plans: size -> the plan from `model` to it; also of sizes between, once they were asked for.
        order: the plan that made `model` of the model that was given.
        before: the plans that had made that one, where it was itself a result.
        proofs: size -> the comparison of that size with the masked original; of 1, of the whole in its new order.
        notes: what had to stay whole, and why.
    """

    model: nn.Module
    depgraph_unfit = "an Elastic, which is several models\n  fix: give its whole, elastic.model, or one of its sizes, elastic.extract(size)"

    def __init__(
        self, model: nn.Module, example_inputs: Any, *, sizes: Sequence[float] = (1, 0.5, 0.25), cost: str = "macs",
        importance: str | Importance = "l1", calibration: Iterable[Any] | None = None, loss: Loss | None = None,
        depth: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        """Order the units of a copy of `model`, and plan every size.

        Args:
            model: any module, not wrapped; it stays as it is.
            example_inputs: as for `prune`.
            sizes: shares of the cost, falling from 1 (the whole model, which may be left out).
            cost: what they are shares of: "macs", "params" or "latency" (measured on this machine).
            importance: as for `prune`.
            calibration: batches for criteria that look at data, as for `prune`.
            loss: as for `prune`.
            depth: whether smaller sizes may also leave out branches (see `branches`), as ``prune(..., depth=True)`` does: of
                several numbers of branches that is taken whose outputs are nearest to the whole's. What a larger size leaves out,
                each smaller one leaves out.
            **options: those of `analyze` (``ignore``, ``granularity`` ...) and of `choose` that do not say how much goes
                (``round_to``, ``uniform``, ``max_ratio``, ``scope`` ...).

        Raises:
            InputError: bad arguments; sizes that can't be reached, with what can.
            NothingToPruneError: everything is frozen; with `depth`, no branch can go.
            TraceError: the model rejects the inputs.
        """
        super().__init__()
        a_module("model", model := as_module(model))
        flag("depth", depth)
        if any(inner_name(m) is not None for m in model.modules()):
            raise InputError(
                "the model is wrapped (data parallel, compiled)\n  fix: give the module in it, and wrap Elastic's"
            )
        wanted = checked_sizes(sizes)
        stated = {k: options.pop(k) for k in OF_ANALYZE if k in options}
        options.setdefault("normalise", normalisation(importance))
        checked_options(cost, options)
        data = None if calibration is None else Calibration(calibration, example_inputs, loss)
        graph = analyze(model, example_inputs, **stated)
        if not graph.groups and not depth:
            raise NothingToPruneError(nothing_text(graph))
        stated["ignore"] = [name_in(graph, n) for n in given_names("ignore", stated.get("ignore", ()))]
        scores = scores_of(graph, importance, calibration=data)
        moved, proof = in_order(model, graph, scores, example_inputs)
        self.order = build_plan(graph, {}, order=moved)
        ordered = apply(model, self.order)
        scores = {n: falling(s[moved[n]]) if n in moved else s for n, s in scores.items()}
        graph = analyze(ordered, example_inputs, **stated)
        self._nested: Nested | None = Nested(
            graph, example_inputs, scores, cost, options, proof, stated, Depth() if depth else None, data
        )
        self._nested.find(wanted)
        self.before, self.example_inputs = plans_of(model), example_inputs
        self.proofs: dict[float, Verification] = self._nested.proofs
        self.notes = self._nested.notes
        self._begin(ordered, wanted, self._nested.plans)

    @classmethod
    def restored(
        cls, model: nn.Module, made_by: Sequence[Plan], plans: Mapping[float, Plan],
        own: Mapping[float, Mapping[str, Tensor]],
    ) -> Elastic:  # fmt: skip
        """What was saved: nothing is traced, so that there are no sizes but these; `depgraph.load` calls it.

        Args:
            model: the whole.
            made_by: the plans that made it of its original; the last one is its order.
            plans: smaller size -> its plan from `model`.
            own: smaller size -> buffers in which it differs, by the names in `model`.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        *before, made.order = made_by
        made.before, made.example_inputs, made._nested = tuple(before), None, None
        made.proofs, made.notes = {}, []
        made._begin(
            model, sorted({1.0, *plans}, reverse=True), {1.0: Plan(shapes=made.order.shapes), **plans}
        )
        made.set_extra_state(
            {repr(s): {plans[s].moves.new(n): b for n, b in buffers.items()} for s, buffers in own.items()}
        )
        return made

    def _begin(self, model: nn.Module, sizes: Sequence[float], plans: dict[float, Plan]) -> None:
        self.model, self.sizes, self.plans = model, tuple(sizes), plans
        self._parts: dict[float, tuple[nn.Module, Link]] = {}
        self._size, self._steps = 1.0, 0
        self._tables: dict[Any, dict[float, float]] = {}
        for size in sizes[1:]:
            self.at(size)

    # ---------------------------------------------------------------------------------------------- sub-models

    @property
    def _inputs(self) -> Any:
        if self.example_inputs is None:
            raise InputError("a loaded model has no example inputs: set example_inputs")
        return self.example_inputs

    @property
    def size(self) -> float:
        """The size that calls run."""
        return self._size

    def plan(self, size: float) -> Plan:
        """From the model that was given to that size: what stays, and in which order.

        Raises:
            InputError: there is no such size.
        """
        return self.order.then(self.plans[self._known(size)])

    def at(self, size: float) -> nn.Module:
        """That size on the shared weights: a module of the model's class whose parameters are views.

        It is in the modes of `model`. What calls of it add to gradients lands in the parameters of `model`. Its buffers
        (statistics of batch norms) are its own.

        Args:
            size: one of `sizes`, or one between them, which is then planned. Plan it before others are served: while it is
                proved, calls in other threads run by other kernels, and round otherwise.

        Raises:
            InputError: there is no such size, or its units allow none between its neighbours; modules of `model` were replaced.
        """
        size = self._known(size)
        part = self.to_call(size)
        if size != 1:
            self._parts[size][1].refresh(history=False)
        return part

    def to_call(self, size: float) -> nn.Module:
        """As `at`, for a call alone, which looks after its weights itself.

        Args:
            size: as for `at`.

        Raises:
            InputError: as for `at`.
        """
        size = self._known(size)
        if size == 1:
            return self.model
        if size not in self._parts:
            self._parts[size] = linked(self.model, self.plans[size])
        part, link = self._parts[size]
        if changed := link.changed():
            raise InputError(
                f"{changed} of the whole model has other modules or parameters than when its sizes were made, which do not follow\n"
                "  fix: change the model first, and make an Elastic of it"
            )
        link.take_modes()
        return part

    def extract(self, size: float) -> nn.Module:
        """That size as a plain module with weights of its own; it computes what ``at(size)`` computes.

        But for rounding: some kernels, and some processors, add the entries of a view in another order than those of a block.

        Args:
            size: as for `at`.

        Raises:
            InputError: as for `at`.
        """
        part = self.at(size)
        small = apply(self.model, self.plans[self._known(size)])
        values = dict(part.named_buffers())
        with torch.no_grad():
            for name, buffer in small.named_buffers():
                buffer.copy_(values[name])
        return small

    def switch(self, size: float) -> None:
        """Let calls of this module run that size from now on. A call that is running ends as it began.

        Any threads may switch and call; calls whose gradients are wanted belong into one of them.

        Args:
            size: as for `at`.

        Raises:
            InputError: as for `at`.
        """
        size = self._known(size)
        if size not in self._parts:
            self.at(size)
        self._size = size

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the size that the module is switched to returns.

        Args:
            *args: of the model.
            **kwargs: likewise.
        """
        return self.to_call(self._size)(*args, **kwargs)

    def _known(self, size: Any) -> float:
        """`size`, planned where it is between two others."""
        if is_number(size) and float(size) in self.plans:
            return float(size)
        if not is_number(size) or not self.sizes[-1] < size < 1:
            raise InputError(
                f"there is no size {shown(size)}: the sizes are {', '.join(f'{s:g}' for s in self.sizes)}, and between them "
                "what units allow"
            )
        if self._nested is None:
            raise InputError(
                f"a model that was loaded or copied has no size {size:g}: it has {suggestions('', map(str, self.plans))}"
            )
        with self._nested.one_at_a_time:
            if float(size) not in self.plans:
                self._nested.add(float(size))
        return float(size)

    # ------------------------------------------------------------------------------------------------ training

    def sandwich(
        self, inputs: Any, loss_fn: Callable[..., Tensor], *, temperature: float = 1.0, alpha: float = 1.0,
        largest: nn.Module | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss of one step: the largest size on the targets, the smallest and one between on what the largest says.

        Call ``backward()`` on it; gradients of all three land on the parameters of `model`. The ones between take turns.

        Args:
            inputs: as `example_inputs`; where `loss_fn` takes two arguments, a pair of these and a target.
            loss_fn: ``loss_fn(output)`` or ``loss_fn(output, target)`` -> scalar.
            temperature: of the softmax over the last dim of the logits, as for `distill`.
            alpha: share of the soft term in the loss of the smaller sizes, the rest is `loss_fn`. 0 where the model does not
                return logits [rows, classes] or [rows, positions, classes].
            largest: what runs the whole, where `model` is wrapped: a ``DistributedDataParallel`` reduces the gradients of
                all sizes with those of the whole.

        Returns:
            the sum of the three losses.

        Raises:
            InputError: bad arguments; a loss that is not finite; no logits.
        """
        check_mix(alpha, temperature)
        self._check_largest(largest)
        given, hard = _with_target(inputs, loss_fn)
        arguments = split_inputs(given)
        output = arguments.run(self.model if largest is None else largest)
        total = loss_value(hard, output, None)
        between = self.sizes[1:-1]
        chosen = dict.fromkeys([*between[self._steps % len(between) :][:1]] if between else [])
        self._steps += 1
        for size in (*chosen, *self.sizes[1:][-1:]):
            small = self.to_call(size)(*arguments.args, **arguments.kwargs)
            if alpha > 0:
                logits, aim = logits_of(small, "a smaller size"), logits_of(output, "the whole").detach()
                if logits.dim() not in (2, 3) or logits.shape[-1] < 2:
                    raise InputError(
                        f"the model returns no logits over the last dim ({list(logits.shape)}), so there is nothing to "
                        "distil\n  fix: alpha=0.0, every size then learns from loss_fn"
                    )
                total = total + alpha * soft_loss(logits, aim, temperature)
            if alpha < 1:
                total = total + (1 - alpha) * loss_value(hard, small, None)
        return total

    def _check_largest(self, largest: Any) -> None:
        """Refuse what does not run the whole."""
        inside = list(largest.modules()) if isinstance(largest, nn.Module) else []
        if largest is not None and (
            all(m is not self.model for m in inside) or (self in inside and self.size != 1)
        ):
            raise InputError(
                "largest must be elastic.model in its wrapper (or this module in one, switched to size 1), not "
                f"{type(largest).__name__ if inside else shown(largest)}"
            )

    def estimate_statistics(self, calibration: Iterable[Any]) -> None:
        """Estimate the running statistics of batch norms of every smaller size anew; they are kept beside those of `model`.

        Each batch runs once through each size. To be done after training, whose steps see each size but now and then.

        Args:
            calibration: batches in the form of the example inputs, or pairs of these and a target.

        Raises:
            InputError: no data, or bad data.
        """
        batches = list(Calibration(calibration, self._inputs).batches("reading calibration data"))
        for size in self.plans:
            if size != 1:
                estimate(Task(self.model, Changes(self.at(size)), batches))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: weights, sub-models and statistics of their own, and no sizes but those that there are."""
        state = {k: v for k, v in vars(self).items() if k != "report"}
        return {**state, "_nested": None, "_parts": {}, "own": self.get_extra_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.pop("own")
        super().__setstate__(state)
        self.set_extra_state(own)

    def own_buffers(self, size: float) -> dict[str, Tensor]:
        """The buffers in which a size differs from what its plan keeps of `model`, by the names there: its statistics.

        Args:
            size: as for `at`.
        """
        whole, part, found = named_tensors(self.model)[0], self.at(size), {}
        plan = self.plans[self._known(size)]
        old = plan.moves.old
        for name, buffer in part.named_buffers():
            first = old(name)
            kept = whole.get(first)
            if kept is not None and first in plan.cuts:
                kept = plan.cuts[first].slice(kept)
            if kept is None or kept.shape != buffer.shape or not torch.equal(kept, buffer):
                found[first] = buffer
        return found

    def get_extra_state(self) -> dict[str, dict[str, Tensor]]:
        """The buffers of the smaller sizes, for ``state_dict``."""
        parts = {size: self.at(size) for size in self.plans if size != 1}
        return {
            repr(s): {n: b.detach().clone() for n, b in part.named_buffers()} for s, part in parts.items()
        }

    def set_extra_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the buffers in `state`, which `get_extra_state` of an `Elastic` with the same sizes gave.

        Raises:
            InputError: a size is missing there, or has buffers of other shapes; nothing was changed.
        """
        missing = [f"{s:g}" for s in self.plans if s != 1 and repr(s) not in state]
        for size in map(repr, self.plans):
            there = {} if size == "1.0" else dict(self.at(float(size)).named_buffers())
            given = state.get(size, {})
            if any(given[n].shape != there[n].shape for n in given.keys() & there.keys()):
                missing.append(f"{float(size):g}")
        if missing:
            raise InputError(
                f"the state is of an Elastic without these sizes {', '.join(missing)}, or with others of that name\n"
                "  fix: make this one of the same model with the same sizes, or depgraph.save and depgraph.load it"
            )
        with torch.no_grad():
            for size, buffers in state.items():
                if float(size) in self.plans:
                    there = dict(self.at(float(size)).named_buffers())
                    for name in buffers.keys() & there.keys():
                        there[name].copy_(buffers[name])

    # ----------------------------------------------------------------------------------------------- measuring

    def latencies(self, inputs: Any = None) -> dict[float, float]:
        """Size -> median seconds of one forward pass on this machine, in eval mode; measured once for inputs of one shape.

        Args:
            inputs: as `example_inputs`, which is what they are by default.
        """
        inputs = self._inputs if inputs is None else inputs
        key = tuple(tuple(t.shape) for t in tensor_leaves(each_example(inputs)))
        if key not in self._tables:
            models = [self.at(size) for size in self.sizes]
            self._tables[key] = dict(zip(self.sizes, latencies(models, inputs), strict=True))
        return dict(self._tables[key])

    def serve(self, inputs: Any = None, *, max_latency: float | str) -> Served:
        """Switch to the largest size that is fast enough.

        Args:
            inputs: what is served looks like these; by default like the example inputs.
            max_latency: of one forward pass: "12ms", or a share of the whole's.

        Returns:
            the size, its sub-model, and the table that it was chosen from.

        Raises:
            InputError: no size is fast enough for these inputs; the table is in the message.
        """
        kind = budget_kind("max_latency")
        limit = kind.amount(max_latency, float("inf"))
        table = self.latencies(inputs)
        limit = kind.amount(max_latency, table[1.0]) if limit == float("inf") else limit
        fits = [size for size, seconds in table.items() if seconds <= limit]
        if not fits:
            rows = ", ".join(f"{size:g}: {kind.show(seconds)}" for size, seconds in table.items())
            raise InputError(f"no size takes at most {kind.show(limit)} on these inputs: {rows}")
        self.switch(max(fits))
        return Served(max(fits), self.at(max(fits)), table)

    def cascade(
        self, threshold: float | str = "auto", *, calibration: Iterable[Any] | None = None, drop: float = 0.005,
        confidence: float = 0.95,
    ) -> Cascade:  # fmt: skip
        """A classifier that runs a small size, and a larger one for the rows that it is not sure of.

        Args:
            threshold: a row for which the largest probability is below this goes on; "auto": found on the first half of
                `calibration`, with the sizes that are used.
            calibration: batches of (inputs, classes); of inputs alone, where the whole model's answer counts as right. Needed for
                "auto"; what the cascade costs and loses is measured on the second half.
            drop: how much accuracy "auto" may lose, 0.005 for half a point: its estimate and standard error together stay below it.
            confidence: of the bound on that loss.

        Raises:
            InputError: no calibration data; the model's output is no row of class scores for each input.
        """
        return fitted(self, threshold, calibration, drop, confidence)

    @cached_property
    def report(self) -> Sweep:
        """A row for each size: parameters, MACs and bytes. Prints as a table."""
        return self.measured(latency=False)

    def measured(self, score: Score | None = None, *, latency: bool = True) -> Sweep:
        """A row for each size; `Sweep.plot` and `pictures.trade_off` draw them, also beside separately pruned models.

        Args:
            score: ``score(model)`` -> a number, higher is better, called with each size in eval mode.
            latency: measure seconds of a forward pass on the example inputs, too.
        """
        flag("latency", latency)
        if score is not None:
            function("score", score, "model")
        seconds = self.latencies() if latency else {}
        rows = []
        for size in self.sizes:
            part, taken = self.at(size), seconds.get(size)
            rows.append(
                Row(
                    "dense" if size == 1 else "size", size,
                    costs.parameter_count(part), costs.count_macs(part, self._inputs), costs.byte_count(part), taken,
                    None if score is None else score_of(score, part), speedup=None if taken is None else seconds[1.0] / taken,
                )
            )  # fmt: skip
        return Sweep(rows[0], rows[1:], title="sizes")


def _with_target(inputs: Any, loss_fn: Any) -> tuple[Any, Loss]:
    """The inputs of the model, and the loss of its output alone."""
    try:
        function("loss_fn", loss_fn, "output")
    except InputError:
        function("loss_fn", loss_fn, "output", "target")
        if not isinstance(inputs, (tuple, list)) or len(inputs) != 2:
            raise InputError(
                "loss_fn takes a target: inputs must be a pair (inputs, target)\n  fix: a pair, or a loss_fn of the output alone"
            ) from None
        given, target = inputs
        return given, lambda output, _: loss_fn(output, target)
    return inputs, lambda output, _: loss_fn(output)
