"""What each branch is worth, in a model from which others have gone already: removals interact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from ..axes.nodes import base_name
from ..base.errors import InputError
from ..base.running import CallMode, WriteGuardMode, tensors_in
from ..base.switches import eagerly, same_random_state, without_cudnn
from ..base.values import map_tensors
from ..base.weights import InMemory
from ..data.calibration import Batch, Calibration
from ..surgery.on_demand import Recent, standing_in
from ..surgery.remove import StandIn
from ..tracing.caches import nothing_kept
from ..tracing.tensors import all_tensors, skeleton
from .branches import Branch, Residual, prefixes

Tensor = torch.Tensor
BLOCK = 1 << 22  # entries that are read at a time
Unit = tuple[Branch, ...]  # what goes together, in the order of execution


class Ranking:
    """Scores of branches, by runs of a copy of the model that shares its parameters."""

    def __init__(self, residual: Residual, by: str, calibration: Calibration) -> None:
        """`by`: one of `request.CRITERIA`."""
        model = residual.model
        self.model, self.by, self.calibration, self.prefix = model, by, calibration, _Prefix(residual)
        self.parameters = dict(model.named_parameters())
        self.weights = residual.weights or InMemory(all_tensors(model))
        if residual.weights is not None:
            self.shared: list[Tensor] = []
            self.twin = standing_in(model, self.weights, Recent(self.weights.room)).eval()
            return
        self.shared = [p.detach() for p in model.parameters()]
        stand_in = {
            id(p): nn.Parameter(t, requires_grad=False)
            for p, t in zip(model.parameters(), self.shared, strict=True)
        }
        others = {id(t): t.detach().clone() for t in all_tensors(model).values() if id(t) not in stand_in}
        self.twin = skeleton(model, {**others, **stand_in}).eval()

    def scores(self, removed: Sequence[Branch], units: Sequence[Unit]) -> list[float]:
        """One score for each of `units`, where the branches in `removed` are gone: the lowest goes first.

        Of ``"loss"`` it is what the loss rises by, so that all criteria but ``"magnitude"``, a mean, grow with how much goes.
        """
        if self.by == "magnitude":
            return [self._magnitude(u) for u in units]
        if self.by == "loss":
            return self._losses(removed, units)
        names = {b.output: b for u in units for b in u}
        watch = (
            _Influence(names, units) if self.by == "influence" else _Taylor(names, units, self.calibration)
        )
        with self._without(removed), self._batches(watch.grad) as batches:
            for batch in batches:
                watch.run(self.twin, batch)
        return watch.scores()

    def _magnitude(self, unit: Unit) -> float:
        matrices = [
            n for b in unit for n in b.weights if self.parameters[n].dim() > 1
        ]  # a norm's scale says nothing of its branch
        found = matrices or [n for b in unit for n in b.weights]
        return sum(map(self._absolute, found)) / max(1, sum(self.parameters[n].numel() for n in found))

    def _absolute(self, name: str) -> float:
        """The sum of |w| of a tensor, which is read in blocks of rows."""
        shape = self.parameters[name].shape
        rows, columns = shape[0] if shape else 1, prod(shape[1:])
        step = max(1, BLOCK // max(1, columns))

        def summed() -> list[Any]:
            blocks = (self.weights.rows(name, i, min(i + step, rows)) for i in range(0, rows, step))
            return [torch.stack([b.abs().double().sum() for b in blocks]).sum().cpu().numpy()]

        found = self.weights.kept(f"{name} absolute", summed)
        return 0.0 if found is None else float(np.sum(found[0]))

    def _losses(self, removed: Sequence[Branch], units: Sequence[Unit]) -> list[float]:
        """What the mean loss rises by without each unit: one run for each and batch, of what comes behind it."""
        totals, whole, count = [0.0] * len(units), 0.0, 0
        with self._without(removed), self._batches(False) as batches:
            for batch in batches:
                count += 1
                copy = batch.copy()
                before, out = self.prefix.of(self.twin, copy)
                whole += float(self.calibration.loss_of(out, copy))
                for i, unit in enumerate(units):
                    with self._without(unit):
                        totals[i] += self._behind(before, unit, batch)
        return [(t - whole) / max(1, count) for t in totals]

    def _behind(self, before: dict[str, Any], unit: Unit, batch: Batch) -> float:
        def loss() -> float:
            copy = batch.copy()
            return float(self.calibration.loss_of(copy.run(self.twin), copy))

        ended = self.prefix.ended(before, unit)
        if not ended:
            return loss()
        try:
            with self.prefix.replayed(self.twin, before, ended):
                found = loss()
        except InputError:  # code that a module in front should have run
            self.prefix.use = False
            return loss()
        if not self.prefix.checked:  # what a module leaves behind beside its result is not replayed
            exact = loss()
            self.prefix.checked, self.prefix.use = True, abs(found - exact) <= 1e-6 * max(1.0, abs(exact))
            return exact
        return found

    @contextmanager
    def _batches(self, grad: bool) -> Iterator[Iterator[Batch]]:
        """The batches, and the modes that they are run in."""
        with (
            same_random_state(), torch.inference_mode(False), torch.set_grad_enabled(grad), eagerly(), without_cudnn(),
            nothing_kept(self.model), WriteGuardMode(self.shared), closing(self.calibration.batches("ranking branches")) as batches,
        ):  # fmt: skip
            yield batches

    @contextmanager
    def _without(self, removed: Sequence[Branch]) -> Iterator[None]:
        """Inside, the copy has stand-ins for the modules of the branches `removed`."""
        before: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            for removal in (r for b in removed for r in b.removals):
                parent, _, child = removal.path.rpartition(".")
                try:
                    owner = self.twin.get_submodule(parent)
                    module = owner.get_submodule(child)
                except AttributeError:  # in a branch that has gone
                    continue
                before.append((owner, child, module))
                owner._modules[child] = StandIn(module, removal.leaves, removal.returns)
            yield
        finally:
            for owner, child, module in reversed(before):
                owner._modules[child] = module


class _Replay(nn.Module):
    """Returns what another module returned."""

    def __init__(self, out: Any) -> None:
        super().__init__()
        self.out = [out]

    def forward(self, *_: Any, **__: Any) -> Any:
        """The same again, in memory of its own."""
        return map_tensors(self.out[0], torch.clone)


class _Prefix:
    """What modules return before a branch begins: the same whether it goes or not, so it is computed once.

    Attributes:
        use: whether replaying was found to be right.
        checked: whether that was looked at.
    """

    def __init__(self, residual: Residual) -> None:
        """Modules beside those on the way to a branch, and when each has ended."""
        ways = {p for b in residual.branches for r in b.removals for p in prefixes(r.path)}
        beside = {
            ".".join(filter(None, (parent, name)))
            for parent in {p.rpartition(".")[0] for p in ways}
            for name in residual.modules[parent]._modules
        }
        once = {p for p in beside if len([c for c in residual.trace.calls.get(p, ()) if not c.training]) == 1}
        self.ends = {
            p: max(residual.order[n] for n in residual.regions[p]) for p in once if p in residual.regions
        }
        found = zip(residual.branches, residual.found, strict=True)
        self.starts = {b.name: min(residual.order[n] for n in f.inner) for b, f in found}
        self.use, self.checked = True, False

    def of(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Any], Any]:
        """Run `model`; path of a module -> what it returned, and the output."""
        seen: dict[str, Any] = {}

        def hook(path: str) -> Callable[..., None]:
            return lambda module, args, out: seen.__setitem__(path, map_tensors(out, torch.clone))

        handles = []
        try:
            for path in self.ends if self.use else ():
                with suppress(AttributeError):  # in a branch that has gone
                    handles.append(model.get_submodule(path).register_forward_hook(hook(path)))
            out = batch.run(model)
        finally:
            for handle in handles:
                handle.remove()
        return seen, out

    def ended(self, before: dict[str, Any], unit: Unit) -> list[str]:
        """The outermost modules that had ended when the first branch of `unit` began."""
        start = min(self.starts[b.name] for b in unit)
        done = {p for p in before if self.ends[p] < start} if self.use else set()
        return [p for p in done if not any(q in done for q in prefixes(p)[:-1])]

    @contextmanager
    def replayed(self, model: nn.Module, before: dict[str, Any], ended: Sequence[str]) -> Iterator[None]:
        """Inside, the modules `ended` of `model` return what they did."""
        owners = [(model.get_submodule(p.rpartition(".")[0]), p.rpartition(".")[2], p) for p in ended]
        held = [owner._modules[child] for owner, child, _ in owners]
        try:
            for owner, child, path in owners:
                owner._modules[child] = _Replay(before[path])
            yield
        finally:
            for (owner, child, _), module in zip(owners, held, strict=True):
                owner._modules[child] = module


class _Watch:
    """Sums of something over the positions of the branches in `names` (by the module that puts each out)."""

    grad = False

    def __init__(self, names: dict[str, Branch], units: Sequence[Unit]) -> None:
        self.names, self.units = names, units
        self.sums = [0.0] * len(units)
        self.batches = 0

    def scores(self) -> list[float]:
        """The mean over batches, of each unit."""
        return [s / max(1, self.batches) for s in self.sums]

    @contextmanager
    def seen(self, model: nn.Module, see: Callable[[Branch, Tensor], Tensor | None]) -> Iterator[None]:
        """Inside, what each branch puts out goes to `see`, and is what that returns, if anything."""

        def hook(branch: Branch) -> Any:
            returns = next(r.returns for r in branch.removals if r.path == branch.output)

            def seen(module: nn.Module, args: Any, out: Any) -> Any:
                now = see(branch, out if returns is None else out[returns[1]])
                if now is None:
                    return None
                return (
                    now
                    if returns is None
                    else tuple(now if i == returns[1] else t for i, t in enumerate(out))
                )

            return seen

        handles = []
        try:
            for path, branch in self.names.items():
                try:
                    handles.append(model.get_submodule(path).register_forward_hook(hook(branch)))
                except AttributeError:  # in a branch that has gone
                    continue
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Taylor(_Watch):
    """|g·y| of what each branch puts out: summed over channels, then the mean over positions."""

    grad = True

    def __init__(self, names: dict[str, Branch], units: Sequence[Unit], calibration: Calibration) -> None:
        super().__init__(names, units)
        self.calibration = calibration

    def run(self, model: nn.Module, batch: Batch) -> None:
        """One batch, forward and backward."""
        outputs: dict[str, Tensor] = {}
        probes: dict[str, Tensor] = {}

        def see(branch: Branch, y: Tensor) -> Tensor:
            outputs[branch.name] = y.detach().clone()
            probes[branch.name] = torch.zeros_like(y, requires_grad=True)
            return y + probes[branch.name]

        with self.seen(model, see):
            loss = self.calibration.loss_of(batch.run(model), batch)
        found = dict(
            zip(probes, torch.autograd.grad(loss, [*probes.values()], allow_unused=True), strict=True)
        )
        self.batches += 1
        for i, unit in enumerate(self.units):
            for b in unit:
                g = found.get(b.name)
                if g is not None:
                    self.sums[i] += float((g * outputs[b.name]).sum(b.channels).abs().double().mean())


class _Influence(_Watch):
    """1 - cosine of the stream before the first branch of a unit and behind the last."""

    def run(self, model: nn.Module, batch: Batch) -> None:
        """One batch, forward."""
        lasts: dict[str, list[int]] = {}
        for i, u in enumerate(self.units):
            lasts.setdefault(u[-1].name, []).append(i)
        before: dict[str, Tensor] = {}
        wanted = {u[0].name for u in self.units}

        def joined(branch: Branch, channels: int, stream: Tensor, term: Tensor) -> None:
            if branch.name in wanted:
                before[branch.name] = stream.detach().clone()
            for i in lasts.get(branch.name, ()):
                start, end = before.get(self.units[i][0].name), stream + term
                if start is not None:
                    self.sums[i] += _turn(start, end, channels)

        mode = _Sums(joined)
        with self.seen(model, mode.tag), mode:
            batch.run(model)
        self.batches += 1


def _turn(a: Tensor, b: Tensor, channels: int) -> float:
    """1 - cosine of `a` and `b` along the dim of channels, the mean over the rest; of other shapes, of each as a whole."""
    if a.shape != b.shape:
        return 1.0
    return float(1 - torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=channels).mean())


class _Sums(CallMode):
    """Follows what branches put out to the sum that they are a term of."""

    def __init__(self, joined: Callable[[Branch, int, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.joined = joined
        self.tags: dict[int, list[tuple[Branch, torch.Size]]] = {}
        self.alive: list[Tensor] = []

    def tag(self, branch: Branch, y: Tensor) -> None:
        """`y` is what `branch` puts out."""
        self._give(y, [(branch, y.shape)])

    def _give(self, y: Tensor, tags: list[tuple[Branch, torch.Size]]) -> None:
        self.tags[id(y)] = tags
        self.alive.append(y)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors_in(args, kwargs or {})
        tags = [tag for t in given for tag in self.tags.get(id(t), ())]
        if tags and base_name(func) == "add" and len(given) == 2:
            stream = next((t for t in given if id(t) not in self.tags), None)
            if stream is not None:
                term = given[1] if given[0] is stream else given[0]
                for branch, shape in tags:
                    with torch.no_grad():
                        self.joined(branch, _channels(branch, shape, stream), stream, term)
                out = func(*args, **(kwargs or {}))
                for t in given:
                    self.tags.pop(id(t), None)
                return out
        out = func(*args, **(kwargs or {}))
        if tags and isinstance(out, Tensor):
            self._give(out, tags)
        return out


def _channels(branch: Branch, shape: torch.Size, stream: Tensor) -> int:
    """The dim of channels in the sum: where the branch was permuted on its way there, the dim of their number."""
    if shape == stream.shape:
        return branch.channels
    count = shape[branch.channels]
    return next((d for d in (1, -1) if stream.dim() > 1 and stream.shape[d] == count), -1)
