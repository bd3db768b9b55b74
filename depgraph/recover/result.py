"""What recovery did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# Why a layer is left as it is.
UNREACHED = "no calibration batch reached it"
NOT_FINITE = "has NaN or infinite inputs or outputs on the calibration data"


@dataclass(frozen=True)
class LayerRecovery:
    """What became of one layer.

    Attributes:
        name: its weight, or for batch norms its running mean.
        method: ``"reconstruction"``, ``"compensation"`` or ``"statistics"``.
        before, after: squared error of the layer's result against the original's, relative to the original's own
            squares, on batches that were held out where there are several; None where none is measured.
        kept: whether the change was kept: only what lowers the error is.
        detail: a few words (the damping, the number of samples).
    """

    name: str
    method: str
    before: float | None
    after: float | None
    kept: bool
    detail: str = ""


@dataclass
class Recovery:
    """What `recover` did.

    Attributes:
        layers: one entry for each layer and method.
        skipped: (weight, reason) of the layers that lost inputs and could not be helped.
        output: squared error of the model's outputs against the original's, relative to these, before and after; None
            where outputs can't be compared.
        notes: what was undone, and why.
        biases: names of the biases that the smaller model has and the original lacks.
    """

    layers: list[LayerRecovery] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    output: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)

    def summary(self) -> list[str]:
        """A few sentences."""
        found = self._by_method().items()
        lines = [f"{method} changed {sum(x.kept for x in own)} of {len(own)} layers" for method, own in found]
        if self.biases:
            lines.append(
                f"{len(self.biases)} layers got a bias: {', '.join(self.biases[:5])}{' ...' * (len(self.biases) > 5)}"
            )
        if self.output is not None:
            lines.append(
                f"recovery changed the error of the outputs from {self.output[0]:.3g} to {self.output[1]:.3g}"
            )
        return [*lines, *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        layers = [asdict(layer) for layer in self.layers]
        output = None if self.output is None else {"before": self.output[0], "after": self.output[1]}
        rest = {"notes": self.notes, "biases": self.biases}
        return {"layers": layers, "skipped": self.skipped, "output": output, **rest}

    def _by_method(self) -> dict[str, list[LayerRecovery]]:
        found: dict[str, list[LayerRecovery]] = {}
        for layer in self.layers:
            found.setdefault(layer.method, []).append(layer)
        return found

    def __str__(self) -> str:
        lines = []
        for method, own in self._by_method().items():
            lines.append(f"{method}: {sum(layer.kept for layer in own)} of {len(own)} layers changed")
            lines += [
                f"  {layer.name}: error {layer.before:.3g} -> {layer.after:.3g}"
                f"{'' if layer.kept else ' (not kept)'}{f', {layer.detail}' if layer.detail else ''}"
                for layer in own
                if layer.before is not None
            ]
        lines += [f"new bias: {name}" for name in self.biases]
        lines += [f"unchanged: {name} ({reason})" for name, reason in self.skipped]
        if self.output is not None:
            lines.append(f"outputs: error {self.output[0]:.3g} -> {self.output[1]:.3g}")
        return "\n".join([*lines, *self.notes])
