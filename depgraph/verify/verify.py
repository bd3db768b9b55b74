"""The proof: the smaller model computes what the original computes with the removed entries zeroed.

The original is run once more with masks beside its tensors (`masked/`), which come from the plan alone; the smaller
model is run as it is; their outputs are compared in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..base.checks import a_module, number, of_kind
from ..base.errors import VerificationError
from ..base.inputs import Examples, fresh_inputs
from ..base.running import CallMode, WriteGuardMode
from ..base.switches import eagerly, same_random_state, without_fast_attention, without_mkldnn
from ..base.values import map_tensors, output_leaves
from ..plan.names import fitted
from ..plan.plan import Plan
from ..tracing.caches import nothing_kept
from ..tracing.tensors import all_tensors, named_tensors, skeleton
from .masked import MaskedRun, Unfollowed, in_double, widened_cast

Tensor = torch.Tensor
TOLERANCE = 1e-5  # of values computed in float64, relative to the largest entry of each output
DOUBLE_LIMIT = 400_000_000  # parameters up to which the comparison runs in float64


@dataclass(frozen=True)
class Verification:
    """What was compared.

    Attributes:
        status: ``"equal"`` (values compared), ``"shapes"`` (values could not be compared, `detail` says why) or
            ``"skipped"``.
        max_error: largest deviation of an output, relative to that output's largest entry.
        detail: a sentence.
        restricted: ops that took a statistic over kept entries only.
    """

    status: str
    max_error: float = 0.0
    detail: str = ""
    restricted: tuple[str, ...] = ()


def masked_outputs(
    model: nn.Module, plan: Plan, example_inputs: Any, double: bool = False
) -> tuple[Any, MaskedRun]:
    """What `model` returns with the entries that `plan` removes zeroed, and statistics taken over what is kept.

    Args:
        model: the original, in eval mode; it is not touched.
        plan: what is removed.
        example_inputs: as for `prune`, a single one.
        double: model and inputs are float64, and so is all that forward computes, whatever types it names.

    Returns:
        the model's output, and the run, which knows the ops whose statistics were `restricted` and those whose effect on
        masks had to be `probed`.
    """
    args, kwargs = fresh_inputs(example_inputs)
    tensors = all_tensors(model)
    replaced: dict[int, Tensor] = {}
    masks: list[tuple[Tensor, Tensor]] = []
    for name, tensor in tensors.items():
        cut = plan.cuts.get(name)
        if cut is None:
            continue
        mask = cut.mask().to(tensor.device)
        value = tensor.detach().masked_fill(~mask, 0)
        held = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
        replaced[id(tensor)] = held
        masks.append((held, mask.float()))
    shared = {id(t): t for t in tensors.values() if id(t) not in replaced and isinstance(t, nn.Parameter)}
    run = MaskedRun(double, shared.values())
    for held, mask in masks:
        run.give(held, mask)
    twin = skeleton(model, {**replaced, **shared}).eval()
    try:
        with (
            torch.no_grad(),
            eagerly(),
            without_mkldnn(),
            without_fast_attention(),
            nothing_kept(model),
            run,
        ):
            out = twin(*args, **kwargs)
    finally:
        run.kept.restore()
    return out, run


def deviation(got: Any, wanted: Any) -> float:
    """Largest |got - wanted| of any pair of output tensors, relative to the largest |wanted| of the pair.

    Raises:
        VerificationError: the outputs differ in number, shape or where they are not finite.
    """
    a, b = output_leaves(got), output_leaves(wanted)
    if len(a) != len(b):
        raise VerificationError(f"the smaller model returns {len(a)} tensors, the original {len(b)}")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            raise VerificationError(f"an output has shape {tuple(x.shape)}, the original's {tuple(y.shape)}")
        if not x.numel() or not (y.is_floating_point() or y.is_complex()):
            if x.numel() and not torch.equal(x, y):
                raise VerificationError("an output of integers differs")
            continue
        x, y = x.detach(), y.detach()
        fine = torch.isfinite(y)
        if not torch.equal(torch.isfinite(x), fine):
            raise VerificationError("outputs are NaN or infinite in different places")
        scale = y[fine].abs().max() if fine.any() else torch.ones(())
        difference = (x[fine] - y[fine]).abs().max() if fine.any() else torch.zeros(())
        worst = max(worst, float(difference / scale.clamp(min=1e-30)))
    return worst


def verify(
    model: nn.Module, small: nn.Module, plan: Plan, example_inputs: Any, tolerance: float = TOLERANCE
) -> Verification:
    """Compare `small` with the masked original.

    Args:
        model: the original; it is not changed.
        small: the model that `plan` made of it; neither is it.
        plan: what was removed.
        example_inputs: as for `prune`; with `Examples`, all are compared.
        tolerance: largest deviation relative to an output's largest entry, in float64.

    Returns:
        What was compared, and how close it is.

    Raises:
        VerificationError: the smaller model fails to run, or computes something else.
    """
    a_module("model", model)
    a_module("small", small)
    of_kind("plan", plan, Plan, "a depgraph.Plan")
    number("tolerance", tolerance, 0)
    if any(t.device.type == "meta" for t in named_tensors(model)[0].values()):
        return Verification("skipped", detail="the model is on the meta device: it has no values")
    plan = fitted(plan, model)
    examples = example_inputs.examples if isinstance(example_inputs, Examples) else (example_inputs,)
    proofs = [_verify_one(model, small, plan, example, tolerance) for example in examples]
    least = next((p for p in proofs if p.status != "equal"), proofs[0])
    restricted = tuple(sorted({name for p in proofs for name in p.restricted}))
    return Verification(least.status, max(p.max_error for p in proofs), least.detail, restricted)


def _verify_one(
    model: nn.Module, small: nn.Module, plan: Plan, example_inputs: Any, tolerance: float
) -> Verification:
    """`verify` on one example."""
    wide = sum(p.numel() for p in model.parameters()) <= DOUBLE_LIMIT
    for double in (True, False) if wide else (False,):
        try:
            left, right, inputs = (_widened(o) if double else o for o in (model, small, example_inputs))
            with _same_conditions(double):
                wanted, run = masked_outputs(left, plan, inputs, double)
        except Unfollowed as why:
            return _shapes_only(model, small, example_inputs, f"values were not compared: {why}")
        except Exception as error:
            if double:
                continue
            raise VerificationError(
                f"the masked original failed to run: {type(error).__name__}: {error}"
            ) from error
        try:
            with without_fast_attention(), _same_conditions(double):
                got = _run(right, inputs, _Widen() if double else None)
        except Exception as error:
            raise VerificationError(
                f"the smaller model failed to run: {type(error).__name__}: {error}"
            ) from error
        if not output_leaves(wanted):
            return Verification("shapes", detail="values were not compared: the model returns no tensors")
        error_ = deviation(got, wanted)
        limit = tolerance if double else max(tolerance, 20 * _precision(left))
        if not error_ <= limit and run.probed:
            unknown = ", ".join(sorted(run.probed))
            return _shapes_only(
                model,
                small,
                example_inputs,
                f"values differ, but the effect of {unknown} on removed entries is not known",
            )
        if not error_ <= limit:
            raise VerificationError(
                f"the smaller model deviates from the masked original by {error_:.2g} (tolerance {limit:.2g})"
            )
        if double:
            _check_shapes(small, example_inputs, wanted)
        return Verification(
            "equal",
            error_,
            "values compared in " + ("float64" if double else "the model's type"),
            tuple(sorted(run.restricted)),
        )
    raise AssertionError("unreachable")


class _Widen(CallMode):
    """Casts to a narrower float type become casts to float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return in_double(func, args, widened_cast(kwargs))


