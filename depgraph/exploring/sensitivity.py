"""How much of the score each group alone is worth: which layers can be cut deep, and which hardly at all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from ..base.checks import flag, fraction, function, several
from ..base.errors import InputError, NothingToPruneError
from ..base.progress import track
from ..base.running import Score, score_of
from ..base.tables import printed, table
from ..data.calibration import Calibration, Loss
from ..grouping.build import build_plan, flipped
from ..grouping.graph import DependencyGraph
from ..importance import AUTO, Importance, normalisation, ruled, scores_of
from ..plan.plan import Masks
from ..prune import Constraint, analyze, as_module
from ..select import Request, Selection, choose, nothing_text
from ..select.blocks import Block
from ..surgery.apply import apply
from ..verify.verify import verify as verify_values
from . import pictures
from .records import Records, name_of

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
Cell = tuple[str, float]  # group, ratio


@dataclass
class Sensitivity:
    """What `sensitivity` measured; prints as a table.

    Attributes:
        dense: score of the model as it was given.
        groups: a name for each group, or for groups that can only be cut together.
        tensors: for each, the name of a tensor that produces its units.
        ratios: what was tried of each.
        scores: [groups, ratios] with that one group cut; NaN where that failed.
        errors: (group, ratio) -> why it failed.
    """

    dense: float
    groups: list[str]
    tensors: list[str]
    ratios: tuple[float, ...]
    scores: npt.NDArray[np.float64]
    errors: dict[Cell, str] = field(default_factory=dict)

    def losses(self) -> npt.NDArray[np.float64]:
        """[groups, ratios]: how much lower than that of the dense model the score is; NaN where it failed."""
        return self.dense - self.scores

    def suggest(self, drop: float) -> dict[str, float]:
        """For each group the largest ratio up to which it costs at most `drop` by itself; 0 for one that costs more.

        Pass them on: ``prune(model, x, pruning_ratio=found.suggest(0.01))``. The losses of groups that are cut together
        add up, and more: tolerate less here than for the whole, and look at the score of what comes out.

        Args:
            drop: in units of the score.

        Raises:
            InputError: `drop` is below 0.
        """
        if not drop >= 0:
            raise InputError(f"drop must be 0 or more, in units of the score, not {drop!r}")
        fine = np.nan_to_num(self.losses(), nan=np.inf) <= drop
        steps = np.cumprod(fine, axis=1).sum(1)
        ratios = (0.0, *self.ratios)
        found: dict[str, float] = {}
        for name, n in zip(self.tensors, steps, strict=True):
            found[name] = min(ratios[n], found.get(name, 1.0))
        return found

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain data; None where a score is missing."""
        rows = [[float(s) if np.isfinite(s) else None for s in row] for row in self.scores]
        return {
            "dense": self.dense,
            "ratios": list(self.ratios),
            "groups": [{"name": n, "scores": s} for n, s in zip(self.groups, rows, strict=True)],
            "errors": [{"name": g, "ratio": r, "error": e} for (g, r), e in self.errors.items()],
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the losses: lines for a few groups, a heat map for many; see `pictures.sensitivity`. `path` is where to write it."""
        return pictures.sensitivity(self, path)

    def __str__(self) -> str:
        cells = table(f"one group cut (dense: {self.dense:.4g})", "group", *(f"{r:g}" for r in self.ratios))
        for name, row in zip(self.groups, self.scores, strict=True):
            cells.add_row(name, *(f"{s:.4g}" if np.isfinite(s) else "failed" for s in row))
        return printed(
            cells, *(f"{name} at {ratio:g}: {error}" for (name, ratio), error in self.errors.items())
        )


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    score: Score,
    ratios: Sequence[float] = RATIOS,
    *,
    groups: Sequence[str] | None = None,
    importance: str | Importance = AUTO,
    ignore: Sequence[str] = (),
    constraints: Constraint | Sequence[Constraint] = (),
    granularity: str | None = None,
    round_to: int | str = 1,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    verify: bool = True,
    file: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Score `model` with one group cut at a time, to each of `ratios`.

    Groups that can only be cut together (tied counts, parts of one dim) count as one. The model is traced once, and only
    the first plan of each group is verified: the others remove more or fewer units of the same.

    Args:
        model: any module; it stays as it is, also after an exception or Ctrl-C.
        example_inputs: as for `prune`.
        score: ``score(model)`` -> a number, higher is better, called with each smaller model in eval mode.
        ratios: shares of a group's units to remove.
        groups: names of groups, of tensors or modules that produce them, or globs of these; None: all.
        importance: as for `prune`, like the next six.
        ignore: modules, parameters or globs to leave alone.
        constraints: functions of the graph that state what else must hold.
        granularity: whether whole heads go, or widths in them.
        round_to: every parameter dim that shrinks keeps a multiple of this, or "auto"; here 1, so that each ratio is what it says.
        calibration: batches for criteria that look at data.
        loss: for criteria that look at gradients.
        verify: compare the first result of each group with the masked original.
        file: keep each score there, as for `sweep`: what it has is not computed again, but for what failed.
        progress: a bar; None: on a terminal alone.

    Raises:
        InputError: bad arguments, or `file` has rows of another run.
        NothingToPruneError: everything is frozen; the message says by what.
        DepgraphError: what `analyze` raises.
    """
    ratios = _checked(ratios)
    function("score", score, "model")
    flag("verify", verify)
    Request(round_to=round_to)  # checks it
    model = as_module(model)
    graph = analyze(model, example_inputs, ignore=ignore, constraints=constraints, granularity=granularity)
    if not graph.groups:
        raise NothingToPruneError(nothing_text(graph))
    data = None if calibration is None else Calibration(calibration, example_inputs, loss, progress)
    arguments: dict[str, Any] = {
        "importance": importance,
        "ignore": ignore,
        "round_to": round_to,
        "loss": loss,
    }
    further = {"constraints": constraints, "granularity": granularity}
    subject = {
        "kind": "sensitivity",
        "model": model,
        "example_inputs": example_inputs,
        "score": name_of(score),
        "calibration": calibration,
        "arguments": arguments | {name: value for name, value in further.items() if value},
    }
    records = Records(file, subject)
    known: dict[Cell, float] = {
        (r["group"], r["ratio"]): r["score"] for r in records.rows if r["error"] is None
    }
    if ("dense", 0) not in known:
        known["dense", 0] = score_of(score, model)
        records.add({"group": "dense", "ratio": 0, "score": known["dense", 0], "error": None})

    importance = ruled(importance, calibration is not None)
    units = scores_of(graph, importance, calibration=data)
    how: dict[str, Any] = {"round_to": round_to, "normalise": normalisation(importance)}
    blocks = _blocks(Selection(graph, units, **how), groups)
    chosen = {r: choose(graph, units, pruning_ratio=r, **how) for r in ratios}
    errors = _fill(graph, blocks, chosen, score, example_inputs if verify else None, known, records, progress)
    found = np.array([[known.get((b, r), np.nan) for r in ratios] for b in blocks], dtype=np.float64)
    scores = found.reshape(len(blocks), len(ratios))
    return Sensitivity(known["dense", 0], list(blocks), _one_tensor_of_each(blocks), ratios, scores, errors)


def _fill(
    graph: DependencyGraph, blocks: dict[str, Block], chosen: dict[float, Masks], score: Score, example_inputs: Any,
    known: dict[Cell, float], records: Records, progress: bool | None,
) -> dict[Cell, str]:  # fmt: skip
    """Score what `known` lacks, and add it there and to `records`; why a cell has no score.

    The first plan of each block is verified, where example inputs are given.
    """
    errors: dict[Cell, str] = {}
    unchecked = set() if example_inputs is None else set(blocks)
    for name, ratio in track([(b, r) for b in blocks for r in chosen], "sensitivity", progress):
        if (name, ratio) in known:
            continue
        masks = {g: chosen[ratio][g] for g in blocks[name].names if g in chosen[ratio]}
        value, error = known["dense", 0] if not masks else None, None
        if masks:
            value, error = _score_of_one(graph, masks, score, example_inputs if name in unchecked else None)
            if error is None:
                unchecked.discard(name)
        records.add({"group": name, "ratio": ratio, "score": value, "error": error})
        if value is not None:
            known[name, ratio] = value
        if error is not None:
            errors[name, ratio] = error
    return errors


def _score_of_one(
    graph: DependencyGraph, masks: Masks, score: Score, example_inputs: Any
) -> tuple[float | None, str | None]:
    """The score of the model that `masks` leave, or why there is none; verified where example inputs are given."""
    try:
        if changed := flipped(graph, masks):
            return None, f"a comparison of sizes in forward would have changed ({changed[0][1]})"
        plan = build_plan(graph, masks)
        small = apply(graph.model, plan)
        if example_inputs is not None:
            verify_values(graph.model, small, plan, example_inputs)
        return score_of(score, small), None
    except Exception as error:  # noqa: BLE001  whatever the user's function raises for this model
        return None, f"{type(error).__name__}: {error}"


def _checked(ratios: Sequence[float]) -> tuple[float, ...]:
    found = {fraction("ratios", r) for r in several("ratios", ratios, (int, float), "shares between 0 and 1")}
    if not found:
        raise InputError("no ratios given: give the shares to remove of each group")
    return tuple(sorted(found))


def _makers(block: Block) -> list[str]:
    """The tensors that produce the units of a block."""
    return [m.name for g in block.groups for m in g.members if m.role == "produces"]


def _one_tensor_of_each(blocks: dict[str, Block]) -> list[str]:
    """For each block a tensor that produces units of it, and of no other block where there is such a one."""
    makers = {name: _makers(block) for name, block in blocks.items()}
    blocks_of = Counter(name for names in makers.values() for name in set(names))
    found = []
    for name, block in blocks.items():
        alone = [n for n in makers[name] if blocks_of[n] == 1]
        found.append((alone or makers[name] or [block.groups[0].members[0].name])[0])
    return found


def _blocks(selection: Selection, wanted: Sequence[str] | None) -> dict[str, Block]:
    """Name -> what must be cut together, in the order of the model, for those that `wanted` names."""
    found = {block.names[0]: block for block in selection.blocks}
    if wanted is None:
        return found
    names = {
        name: {*block.names, *_makers(block), *(t.rpartition(".")[0] for t in _makers(block))}
        for name, block in found.items()
    }
    patterns = several("groups", [wanted] if isinstance(wanted, str) else wanted, str, "names")
    idle = [p for p in patterns if not any(_means(p, n) for ns in names.values() for n in ns)]
    if idle:
        some = ", ".join(list(found)[:8])
        raise InputError(
            f"groups matches nothing that can be cut: {', '.join(map(repr, idle))}; there are {some}"
        )
    return {b: v for b, v in found.items() if any(_means(p, n) for n in names[b] for p in patterns)}


def _means(pattern: str, name: str) -> bool:
    """Whether `pattern` is `name`, which may have brackets in it, or a glob of it."""
    return pattern == name or fnmatchcase(name, pattern)
