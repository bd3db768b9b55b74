"""The size chosen by the input: a small one for every row, and a larger one for the rows that it is not sure of.

Source: the largest probability as confidence and one threshold, as in Wang et al., "IDK Cascades: Fast Deep Learning by
Learning not to Overthink", UAI 2018. The bound is exact: Clopper and Pearson, Biometrika 1934, for the share of rows that
the whole has right and the cascade wrong, and for the share where it is the other way round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..base.checks import fraction, is_number, shown
from ..base.errors import InputError
from ..base.inputs import each_example
from ..base.running import in_mode
from ..base.tables import printed, table
from ..base.values import map_tensors
from ..data.calibration import Batch, Calibration
from ..training.train import logits_of

if TYPE_CHECKING:
    from .elastic import Elastic

Bools = npt.NDArray[np.bool_]
STEPS = 200  # thresholds that are tried


@dataclass(frozen=True)
class CascadeReport:
    """What a cascade did on held-out rows; prints as a table.

    Attributes:
        rows: how many there were.
        shares: size -> the share of rows whose answer it gave.
        seconds: mean over the held-out rows, as these batches run on this machine.
        whole_seconds: the same of the whole model.
        drop: the accuracy of the whole less that of the cascade; without classes in the calibration data, the share of
            rows where they differ.
        bound: what that loss is below, with probability `confidence` over the draw of the rows.
        confidence: see `bound`.
    """

    rows: int
    shares: dict[float, float]
    seconds: float
    whole_seconds: float
    drop: float
    bound: float
    confidence: float

    @property
    def speedup(self) -> float:
        """How many times faster than the whole the cascade is."""
        return self.whole_seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"speedup": self.speedup}

    def __str__(self) -> str:
        cells = table("cascade", "size", "share of the inputs")
        for size, share in self.shares.items():
            cells.add_row(f"{size:g}", f"{share:.1%}")
        return printed(
            cells,
            f"{self.seconds * 1e3:.3g} ms a row, {self.speedup:.2f} times faster than the whole",
            f"accuracy lost on {self.rows:,} held-out rows: {self.drop:.2%}, below {self.bound:.2%} with {self.confidence:.0%} confidence",
        )


class Cascade:
    """Runs a small size on every row, and a larger one on those rows that it is not sure of; see `Elastic.cascade`.

    Each row of what it returns is what the sub-model that answered gives for it.

    Attributes:
        sizes: in the order in which they are asked, the whole last.
        threshold: a row whose largest probability is below this goes on to the next.
        report: what it did on held-out rows; None without calibration data.
    """

    def __init__(self, elastic: Elastic, sizes: Sequence[float], threshold: float) -> None:
        """`sizes` of `elastic`, rising, with one `threshold` from 0 to 1."""
        self.elastic, self.sizes, self.threshold = elastic, tuple(sizes), threshold
        self.report: CascadeReport | None = None
        self._modules: dict[float, list[nn.Module]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns for these inputs, row by row from the size that answered."""
        return self.routed(*args, **kwargs)[0]

    def _in_eval(self, size: float, part: nn.Module) -> Any:
        """`part` in eval mode; where it is in it as a whole, that is seen sooner than `in_mode` sees it."""
        if size not in self._modules:
            self._modules[size] = list(part.modules())
        return in_mode(part, False) if any(m.training for m in self._modules[size]) else nullcontext()

    @torch.no_grad()
    def routed(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """What the model returns, and [rows] the size that answered each row.

        Args:
            *args: of the model. A tensor whose first dim is the number of rows is one input a row.
            **kwargs: likewise.

        Raises:
            InputError: the model returns no row of class scores for each input.
        """
        result, answered, left = None, torch.zeros(0), None
        for size in self.sizes:
            part, inputs = self.elastic.to_call(size), (args, kwargs)
            if left is not None:
                inputs = map_tensors(inputs, _rows(left, len(answered)))
            with self._in_eval(size, part):
                output = part(*inputs[0], **inputs[1])
            scores = class_scores(output)
            if left is None:
                result, answered = (
                    output,
                    torch.full((len(scores),), size, dtype=torch.float64, device=scores.device),
                )
                left = torch.arange(len(scores), device=scores.device)
            else:
                result = (
                    output if len(left) == len(answered) else _merged(result, output, left, len(answered))
                )
                answered[left] = size
            if size != self.sizes[-1]:
                left = left[scores.softmax(-1).amax(-1) < self.threshold]
            if not len(left):
                break
        return result, answered


def fitted(
    elastic: Elastic, threshold: Any, calibration: Iterable[Any] | None, drop: float, confidence: float
) -> Cascade:  # fmt: skip
    """The cascade that `Elastic.cascade` describes."""
    fraction("drop", drop, zero=True)
    fraction("confidence", confidence)
    auto = isinstance(threshold, str) and threshold == "auto"
    if not auto and not (is_number(threshold) and 0 <= threshold <= 1):
        raise InputError(f"threshold must be 'auto' or from 0 to 1, not {shown(threshold)}")
    if auto and calibration is None:
        raise InputError(
            "threshold='auto' is found on data: give calibration=[...], batches of (inputs, classes)"
        )
    rising = elastic.sizes[::-1]
    first = each_example(elastic._inputs)[0]
    with torch.no_grad(), in_mode(elastic.model, False):
        class_scores(first.run(elastic.model))
    made = Cascade(elastic, rising, 1.0 if auto else float(threshold))
    if calibration is None:
        return made
    batches = list(Calibration(calibration, elastic._inputs).batches("reading calibration data"))
    if len(batches) < 2:
        raise InputError("calibration has one batch: give at least two, of which the last half is held out")
    if auto:
        sure, right = _answers(elastic, rising, batches[: len(batches) // 2])
        costs = elastic.latencies(batches[0].kwargs or batches[0].args)
        made.sizes, made.threshold = _cheapest(rising, [costs[s] for s in rising], sure, right, drop)
    made.report = tried(made, batches[len(batches) // 2 :], confidence)
    return made


def tried(cascade: Cascade, batches: Sequence[Batch], confidence: float) -> CascadeReport:
    """What `cascade` does on `batches`, beside the whole model."""
    whole = cascade.elastic.at(1)
    times: list[list[float]] = [[], []]
    sizes, harm, gain = [], 0, 0
    with torch.no_grad(), in_mode(whole, False):
        for batch in batches:
            for run, found in ((cascade, times[0]), (whole, times[1])):
                start = time.perf_counter()
                batch.run(run)
                found.append(time.perf_counter() - start)
            output, answered = cascade.routed(*batch.args, **batch.kwargs)
            wanted = class_scores(whole(*batch.args, **batch.kwargs)).argmax(-1)
            truth = wanted if batch.target is None else classes_of(batch.target, wanted)
            mine, theirs = class_scores(output).argmax(-1) == truth, wanted == truth
            harm, gain = harm + int((theirs & ~mine).sum()), gain + int((mine & ~theirs).sum())
            sizes.append(answered.cpu())
    chosen = torch.cat(sizes)
    n, doubt = len(chosen), (1 - confidence) / 2
    shares = {s: float((chosen == s).float().mean()) for s in cascade.sizes}
    mine_s, whole_s = (float(np.sum(found)) / n for found in times)
    bound = upper(harm, n, doubt) - (1 - upper(n - gain, n, doubt))
    return CascadeReport(n, shares, mine_s, whole_s, (harm - gain) / n, bound, confidence)


def class_scores(output: Any) -> Tensor:
    """The class scores [rows, classes] in what a model returns, or an `InputError`."""
    scores = logits_of(output, "a cascade's model")
    if scores.dim() != 2 or scores.shape[1] < 2 or not scores.is_floating_point():
        raise InputError(
            f"a cascade needs class scores [rows, classes], and the model returns {list(scores.shape)} {scores.dtype}\n"
            "  fix: choose the size yourself (switch, serve); for language models, a small size as the assistant"
        )
    return scores


def classes_of(target: Any, like: Tensor) -> Tensor:
    """Targets as classes [rows], on the device of `like`, or an `InputError`."""
    if not isinstance(target, Tensor) or target.shape != like.shape or target.is_floating_point():
        raise InputError(
            f"a cascade's targets must be {len(like)} classes, whole numbers, not {shown(target)}"
        )
    return target.to(like.device)


def _answers(elastic: Elastic, sizes: Sequence[float], batches: Sequence[Batch]) -> tuple[Any, Bools]:
    """[sizes, rows]: how sure each size is, and whether it is right."""
    sure, right = [], []
    with torch.no_grad():
        for batch in batches:
            found = []
            for size in sizes:
                part = elastic.at(size)
                with in_mode(part, False):
                    found.append(class_scores(batch.run(part)).softmax(-1).max(-1))
            truth = found[-1].indices
            if batch.target is not None:
                truth = classes_of(batch.target, truth)
            sure.append(torch.stack([f.values for f in found]))
            right.append(torch.stack([f.indices == truth for f in found]))
    return torch.cat(sure, 1).double().cpu().numpy(), torch.cat(right, 1).cpu().numpy()


def _cheapest(
    sizes: Sequence[float], costs: Sequence[float], sure: Any, right: Bools, drop: float
) -> tuple[tuple[float, ...], float]:
    """The sizes to ask, and the threshold, that cost least; at worst the whole alone.

    The loss on these rows and its standard error are at most `drop` together: the cheapest of many is one that was lucky.
    """
    last = len(sizes) - 1
    best: tuple[float, tuple[float, ...], float] = float(costs[-1]), (sizes[-1],), 1.0
    tried = np.unique(np.quantile(sure[:last], np.linspace(0, 1, STEPS))) if last else np.zeros(0)
    chains = [c for n in range(1, last + 1) for c in combinations(range(last), n)]
    for chain in chains:
        for threshold in tried:
            left, cost = np.ones(sure.shape[1], dtype=bool), 0.0
            fine = np.zeros(sure.shape[1], dtype=bool)
            for i in (*chain, last):
                cost += costs[i] * left.mean()
                fine[left] = right[i][left]
                left = left & (sure[i] < threshold)
            lost = right[last].astype(float) - fine
            if cost < best[0] and lost.mean() + lost.std() / len(lost) ** 0.5 <= drop:
                best = cost, tuple(sizes[i] for i in (*chain, last)), float(threshold)
    return best[1], best[2]


def _rows(left: Tensor, count: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t[left.to(t.device)] if t.dim() and len(t) == count else t


def _merged(result: Any, output: Any, rows: Tensor, count: int) -> Any:
    """`result` with `rows` of every tensor those of `output`."""
    (mine, form), (theirs, other) = pytree.tree_flatten(result), pytree.tree_flatten(output)
    fine = form == other and all(not isinstance(t, Tensor) or (t.dim() and len(t) == count) for t in mine)
    if not fine:
        raise InputError("a cascade needs outputs that have a row for each input, and nothing else")
    made = [
        t.index_copy(0, rows, new) if isinstance(t, Tensor) else t
        for t, new in zip(mine, theirs, strict=True)
    ]
    return pytree.tree_unflatten(made, form)


def upper(count: int, of: int, doubt: float) -> float:
    """What a share is below of which `count` in `of` were seen, but for a probability of `doubt` (Clopper, Pearson 1934)."""
    if count >= of:
        return 1.0
    k = np.arange(count + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, of + 1)))])
    ways = logs[of] - logs[k] - logs[of - k]
    low, high = count / of, 1.0
    for _ in range(60):
        p = (low + high) / 2
        at_most = np.exp(ways + k * np.log(p) + (of - k) * np.log1p(-p)).sum() if p < 1 else 0.0
        low, high = (p, high) if at_most > doubt else (low, p)
    return float(high)
