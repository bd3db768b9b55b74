"""What a pruning did, as data first and as text second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from .axes import axes
from .axes.axes import Reason
from .base.tables import printed, table
from .config.origin import config_mismatches
from .costs import cost
from .grouping.graph import DependencyGraph, Frozen
from .grouping.outline import kept_units, outline
from .grouping.unread import Key, unread_values
from .plan.plan import Plan
from .recover.result import Recovery
from .select import Selection
from .select.aligned import STEP, aligned
from .select.repeated import ties
from .verify.verify import Verification

if TYPE_CHECKING:
    from rich.table import Table


def reachable(graph: DependencyGraph) -> dict[str, float]:
    """The fraction of parameters and of MACs that can shrink: those with a free axis in some dim."""
    parameters = {n for n, _ in graph.model.named_parameters()}
    total = sum(graph.tensors[n].numel() for n in parameters)
    free = sum(
        graph.tensors[n].numel()
        for n in parameters
        if any(
            graph.reason(a) is None for axis in graph.dims(n) if axis is not None for a in axes.atoms(axis)
        )
    )
    work = free_work = 0
    for _, factors in graph.state.work:
        own = [f for f in factors if isinstance(f, axes.Axis)]
        n = prod(f.size for f in own) * prod(f for f in factors if isinstance(f, int))
        work += n
        free_work += n if any(graph.reason(a) is None for f in own for a in axes.atoms(f)) else 0
    return {"params": free / total if total else 0.0, "macs": free_work / work if work else 0.0}


@dataclass(frozen=True)
class Layer:
    """What a module with parameters of its own lost.

    Attributes:
        module: its path; "" for the model itself.
        params: entries of its own parameters before and after; a tied one counts where it comes first.
        width: how many units it puts out before and after: the size of the dim that its largest parameter produces.
        largest: the name of that parameter.
    """

    module: str
    params: tuple[int, int]
    width: tuple[int, int]
    largest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data; `sparsity` is the share that was removed."""

        def figures(counts: tuple[int, int]) -> dict[str, Any]:
            before, after = counts
            return {"before": before, "after": after, "sparsity": 1 - after / before if before else 0.0}

        return {"module": self.module, "params": figures(self.params), "units": figures(self.width)}