@contextmanager
def _same_conditions(wanted: bool) -> Iterator[None]:
    """Numbers that forward makes tensors of are float64; and what it draws at random is the same in every run."""
    with same_random_state():
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if wanted else before)
        torch.manual_seed(0)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _precision(model: nn.Module) -> float:
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max((torch.finfo(k).eps for k in kinds), default=1e-7) * 50


def _widened(value: Any) -> Any:
    """A float64 copy of a model or of inputs."""
    if isinstance(value, nn.Module):
        tensors = all_tensors(value)
        wide: dict[int, Any] = {}
        for t in tensors.values():
            if t.is_floating_point():
                data = t.detach().to(torch.float64, copy=True)
                wide[id(t)] = nn.Parameter(data, requires_grad=False) if isinstance(t, nn.Parameter) else data
        return skeleton(value, wide).double()
    return map_tensors(value, lambda t: t.double() if t.is_floating_point() else t.clone())


def _shapes_only(model: nn.Module, small: nn.Module, example_inputs: Any, why: str) -> Verification:
    _check_shapes(small, example_inputs, _run(model, example_inputs))
    return Verification("shapes", detail=why)


def _check_shapes(small: nn.Module, example_inputs: Any, wanted: Any) -> None:
    """Run the smaller model as it is: kernels may ask more of strides and sizes than their float64 counterparts do."""
    try:
        got = _run(small, example_inputs)
    except Exception as error:
        raise VerificationError(
            f"the smaller model failed to run: {type(error).__name__}: {error}"
        ) from error
    shapes = [[tuple(t.shape) for t in output_leaves(out)] for out in (got, wanted)]
    if shapes[0] != shapes[1]:
        raise VerificationError(
            f"the smaller model's outputs have shapes {shapes[0]}, the original's {shapes[1]}"
        )


def _run(model: nn.Module, example_inputs: Any, mode: AbstractContextManager[Any] | None = None) -> Any:
    """What `model` returns in eval mode, inside `mode` if it is a copy, else unchanged by what forward writes."""
    args, kwargs = fresh_inputs(example_inputs)
    parameters = {id(p): p for p in model.parameters()}
    twin = skeleton(model, parameters).eval()
    guard = mode or WriteGuardMode(parameters.values())
    with same_random_state(), torch.no_grad(), eagerly(), nothing_kept(model), guard:
        return twin(*args, **kwargs)
