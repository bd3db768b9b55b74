"""Zeros among single weights: what is scored, which entries go, and how many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..base.checks import function, is_number, is_whole, number, shown
from ..base.errors import InputError, VerificationError, listed
from ..data.calibration import Loss
from ..grouping.naming import Name, given_names
from ..plan.bits import Bits
from ..plan.plan import Plan
from ..surgery.apply import apply
from ..surgery.lineage import plans_of
from ..surgery.zeros import entries_of
from ..tracing.tensors import named_tensors
from ..verify.verify import Verification
from .result import Simplified, Summary, check_values
from .threshold import lowest
from .weight_scores import scored

Tensor = torch.Tensor
SCOPES = ("global", "local")
CRITERIA = ("magnitude", "gradient", "taylor", "wanda", "random")
Pattern = tuple[int, int]
DEFAULT = 0.8


@torch.inference_mode(False)
def mask(
    model: nn.Module, x: Any = None, *, sparsity: float = DEFAULT, scope: str = "global",
    importance: str | Callable[..., Tensor] = "magnitude", pattern: Pattern | None = None, threshold: float | None = None,
    ignore: Name | Sequence[Name] = (), calibration: Iterable[Any] | None = None, loss: Loss | None = None,
) -> Simplified:  # fmt: skip
    """Set single weights to zero, and keep them zero.

    The weights are the parameters of at least two dims, but for those of embeddings (whose entries no product sums over),
    learned tokens and positions (of three dims or more, the first of size 1) and what parametrizations compute weights from. The masked model has the parameters and names of the one given. Its zeros stay
    zero in whatever a `torch.optim.Optimizer` does, also in copies of it, under AMP and in DistributedDataParallel. Entries
    that a model has been masked in before stay masked and count.

    Args:
        model: any module; it is not touched.
        x: example inputs, as for `prune`; criteria that look at data need them, and the report counts MACs on them.
        sparsity: the share of zeros, from 0 to below 1: exactly ``round(sparsity * n)`` of n weights, of equal scores those
            that come first.
        scope: "global": all weights compete; "local": each tensor loses the same share.
        importance: the lowest scores go: "magnitude", abs(w); "gradient", abs(g); "taylor", abs(w·g), with g the gradient of
            the mean loss; "wanda", abs(w) times the norm of the input that it meets, with ``scope="local"`` within each row
            (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023); "random"; or a function of
            a weight, or of its name and itself, that returns a tensor of its shape.
        pattern: (n, m) with n < m, such as (2, 4): of each m consecutive inputs of a row, n stay, and `sparsity` is 1 - n / m;
            inputs of a convolution are in the order of ``weight.flatten(1)``. (n, n), such as (32, 32): blocks of so many rows
            and inputs go as a whole, by the sum of their scores.
        threshold: instead of a share: the weights whose score is below this go.
        ignore: what to leave alone: modules and parameters, as module paths, parameter names, globs of them, or themselves.
        calibration: batches for criteria that look at data, as for `prune`; by default `x` alone.
        loss: ``loss(output, target)`` -> scalar, for "gradient" and "taylor", with batches that are (inputs, target). By
            default what the model returns as its loss, or else half the mean square of its outputs.

    Returns:
        the masked model, a plan whose ``mask(name)`` tells single entries, and a report.

    Raises:
        InputError: a sparsity outside [0, 1), a pattern that does not divide a weight, unknown names, missing inputs, or scores
            that are NaN or of another shape.
        TraceError: the model rejects the inputs.
    """
    check_values(model)
    names = check_names(model, [name_in(model, given) for given in given_names("ignore", ignore)])
    share = _checked(sparsity, scope, importance, pattern, threshold)
    before = entries_of(model)
    weights, notes = _weights(model, names)
    _check_divides(weights, pattern)
    arguments = 1 if isinstance(importance, str) else takes(importance)
    scores, unseen, transposed = scored(model, x, importance, weights, calibration, loss, arguments)
    for name in unseen:
        notes.append(f"{name} stays whole: {unseen[name]}")
        weights.pop(name)
    choice = _Choice(weights, scores, before, pattern, scope, transposed if importance == "wanda" else None)
    if threshold is not None:
        found = choice.below(threshold)
    else:
        found = choice.lowest_share(share)
    total = sum(w.numel() for w in weights.values())
    entries = {name: _kept(gone, before.get(name)) for name, gone in found if bool(gone.any())}
    request: dict[str, Any] = {"threshold": threshold} if threshold is not None else {"sparsity": share}
    request |= {"scope": scope, "importance": importance if isinstance(importance, str) else "a function"}
    request |= {"pattern": list(pattern)} if pattern else {}
    return masked(model, x, {**before, **entries}, notes, request, total)


def chosen(
    weights: dict[str, Tensor], scores: Callable[[str], Tensor], sparsity: Any, scope: Any, pattern: Any
) -> Iterator[tuple[str, Tensor]]:
    """Which entries of `weights` (of which the shapes and types are looked at alone) go, by their scores."""
    share = _checked(sparsity, scope, "magnitude", pattern, None)
    _check_divides(weights, pattern)
    return _Choice(weights, scores, {}, pattern, scope, None).lowest_share(share)


def _kept(gone: Tensor, before: Bits | None) -> Bits:
    """What stays of a weight; what was zero before does not come back."""
    return Bits.of(~gone if before is None else ~gone & before.mask())


def masked(
    model: nn.Module, x: Any, entries: dict[str, Bits], notes: list[str], request: dict[str, Any], of: int
) -> Simplified:
    """`model` with zeros where `entries` say, its plan and its report; `of` weights could be zero."""
    tensors, aliases = named_tensors(model)
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    plan = Plan(shapes=shapes, aliases=aliases, entries=entries, request=request)
    made = apply(model, plan)
    proof = _compared(tensors, named_tensors(made)[0], plan)
    rows, zeros = [], 0
    for name, bits in entries.items():
        count, gone = tensors[name].numel(), bits.gone
        zeros += gone
        rows.append({"weight": name, "entries": count, "zeros": gone, "sparsity": gone / count})
    total = sum(p.numel() for p in model.parameters())
    report = Summary.of(
        "single weights", model, made, x, rows=rows, verification=proof, notes=notes,
        parameters=(total, total - zeros),
        figures={"zeros": zeros, "sparsity": zeros / max(1, of)},
    )  # fmt: skip
    return Simplified(made, plan, report, plans_of(model))


def _checked(sparsity: Any, scope: Any, importance: Any, pattern: Any, threshold: Any) -> float:
    """The share of zeros, where all arguments can be taken."""
    if not is_number(sparsity) or not 0 <= sparsity < 1:
        raise InputError(
            f"sparsity must be from 0 to below 1, not {shown(sparsity)}: 0.8 sets 80 % of the weights to zero"
        )
    if scope not in SCOPES:
        raise InputError(f"scope must be one of {', '.join(SCOPES)}, not {shown(scope)}")
    if isinstance(importance, str):
        if importance not in CRITERIA:
            raise InputError(
                f"importance must be a function of a weight or one of {', '.join(CRITERIA)}, not {shown(importance)}"
            )
    else:
        function("importance", importance, *("name", "weight")[-takes(importance) :])
    if threshold is not None:
        number("threshold", threshold)
        if pattern is not None or sparsity != DEFAULT:
            raise InputError("threshold says how much goes: leave sparsity and pattern away")
    if pattern is None:
        return float(sparsity)
    if (
        not isinstance(pattern, (tuple, list))
        or len(pattern) != 2
        or not all(is_whole(n) and n > 0 for n in pattern)
    ):
        raise InputError(
            f"pattern must be two whole numbers, such as (2, 4) or (32, 32), not {shown(pattern)}"
        )
    kept, of = pattern
    if kept > of:
        raise InputError(
            f"pattern {tuple(pattern)}: at most {of} of {of} inputs can stay; blocks are squares, such as ({of}, {of})"
        )
    if kept == of:
        return float(sparsity)
    if sparsity not in (DEFAULT, 1 - kept / of):
        raise InputError(
            f"pattern {tuple(pattern)} means a sparsity of {1 - kept / of:g}: leave sparsity={sparsity} away"
        )
    return 1 - kept / of


def takes(importance: Any) -> int:
    """How many arguments a criterion of the user's takes: 1 (the weight) or 2 (its name before)."""
    try:
        signature(importance).bind("name", "weight")
    except (TypeError, ValueError):
        return 1
    return 2