@dataclass(repr=False)
class Report:
    """Before and after of one pruning; prints as tables.

    Plain data, all of it computed by `of`: a report keeps no model alive, and what becomes of the models does not change it.

    Attributes:
        plan: what was removed.
        verification: what was proved.
        parameters, byte_counts: before and after.
        macs: multiply-accumulates of one forward pass before and after, by torch's FLOP counter.
        widths: (parameter, shape before, shape after) of those that shrank.
        layers: every module with parameters of its own, in the order of the model.
        outline: modules, tensors and groups of the original (see `grouping/outline.py`).
        reachable: the fraction of the parameters ("params") and of the MACs ("macs") that can shrink.
        locks: (reason, parameters that can't shrink in any dim because of it), largest first.
        locked: (group, reason) of the groups that no plan can cut because a constraint can't be met otherwise.
        frozen: the dims of parameters that can't shrink, or can in part, and why.
        unreached: parameters and buffers that no run used.
        followed: path of a module that no run called -> the executed sibling that it is cut like.
        unknown_ops: op without a rule -> how often it was called.
        config_mismatches: parameters that the class, called with the fields the model was built from, makes otherwise.
        remarks: sentences about parameters that no run used, and about the object the model was built from.
        notes: sentences about what was decided on the way (axes frozen after a failed check ...).
        latency: seconds before and after, where it was measured.
        latency_spread: how far their ratio may be off, as a share of it: about one time in twenty it is off by more.
        score: before and after, where a function for it was given.
        recovery: what was recovered from calibration data, where requested; ``print`` it for each layer.
        removed: names of the branches that went, where depth was asked for.
        channels: how many sizes that channels of convolutions have shrank, and how many of these are multiples of 4: exported
            models run faster so (see `select/aligned.py`).
    """

    plan: Plan
    verification: Verification
    parameters: tuple[int, int]
    byte_counts: tuple[int, int]
    macs: tuple[int, int]
    widths: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    layers: list[Layer]
    outline: dict[str, Any]
    reachable: dict[str, float]
    locks: list[tuple[Reason, int]]
    locked: list[tuple[str, str]]
    frozen: list[Frozen]
    unreached: list[str]
    followed: dict[str, str]
    unknown_ops: dict[str, int]
    config_mismatches: list[str]
    remarks: list[str]
    notes: list[str] = field(default_factory=list)
    latency: tuple[float, float] | None = None
    latency_spread: float | None = None
    score: tuple[float, float] | None = None
    recovery: Recovery | None = None
    removed: list[str] = field(default_factory=list)
    channels: tuple[int, int] = (0, 0)

    @classmethod
    def of(
        cls, graph: DependencyGraph, plan: Plan, small: nn.Module, verification: Verification, example_inputs: Any,
        **measured: Any,
    ) -> Report:  # fmt: skip
        """The report on `small`, which `plan` made of the model of `graph`.

        Args:
            graph: the dependency graph of the original.
            plan: what was removed.
            small: the smaller model.
            verification: what was proved.
            example_inputs: those that the forward pass is counted on.
            **measured: notes, latency, score, recovery and removed, as above.
        """
        models = graph.model, small
        names = {n for n, _ in graph.model.named_parameters()}
        mismatches = config_mismatches(small, graph.origins)
        before, after = (cost.macs_of(m, example_inputs, cheap=not graph.trace.fake) for m in models)
        return cls(
            plan=plan,
            verification=verification,
            parameters=(cost.parameter_count(graph.model), cost.parameter_count(small)),
            byte_counts=(cost.byte_count(graph.model), cost.byte_count(small)),
            macs=(before, after),
            widths=[(n, c.shape, c.new_shape) for n, c in plan.cuts.items() if n in names],
            layers=_layers(graph, plan),
            outline=outline(graph, plan),
            reachable=reachable(graph),
            locks=graph.lock_summary().most_common(),
            locked=_locked(graph, plan),
            frozen=[f for f in graph.frozen if f.name in names],
            unreached=list(graph.trace.unreached),
            followed={s.path: s.executed for s in graph.followed},
            unknown_ops={op: len(nodes) for op, nodes in graph.state.unknown.items()},
            config_mismatches=mismatches,
            channels=aligned(graph, {g.axis: kept_units(g, plan) for g in graph.groups}),
            remarks=_remarks(graph, mismatches, names, _unclear(graph, plan)),
            **measured,
        )

    @property
    def ratios(self) -> dict[str, float | None]:
        """How many times smaller and faster the model became; None for what was not measured or is 0 afterwards."""
        pairs = {
            "params": self.parameters,
            "macs": self.macs,
            "bytes": self.byte_counts,
            "latency": self.latency,
        }
        return {k: p[0] / p[1] if p is not None and p[1] else None for k, p in pairs.items()}

    @property
    def rewritten(self) -> list[str]:
        """Paths of the submodules in whose code numbers were changed."""
        return list(dict.fromkeys(r.path for r in self.plan.rewrites))

    def frozen_dims(self) -> Counter[str]:
        """Reason -> number of parameter dims it freezes."""
        return Counter(f.reason.text for f in self.frozen)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain data (counts in entries, MACs and bytes; latency in seconds)."""
        return {
            "params": {"before": self.parameters[0], "after": self.parameters[1]},
            "macs": {"before": self.macs[0], "after": self.macs[1]},
            "bytes": {"before": self.byte_counts[0], "after": self.byte_counts[1]},
            "latency": None
            if self.latency is None
            else {"before": self.latency[0], "after": self.latency[1], "spread": self.latency_spread},
            "ratios": self.ratios,
            "recovery": None if self.recovery is None else self.recovery.to_dict(),
            "score": None if self.score is None else {"before": self.score[0], "after": self.score[1]},
            "reachable": self.reachable,
            "groups": len(self.outline["groups"]),
            "units": sum(units for _, units, *_ in self.outline["groups"]),
            "widths": [{"name": n, "before": list(a), "after": list(b)} for n, a, b in self.widths],
            "layers": [layer.to_dict() for layer in self.layers],
            "locks": [
                {"reason": r.text, "module": r.module, "source": r.source, "params": n} for r, n in self.locks
            ],
            "frozen": dict(self.frozen_dims().most_common()),
            "constrained": [{"name": n, "reason": r} for n, r in self.locked],
            "unreached": self.unreached,
            "followed": self.followed,
            "unknown_ops": self.unknown_ops,
            "rewritten": self.rewritten,
            "channels": {"shrunk": self.channels[0], "multiples": self.channels[1]},
            "removed": list(self.removed),
            "verification": {
                "status": self.verification.status,
                "max_error": self.verification.max_error,
                "detail": self.verification.detail,
                "restricted": list(self.verification.restricted),
                "unproved": list(self.verification.unproved),
                "unseen": list(self.verification.unseen),
            },
            "config_mismatches": self.config_mismatches,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        shrunk = self._shrunk()
        return printed(self._totals(), *([shrunk] if shrunk.row_count else []), *self._lines())

    def _totals(self) -> Table:
        totals = table("depgraph", "", "before", "after", "left", "before / after")
        ratios = {k: "-" if r is None else f"{r:.2f}x" for k, r in self.ratios.items()}
        rows = [
            ("parameters", self.parameters, ratios["params"]),
            ("MACs", self.macs, ratios["macs"]),
            ("bytes", self.byte_counts, ratios["bytes"]),
        ]
        for label, (a, b), ratio in rows:
            totals.add_row(label, f"{a:,}", f"{b:,}", f"{b / a:.1%}" if a else "-", ratio)
        if self.latency is not None:
            slow, fast = self.latency
            cells = f"{slow * 1e3:.2f}", f"{fast * 1e3:.2f}", f"{fast / slow:.1%}", ratios["latency"]
            totals.add_row("latency [ms]", *cells)
        if self.score is not None:
            good, now = self.score
            totals.add_row("score", f"{good:.4g}", f"{now:.4g}", f"{now - good:+.3g}", "")
        return totals

    def _shrunk(self) -> Table:
        widths = table("what shrank", "parameter", "before", "after", "removed")
        matrices = [w for w in self.widths if len(w[1]) > 1]
        for name, old, new in matrices[:40]:
            shapes = (" x ".join(map(str, shape)) for shape in (old, new))
            widths.add_row(name, *shapes, f"{1 - prod(new) / prod(old):.1%}" if prod(old) else "-")
        if len(matrices) > 40:
            widths.add_row(f"... and {len(matrices) - 40} more", "", "", "")
        return widths

    def _lines(self) -> Iterator[str]:
        reach, count = self.reachable, len(self.outline["groups"])
        yield (
            f"{count} group{'' if count == 1 else 's'}; {reach['params']:.1%} of the parameters and {reach['macs']:.1%} of the "
            "MACs can shrink"
        )
        if self.locks:
            yield "locked (parameters that can shrink in no dim):"
            yield from (f"  {n:>12,}  {reason}" for reason, n in self.locks[:6])
        yield from (f"  constrained: {name} {why}" for name, why in self.locked[:6])
        shrunk, multiples = self.channels
        if shrunk:
            yield (
                f"multiples of {STEP} among the widths of convolutions that shrank: {multiples} of {shrunk}"
                + (
                    ""
                    if multiples == shrunk
                    else "; the others run slower where the model is exported to (round_to)"
                )
            )
        won = self.recovery.summary() if self.recovery is not None else []
        yield from (f"note: {note}" for note in [*self.notes, *won, *self.remarks])
        if self.recovery is None and self.parameters[0] != self.parameters[1]:
            yield 'nothing was recovered: calibration=[...] does, recover="synthetic" without data'
        if self.latency_spread is not None:
            yield f"latency: measured in turns; the ratio may be off by {self.latency_spread:.1%}"
        if self.rewritten:
            yield f"numbers rewritten in the code of: {', '.join(p or '(the model)' for p in self.rewritten)}"
        v = self.verification
        proof = {"equal": f"verified: equals the masked original within {v.max_error:.1e} ({v.detail})"}
        yield proof.get(v.status, f"verification: {v.status}; {v.detail}")
        if v.unproved:
            names = ", ".join(v.unproved[:6]) + (" ..." if len(v.unproved) > 6 else "")
            yield f"not proved: {names}: what is left of them, or a part of it, moves no output in any run that was compared"
        if v.unseen:
            yield f"not compared: the tensors in {', '.join(v.unseen)}, which the model returns"
        if v.restricted:
            yield f"statistics taken over kept entries: {', '.join(v.restricted)}"


def _layers(graph: DependencyGraph, plan: Plan) -> list[Layer]:
    """Every module with parameters of its own, in the order of the model."""
    owners: dict[str, list[str]] = {}
    for name, _ in graph.model.named_parameters():
        owner = name.split("parametrizations.")[0].rpartition(".")[0]
        owners.setdefault(owner, []).append(name)
    found = []
    for owner, names in owners.items():
        shapes = {n: (plan.shapes[n], plan.new_shape(n)) for n in names}
        params = sum(prod(a) for a, _ in shapes.values()), sum(prod(b) for _, b in shapes.values())
        largest = max(names, key=lambda n: prod(shapes[n][0]))
        d = graph.output_dim(largest)
        before, after = ((s[d] if s else 1) for s in shapes[largest])
        found.append(Layer(owner, params, (before, after), largest))
    return found


def _locked(graph: DependencyGraph, plan: Plan) -> list[tuple[str, str]]:
    """(group, reason) of the groups that no plan can cut because a constraint can't be met otherwise."""
    if not graph.groups:
        return []
    further = ties(graph) if plan.request.get("uniform") else ()
    ones = {g.name: np.ones(g.units) for g in graph.groups}
    return list(Selection(graph, ones, ties=further).locked.items())


