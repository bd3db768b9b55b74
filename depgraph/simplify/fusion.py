"""Batch norms into the layers before them: what can go, what stays and why, and the check of the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from ..base.checks import flag
from ..base.errors import InputError, VerificationError
from ..plan.plan import Fusion, Plan
from ..surgery.apply import apply
from ..surgery.fold import LAYERS
from ..surgery.lineage import plans_of
from ..surgery.zeros import KeepZeros
from ..tracing.recorder import Node, record_of
from ..tracing.tensors import named_tensors
from ..tracing.trace import Trace, trace
from ..tracing.wrappers import core
from .result import Simplified, Summary, check_values, same_results
from .scales import movable

aten = torch.ops.aten
PRODUCTS = (aten.convolution.default, aten.linear.default)
TOLERANCE = 1e-9  # relative to the spread of each output, in float64
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class _Stays:
    """A norm that stays, and why."""

    norm: str
    why: str


@torch.inference_mode(False)
def fuse(model: nn.Module, x: Any, *, scales: bool = False) -> Simplified:
    """Fold each batch norm into the one convolution or linear layer whose result it reads.

    An identity takes its place, or where it has modules of its own (an activation, say), these in their order.
    Convolutions may be grouped, depthwise and transposed. A run on the example inputs tells who reads what, so that code in
    any form is followed. What can't be folded stays, and ``report.notes`` has the reason: the layer or the norm is called
    more than once or has hooks, the layer's result is also read elsewhere, its weight is tied or computed, the norm has no
    running statistics or code of its own. The names of all other tensors stay.

    Source: the folding is that of Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, section 3.2.

    Args:
        model: any module in eval mode; it is not touched.
        x: example inputs, as for `prune`: a tensor, a tuple of positional arguments, a dict of keyword arguments, or `Examples`.
        scales: also move the scale and shift of layer and RMS norms into the linear layers that read their results, where
            nothing else reads them; they become ones and zeros. Nothing gets smaller: criteria and quantisation then see the
            weights that count.

    Returns:
        the new model, a plan that replays on other weights, and a report. Both models are compared in float64 on the example
        inputs and on inputs drawn like them; ``report.verification`` says how far they were apart.

    Raises:
        InputError: a norm is in train mode, or an argument is something else.
        TraceError: the model rejects the inputs.
        VerificationError: the result computes something else by more than 1e-9 of the spread of an output.
    """
    check_values(model)
    flag("scales", scales)
    _check_mode(model)
    recorded = trace(model, x)
    found, stay = _pairs(model, recorded)
    moved = movable(model, recorded) if scales else []
    tensors, aliases = named_tensors(model)
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}

    def planned(fusions: list[Fusion]) -> Plan:
        return Plan(
            shapes=shapes,
            aliases=aliases,
            fusions=fusions,
            scales=moved,
            request={"fuse": "norms", "scales": scales},
        )

    def checked(fusions: list[Fusion]) -> tuple[nn.Module, Any]:
        plan = planned(fusions)
        made = apply(model, plan)
        return made, same_results(model, made, x, TOLERANCE, lambda wide: apply(wide, plan))

    try:
        made, proof = checked(found)
    except VerificationError:  # code of a module that does not do with its tensors what torch's does
        stock = [f for f in found if all(is_torchs(model.get_submodule(p)) for p in (f.layer, f.norm))]
        own = [
            _Stays(f.norm, "it or its layer has a forward of its own, and the result would differ")
            for f in found
            if f not in stock
        ]
        if not own:
            raise
        found, stay = stock, [*stay, *own]
        made, proof = checked(found)
    rows = [{"layer": f.layer, "norm": f.norm, "bias": "new" if f.bias else "as before"} for f in found]
    rows += [
        {"layer": ", ".join(m.layers), "norm": m.scale, "bias": "as before" if m.shift is None else "shifted"}
        for m in moved
    ]
    notes = [f"{s.norm} stays: {s.why}" for s in stay] or (
        [] if found or moved else ["there is no batch norm to fuse"]
    )
    report = Summary.of(
        f"fused {len(found)} of {len(found) + len(stay)} batch norms", model, made, x,
        rows=rows, verification=proof, notes=notes,
    )  # fmt: skip
    return Simplified(made, planned(found), report, plans_of(model))


def _check_mode(model: nn.Module) -> None:
    training = [p for p, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training]
    if core(model).training or training:
        names = ", ".join(map(repr, training[:3])) or "the model"
        raise InputError(
            f"{names}{' ...' if len(training) > 3 else ''} in train mode, where a batch norm takes its statistics from each batch: "
            "fusing keeps those of eval mode\n  fix: call model.eval() first, when training is over"
        )


def _pairs(model: nn.Module, recorded: Trace) -> tuple[list[Fusion], list[_Stays]]:
    """The norms that can go, in the order of the model, and those that stay."""
    nodes = [n for n in recorded.graph.nodes if n.op == "call_function" and not record_of(n).training]
    calls: dict[str, list[Node]] = {}
    for node in nodes:
        calls.setdefault(record_of(node).module, []).append(node)
    name_of = {node: name for name, node in recorded.tensors.items()}
    tied = {*recorded.aliases, *recorded.aliases.values()}
    one = _Reader(model, calls, name_of, tied, Counter(recorded.outputs))
    found: list[Fusion] = []
    stay: list[_Stays] = []
    for path, norm in model.named_modules():
        if isinstance(norm, _BatchNorm):
            answer = one.fusion(path, norm)
            (found if isinstance(answer, Fusion) else stay).append(answer)  # type: ignore[arg-type]
    return found, stay


class _Reader:
    """What the run says of one norm after the other."""

    def __init__(
        self, model: nn.Module, calls: dict[str, list[Node]], name_of: dict[Node, str], tied: Iterable[str],
        outputs: Counter[Node],
    ) -> None:  # fmt: skip
        self.model, self.calls, self.name_of, self.tied, self.outputs = model, calls, name_of, tied, outputs
        self.paths = {id(m): p for p, m in model.named_modules()}

    def fusion(self, path: str, norm: _BatchNorm) -> Fusion | _Stays:
        """The fusion of the norm at `path`, or why it stays."""
        try:
            node = self._only_call(path, norm)
            layer = self._before(node)
            self._fits(layer, node)
        except _Refused as why:
            return _Stays(path, str(why))
        module: Any = self.model.get_submodule(layer)
        return Fusion(layer, path, module.bias is None)

    def _only_call(self, path: str, norm: _BatchNorm) -> Node:
        """The one call of the norm."""
        called = self.calls.get(path, [])
        nodes = [n for n in called if n.target is aten.batch_norm.default]
        if not called:
            raise _Refused("no run on the example inputs called it")
        if norm.running_mean is None or norm.running_var is None:
            raise _Refused("it has no running statistics: it normalises by those of each batch")
        if hooked(norm):
            raise _Refused("it has hooks, or tensors that are computed")
        if len(nodes) < len(called) or not nodes:
            raise _Refused(f"the forward of {type(norm).__name__} is its own and does more than normalise")
        if len(nodes) > 1:
            raise _Refused(f"it is shared: called {len(nodes)} times")
        return nodes[0]

    def _before(self, node: Node) -> str:
        """The path of the layer whose result the norm reads."""
        source: Any = node.args[0]
        if source.op != "call_function" or source.target not in PRODUCTS:
            made_in = self.model.get_submodule(record_of(source).module)
            if isinstance(made_in, LAYERS) and hooked(made_in):
                raise _Refused(f"hooks of {record_of(source).module!r} change what it reads")
            raise _Refused("what it reads is not the result of a convolution or linear layer itself")
        layer = record_of(source).module
        readers = [u for u in source.users if not record_of(u).training]
        if len(readers) > 1 or self.outputs[source] > 0:
            others = [record_of(u).source for u in readers if u is not node and u.op != "output"]
            raise _Refused(
                f"the result of {layer!r} is also read {f'at {others[0]}' if others else 'by the caller'}"
            )
        weight = self.name_of.get(source.args[1])
        if weight is None:
            raise _Refused(
                f"the weight of {layer!r} is computed (by a parametrization, a hook or its forward)"
            )
        if weight != f"{layer}.weight" or weight in self.tied:
            raise _Refused(f"{weight!r} is tied, or read outside its module")
        uses = [u for u in source.args[1].users if u.op == "call_function" and not record_of(u).training]
        if len(uses) > 1:
            raise _Refused(f"{layer!r} is shared: called {len(uses)} times")
        return layer

    def _fits(self, layer: str, node: Node) -> None:
        """The layer is one of torch's, without hooks, and its channels are those that the norm scales."""
        module: Any = self.model.get_submodule(layer)
        if not isinstance(module, LAYERS):
            raise _Refused(
                f"{layer!r} is no convolution or linear layer of torch, but {type(module).__name__}"
            )
        if hooked(module):
            raise _Refused(f"{layer!r} has hooks, or tensors that are computed")
        if module.bias is not None and f"{layer}.bias" in self.tied:
            raise _Refused(f"'{layer}.bias' is tied")
        dims, wanted = len(record_of(node).shape), max(module.weight.dim(), 2)
        if dims != wanted:
            raise _Refused(f"it scales dim 1 of the {dims} that {layer!r} returns, which is not its channels")


class _Refused(Exception):
    """Why a norm stays."""


def is_torchs(module: nn.Module) -> bool:
    """Whether the forward of `module` is written in torch."""
    return type(module).forward.__module__.startswith("torch.")


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, other than those that keep zeros, or tensors that are computed."""
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    return any(not isinstance(hook, KeepZeros) for hook in hooks) or parametrize.is_parametrized(module)
