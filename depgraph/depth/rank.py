"""What each branch is worth, in a model from which others have gone already: removals interact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch
from torch import nn

from ..axes.nodes import base_name
from ..base.running import CallMode, WriteGuardMode, tensors_in
from ..base.switches import eagerly, same_random_state, without_cudnn
from ..data.calibration import Batch, Calibration
from ..surgery.remove import StandIn
from ..tracing.caches import nothing_kept
from ..tracing.tensors import all_tensors, skeleton
from .branches import Branch

Tensor = torch.Tensor
Unit = tuple[Branch, ...]  # what goes together, in the order of execution


class Ranking:
    """Scores of branches, by runs of a copy of the model that shares its parameters."""

    def __init__(self, model: nn.Module, by: str, calibration: Calibration) -> None:
        """`by`: one of `request.CRITERIA`."""
        self.model, self.by, self.calibration = model, by, calibration
        self.shared = [p.detach() for p in model.parameters()]
        stand_in = {
            id(p): nn.Parameter(t, requires_grad=False)
            for p, t in zip(model.parameters(), self.shared, strict=True)
        }
        others = {id(t): t.detach().clone() for t in all_tensors(model).values() if id(t) not in stand_in}
        self.twin = skeleton(model, {**others, **stand_in}).eval()

    def scores(self, removed: Sequence[Branch], units: Sequence[Unit]) -> list[float]:
        """One score for each of `units`, where the branches in `removed` are gone: the lowest goes first."""
        if self.by == "magnitude":
            return [self._magnitude(u) for u in units]
        if self.by == "loss":
            return [self._loss([*removed, *u]) for u in units]
        names = {b.output: b for u in units for b in u}
        watch = (
            _Influence(names, units) if self.by == "influence" else _Taylor(names, units, self.calibration)
        )
        with self._without(removed):
            for batch in self._batches(watch.grad):
                watch.run(self.twin, batch)
        return watch.scores()

    def _magnitude(self, unit: Unit) -> float:
        parameters = dict(self.model.named_parameters())
        matrices = [
            n for b in unit for n in b.weights if parameters[n].dim() > 1
        ]  # a norm's scale says nothing of its branch
        found = [parameters[n].detach() for n in matrices or [n for b in unit for n in b.weights]]
        return float(sum(p.abs().double().sum() for p in found) / max(1, sum(p.numel() for p in found)))

    def _loss(self, removed: Sequence[Branch]) -> float:
        total, count = 0.0, 0
        with self._without(removed):
            for batch in self._batches(False):
                total += float(self.calibration.loss_of(batch.run(self.twin), batch))
                count += 1
        return total / max(1, count)

    def _batches(self, grad: bool) -> Iterator[Batch]:
        with ExitStack() as stack:
            for mode in (same_random_state(), torch.inference_mode(False), torch.set_grad_enabled(grad), eagerly(),
                         without_cudnn(), nothing_kept(self.model), WriteGuardMode(self.shared)):  # fmt: skip
                stack.enter_context(mode)
            yield from stack.enter_context(closing(self.calibration.batches("ranking branches")))

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
                owner._modules[child] = StandIn(module, removal.leaves == "zeros", removal.returns)
            yield
        finally:
            for owner, child, module in reversed(before):
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
            returns = next(r.returns for r in branch.removals if r.leaves == "zeros")

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
