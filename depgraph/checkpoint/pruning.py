"""The one call: look at the model without values, read them once, choose, plan, and write what stays, file by file."""

from __future__ import annotations

import copy
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..base.checks import a_path, flag, is_whole, shown
from ..base.errors import InputError, TraceError
from ..base.inputs import Examples, Outputs, checked_outputs, with_outputs
from ..base.memory import returned_at_once
from ..base.processes import Processes, together
from ..base.progress import bytes_bar
from ..base.weights import Weights
from ..data.calibration import Calibration, Loss
from ..depth.request import Depth, depth_of
from ..grouping.graph import DependencyGraph
from ..grouping.naming import Name, given_names
from ..importance import Importance, Prepared, needs_of, scores_of
from ..plan.plan import Plan
from ..prune import (
    Constraint,
    Widths,
    analyzed,
    by_rule,
    check_finite,
    planned,
    recovery_of,
    scored_by,
    shortened,
    stated_again,
    stated_constraints,
)
from ..recover import adds_bias, on_synthetic
from ..recover import check as check_recovery
from ..search import Settled
from ..select import Request, Scope
from ..select.budget_kinds import BYTES
from ..surgery.apply import apply, assign
from ..tracing.tensors import all_tensors, named_tensors
from ..verify.verify import Verification
from ..verify.weights import ROOM, DrawnValues
from .bound import Bound
from .original import Original
from .outcome import CheckpointResult, written
from .recovering import recovered
from .shell import fill_buffers, shell_of
from .source import FromFiles, Share, Unshared
from .writing import check_out, scratch_for

Tensor = torch.Tensor
VERIFY = ("values", "structure", False)
PROOF = 60_000_000  # bytes of what both runs of a proof compute with
WORKING = 120_000_000  # bytes that reading and writing take beside what the process has: blocks, sums, plans


@dataclass(frozen=True)
class Forecast:
    """What a pruning of a checkpoint will take, said before a value is read.

    Attributes:
        bytes_read: of the checkpoint.
        bytes_written: of the smaller one; exact where every group loses its own share, else about.
        parameters: of the model, before and (likewise) after.
        memory: bytes that it will take at most beside what the process has, about.
        seconds: about, at the rate of a block in memory on this machine; a slower disk takes longer.
        free: bytes that the disk of `out` has left.
    """

    bytes_read: int
    bytes_written: int
    parameters: tuple[int, int]
    memory: int
    seconds: float
    free: int

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**vars(self), "parameters": {"before": self.parameters[0], "after": self.parameters[1]}}

    def __str__(self) -> str:
        before, after = self.parameters
        return (
            f"would read {self.bytes_read / 1e9:.2f} GB and write about {self.bytes_written / 1e9:.2f} GB ({self.free / 1e9:.1f} GB "
            f"free); {before:,} parameters become about {after:,}; about {self.memory / 1e9:.2f} GB of memory and "
            f"{self.seconds:.0f} s, more where the disk is slow"
        )


