"""Gradual pruning and distillation while Lightning trains: two callbacks.

Pruning(example_inputs, every=100, steps=5, max_macs=0.5, network="net")
Distilling(teacher, network="net", temperature=2.0, alpha=0.5)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.errors import DepgraphError, InputError, PlanError
from ..base.running import in_mode
from ..training.train import check_mix, logits_of, soft_loss
from .hosted import InPlacePruner

try:
    from lightning.pytorch import Callback
except ImportError as missing:
    raise DepgraphError(
        "depgraph.integrations.lightning needs Lightning\n  fix: pip install lightning"
    ) from missing

STEP = "training_step"
OWNED = ("_trainer", "_fabric")  # what a LightningModule knows of its trainer: no part of the network


class Pruning(Callback):
    """Prunes the network of a LightningModule step by step, between steps of its optimizer.

    The optimizer continues with its state cut like the parameters; learning rate schedules and gradient scalers know the
    optimizer, and continue with it. Checkpoints hold the plan; `resume` makes a fresh network ready for one.

    Attributes:
        hosted: what prunes; ``hosted.result`` is the last step's, with plan and report from the original.
    """

    def __init__(self, example_inputs: Any, *, network: str = "", **options: Any) -> None:
        """Say when and how.

        Args:
            example_inputs: what the network takes, as for `prune`.
            network: path of the network in the LightningModule; the whole by default.
            **options: ``every``, ``start``, ``regulariser`` as for `InPlacePruner`; others as for `GradualPruner`.

        Raises:
            InputError: bad numbers.
        """
        self.network, self.hosted = network, InPlacePruner(example_inputs, **options)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the network."""
        with self._found(pl_module) as network:
            self.hosted.begin(network)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Regularise, and prune when it is time."""
        with self._found(pl_module) as network:
            self.hosted.after_step(network, trainer.optimizers, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Goes into Lightning's checkpoints."""
        return self.hosted.state_dict()

    def resume(self, pl_module: Any, path: str | Path) -> None:
        """Make a freshly built module as small as in the checkpoint at `path`; then ``fit(..., ckpt_path=path)``.

        Raises:
            PlanError: the checkpoint was written without this callback, or of another network.
        """
        states = torch.load(path, map_location="cpu", weights_only=True).get("callbacks", {})
        if self.state_key not in states:
            raise PlanError(f"{path} was written without this callback: it has {sorted(states)}")
        with self._found(pl_module) as network:
            self.hosted.resume(network, states[self.state_key])

    @contextmanager
    def _found(self, pl_module: Any) -> Iterator[nn.Module]:
        """The network, without its ties to the trainer and to `Distilling` meanwhile."""
        kept = {name: vars(pl_module)[name] for name in OWNED if name in vars(pl_module)}
        vars(pl_module).update(dict.fromkeys(kept))
        if STEP in vars(pl_module):
            kept[STEP] = vars(pl_module).pop(STEP)
        try:
            yield pl_module.get_submodule(self.network)
        finally:
            vars(pl_module).update(kept)


class Distilling(Callback):
    """Makes the loss of ``training_step`` be ``alpha * soft + (1 - alpha) * hard``: see `depgraph.distill`.

    *Hard* is the loss that ``training_step`` returns. For *soft* the teacher gets what the network is called with in that
    step; with several calls it is their mean. Works beside `Pruning`, whose network stays the same object.
    """

    def __init__(
        self, teacher: nn.Module, *, network: str = "", temperature: float = 2.0, alpha: float = 0.5
    ) -> None:
        """Say from whom, and how much.

        Args:
            teacher: the dense network; stays as it is, in eval mode and without gradients, and is not part of checkpoints. It
                takes what the network takes, and is moved to the device of the network's logits.
            network: path of the network in the LightningModule; the whole (its ``forward``) by default.
            temperature: T of the softmax, above 0.
            alpha: share of the soft term, 0 to 1.

        Raises:
            InputError: a bad number.
        """
        check_mix(alpha, temperature)
        self.teacher, self.network, self.temperature, self.alpha = teacher, network, temperature, alpha

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the soft term into ``training_step``.

        Raises:
            InputError: the module calls its optimizers itself, and so has used the loss already.
        """
        if not pl_module.automatic_optimization:
            raise InputError(
                "the module calls its optimizers itself (automatic_optimization=False), so the result of training_step is not used\n"
                "  fix: add depgraph.training.train.soft_loss(logits, aim) to the loss there"
            )
        pl_module.training_step = self._distilled(pl_module, pl_module.training_step)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The module is as it was."""
        vars(pl_module).pop(STEP, None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Likewise."""
        self.on_fit_end(trainer, pl_module)

    def _distilled(self, pl_module: Any, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def distilled(*args: Any, **kwargs: Any) -> Any:
            with _calls(pl_module.get_submodule(self.network)) as calls:
                given = step(*args, **kwargs)
            if given is None:  # Lightning's way to pass over a batch
                return None
            if not calls:
                raise InputError(
                    f"training_step did not call {self.network or 'forward of the module'}, so there is nothing to distil\n"
                    "  fix: give network=..., the name of the module that is called"
                )
            soft = torch.stack([self._soft(*call) for call in calls]).mean()
            total = self.alpha * soft + (1 - self.alpha) * (
                given["loss"] if isinstance(given, dict) else given
            )
            return {**given, "loss": total} if isinstance(given, dict) else total

        return distilled

    def _soft(self, args: Any, kwargs: Any, output: Any) -> torch.Tensor:
        logits = logits_of(output, "network")
        self.teacher.to(logits.device)
        with torch.no_grad(), in_mode(self.teacher, False):
            aim = logits_of(self.teacher(*args, **kwargs), "teacher")
        return soft_loss(logits, aim, self.temperature)


@contextmanager
def _calls(network: nn.Module) -> Iterator[list[tuple[Any, Any, Any]]]:
    """The arguments and the output of each call of `network` meanwhile, but for those without gradients."""
    seen: list[tuple[Any, Any, Any]] = []

    def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            seen.append((args, kwargs, output))

    handle = network.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


__all__ = ["Distilling", "Pruning"]
