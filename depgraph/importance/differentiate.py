"""Gradients of a loss on calibration data, taken on a copy of the model: nothing of the model's own is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..base.errors import InputError
from ..base.switches import eagerly, same_random_state, without_cudnn
from ..base.values import map_tensors, tensor_leaves
from ..data.calibration import Batch, Calibration
from ..data.gradients import UNRELATED, no_derivative
from ..grouping.graph import DependencyGraph
from ..tracing.tensors import all_tensors, skeleton
from .sums import moved_from

Aliases = dict[str, nn.Parameter]
Gradients = dict[str, torch.Tensor]


def differentiate(
    graph: DependencyGraph,
    calibration: Calibration,
    names: Sequence[str],
    visit: Callable[[Aliases, Gradients], None],
    *,
    samples: bool = False,
    twice: bool = False,
) -> None:
    """Hand `visit` the aliases that a run uses for the parameters `names`, and their gradients, for each batch or sample.

    Parameters that the loss does not depend on are left out. The model is run in eval mode and left as it is. With
    `twice` the gradients can be differentiated again.

    Raises:
        InputError: the loss is NaN or does not depend on the parameters, or the batch can't be split into samples.
    """
    with ExitStack() as stack:
        twin, aliases = stack.enter_context(_twin(graph, names))
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the fused ones have no second derivative
        for batch in stack.enter_context(closing(calibration.batches("gradients"))):
            for piece in _samples(batch) if samples else [batch]:
                loss = calibration.loss_of(piece.run(twin), piece)
                found = _gradients(loss, aliases, twice)
                visit(aliases, {n: g.to_dense() if g.is_sparse else g for n, g in found.items()})


def _written(graph: DependencyGraph) -> set[str]:
    """Names of the tensors that some op in forward writes into (an embedding with a largest norm does)."""
    found = set()
    for node in graph.trace.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        for a, given in zip(schema.arguments, node.args, strict=False) if schema is not None else ():
            leaf = moved_from(given) if a.alias_info is not None and a.alias_info.is_write else None
            if leaf is not None:
                found.add(str(leaf.target))
    return found


def _gradients(loss: torch.Tensor, aliases: Aliases, twice: bool) -> Gradients:
    if not loss.requires_grad:
        raise InputError(UNRELATED)
    try:
        given = torch.autograd.grad(loss, [*aliases.values()], allow_unused=True, create_graph=twice)
    except RuntimeError as error:
        raise InputError(no_derivative(error)) from error
    found = {n: g for n, g in zip(aliases, given, strict=True) if g is not None}
    if not found:
        raise InputError(UNRELATED)
    return found


def again(aliases: Aliases, first: Gradients, signs: Gradients, last: bool) -> Gradients:
    """The gradients of sum over the parameters in `signs` of signs·first."""
    try:
        found = torch.autograd.grad(
            [first[n] for n in signs],
            [aliases[n] for n in signs],
            [*signs.values()],
            retain_graph=not last,
            allow_unused=True,
        )
    except RuntimeError as error:
        if "deriv" in str(error) or "differentia" in str(error):
            raise InputError(
                f"an op of this model has no second derivative ({error}): use importance='fisher'"
            ) from error
        raise
    return {n: g.detach() for n, g in zip(signs, found, strict=True) if g is not None}


@contextmanager
def _twin(graph: DependencyGraph, names: Sequence[str]) -> Iterator[tuple[nn.Module, Aliases]]:
    """A copy of the model in eval mode, whose parameters in `names` want gradients, and these by name.

    Parameters share the memory of the model's own, unless the model writes into them; buffers are copies.
    """
    parameters, written = {id(p) for p in graph.model.parameters()}, _written(graph)
    with ExitStack() as stack:
        stack.enter_context(same_random_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_cudnn())  # its RNNs have no backward in eval mode
        stack.enter_context(eagerly())
        stand_in: dict[int, torch.Tensor] = {}
        aliases: Aliases = {}
        for name, tensor in all_tensors(graph.model).items():
            if id(tensor) in parameters:
                own = tensor.is_inference() or name in written
                shared = tensor.detach().clone() if own else tensor.detach()
                alias = nn.Parameter(shared, requires_grad=name in names)
                if name in names:
                    aliases[name] = alias
                stand_in[id(tensor)] = alias
            else:
                stand_in[id(tensor)] = tensor.detach().clone()
        yield skeleton(graph.model, stand_in).eval(), aliases


def _samples(batch: Batch) -> list[Batch]:
    """The samples of a batch, each a batch of one; an `InputError` where its tensors do not agree in their first dim."""
    whole = (batch.args, batch.kwargs, batch.target)
    counts = {t.shape[0] for t in tensor_leaves(whole) if t.dim()}
    if len(counts) != 1:
        raise InputError(
            f"a calibration batch cannot be split into samples: first dims of {sorted(counts)}\n"
            "  fix: give batches of one sample, or an importance that takes whole batches, such as 'taylor_squared'"
        )

    def at(i: int) -> Batch:
        return Batch(*map_tensors(whole, lambda t: t[i : i + 1] if t.dim() else t))

    return [at(i) for i in range(counts.pop())]