def name_in(model: nn.Module, given: Name) -> str:
    """What the model calls a module or parameter."""
    if isinstance(given, str):
        return given
    for name, one in (*model.named_modules(), *model.named_parameters(remove_duplicate=False)):
        if one is given:
            return name or "*"
    raise InputError(f"ignore: this {type(given).__name__} is not in the model")


def check_names(model: nn.Module, ignore: list[str]) -> list[str]:
    """`ignore`, where each name or glob in it names something of the model."""
    names = {n for n, _ in model.named_parameters()}
    modules = {path for path, _ in model.named_modules() if path}
    unknown = [g for g in ignore if not any(fnmatch(n, g) for n in (*names, *modules))]
    if unknown:
        raise InputError(f"ignore: {', '.join(map(repr, unknown))} is no module or parameter of the model")
    return ignore


def _weights(model: nn.Module, ignore: list[str]) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters whose entries can go, and remarks."""
    tables = {
        id(p)
        for m in model.modules()
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag))
        for p in m.parameters(recurse=False)
    }
    found, computed, tokens = {}, [], []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        if parameter.dim() < 2 or not parameter.is_floating_point() or id(parameter) in tables:
            continue
        if any(fnmatch(path, g) for path in paths for g in ignore):
            continue
        if (
            parameter.dim() > 2
            and len(parameter) == 1
            and not isinstance(model.get_submodule(paths[-2] if parts[1:] else ""), _ConvNd)
        ):
            tokens.append(name)
            continue
        if parameter.layout is not torch.strided or "parametrizations" in parts:
            computed.append(name)
        else:
            found[name] = parameter.detach()
    if not found:
        raise InputError(
            "there is no weight to mask: no parameter of two dims or more, other than embeddings, is left"
        )
    notes = [f"{n} stays whole: a weight is computed from it, or it is sparse" for n in computed]
    return found, [*notes, *(f"{n} stays whole: it is added to every sample alike" for n in tokens)]


def _check_divides(weights: dict[str, Tensor], pattern: Pattern | None) -> None:
    if pattern is None:
        return
    rows, columns = pattern if pattern[0] == pattern[1] else (1, pattern[1])
    wrong = [
        f"{name} has {len(w)} rows of {w[0].numel()} inputs"
        for name, w in weights.items()
        if len(w) % rows or not w.numel() or w[0].numel() % columns
    ]
    if wrong:
        what = f"{rows} rows and {columns} inputs" if rows > 1 else f"{columns} inputs"
        raise InputError(
            listed(f"pattern {tuple(pattern)} does not divide these weights into parts of {what}:", wrong)
            + f"\n  fix: leave them alone, ignore={[line.split()[0] for line in wrong[:3]]}"
        )


@dataclass
class _Choice:
    """Which entries go: True in the masks that its methods hand out."""

    weights: dict[str, Tensor]
    scores: Callable[[str], Tensor]
    before: dict[str, Bits]
    pattern: Pattern | None
    scope: str
    by_row: set[str] | None  # compare within rows, or within columns of the weights in it

    def score(self, name: str) -> Tensor:
        """The scores of a weight; what is zero already comes first. Of blocks, one each."""
        given = self.scores(name)
        if name in self.before:
            given = given.masked_fill(~self.before[name].mask().to(given.device), -torch.inf)
        if self.pattern is not None and self.pattern[0] == self.pattern[1]:
            n = self.pattern[0]
            rows = given.flatten(1)
            return rows.view(len(rows) // n, n, rows.shape[1] // n, n).sum((1, 3))
        return given

    def lowest_share(self, share: float) -> Iterator[tuple[str, Tensor]]:
        """The lowest `share` of all scores, or of those of each tensor."""
        if self.pattern is not None and self.pattern[0] < self.pattern[1]:
            yield from self._in_groups(*self.pattern)
            return
        if self.scope == "global":
            yield from self._chosen(list(self.weights), share)
            return
        for name in self.weights:
            if self.by_row is not None and self.pattern is None:
                given = self.score(name)
                yield name, _by_row(given.T, share).T if name in self.by_row else _by_row(given, share)
            else:
                yield from self._chosen([name], share)

    def below(self, threshold: float) -> Iterator[tuple[str, Tensor]]:
        """What scores less."""
        for name in self.weights:
            yield name, (self.score(name) < threshold).cpu()

    def _chosen(self, names: list[str], share: float) -> Iterator[tuple[str, Tensor]]:
        per = self.pattern[0] ** 2 if self.pattern else 1
        total = sum(self.weights[n].numel() for n in names) // per
        kind = torch.float64 if any(self.weights[n].dtype == torch.float64 for n in names) else torch.float32
        for name, gone in lowest(lambda: ((n, self.score(n)) for n in names), round(share * total), kind):
            yield name, self._whole(name, gone)

    def _whole(self, name: str, gone: Tensor) -> Tensor:
        """Blocks as entries."""
        if self.pattern is None:
            return gone
        n = self.pattern[0]
        return gone.repeat_interleave(n, 0).repeat_interleave(n, 1).view(self.weights[name].shape)

    def _in_groups(self, kept: int, of: int) -> Iterator[tuple[str, Tensor]]:
        """Of each `of` consecutive inputs the lowest but `kept`."""
        for name in self.weights:
            given = self.score(name).cpu()
            groups = given.flatten(1).view(len(given), -1, of)
            order = groups.argsort(dim=-1, stable=True)[..., : of - kept]
            gone = torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, order, True)
            yield name, gone.view(given.shape)


def _by_row(scores: Tensor, share: float) -> Tensor:
    """The lowest of each row; the rows together lose exactly the share, the first ones one more where it does not divide."""
    rows = scores.cpu().flatten(1)
    total, width = round(share * rows.numel()), rows.shape[1]
    counts = torch.full((len(rows),), total // len(rows))
    counts[: total % len(rows)] += 1
    order = rows.argsort(dim=1, stable=True)
    gone = torch.zeros(rows.shape, dtype=torch.bool)
    gone.scatter_(1, order, torch.arange(width) < counts[:, None])
    return gone.view(scores.shape)


def _compared(before: dict[str, Tensor], after: dict[str, Tensor], plan: Plan) -> Verification:
    """Every tensor must be the one given, with zeros where the plan has them."""
    for name, tensor in before.items():
        bits, made = plan.entries.get(name), after[name]
        wanted = (
            tensor.detach()
            if bits is None
            else torch.where(bits.mask().to(tensor.device), tensor.detach(), 0.0)
        )
        if tensor.layout is torch.strided and not torch.equal(made.detach(), wanted.to(made.dtype)):
            raise VerificationError(f"{name!r} is not the weight given with zeros in it")
    return Verification("equal", 0.0, "each tensor is the one given, with zeros where the plan has them")
