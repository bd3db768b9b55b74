"""Seconds of a forward pass on this machine, as a function of how many units each group keeps.

A table of measured layers. The model and a few uniformly pruned copies of it are run, and each call of a module is
timed, less the calls inside it. A row is a module; what it is looked up by is its work at given widths: multiply-
accumulates, and bytes that its ops write. Between measured points the seconds are interpolated, beyond them continued.

What else the machine does is kept out in two ways: a pass of one thread takes the processor time of that thread, and two
models are compared by pairs of passes in turn (A B A B), which are slowed alike.

The table knows nothing of how layers follow each other, and odd widths may be slower than it thinks: a pruned model is
measured afresh, and planned again with what the table was wrong by, until it is within the budget (`budgets.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..base.checks import a_module, is_number, shown
from ..base.errors import DepgraphError, InputError, TraceError, could_not_run
from ..base.inputs import Arguments, each_example
from ..base.running import in_mode
from ..base.switches import ModuleCall, around_calls, same_random_state
from ..grouping.graph import DependencyGraph
from ..tracing.recorder import record_of
from .size_table import Floats, Integers, SizeTable

try:
    import resource

    _COUNTS_WAITS = hasattr(resource, "RUSAGE_THREAD")
except ImportError:  # not on Windows
    _COUNTS_WAITS = False

Timer = Callable[[nn.Module, Any], float]  # (model, example inputs) -> seconds of one forward pass
RATIOS = (0.0, 0.25, 0.5, 0.75)  # of the copies that are timed
PAIRS, MOST_TURNS = 3, 6  # calls of a timer of the user's in a row; so often pairs are taken at most
CLOSE = 0.02  # the spread with which a ratio is known well enough
LONG = 0.4  # seconds that a measurement of one model takes, where 10 to 100 passes fit
MAC_BYTES = 0.25  # a multiply-accumulate takes about as long as moving so many bytes: it only places widths on one line


class Now(NamedTuple):
    """A moment of this thread: by the clock on the wall, by the processor time it had, and how often it had waited."""

    wall: float
    worked: float
    waits: int


def now() -> Now:
    """This moment."""
    waits = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw if _COUNTS_WAITS else 0
    return Now(time.perf_counter(), time.thread_time(), waits)


def seconds_since(start: Now) -> float:
    """How long this thread took since `start`, without the time in which others had its processor.

    A thread that never waited (for other threads, a device, a file) took its processor time; else, and where the system
    does not count waits, the clock on the wall says it.
    """
    end = now()
    worked = end.worked - start.worked
    return worked if _COUNTS_WAITS and end.waits == start.waits and worked > 0 else end.wall - start.wall


class LatencyTable:
    """Seconds of one forward pass at given counts: the sum of its rows.

    Row r has measured points (work, seconds), ascending in work; work is ``macs * MAC_BYTES + bytes written``.
    """

    def __init__(self, graph: DependencyGraph) -> None:
        """Rows for the modules of `graph`, without points: see `add`."""
        work = graph.state.work
        calls = [(n, record_of(n)) for n in graph.trace.graph.nodes if n.op == "call_function"]
        made = [n for n, record in calls if record.one_tensor and not record.training]
        self.paths = list(dict.fromkeys(record_of(n).module for n in [*made, *(n for n, _ in work)]))
        self.row = {path: i for i, path in enumerate(self.paths)}
        rows = len(self.paths)
        self.macs, self.written = SizeTable(graph, rows), SizeTable(graph, rows)
        for n, factors in work:
            self.macs.add(factors, row=self.row[record_of(n).module])
        for n in made:
            self.written.add(
                graph.state.dims[n][0], record_of(n).dtype.itemsize, self.row[record_of(n).module]
            )
        self.points: list[tuple[Floats, Floats]] = []  # [rows] work, [rows] seconds

    def add(self, counts: Integers, seconds: Mapping[str, float]) -> None:
        """A measured model: seconds by module path, at `counts`."""
        times = np.array([seconds.get(path, 0.0) for path in self.paths])
        self.points.append((self._work(counts), times))

    def value(self, counts: Integers) -> float:
        """Seconds at `counts`."""
        return float(self._rows(counts)[0].sum())

    def slopes(self, counts: Integers) -> Floats:
        """How fast they grow with each count."""
        rate = self._rows(counts)[1]
        return self.macs.slopes(counts, rate * MAC_BYTES) + self.written.slopes(counts, rate)

    def _work(self, counts: Integers) -> Floats:
        return (self.macs.values(counts) * MAC_BYTES + self.written.values(counts)).astype(np.float64)

    def _rows(self, counts: Integers) -> tuple[Floats, Floats]:
        """[rows] seconds at `counts`, and by how much they grow with the work."""
        at = self._work(counts)
        work, seconds = (np.stack([p[k] for p in self.points], axis=1) for k in (0, 1))  # [rows, points]
        order = np.argsort(work, axis=1, kind="stable")
        work, seconds = np.take_along_axis(work, order, 1), np.take_along_axis(seconds, order, 1)
        seconds = np.maximum.accumulate(seconds, axis=1)  # less work is not slower: what says so is noise
        right = np.clip((work < at[:, None]).sum(1), 1, work.shape[1] - 1)
        index = np.arange(len(at))
        x0, x1 = work[index, right - 1], work[index, right]
        y0, y1 = seconds[index, right - 1], seconds[index, right]
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(x1 > x0, (y1 - y0) / (x1 - x0), 0.0)
        return np.maximum(y0 + rate * (at - x0), 0.0), rate


def shared_out(graph: DependencyGraph, counts: Integers, seconds: float) -> dict[str, float]:
    """`seconds` of a whole pass by path of module, by the work of each: what a timer that sees no modules leaves to know."""
    table = LatencyTable(graph)
    work = table._work(counts)
    return dict(zip(table.paths, (work * (seconds / max(float(work.sum()), 1e-300))).tolist(), strict=True))


def measure_rows(model: nn.Module, example_inputs: Any) -> dict[str, float]:
    """Median seconds that each module spends in itself in one forward pass, by path; together they are `latencies`."""
    whole = measure_latency(model, example_inputs)
    runs: list[dict[str, float]] = []
    examples = each_example(example_inputs)
    with same_random_state(), torch.no_grad(), _timed(model) as rows:
        for _ in _passes(whole):
            rows.clear()
            _run(model, examples)
            runs.append(dict(rows))
    paths = {path for run in runs for path in run}
    found = {path: float(np.median([run.get(path, 0.0) for run in runs])) for path in paths}
    total = sum(found.values())
    return {path: t * whole / total for path, t in found.items()} if total else found


def measure_latency(model: nn.Module, example_inputs: Any) -> float:
    """Median seconds of one forward pass (of one on each of `Examples`), in eval mode without gradients.

    After three passes to warm up, 10 to 100 are timed: as many as fit into 0.4 s.

    Args:
        model: any module; its modes are as they were afterwards.
        example_inputs: as for `prune`.
    """
    a_module("model", model)
    return latencies([model], example_inputs)[0]


def latencies(models: Sequence[nn.Module], example_inputs: Any) -> list[float]:
    """Median seconds of one forward pass (of one on each of `Examples`) of each model, in eval mode without gradients."""
    return [float(np.median(found)) for found in _in_turns(models, example_inputs)]


@dataclass(frozen=True)
class Pairs:
    """Two models that were timed in turns: what else the machine does slows both of a pair alike.

    Attributes:
        before: median seconds of one forward pass of the reference.
        after: those of the other model: `ratio` times as many.
        ratio: the median over the pairs.
        spread: how far that median may be off, as a share of it: about one time in twenty it is off by more.
        count: how many pairs there are.
    """

    before: float
    after: float
    ratio: float
    spread: float
    count: int


def pairs_of(
    reference: nn.Module, model: nn.Module, example_inputs: Any, timer: Timer | None = None
) -> Pairs:
    """Time two models in turns (A B A B), until the ratio is known well enough or that has taken long.

    Args:
        reference: the larger one.
        model: the other one.
        example_inputs: as for `prune`.
        timer: ``timer(model, example_inputs)`` -> seconds of a pass, of yours; by default eager runs on this machine.

    Raises:
        InputError: `timer` gives something else than seconds.
    """
    times: list[list[float]] = [[], []]
    for _ in range(MOST_TURNS):
        if timer is None:
            more = _in_turns([reference, model], example_inputs)
        else:
            more = [list(t) for t in zip(*([timed(timer, m, example_inputs) for m in (reference, model)]
                                           for _ in range(PAIRS)), strict=True)]  # fmt: skip
        times = [a + b for a, b in zip(times, more, strict=True)]
        found = _summed_up(*times)
        if found.spread < CLOSE:
            break
    return found


def _summed_up(before: list[float], after: list[float]) -> Pairs:
    ratios = np.divide(after, before)
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    spread = (
        2 * 1.25 * (high - low) / 1.35 / math.sqrt(len(ratios)) / middle
    )  # of a median, by the middle half
    usual = float(np.median(before))
    return Pairs(usual, usual * float(middle), float(middle), float(spread), len(ratios))


def timed(timer: Timer, model: nn.Module, example_inputs: Any) -> float:
    """What a timer of the user's says of `model`, whose modes are as they were afterwards."""
    with in_mode(model, False), torch.no_grad():
        seconds = timer(model, example_inputs)
    if not is_number(seconds) or not math.isfinite(seconds) or seconds <= 0:
        raise InputError(f"latency must return seconds above 0, not {shown(seconds)}")
    return float(seconds)


