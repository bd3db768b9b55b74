"""Gradual pruning while Lightning trains: `Pruning`, a callback.

Pruning(example_inputs, every=100, steps=5, max_macs=0.5, network="net")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import DepgraphError, PlanError
from .hosted import Hosted

try:
    from lightning.pytorch import Callback
except ImportError as missing:
    raise DepgraphError(
        "depgraph.integrations.lightning needs Lightning\n  fix: pip install lightning"
    ) from missing

OWNED = ("_trainer", "_fabric")  # what a LightningModule knows of its trainer: no part of the network


class Pruning(Callback):
    """Prunes the network of a LightningModule step by step, between steps of its optimizer.

    The optimizer goes on with its state cut like the parameters; learning rate schedules and gradient scalers know the
    optimizer, and go on with it. Checkpoints hold the plan; `resume` makes a fresh network ready for one.

    Attributes:
        hosted: what prunes; ``hosted.result`` is the last step's, with plan and report from the original.
    """

    def __init__(self, example_inputs: Any, *, network: str = "", **options: Any) -> None:
        """Say when and how.

        Args:
            example_inputs: what the network takes, as for `prune`.
            network: path of the network in the LightningModule; the whole by default.
            **options: ``every``, ``start``, ``regulariser`` as for `Hosted`; others as for `GradualPruner`.

        Raises:
            InputError: bad numbers.
        """
        self.network, self.hosted = network, Hosted(example_inputs, **options)

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
            raise PlanError(f"{path} was written without this callback: it holds {sorted(states)}")
        with self._found(pl_module) as network:
            self.hosted.resume(network, states[self.state_key])

    @contextmanager
    def _found(self, pl_module: Any) -> Iterator[nn.Module]:
        """The network, without its ties to the trainer meanwhile."""
        kept = {name: vars(pl_module)[name] for name in OWNED if name in vars(pl_module)}
        vars(pl_module).update(dict.fromkeys(kept))
        try:
            yield pl_module.get_submodule(self.network)
        finally:
            vars(pl_module).update(kept)


__all__ = ["Pruning"]