def prune(
    folder: str | os.PathLike[str], example_inputs: Any, *, out: str | os.PathLike[str],
    factory: Callable[[], nn.Module] | str | None = None, memory: int | str = "6GB", verify: str | bool = "values",
    pruning_ratio: float | Mapping[str, float] | None = None, max_params: float | str | None = None,
    max_macs: float | str | None = None, max_bytes: float | str | None = None, max_memory: float | str | None = None,
    max_latency: float | str | None = None, importance: str | Importance = "auto", scope: str | Sequence[Scope] | None = None,
    max_ratio: float | None = None, normalise: str | None = None, per_cost: bool | None = None, ignore: Name | Sequence[Name] = (),
    round_to: int | str = "auto", uniform: bool = False, constraints: Constraint | Sequence[Constraint] = (),
    granularity: str | None = None, calibration: Iterable[Any] | None = None, loss: Loss | None = None, recover: Any = None,
    progress: bool | None = None, strict: bool = False, already_pruned: Plan | None = None,
    within: Plan | None = None, threshold: float | None = None, depth: bool | Depth | None = None, outputs: Outputs | None = None,
    dry_run: bool = False, timeout: float = 21600.0, **further_budgets: float | str | None,
) -> CheckpointResult | Forecast:  # fmt: skip
    """Prune a checkpoint of safetensors files without holding its model.

    The model is built and looked at without memory for its parameters. Their values are read once, for the scores, in blocks of
    rows; sums of them are kept beside the folder, so that another ratio needs no second reading. What stays is written
    file by file into ``out.partial``, which gets its name at the end; a run that was killed continues there. The checkpoint
    itself is not touched, and types stay as they are in its files.

    Under torchrun, or in a process group of torch.distributed, all processes call this with the same arguments. Each
    reads and writes its own files, on a disk that all share; the first one chooses and compares. All return the same, and the
    result is that of one process.

    Args:
        folder: a folder of ``.safetensors`` files, with an index where there are several. What else is in it (tokenizer,
            README) is copied.
        example_inputs: as for `depgraph.prune`.
        out: the smaller checkpoint; a new folder.
        factory: builds the model, or ``"package.module:function"``; its ``state_dict`` has the names that are in the files. Not
            needed where ``config.json`` in the folder names a class that `from_pretrained` knows.
        memory: bytes that this may take at most, such as ``"6GB"``, beside what the process has when the model is built (libraries,
            your data); what takes more is refused with what it takes.
        verify: ``"values"``: the smaller model is compared with the masked original on weights drawn from a seed, and then on
            those in the files, which exist only while their module runs. ``"structure"``: on drawn ones alone, which reads
            nothing. False: not at all.
        pruning_ratio: as for `depgraph.prune`, and so are the following.
        max_params: likewise.
        max_macs: likewise.
        max_bytes: likewise.
        max_memory: likewise.
        max_latency: refused: it needs a model that runs here.
        importance: likewise. Criteria that look at inputs (``"wanda"``, ``"flap"``, ``"obs"``, ``"kfac_obs"`` ...) run the model on the
            calibration data with weights that are read when they are used; those that need gradients of all weights
            (``"taylor"`` and its like) take the model in memory, where that fits.
        scope: likewise.
        max_ratio: likewise.
        normalise: likewise.
        per_cost: likewise.
        ignore: likewise.
        round_to: likewise.
        uniform: likewise.
        constraints: likewise.
        granularity: likewise.
        calibration: likewise, for criteria that look at data, and for recovery.
        loss: likewise.
        recover: likewise, but for functions of your own; each layer is solved when all batches have come to it, and new values
            are put aside in a file.
        progress: show bars with bytes, rate and time left; None: on a terminal alone.
        strict: likewise.
        already_pruned: likewise.
        within: likewise.
        threshold: likewise.
        depth: likewise, with ``Depth(keep=...)``, with ``alone=True``, or with a ratio for both: under budgets how many branches go beside
            widths is not searched for, since that compares whole models. To rank branches by anything but their size the model is run
            once for each that goes (once in all, if they are `contiguous`), with weights that are read when they are used.
        outputs: likewise.
        dry_run: say what it will take, read and write nothing.
        timeout: seconds that one of several processes waits for another: more than one takes for its files, and the first one
            for the proof. One that exits is noticed at once.
        **further_budgets: those of `register_budget`.

    Returns:
        A `CheckpointResult`; with `dry_run`, a `Forecast`.

    Raises:
        InputError: bad arguments; a checkpoint that is incomplete, damaged or does not fit its model, or has pickled, packed or
            quantised weights; NaN or infinite values, with their place; too little memory or disk. Nothing was written.
        TraceError: the model rejects the inputs.
        NothingToPruneError: everything is frozen.
        BudgetError: the budget is below what can be reached.
        VerificationError: the result would not equal the masked original. There is no `out`.
        StoreError: a file can't be read or written; what was written is kept, and the same call continues.
        DepgraphError: what another process raised; or it ended, or kept this one waiting too long.
    """
    arguments = dict(locals())
    with together(timeout, "what was written is kept: the same call continues") as ranks, returned_at_once():
        if ranks.count > 1 and calibration is not None:
            raise InputError(
                "calibration runs the model, which is the work of one process: leave it away, or call this in one process"
            )
        recover = _recovery(recover, importance, calibration)
        asked, importance = importance, by_rule(arguments, further_budgets, calibration is not None)
        if max_latency is not None:
            raise InputError(
                "max_latency needs a model that runs on this machine: use max_macs or max_params"
            )
        request, shorter = Request.of(arguments, further_budgets), depth_of(depth)
        names, stated = given_names("ignore", ignore), stated_constraints(constraints)
        flag("strict", strict)
        flag("dry_run", dry_run)
        if not (verify is False or (isinstance(verify, str) and verify in VERIFY)):
            raise InputError(f"verify must be 'values', 'structure' or False, not {shown(verify)}")
        if progress is not None:
            flag("progress", progress)
        bound = byte_amount("memory", memory)
        source, target = a_path("folder", folder), a_path("out", out)
        if not dry_run:
            check_out(target, source)
        progress = False if ranks.rank else progress
        data = None if calibration is None else Calibration(calibration, example_inputs, loss, progress)
        original = Original.of(source, factory)
        try:
            weights = original.weights()
            weights.check = Bound(bound).check
            weights.room = min(weights.room, bound // 16)
            example_inputs = with_outputs(example_inputs, checked_outputs(outputs))
            how = (names, strict, stated, granularity)
            graph = _analyzed(original, weights, example_inputs, how, bound, dry_run, needs_of(importance))
            if not isinstance(example_inputs, Examples) or example_inputs.outputs is None:
                example_inputs = with_outputs(example_inputs, graph.trace.counted)
            runs = data is not None or (shorter is not None and shorter.by != "magnitude")
            if dry_run:
                needed = needed_memory(original, verify, weights.room, runs)[0]
                return _forecast(original, graph, example_inputs, request, shorter, how, target, needed)
            _check_memory(original, bound, verify, weights.room, runs)
            if data is not None:
                data.memory = bound - needed_memory(original, False, weights.room, True)[0]
                check_finite(graph, set())
            notes: list[str] = []
            wanted = request, shorter, how, importance, asked, verify
            chosen = _chosen(graph, weights, example_inputs, wanted, data, notes, progress, ranks)
            with ExitStack() as stack:
                won = None
                if recover is not None and data is not None:
                    aside = stack.enter_context(scratch_for(target))
                    unshifted = chosen.unshifted
                    task = graph, unshifted.model, unshifted.plan, data, recover, example_inputs
                    won = recovered(*task, weights, aside, progress)
                weights.check = lambda what: None
                end = example_inputs, target, verify, notes, progress, won, ranks
                return written(original, weights, chosen.found, chosen.removed, *end)
        finally:
            original.checkpoint.close()


def _recovery(recover: Any, importance: str | Importance, calibration: Iterable[Any] | None) -> Any:
    """What recovers, checked."""
    recover = recovery_of(recover, importance, calibration)
    if callable(recover):
        raise InputError(
            "recover can't be a function here, which would need both models in memory: name a method, such as 'auto'"
        )
    if recover is not None:
        check_recovery(recover, calibration)
    if on_synthetic(recover):
        raise InputError(
            "'synthetic' in recover runs a model in memory: give calibration=[...] and 'auto' in its place"
        )
    if adds_bias(recover):
        raise InputError(
            "'new_bias' in recover makes tensors that the files of the checkpoint lack: leave it away, or prune the model in memory"
        )
    return recover


class _Chosen(NamedTuple):
    """What goes; the same with stand-ins for what was removed, in the original's names; and the names of branches that go."""

    found: Settled
    unshifted: Settled
    removed: list[str]


def _chosen(
    graph: DependencyGraph, weights: FromFiles, example_inputs: Any, wanted: tuple[Any, ...], data: Calibration | None,
    notes: list[str], progress: bool | None, ranks: Processes,
) -> _Chosen:  # fmt: skip
    """What goes, by values that all processes read, chosen and compared by the first of them."""
    request, shorter, how, importance, asked, verify = wanted
    drawn = DrawnValues(all_tensors(graph.model), _floats(graph.model))
    drawn.room = weights.room
    proof = drawn if graph.weights is weights else True
    sizes = weights.checkpoint.sizes
    own = ranks.dealt(sizes)
    found = None
    with bytes_bar("reading weights", sum(sizes[file] for file in own), progress) as weights.seen:
        if ranks.count > 1 and graph.weights is weights:
            _read_together(graph, weights, importance, asked, own, ranks)
        if not ranks.rank:
            try:
                proved = proof if verify else False
                if shorter is None:
                    alone = planned(graph, example_inputs, request, importance, data, proved, notes, asked)
                    found = _Chosen(alone, alone, [])
                else:
                    widths = _widths(graph, example_inputs, importance, data, notes, how)
                    short = shortened(graph, shorter, request, widths, asked, proved)
                    settled = Settled(short.model, short.plan, short.verification, graph)
                    found = _Chosen(settled, short.unshifted, [b.name for b in short.branches])
            finally:
                weights.memory.save()
    text = ranks.of_first(found.found.plan.to_json() if found else None)
    if found is not None:
        return found
    plan = Plan.from_json(text)
    settled = Settled(apply(graph.model, plan), plan, Verification("skipped"), graph)
    return _Chosen(settled, settled, [])


def _widths(
    graph: DependencyGraph, example_inputs: Any, importance: str | Importance, data: Calibration | None, notes: list[str],
    how: tuple[Any, ...],
) -> Widths:  # fmt: skip
    """How widths are cut of the model of `graph`, from which branches go."""
    again = stated_again(graph, *how)
    return Widths(importance, data, example_inputs, notes, again, weights=graph.elsewhere)


def _read_together(
    graph: DependencyGraph, weights: FromFiles, importance: str | Importance, asked: str | Importance, files: set[str],
    ranks: Processes,
) -> None:  # fmt: skip
    """Each process reads its own `files` for the scores; what it has found in them goes into the notes of all."""
    stored = weights.checkpoint.stored
    own = {name for name, laid in weights.laid.items() if stored[laid.parts[0].name].file in files}
    graph.weights = Share(weights, own)
    try:
        check_finite(graph, scored_by(asked, graph))
        if isinstance(importance, str | Prepared):
            scores_of(graph, copy.deepcopy(importance))
    except Unshared:
        pass
    finally:
        graph.weights = weights
    for news in ranks.gathered(weights.memory.news()):
        weights.memory.add(news)


def shell(folder: str | os.PathLike[str], factory: Callable[[], nn.Module] | str | None = None) -> nn.Module:
    """The model of a checkpoint without memory for its parameters, which are on the meta device; buffers have their values.

    Args:
        folder: as for `prune`.
        factory: likewise.

    Raises:
        InputError: as for `prune`.
    """
    original = Original.of(a_path("folder", folder), factory)
    original.checkpoint.close()
    return original.model


def byte_amount(name: str, given: Any) -> int:
    """A number of bytes: a positive int, or a text with a unit."""
    match = (
        re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", given) if isinstance(given, str) else None
    )
    if match is not None and match[2] in BYTES and float(match[1]) > 0:
        return int(float(match[1]) * BYTES[match[2]])
    if is_whole(given) and given > 0:
        return int(given)
    raise InputError(
        f"{name} must be a number of bytes, or a text with a unit ({', '.join(BYTES)}), such as '6GB', not {shown(given)}"
    )


def _floats(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.is_floating_point()}


def _analyzed(
    original: Original,
    weights: FromFiles,
    example_inputs: Any,
    how: tuple[Any, ...],
    bound: int,
    dry_run: bool,
    needs: str,
) -> DependencyGraph:
    """The graph of the model without values; where its code or a criterion needs them all, and they fit, of the model with them."""
    names, strict, stated, granularity = how
    needed = 3 * original.checkpoint.bytes
    try:
        if needs != "loss" or dry_run:
            return analyzed(original.model, example_inputs, names, strict, stated, granularity, weights)
        needed = 5 * original.checkpoint.bytes
        if needed > bound:
            raise InputError(
                f"this importance takes gradients of all weights, and for that the model in memory, about {needed / 1e9:.2g} GB; "
                f"memory={bound / 1e9:.2g} GB\n  fix: give more memory, or importance='kfac_obs', 'obs', 'wanda' or 'flap'"
            )
    except TraceError as error:
        if needed > bound:
            raise TraceError(
                f"{error}\n  (it was run without values, as memory={bound / 1e9:.2g} GB allows; with them it would take "
                f"{needed / 1e9:.2g} GB)"
            ) from error
    model = shell_of(original.make)
    if original.files is not None:
        original.files.give_computed(model, original.laid)
    tensors = named_tensors(model)[0]
    source: Weights = DrawnValues(tensors, _floats(model)) if dry_run else weights
    values = {
        n: nn.Parameter(source.whole(n).to(t.dtype, copy=True), t.requires_grad)
        for n, t in tensors.items()
        if t.is_meta and isinstance(t, nn.Parameter)
    }
    assign(model, {n: tensors[n] for n in values}, values)
    fill_buffers(model, original.laid, weights.stored)
    return analyzed(model, example_inputs, names, strict, stated, granularity)


def needed_memory(original: Original, verify: Any, kept: int, runs: bool = False) -> tuple[int, str]:
    """Bytes that a pruning takes at most, about, and the name of the tensor that takes most of it.

    `kept` is what runs keep of weights; whether there are `runs` on data, which say what else they take when they are made.
    """
    tensors = named_tensors(original.model)[0]
    here = WORKING + (kept if runs else 0)
    if not verify:
        return here, ""
    made = {n: 3 * 8 * t.numel() for n, t in tensors.items() if t.is_meta and t.dim() != 2}
    largest = max(made, key=lambda n: made[n], default="")
    widened = 2 * 8 * min(ROOM, kept // 8, sum(t.numel() for t in tensors.values()))
    return here + PROOF + widened + made.get(largest, 0), largest


def _check_memory(original: Original, bound: int, verify: Any, kept: int, runs: bool) -> None:
    """Refuse a bound that can't hold."""
    needed, largest = needed_memory(original, verify, kept, runs)
    if needed > bound:
        most = (
            f", most of it to compare {largest!r}"
            if largest and needed_memory(original, False, kept, runs)[0] <= bound
            else ""
        )
        fix = f'memory="{math.ceil(needed / 1e8) / 10:g}GB"' + (", or verify=False" if most else "")
        raise InputError(
            f"memory={bound / 1e9:.3g} GB is too little: this takes about {needed / 1e9:.2f} GB{most}\n  fix: {fix}"
        )


class _Unread(DrawnValues):
    """Values that nobody looks at: a forecast takes them to be finite."""

    def kept(self, key: str, compute: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """True."""
        return [True]


def _forecast(
    original: Original, graph: DependencyGraph, example_inputs: Any, request: Request, depth: Depth | None, how: tuple[Any, ...],
    out: Path, memory: int,
) -> Forecast:  # fmt: skip
    """What it will take, by a plan for scores that are drawn."""
    graph.weights = _Unread(all_tensors(graph.model), set())
    if depth is None:
        small = planned(graph, example_inputs, request, "random", None, False, []).model
    else:
        widths = _widths(graph, example_inputs, "random", None, [], how)
        small = shortened(graph, replace(depth, by="magnitude"), request, widths, "random", False).model
    before, after = (sum(p.numel() for p in m.parameters()) for m in (graph.model, small))
    size = original.checkpoint.bytes
    written = int(size * after / max(before, 1))
    block = torch.linspace(-1, 1, 1 << 22)
    begin = time.perf_counter()
    for _ in range(4):
        block.to(torch.bfloat16).float().abs_().sum()
    rate = 4 * 2 * len(block) / (time.perf_counter() - begin)
    parent = next(p for p in (out, *out.parents) if p.exists())
    return Forecast(
        size, written, (before, after), memory, (size + written + size) / rate,
        shutil.disk_usage(parent).free,
    )  # fmt: skip
