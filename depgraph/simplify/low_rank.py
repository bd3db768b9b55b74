"""Layers as two factors: which can be, what the factors are, and how low their ranks fall under a budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from inspect import signature
from typing import Any

import torch
from torch import nn

from ..base.errors import InputError, suggestions
from ..data.calibration import Calibration
from ..data.consumers import Consumer, consumers
from ..data.watch import Call, Watch
from ..grouping.graph import DependencyGraph
from ..grouping.naming import Name, given_names
from ..plan.plan import Factor, Plan
from ..prune import analyze, prune
from ..select import BUDGETS
from ..surgery import factors
from ..surgery.apply import apply
from ..surgery.lineage import plans_of
from ..surgery.zeros import entries_of
from ..tracing.recorder import record_of
from ..tracing.tensors import named_tensors, take_values
from ..verify.verify import Verification
from .fusion import PRODUCTS, hooked, is_torchs
from .masking import check_names, name_in
from .result import Simplified, Summary, check_values, same_results

Tensor = torch.Tensor
TOLERANCE = 1e-9
RIDGE = 1e-9  # of the mean square of the inputs, added to each: what no sample moves is not free


@dataclass
class _Layer:
    """One layer that can become two.

    Attributes:
        path: where it is.
        weight: [out, inputs] float64; of a convolution the inputs are the entries of a window.
        root: a root of the inputs' second moments [inputs, inputs], lower triangular; None without calibration.
        moments: they themselves.
    """

    path: str
    weight: Tensor
    root: Tensor | None = None
    moments: Tensor | None = None

    def values(self) -> tuple[Tensor, Tensor]:
        """Factors of full rank: what the first puts out is uncorrelated and of size 1, the second has the singular values."""
        whole = self.weight if self.root is None else self.weight @ self.root
        up, values, down = torch.linalg.svd(whole, full_matrices=False)
        if self.root is not None:
            down = torch.linalg.solve_triangular(self.root, down, upper=False, left=False)
        return down, up * values

    def error(self, product: Tensor) -> float:
        """The mean square of what the result is off, with `product` for the weight, relative to that of the result."""
        return self._size(self.weight - product) / max(self._size(self.weight), 1e-300)

    def _size(self, matrix: Tensor) -> float:
        inner = matrix if self.moments is None else matrix @ self.moments
        return float((inner * matrix).sum())


@torch.inference_mode(False)
def factorise(
    model: nn.Module, x: Any, calibration: Iterable[Any] | None = None, *, ignore: Name | Sequence[Name] = (), **how_much: Any,
) -> Simplified:  # fmt: skip
    """Turn linear and convolution layers into two factors each, and lower their ranks as far as budgets ask.

    A layer W becomes B·A with A [rank, inputs] and B [out, rank], of a convolution one of its kernel and one of size 1. At full rank
    both compute the same. The ranks are then groups like any other: `prune` and its budgets cut them, and
    ``importance="spectrum"`` scores them by what a layer's result would be off.

    With a budget or ratio this is done here, for the ranks alone: the lowest share of each layer's energy goes first. A layer
    whose two factors would not be smaller than it was is put back as it was, and the rest is cut again.

    With calibration, factors are those that keep the results of the layer on these inputs (the weight is whitened by the
    inputs' second moments), as in Wang et al., "SVD-LLM", 2024; without, those closest to the weight.

    Args:
        model: any module; it is not touched.
        x: example inputs, as for `prune`.
        calibration: batches of inputs, as for `prune`.
        ignore: what to leave alone: modules and parameters, as module paths, parameter names, globs of them, or themselves.
        **how_much: as for `prune`: budgets such as ``max_params=0.7``, of the original's size, ``pruning_ratio`` (of ranks),
            ``scope``, ``round_to``, ``importance``, ``verify`` ... Without a budget or ratio every layer gets its full rank.

    Returns:
        the model with factors, a plan that says their ranks, and a report: for each layer the rank, and the relative error of
        its result as predicted by the moments and as measured sample by sample.

    Raises:
        InputError: there is no layer that can become two, or an argument is something else.
        TraceError, BudgetError, VerificationError: as for `prune`.
    """
    check_values(model)
    names = check_names(model, [name_in(model, given) for given in given_names("ignore", ignore)])
    refused = {"inplace", "graph", "constraints", "recover", "already_pruned"} & how_much.keys()
    if refused:
        raise InputError(f"factorise does not take {', '.join(sorted(refused))}: prune its result with them")
    known = {*signature(prune).parameters, *BUDGETS}
    if unknown := how_much.keys() - known:
        raise InputError(
            f"factorise has no argument {', '.join(sorted(unknown))}: {suggestions(min(unknown), sorted(known))}"
        )
    if "importance" in how_much:  # it may look at data
        how_much["calibration"] = calibration
    graph = analyze(model, x)
    layers, notes = _layers(model, graph, names)
    data = None if calibration is None else Calibration(calibration, x)
    seen = _moments(graph, data, layers) if data is not None else {}
    limits = _absolute(model, x, how_much)
    asked = bool(limits or how_much.keys() & {"pruning_ratio", "threshold", "scope"})
    while True:
        wide = _with_factors(model, layers)
        if not asked:
            ranks = {path: factors.full_rank(model.get_submodule(path)) for path in layers}
            found, proof = wide, _proof(model, wide, layers, x)
            break
        result = prune(wide, x, constraints=_only(layers), **{"importance": "spectrum", **how_much, **limits})
        found, proof = result.model, result.report.verification
        ranks = {path: len(found.get_submodule(path)[0].weight) for path in layers}  # type: ignore[index]
        back = [
            p for p, rank in ranks.items() if rank * sum(layers[p].weight.shape) >= layers[p].weight.numel()
        ]
        notes += [f"{p} is as it was: at rank {ranks[p]} two factors would not be smaller" for p in back]
        if not back:
            break
        for path in back:
            layers.pop(path)
        if not layers:
            found, ranks, proof = wide, {}, Verification("equal", detail="nothing was changed")
            break
    return _result(model, x, found, ranks, layers, proof, notes, graph, data, seen, how_much)


def _layers(
    model: nn.Module, graph: DependencyGraph, ignore: list[str]
) -> tuple[dict[str, _Layer], list[str]]:
    """The layers that can become two, by path, and remarks."""
    aliases, masked = graph.trace.aliases, entries_of(model)
    tied = {*aliases, *aliases.values()}
    found: dict[str, _Layer] = {}
    notes = []
    for path, layer in model.named_modules():
        if not factors.can_be_two(layer) or not path:
            continue
        weight: Any = layer.weight
        name = f"{path}.weight"
        if (
            any(fnmatch(name, g) or fnmatch(path, g) or path.startswith(f"{g}.") for g in ignore)
            or factors.full_rank(layer) < 2
        ):
            continue
        if why := _problem(path, layer, graph, name in tied, name in masked):
            notes.append(f"{path} is as it was: {why}")
        else:
            found[path] = _Layer(path, weight.detach().double().flatten(1))
    if not found:
        raise InputError(
            "no layer of this model can become two factors"
            + (f": {'; '.join(notes[:3])}" if notes else " (linear, or a convolution of one group)")
        )
    return found, notes


def _problem(path: str, layer: nn.Module, graph: DependencyGraph, tied: bool, masked: bool) -> str:
    """Why a layer can't become two, or ""."""
    node = graph.trace.tensors.get(f"{path}.weight")
    if node is None:
        return "no run on the example inputs read its weight"
    if tied or masked:
        return "its weight is tied" if tied else "its weight is masked"
    if not is_torchs(layer) or hooked(layer):
        return "it has hooks, or code of its own"
    for user in node.users:
        if user.target not in PRODUCTS or user.args[1] is not node or record_of(user).module != path:
            return f"its weight is read otherwise, at {record_of(user).source}"
    return ""


def _moments(graph: DependencyGraph, data: Calibration, layers: dict[str, _Layer]) -> dict[str, Consumer]:
    """The second moments of what each layer is given, into `layers`; the consumers of their weights, by path."""
    wanted = {
        c: c.name.removesuffix(".weight")
        for c in consumers(graph)
        if c.name.removesuffix(".weight") in layers and not c.reason
    }
    total: dict[str, Tensor] = {}
    count: dict[str, int] = {}

    def see(call: Call) -> None:
        path = wanted[call.consumer]
        for _, piece in call.inputs():
            inputs = piece.detach().double().flatten(1)
            product = inputs.T @ inputs
            total[path] = total[path] + product if path in total else product
            count[path] = count.get(path, 0) + len(inputs)

    Watch(graph.model, wanted, see).run_all(data, "inputs of layers")
    for path, product in total.items():
        moments = product / max(count[path], 1)
        ridge = RIDGE * max(float(moments.diagonal().mean()), 1e-30)
        layers[path].moments = moments
        layers[path].root = torch.linalg.cholesky(
            moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
        )
    return {path: consumer for consumer, path in wanted.items() if path in total}


def _absolute(model: nn.Module, x: Any, how_much: dict[str, Any]) -> dict[str, Any]:
    """Budgets of the original's size as numbers, which the model with factors of full rank is bigger than."""
    found = {}
    for name, kind in BUDGETS.items():
        given = how_much.get(name)
        if given is not None:
            found[name] = kind.spell(kind.amount(given, float(kind.measure(model, x))))
    return found


def _plan(model: nn.Module, ranks: dict[str, int], request: dict[str, Any]) -> Plan:
    tensors, aliases = named_tensors(model)
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    return Plan(
        shapes=shapes, aliases=aliases, factors=[Factor(p, r) for p, r in ranks.items()], request=request
    )


def _with_factors(model: nn.Module, layers: dict[str, _Layer]) -> nn.Module:
    """A copy of `model` whose layers are two of full rank."""
    made = apply(
        model,
        Plan(
            shapes={n: tuple(t.shape) for n, t in named_tensors(model)[0].items()},
            aliases=named_tensors(model)[1],
        ),
    )
    for path, layer in layers.items():
        factors.replace(made, Factor(path, min(layer.weight.shape)), layer.values())
    return made


def _only(layers: dict[str, _Layer]) -> Any:
    """A constraint: nothing but the ranks may go."""
    names = {f"{path}.0.weight" for path in layers}

    def lock(graph: DependencyGraph) -> None:
        for group in graph.groups:
            if not any(m.name in names and m.dim == 0 for m in group.members):
                graph.lock(group, "is no rank")

    return lock


def _proof(model: nn.Module, wide: nn.Module, layers: dict[str, _Layer], x: Any) -> Verification:
    def remake(other: nn.Module) -> nn.Module:
        return _with_factors(other, layers)

    return same_results(model, wide, x, TOLERANCE, remake)


def _result(
    model: nn.Module, x: Any, found: nn.Module, ranks: dict[str, int], layers: dict[str, _Layer], proof: Verification,
    notes: list[str], graph: DependencyGraph, data: Calibration | None, seen: dict[str, Consumer], how_much: dict[str, Any],
) -> Simplified:  # fmt: skip
    request = {
        "factorise": "spectrum",
        **{k: v for k, v in how_much.items() if isinstance(v, (int, float, str))},
    }
    plan = _plan(model, ranks, request)
    made = apply(model, plan)
    take_values(made, found)
    made.train(model.training)
    products = {}
    for path in ranks:
        pair: Any = made.get_submodule(path)
        products[path] = pair[1].weight.detach().double().flatten(1) @ pair[
            0
        ].weight.detach().double().flatten(1)
    measured = _measured(graph, data, {p: (layers[p].weight, products[p]) for p in ranks}, seen)
    rows = [
        {
            "layer": path, "rank": rank, "of": min(layers[path].weight.shape), "before": layers[path].weight.numel(),
            "after": rank * sum(layers[path].weight.shape), "predicted_error": layers[path].error(products[path]),
            "measured_error": measured[path],
        }
        for path, rank in ranks.items()
    ]  # fmt: skip
    title = f"{len(ranks)} layer{'' if len(ranks) == 1 else 's'} as two factors"
    report = Summary.of(title, model, made, x, rows=rows, verification=proof, notes=notes)
    return Simplified(made, plan, report, plans_of(model))


def _measured(
    graph: DependencyGraph,
    data: Calibration | None,
    pairs: dict[str, tuple[Tensor, Tensor]],
    seen: dict[str, Consumer],
) -> dict[str, float]:
    """How far each layer's results are off, sample by sample, relative to their mean square; of others its weight."""
    sums = {path: [0.0, 0.0] for path in pairs}
    paths = {consumer: path for path, consumer in seen.items() if path in pairs}

    def see(call: Call) -> None:
        path = paths[call.consumer]
        weight, product = pairs[path]
        for _, piece in call.inputs():
            inputs = piece.detach().double().flatten(1)
            result = inputs @ weight.T
            sums[path][0] += float((inputs @ product.T - result).square().sum())
            sums[path][1] += float(result.square().sum())

    if data is not None and paths:
        Watch(graph.model, paths, see).run_all(data, "errors of layers")
    for path, (weight, product) in pairs.items():
        if path not in seen:
            sums[path] = [float((weight - product).square().sum()), float(weight.square().sum())]
    return {path: off / max(whole, 1e-300) for path, (off, whole) in sums.items()}
