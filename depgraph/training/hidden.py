"""Hidden states of a model and of the one that it was pruned from, compared at the channels that were kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.errors import InputError
from ..base.running import in_mode
from ..base.switches import eagerly
from ..base.values import tensor_leaves
from ..data.calibration import Batch
from ..plan.plan import Plan
from ..verify.masked import Unfollowed
from ..verify.runs import masked_outputs


@contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What the modules `names` return meanwhile, call by call: the tensor, or the first of several.

    Compiled code would not call what is hooked on to modules, so it runs as the Python that it is made of.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, out: seen[name].extend(tensor_leaves(out)[:1])

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        with eagerly() if names else nullcontext():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


class Projection:
    """Compares hidden states with the teacher's at the channels that the plan keeps.

    Which those are follows from the masked run of the teacher on the first batch: the plan zeroes weights, and what is
    dead in a module's output are the channels that the smaller model lacks there.
    """

    def __init__(self, teacher: nn.Module, plan: Plan | None, names: Sequence[str]) -> None:
        self.teacher, self.plan, self.names = teacher, plan, names
        self.kept: dict[str, list[list[Tensor | None]]] | None = None

    def __call__(self, name: str, got: list[Tensor], wanted: list[Tensor], batch: Batch) -> Tensor:
        """The mean squared difference of the outputs of module `name`, over all its calls."""
        if len(got) != len(wanted) or not got:
            raise InputError(
                f"{name} is called {len(got)} times in the model and {len(wanted)} times in the teacher"
            )
        total = got[0].new_zeros(())
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            b = b.to(a.device)
            if a.shape != b.shape:
                b = self._project(name, i, tuple(a.shape), b, batch)
            total = total + F.mse_loss(a, b)
        return total / len(got)

    def _project(self, name: str, call: int, shape: tuple[int, ...], aim: Tensor, batch: Batch) -> Tensor:
        if self.plan is None:
            raise InputError(
                f"{name} returns {shape} in the model and {tuple(aim.shape)} in the teacher: give plan=..., which has "
                "the channels that were kept"
            )
        if self.kept is None:
            self.kept = self._look(batch)
        for dim, kept in enumerate(self.kept[name][call]):
            if kept is not None and len(shape) == aim.dim() and shape[dim] != aim.shape[dim]:
                aim = aim.index_select(dim, kept.to(aim.device))
        if tuple(aim.shape) != shape:
            raise InputError(
                f"{name} returns {shape} in the model; the plan makes {tuple(aim.shape)} of the teacher's output there: is "
                "it the plan that made this model from this teacher?"
            )
        return aim

    @torch.no_grad()
    def _look(self, batch: Batch) -> dict[str, list[list[Tensor | None]]]:
        """For each call of each module, the indices along each dim that are not dead, or None where all are alive."""
        inputs = batch.kwargs or batch.args
        try:
            with in_mode(self.teacher, False), captured(self.teacher, self.names) as seen:
                _, run = masked_outputs(self.teacher, self.plan or Plan(), inputs)
        except Unfollowed as error:
            raise InputError(
                f"hidden states can't be projected: the effect of {error} on removed channels is not known"
            ) from error
        found: dict[str, list[list[Tensor | None]]] = {name: [] for name in self.names}
        for name, outputs in seen.items():
            for output in outputs:
                mask = run.full(output) > 0
                alive = [
                    mask.any([e for e in range(mask.dim()) if e != d]) if mask.dim() > 1 else mask
                    for d in range(mask.dim())
                ]
                found[name].append([None if bool(a.all()) else a.nonzero().flatten() for a in alive])
        return found
