"""Gradual pruning and distillation while transformers' Trainer trains: `Pruning`, a callback, and `DistillingTrainer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.errors import DepgraphError, PlanError
from ..base.running import in_mode
from ..training.train import check_mix, soft_loss
from .hosted import InPlacePruner

try:
    from transformers import Trainer, TrainerCallback
except ImportError as missing:
    raise DepgraphError(
        "depgraph.integrations.transformers needs transformers and accelerate\n  fix: pip install 'transformers[torch]'"
    ) from missing

FILE = "pruning.json"


class Pruning(TrainerCallback):
    """Prunes the Trainer's model step by step, between steps of its optimizer.

    The optimizer continues with its state cut like the parameters, and so do its schedule and scaler. Each checkpoint folder
    gets a `pruning.json` with the plan; `resume` makes a fresh model ready for one.

    Attributes:
        hosted: what prunes; ``hosted.result`` is the last step's, with plan and report from the original.
    """

    def __init__(self, example_inputs: Any, **options: Any) -> None:
        """Say when and how.

        Args:
            example_inputs: what the model takes, as for `prune`.
            **options: ``every``, ``start``, ``regulariser`` as for `InPlacePruner`; others as for `GradualPruner`.

        Raises:
            InputError: bad numbers.
        """
        self.hosted = InPlacePruner(example_inputs, **options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the model."""
        self.hosted.begin(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Regularise, and prune when it is time."""
        self.hosted.after_step(kwargs["model"], [kwargs["optimizer"]], state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The plan goes into the checkpoint's folder."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            (folder / FILE).write_text(json.dumps(self.hosted.state_dict()))

    def resume(self, model: nn.Module, folder: str | Path) -> None:
        """Make a freshly built model as small as in the checkpoint in `folder`; then ``train(resume_from_checkpoint=folder)``.

        Raises:
            PlanError: the checkpoint was written without this callback, or of another model.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise PlanError(f"{folder} has no {FILE}: it was written without this callback")
        try:
            state = json.loads(path.read_text())
        except ValueError as error:
            raise PlanError(f"{path} is damaged: {error}") from error
        self.hosted.resume(model, state)


class DistillingTrainer(Trainer):
    """A Trainer whose loss is ``alpha * soft + (1 - alpha) * hard``: see `distill`."""

    def __init__(
        self, *args: Any, teacher: nn.Module, temperature: float = 2.0, alpha: float = 0.5, **kwargs: Any
    ) -> None:
        """As for `Trainer`, and for the soft term.

        Args:
            teacher: the dense model; stays as it is, in eval mode and without gradients.
            temperature: T of the softmax, above 0.
            alpha: share of the soft term, 0 to 1.
            *args: as for `Trainer`.
            **kwargs: likewise.

        Raises:
            InputError: a bad number.
        """
        check_mix(alpha, temperature)
        super().__init__(*args, **kwargs)
        self.teacher, self.temperature, self.alpha = teacher, temperature, alpha

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's own loss and the soft one."""
        hard, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.teacher.to(outputs["logits"].device)
        with torch.no_grad(), in_mode(self.teacher, False):
            aim = self.teacher(**{k: v for k, v in inputs.items() if k != "labels"})["logits"]
        soft = soft_loss(outputs["logits"], aim, self.temperature)
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs:
            soft = (
                soft / self.args.gradient_accumulation_steps
            )  # what the Trainer does to losses that do not know the number
        loss = self.alpha * soft + (1 - self.alpha) * hard
        return (loss, outputs) if return_outputs else loss


__all__ = ["DistillingTrainer", "Pruning"]
