"""What recovery did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerRecovery:
    """What became of one layer.

    Attributes:
        name: its weight, or for batch norms its running mean.
        method: ``"reconstruction"``, ``"compensation"`` or ``"statistics"``.
        before, after: squared error of the layer's result against the original's, relative to the original's own
            squares, on batches that were held out where there are several; NaN where none is measured.
        kept: whether the change was kept: only what lowers the error is.
        detail: a few words (the damping, the number of samples).
    """

    name: str
    method: str
    before: float
    after: float
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
    """

    layers: list[LayerRecovery] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    output: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for method in dict.fromkeys(layer.method for layer in self.layers):
            own = [layer for layer in self.layers if layer.method == method]
            kept = [layer for layer in own if layer.kept]
            lines.append(f"{method}: {len(kept)} of {len(own)} layers changed")
            lines += [
                f"  {layer.name}: error {layer.before:.3g} -> {layer.after:.3g}"
                f"{'' if layer.kept else ' (not kept)'}{f', {layer.detail}' if layer.detail else ''}"
                for layer in own
                if layer.before == layer.before
            ]
        lines += [f"left as it is: {name} ({reason})" for name, reason in self.skipped]
        if self.output is not None:
            lines.append(f"outputs: error {self.output[0]:.3g} -> {self.output[1]:.3g}")
        return "\n".join([*lines, *self.notes])
