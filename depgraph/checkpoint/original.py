"""What a checkpoint and its model are, before anything is computed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..base.errors import InputError
from ..integrations import PRETRAINED_FILES
from ..store.factory import resolved
from ..store.files import Checkpoint, opened
from ..store.layout import Laid
from ..tracing.tensors import all_tensors
from .shell import check_laid, fill_buffers, laid_by_name, shell_of
from .source import FromFiles, Notes


@dataclass
class Original:
    """A checkpoint and its model.

    Attributes:
        checkpoint: the files.
        model: without memory for its parameters.
        laid: how its tensors lie in the files.
        further: stored tensors that the model does not have, and what they would be called in it.
        passed: further ones, which its class passes over when it loads: they are not copied.
        make: builds the model again.
        files: the integration that knows such folders; None with a factory.
    """

    checkpoint: Checkpoint
    model: nn.Module
    laid: dict[str, Laid]
    further: dict[str, str]
    passed: list[str]
    make: Callable[[], nn.Module]
    files: Any = None

    @classmethod
    def of(cls, folder: Path, factory: Any) -> Original:
        """What is in a folder, looked at; an `InputError` says what is wrong with it."""
        if factory is not None:
            make = resolved(factory)
            checkpoint = opened(folder)
            model = shell_of(make)
            laid, further = laid_by_name(model, checkpoint)
            found = cls(checkpoint, model, laid, further, [], make)
        else:
            checkpoint = opened(folder)
            files = importlib.import_module(PRETRAINED_FILES)
            if not files.has_config(folder):
                raise InputError(
                    f"{folder} has no config.json that says what its model is: give factory=..., a function that builds it"
                )
            make = files.maker(folder)
            model = shell_of(make, f"{folder / 'config.json'}")
            laid, further, passed = files.laid(model, checkpoint)
            files.give_computed(model, laid)
            found = cls(checkpoint, model, laid, further, passed, make, files)
        check_laid(found.model, found.laid, checkpoint)
        weights = found.weights()
        fill_buffers(found.model, found.laid, weights.stored)
        return found

    def weights(self) -> FromFiles:
        """The values in the files."""
        return FromFiles(
            self.checkpoint, self.laid, all_tensors(self.model), Notes(self.checkpoint, self.laid)
        )