def relative_latency(model: nn.Module, reference: nn.Module, example_inputs: Any) -> float:
    """How long a pass of `model` takes, in passes of `reference`: see `pairs_of`."""
    return pairs_of(reference, model, example_inputs).ratio


def _in_turns(models: Sequence[nn.Module], example_inputs: Any) -> list[list[float]]:
    """Seconds of each pass of each model; the models take turns."""
    times: list[list[float]] = [[] for _ in models]
    examples = each_example(example_inputs)
    with ExitStack() as stack:
        stack.enter_context(same_random_state())
        stack.enter_context(torch.no_grad())
        for model in models:
            stack.enter_context(in_mode(model, False))
        slowest = max(min(_run(model, examples) for _ in range(3)) for model in models)
        for _ in _passes(slowest):
            for model, found in zip(models, times, strict=True):
                found.append(_run(model, examples))
    return times


def _passes(seconds: float) -> Iterable[int]:
    return range(max(10, min(100, math.ceil(LONG / max(seconds, 1e-6)))))


def _run(model: nn.Module, examples: Sequence[Arguments]) -> float:
    """Seconds of one pass; a `TraceError` where the model rejects the inputs."""
    start = now()
    try:
        for example in examples:
            example.run(model)
    except DepgraphError:
        raise
    except Exception as error:
        raise TraceError(could_not_run(error)) from error
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return seconds_since(start)


@contextmanager
def _timed(model: nn.Module) -> Iterator[dict[str, float]]:
    """While this lasts, seconds that each module of `model` spends in itself are added up in the dict it gives."""
    rows: dict[str, float] = {}
    inner = [0.0]
    wait: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def around(path: str, module: nn.Module, run: ModuleCall) -> Any:
        inner.append(0.0)
        wait()
        start = now()
        try:
            return run()
        finally:
            wait()
            spent = seconds_since(start)
            rows[path] = rows.get(path, 0.0) + spent - inner.pop()
            inner[-1] += spent

    with in_mode(model, False), around_calls(model, around):
        yield rows