def _unclear(graph: DependencyGraph, plan: Plan) -> list[Key]:
    """The attributes that forward does not read and that repeat sizes which became different ones."""
    return unread_values(graph, plan, {g.axis: kept_units(g, plan) for g in graph.named.values()})[1]


def _remarks(
    graph: DependencyGraph, mismatches: list[str], parameters: set[str], unclear: list[Key]
) -> list[str]:
    """What became of `parameters` that no run on the example inputs used, and of the object the model was built from."""
    notes = []
    if graph.followed:
        names = ", ".join(s.path for s in graph.followed[:4])
        notes.append(
            f"no run called {names}{' ...' if len(graph.followed) > 4 else ''}: cut like their executed siblings"
        )
    if mismatches:
        names = ", ".join(mismatches[:3])
        notes.append(
            f"its config cannot express the sizes of {names}{' ...' if len(mismatches) > 3 else ''}: layers built from one field "
            "now differ, so save the model with its plan"
        )
    if unclear:
        names = ", ".join(".".join(map(str, key[1:])).lstrip(".") for key in unclear[:4])
        notes.append(
            f"{names}{' ...' if len(unclear) > 4 else ''} repeat sizes that became different ones, and stay as they are: forward "
            "does not read them, look at them before you call a method that does"
        )
    left = [n for n in graph.trace.unreached if n in parameters]
    if left:
        notes.append(
            f"no run used {', '.join(left[:4])}{' ...' if len(left) > 4 else ''}: left as they are; if other inputs "
            "use them, give those too (depgraph.Examples)"
        )
    return notes
