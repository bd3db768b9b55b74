"""What these ways return, and the comparison of a model with one that should compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..base.checks import a_module
from ..base.errors import InputError, VerificationError
from ..base.inputs import Arguments, each_example
from ..base.running import in_mode
from ..base.switches import same_random_state
from ..base.tables import printed, table
from ..base.values import all_finite, map_tensors
from ..costs import cost
from ..plan.plan import Plan
from ..tracing.caches import nothing_kept
from ..tracing.tensors import all_tensors, named_tensors, skeleton
from ..verify.compare import deviation
from ..verify.conditions import drawn_inputs, seed_all
from ..verify.verify import Verification

ROWS = 40  # of the table that is printed


@dataclass(repr=False)
class Summary:
    """Before and after; prints as tables.

    Attributes:
        title: what was done.
        parameters: entries that are no zeros by a mask, before and after.
        byte_counts: bytes of parameters and buffers before and after.
        macs: multiply-accumulates of one forward pass before and after; None without example inputs.
        rows: one for each layer that changed: what became of it, as plain data with the same keys in each.
        verification: what was compared.
        notes: sentences about what was left as it is, and why.
        figures: what else was measured, as plain data.
    """

    title: str
    parameters: tuple[int, int]
    byte_counts: tuple[int, int]
    macs: tuple[int, int] | None
    rows: list[dict[str, Any]]
    verification: Verification
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, title: str, model: nn.Module, made: nn.Module, example_inputs: Any, **known: Any) -> Summary:
        """The figures of `model` and of what was `made` of it.

        Args:
            title: what was done.
            model: the original.
            made: the new model.
            example_inputs: those that the forward pass is counted on, or None.
            **known: the other attributes.
        """
        macs = None
        if example_inputs is not None:
            macs = cost.count_macs(model, example_inputs), cost.count_macs(made, example_inputs)
        counts = cost.parameter_count(model), cost.parameter_count(made)
        return cls(title, **{"parameters": counts, "byte_counts": (cost.byte_count(model), cost.byte_count(made)),
                             "macs": macs, **known})  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain data (counts in entries, MACs and bytes)."""

        def pair(figures: tuple[int, int] | None) -> dict[str, int] | None:
            return None if figures is None else {"before": figures[0], "after": figures[1]}

        return {
            "params": pair(self.parameters),
            "macs": pair(self.macs),
            "bytes": pair(self.byte_counts),
            "layers": list(self.rows),
            "verification": {
                "status": self.verification.status,
                "max_error": self.verification.max_error,
                "detail": self.verification.detail,
            },
            "notes": list(self.notes),
            **self.figures,
        }

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return printed(*self._parts())

    def _parts(self) -> Iterator[Any]:
        totals = table(self.title, "", "before", "after", "left")
        figures = {"parameters": self.parameters, "MACs": self.macs, "bytes": self.byte_counts}
        for label, found in figures.items():
            if found is not None:
                a, b = found
                totals.add_row(label, f"{a:,}", f"{b:,}", f"{b / a:.1%}" if a else "-")
        yield totals
        if self.rows:
            layers = table("", *self.rows[0])
            for row in self.rows[:ROWS]:
                layers.add_row(*map(_cell, row.values()))
            yield layers
        if len(self.rows) > ROWS:
            yield f"... and {len(self.rows) - ROWS} more"
        yield from (f"{name}: {_cell(value)}" for name, value in self.figures.items())
        yield from (f"note: {note}" for note in self.notes)
        v = self.verification
        yield f"verification: {v.status} ({v.detail}); largest deviation {v.max_error:.1e}"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )


@dataclass(repr=False)
class Simplified:
    """What `fuse`, `mask` and `factorise` return.

    Attributes:
        model: the new model; the one given is as it was.
        plan: what was done; plain data that replays on any model of the original's shapes.
        report: figures before and after; ``print(result.report)``.
        before: the plans that had made the model that was given, where it was itself a result.
    """

    model: nn.Module
    plan: Plan
    report: Summary
    before: tuple[Plan, ...] = ()

    def __repr__(self) -> str:
        return str(self.report)


def check_values(model: Any) -> None:
    """`model` is a module whose weights have values.

    Raises:
        InputError: it is none, or a weight is on the meta device, NaN or infinite.
    """
    a_module("model", model)
    for name, tensor in named_tensors(model)[0].items():
        if tensor.is_meta:
            raise InputError(f"the model is on the meta device ({name!r}): load its weights first")
        if tensor.is_floating_point() and not all_finite(tensor):
            raise InputError(f"NaN or infinite values in {name!r}: nothing was changed")


def in_float64(model: nn.Module) -> nn.Module:
    """A copy of `model` in float64 and eval mode."""
    wide = {id(t): _widened(t) for t in all_tensors(model).values()}
    return skeleton(model, wide).eval()


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    value = tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
    value = value.clone() if value.data_ptr() == tensor.data_ptr() else value
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def same_results(
    model: nn.Module,
    made: nn.Module,
    example_inputs: Any,
    tolerance: float,
    remake: Callable[[nn.Module], nn.Module],
) -> Verification:
    """Compare what `model` and the one `made` of it compute in float64, on the example inputs and on others drawn like them.

    Args:
        model: the original.
        made: what `remake` made of it, run in its own type where float64 can't run.
        example_inputs: as for `prune`.
        tolerance: largest deviation relative to the spread of an output's entries, in float64.
        remake: makes of a copy of the original in float64 what `made` is; rounding `made` to its own type is no part of
            the comparison.

    Raises:
        VerificationError: they compute something else.
    """
    with same_random_state(), nothing_kept(model), torch.no_grad():
        try:
            wide = in_float64(model)
            pair, detail = (wide, remake(wide)), "values compared in float64"
            error = _furthest(*pair, each_example(example_inputs), torch.float64)
        except VerificationError:
            raise
        except Exception as problem:  # noqa: BLE001  kernels and casts in forward that know one type only
            pair, detail = (
                (model, made),
                f"float64 can't run ({type(problem).__name__}), so in the model's own type",
            )
            kinds = [torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()]
            tolerance = max(tolerance, 1e3 * max(kinds, default=0.0))
            with in_mode(model, False), in_mode(made, False):
                error = _furthest(*pair, each_example(example_inputs), None)
    if not error <= tolerance:
        raise VerificationError(
            f"the result deviates from the original by {error:.2g} (tolerance {tolerance:.2g})"
        )
    return Verification("equal", error, detail)


def _furthest(
    model: nn.Module, made: nn.Module, examples: list[Arguments], kind: torch.dtype | None
) -> float:
    error = 0.0
    for example in examples:
        error = max(error, _apart(model, made, example, kind))
        for free in (True, False):
            try:
                drawn = drawn_inputs(example, 1, free)
                wanted = _run(model, drawn, kind)
            except Exception:  # noqa: BLE001  the original does not accept these inputs
                continue
            error = max(error, deviation(_run(made, drawn, kind), wanted))
    return error


def _apart(model: nn.Module, made: nn.Module, example: Arguments, kind: torch.dtype | None) -> float:
    return deviation(_run(made, example, kind), _run(model, example, kind))


def _run(model: nn.Module, arguments: Arguments, kind: torch.dtype | None) -> Any:
    def own(t: torch.Tensor) -> torch.Tensor:
        return (
            t.detach().to(kind, copy=True)
            if kind is not None and t.is_floating_point()
            else t.detach().clone()
        )

    given: Arguments = map_tensors(arguments, own)
    seed_all()
    return given.counting(given.run(model))
