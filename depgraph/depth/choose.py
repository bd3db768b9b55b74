"""Which branches go: the cheapest first, ranked again after each, or the cheapest run of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..base.errors import InputError, NothingToPruneError, listed
from ..base.weights import Weights
from ..config.origin import built_from, outermost
from ..data.calibration import Calibration
from ..plan.plan import Plan
from ..surgery.remove import CONTAINERS
from .branches import Branch, Residual
from .rank import Ranking, Unit
from .removing import is_in, numbered, usable
from .request import Depth

LOOKED = 8  # units whose loss is looked at anew together


class Candidates:
    """The branches of a model that may go, and the order in which they do.

    Attributes:
        residual: the model, and where its branches are.
        branches: those that may go.
        total: how many branches the model has in all.
        fixed: those that go in any case.
        needs: how much of what is to go in all, where budgets count it: of "parameters", of "macs". Branches are then ordered by
            score for what they save of it.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, depth: Depth, calibration: Calibration | None, *,
        ignored: set[str], whole: bool, within: Plan | None = None, around: Plan | None = None, weights: Weights | None = None,
    ) -> None:  # fmt: skip
        """Find them.

        Args:
            model: it is not touched.
            example_inputs: as for `prune`.
            depth: what ranks them.
            calibration: what they are ranked on; None: the example inputs.
            ignored: tensors that stay.
            whole: only children of containers go, as a whole: what a config can express.
            within: the plan of a larger model: the branches that it removes go before all others.
            around: the plan of a smaller model: only branches that it removes go.
            weights: where tensors on the meta device have their values.

        Raises:
            InputError: `depth.keep` is above what there is, or above what `within` leaves; its criterion needs data that is
                missing; `within` removes what is no branch, or is to stay.
            NothingToPruneError: there is no branch, or none that may go.
        """
        if depth.by in ("taylor", "loss") and calibration is None:
            raise InputError(
                f"Depth(by={depth.by!r}) looks at a loss on data: give calibration= (batches of inputs and targets) and loss=, "
                "or rank by 'influence' or 'magnitude'"
            )
        self.residual, self.depth = Residual(model, example_inputs, weights), depth
        found = usable(self.residual, example_inputs)
        self.total = len(found)
        if not found:
            why = list(self.residual.refused) or [
                "no addition has a side that is computed from the other side"
            ]
            raise NothingToPruneError(
                listed("no branch of this model can go:", why)
                + "\n  fix: prune widths instead (leave depth away), or give example inputs that run the branches"
            )
        if depth.keep is not None and depth.keep > self.total:
            raise InputError(
                f"Depth(keep={depth.keep}) is more than the {self.total} branches that this model has: depgraph.branches lists them"
            )
        free = [b for b in found if not ignored & set(b.weights) and (around is None or _removes(around, b))]
        self.units = self._units(free, whole)
        self.branches = [b for u in self.units for b in u]
        fixed = [] if within is None else [u for u in self.units if any(_removes(within, b) for b in u)]
        self.fixed = self.gone([b for u in fixed for b in u])
        self._check_fixed(within)
        if not self.units and around is None:
            raise NothingToPruneError(
                f"none of the {self.total} branches may go: "
                + (
                    "no child of a Sequential or ModuleList goes as a whole"
                    if whole
                    else "ignore holds all of them"
                )
            )
        examples = getattr(example_inputs, "examples", (example_inputs,))
        data = calibration or Calibration(list(examples), example_inputs, progress=False)
        self.ranking = Ranking(self.residual, depth.by, data)
        self._order, self._first = fixed, len(fixed)
        self._seen: dict[Unit, float] = {}  # the last score of each
        self._runs: dict[int, list[Branch]] = {}  # the cheapest neighbours, by how many
        self.needs: dict[str, float] = {}
        self._sizes = {n: p.numel() for n, p in model.named_parameters()}
        terms = self.residual.term_of.items()
        self._inner = {  # of a branch, those that are a part of it
            b.name: {n for n, term in terms if n != b.name and term in f.inner}
            for b, f in zip(self.residual.branches, self.residual.found, strict=True)
        }

    def first(self, count: int) -> list[Branch]:
        """At least `count` branches that go first, in the order of execution; for 0 those that go in any case.

        Raises:
            InputError: not so many can go.
        """
        if self.depth.contiguous and count > len(self.fixed):
            if count not in self._runs:
                self._runs[count] = self._neighbours(count)
            chosen = self._runs[count]
        else:
            chosen = self._one_by_one(count)
        return [b for b in self.residual.branches if b in chosen]

    def _one_by_one(self, count: int) -> list[Branch]:
        chosen = [b for u in self._order[: self._first] for b in u]
        for unit in self._order[self._first :]:
            if len(self.gone(chosen)) >= count:
                return chosen
            chosen += unit
        while len(gone := self.gone(chosen)) < count:
            left = [u for u in self.units if not set(u) <= set(gone)]
            left = [u for u in left if not self.cuts_off([*chosen, *u])]
            if not left:
                raise self._too_few(gone)
            unit = self._cheapest(chosen, left)
            self._order.append(unit)
            chosen += unit
        return chosen

    def _cheapest(self, chosen: Sequence[Branch], left: Sequence[Unit]) -> Unit:
        """The unit with the least score for what it saves, where the branches `chosen` are gone.

        A loss without each of them takes a run of each, so they are looked at in the order of what was last seen of each, `LOOKED`
        together, until the cheapest is cheaper than all others were: mostly, removals make what is left dearer (Minoux, "Accelerated
        greedy algorithms", 1978).
        """
        savings = dict(zip(left, self._savings(chosen, left), strict=True))

        def value(unit: Unit) -> float:
            return _value(self._seen[unit], savings[unit])

        looked = LOOKED if self.depth.by == "loss" and self._seen.keys() >= set(left) else len(left)
        ahead = sorted(left, key=value) if looked < len(left) else list(left)
        fresh: list[Unit] = []
        while ahead and not (fresh and value(min(fresh, key=value)) <= value(ahead[0])):
            some, ahead = ahead[:looked], ahead[looked:]
            self._seen.update(zip(some, self.ranking.scores(chosen, some), strict=True))
            fresh += some
        return min(fresh, key=value)

    def _savings(self, chosen: Sequence[Branch], left: Sequence[Unit]) -> list[float]:
        """What each unit saves beside `chosen`, as a share of what is still to go; 1 where no budget counts it.

        More than is still to go is worth no more: so the last unit is the cheapest that is enough.
        """
        if not self.needs or self.depth.by == "magnitude":  # a mean is for each weight already
            return [1.0] * len(left)
        before = self.saved(chosen)
        rest = {what: need - before[what] for what, need in self.needs.items()}
        rest = {what: need for what, need in rest.items() if need > 0} or self.needs
        found = []
        for unit in left:
            after = self.saved([*chosen, *unit])
            found.append(sum(min(1.0, (after[what] - before[what]) / need) for what, need in rest.items()))
        return found

    def saved(self, chosen: Sequence[Branch]) -> dict[str, float]:
        """What goes with the branches `chosen`, everything counted once: "parameters" and "macs"."""
        inside = {n for b in chosen for n in self._inner[b.name]}
        weights = {n for b in chosen for n in b.weights}
        return {
            "parameters": sum(self._sizes[n] for n in weights),
            "macs": sum(b.macs for b in dict.fromkeys(chosen) if b.name not in inside),
        }

    def _neighbours(self, count: int) -> list[Branch]:
        runs: list[Unit] = []
        for i in range(len(self.units)):
            run: list[Branch] = []
            for unit in self.units[i:]:
                run += unit
                if len(gone := self.gone(run)) >= count and set(self.fixed) <= set(gone):
                    runs.append(tuple(run))
                    break
        runs = [r for r in runs if not self.cuts_off(r)]
        if not runs:
            raise self._too_few(self.branches)
        scores = self.ranking.scores((), runs)
        return list(runs[min(range(len(runs)), key=scores.__getitem__)])

    def gone(self, chosen: Sequence[Branch]) -> list[Branch]:
        """`chosen` and the branches inside of them."""
        inner = [f for f, b in zip(self.residual.found, self.residual.branches, strict=True) if b in chosen]
        return [
            b for b in self.residual.branches
            if b in chosen or any(self.residual.term_of[b.name] in f.inner for f in inner)
        ]  # fmt: skip

    def cuts_off(self, chosen: Sequence[Branch]) -> bool:
        """Whether some output no longer depends on any input where the branches `chosen` are zero."""
        terms = {self.residual.term_of[b.name] for b in chosen}
        return len(self.residual.reached(terms)) < len(self.residual.reached(set()))

    def _check_fixed(self, within: Plan | None) -> None:
        """Refuse a larger plan that removes what can't go here."""
        dropped = (
            []
            if within is None
            else [n for n, _ in self.residual.model.named_parameters() if within.drops(n)]
        )
        mine = {n for b in self.fixed for n in b.weights}
        whole = [r.path for r in self.residual.children(self.fixed)]
        if strange := [n for n in dropped if n not in mine and not any(is_in(n, path) for path in whole)]:
            raise InputError(
                listed("within removes what is no branch here, or is to stay:", strange)
                + "\n  fix: give the plan of a larger model that was made of this one, and the same options"
            )
        if self.depth.keep is not None and self.total - self.depth.keep < len(self.fixed):
            raise InputError(
                f"Depth(keep={self.depth.keep}) is more than the {self.total - len(self.fixed)} branches that within leaves"
            )

    def _too_few(self, gone: Sequence[Branch]) -> InputError:
        return InputError(
            f"only {len(gone)} of the {self.total} branches can go: what is left are ignored ones, and those without which an "
            f"output would not depend on the input\n  fix: Depth(keep={self.total - len(gone)}), or more"
        )

    def _units(self, free: list[Branch], whole: bool) -> list[Unit]:
        """What goes together: a branch, or a child of a container with all of its branches."""
        children: dict[str, list[Branch]] = {}
        for b in self.residual.branches:
            children.setdefault(self._child(b.output), []).append(b)
        units: dict[Unit, None] = {}
        for b in free:
            path = self._child(b.output)
            together = tuple(children[path])
            if not whole and not self._kept_by_number(b):
                units[b,] = None
            elif (
                path
                and set(together) <= set(free)
                and [r.path for r in self.residual.children(together)] == [path]
            ):
                units[together] = None
        return list(units)

    def _child(self, path: str) -> str:
        """The innermost child of a container that module `path` is in; "" where there is none."""
        steps = path.split(".")
        for i in range(len(steps), 0, -1):
            if isinstance(self.residual.modules.get(".".join(steps[: i - 1])), CONTAINERS):
                return ".".join(steps[:i])
        return ""

    def _kept_by_number(self, branch: Branch) -> bool:
        """Whether something else is kept by the number of the branch's child, in a list whose entries differ.

        What a layer keeps under its number (a cache) then depends on which layer it is, so the rest can't move up alone.
        """
        path = self._child(branch.output)
        container = self.residual.modules.get(path.rpartition(".")[0]) if path else None
        if not isinstance(container, CONTAINERS):
            return False
        owners = {".".join(filter(None, (path, inner))) for inner, _ in numbered(container) if inner}
        if not any(is_in(owner, r.path) for owner in owners for r in branch.removals):
            return False
        held = [
            v
            for _, m in outermost(self.residual.model)
            for one in built_from(m).values()
            for v in vars(one).values()
        ]
        lists = [v for v in held if isinstance(v, (list, tuple)) and len(v) == len(container)]
        return any(len({repr(e) for e in v}) > 1 for v in lists)


def _value(score: float, saving: float) -> float:
    """The score for what is saved; where going is a gain (a loss that falls), a gain with more that goes is worth more."""
    if score <= 0:
        return score * saving
    return score / saving if saving > 0 else float("inf")


def _removes(plan: Plan, branch: Branch) -> bool:
    return all(map(plan.drops, branch.weights))
