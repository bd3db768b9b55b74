"""The one call: look at the model without values, read them once, choose, plan, and write what stays, file by file."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.checks import a_path, flag, is_whole, shown
from ..base.errors import InputError, TraceError, VerificationError, listed
from ..base.progress import bytes_bar
from ..base.version import __version__
from ..base.weights import Weights
from ..grouping.graph import DependencyGraph
from ..grouping.naming import Name, given_names
from ..importance import Importance, normalisation
from ..integrations import PRETRAINED_FILES
from ..plan.plan import Cut, Plan
from ..prune import Constraint, analyzed, planned, stated_constraints
from ..report import Report
from ..search import Settled
from ..select import Request, Scope
from ..select.budget_kinds import BYTES
from ..store.document import FILE_NAME
from ..store.factory import resolved
from ..store.files import INDEX, PICKLES, Checkpoint, opened
from ..store.layout import Laid, NotMoved, pulled_back, stored_names
from ..store.saving import SHARD_BYTES, described
from ..store.weights import CODES, FILE, MODEL, NAMES, OTHER, Entry
from ..store.weights import write as write_tensors
from ..surgery.apply import assign
from ..tracing.tensors import all_tensors, named_tensors
from ..verify.verify import Verification
from ..verify.verify import verify as verify_values
from ..verify.weights import ROOM, DrawnValues
from .shell import check_laid, fill_buffers, laid_by_name, shell_of
from .source import FromFiles, Notes
from .writing import Folder, Written, check_out, cut_blocks, folder_for, total

Tensor = torch.Tensor
VERIFY = ("values", "structure", False)
WORKING = 300_000_000  # bytes that reading and writing take beside what the process has: blocks, sums, plans
WEIGHTS = (".safetensors", INDEX, *PICKLES, ".onnx", ".gguf", ".tflite", ".safetensors.partial")


@dataclass(frozen=True)
class Forecast:
    """What a pruning of a checkpoint will take, said before a value is read.

    Attributes:
        bytes_read: of the checkpoint.
        bytes_written: of the smaller one; exact where every group loses its own share, else about.
        parameters: of the model, before and (likewise) after.
        memory: bytes that it will have resident at most, about.
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


@dataclass(repr=False)
class CheckpointResult:
    """What `prune` returns.

    Attributes:
        folder: the smaller checkpoint.
        plan: what was removed.
        report: figures before and after.
        differences: what loading it by its config alone would get wrong; [] where ``from_pretrained(folder)`` gives the smaller
            model. Otherwise, and for a model of a factory, `depgraph.load` or `load_pretrained` loads it.
        load: the line that loads it.
        peak_memory: bytes that this process had resident at most, so far.
    """

    folder: Path
    plan: Plan
    report: Report
    differences: list[str]
    load: str
    peak_memory: int

    def __repr__(self) -> str:
        return f"{self.report}\n{self.folder}: {self.load}"


def prune(
    folder: str | os.PathLike[str], example_inputs: Any, *, out: str | os.PathLike[str],
    factory: Callable[[], nn.Module] | str | None = None, memory: int | str = "6GB", verify: str | bool = "values",
    pruning_ratio: float | Mapping[str, float] | None = None, max_params: float | str | None = None,
    max_macs: float | str | None = None, max_bytes: float | str | None = None, max_memory: float | str | None = None,
    max_latency: float | str | None = None, importance: str | Importance = "l1", scope: str | Sequence[Scope] | None = None,
    max_ratio: float | None = None, normalise: str | None = None, per_cost: bool = False, ignore: Name | Sequence[Name] = (),
    round_to: int = 1, uniform: bool = False, constraints: Constraint | Sequence[Constraint] = (),
    granularity: str | None = None, progress: bool | None = None, strict: bool = False, already_pruned: Plan | None = None,
    threshold: float | None = None, dry_run: bool = False, **further_budgets: float | str | None,
) -> Any:  # fmt: skip
    """Prune a checkpoint of safetensors files without holding its model.

    The model is built and looked at without memory for its parameters. Their values are read once, for the scores, in blocks of
    rows; sums of them are kept beside the folder, so that another ratio needs no second reading. What stays is written
    file by file into ``out.partial``, which gets its name at the end; a run that was killed continues there. The checkpoint
    itself is not touched, and types stay as they are in its files.

    Args:
        folder: a folder of ``.safetensors`` files, with an index where there are several. What else is in it (tokenizer,
            README) is copied.
        example_inputs: as for `depgraph.prune`.
        out: the smaller checkpoint; a new folder.
        factory: builds the model, or ``"package.module:function"``; its ``state_dict`` has the names that are in the files. Not
            needed where ``config.json`` in the folder names a class of transformers.
        memory: bytes that may be resident at most, such as ``"6GB"``; what takes more is refused with what it takes.
        verify: ``"values"``: the smaller model is compared with the masked original on weights drawn from a seed, and then on
            those in the files, which exist only while their module runs. ``"structure"``: on drawn ones alone, which reads
            nothing. False: not at all.
        pruning_ratio: as for `depgraph.prune`, and so are the following.
        max_params: likewise.
        max_macs: likewise.
        max_bytes: likewise.
        max_memory: likewise.
        max_latency: refused: it needs a model that runs here.
        importance: likewise; a criterion that looks at weights alone.
        scope: likewise.
        max_ratio: likewise.
        normalise: likewise.
        per_cost: likewise.
        ignore: likewise.
        round_to: likewise.
        uniform: likewise.
        constraints: likewise.
        granularity: likewise.
        progress: show bars with bytes, rate and time left; None: on a terminal alone.
        strict: likewise.
        already_pruned: likewise.
        threshold: likewise.
        dry_run: say what it will take, read and write nothing.
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
    """
    arguments = dict(locals())
    arguments["normalise"] = normalise if normalise is not None else normalisation(importance)
    if max_latency is not None:
        raise InputError("max_latency needs a model that runs on this machine: use max_macs or max_params")
    request = Request.of(arguments, further_budgets)
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
    original = Original.of(source, factory)
    try:
        weights = original.weights()
        how = (names, strict, stated, granularity)
        graph = _analyzed(original, weights, example_inputs, how, bound, dry_run)
        if dry_run:
            return _forecast(original, graph, example_inputs, request, target, verify)
        _check_memory(original, bound, verify)
        notes: list[str] = []
        drawn: Weights = DrawnValues(all_tensors(graph.model), _floats(graph.model))
        proof = drawn if graph.weights is weights else True
        with bytes_bar("reading weights", original.checkpoint.bytes, progress) as weights.seen:
            try:
                found = planned(
                    graph, example_inputs, request, importance, None, proof if verify else False, notes
                )
            finally:
                weights.memory.save()
        return _written(original, weights, found, example_inputs, target, verify, notes, progress)
    finally:
        original.checkpoint.close()


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


# ------------------------------------------------------------------------------------------------- what there is


@dataclass
class Original:
    """A checkpoint and its model.

    Attributes:
        checkpoint: the files.
        model: without memory for its parameters.
        laid: how its tensors lie in the files.
        further: stored tensors that the model does not have, and what they would be called in it.
        passed: further ones, which its class passes over when it loads: they are not copied.
        make: builds the model again.
        files: the integration that knows such folders; None with a factory.
    """

    checkpoint: Checkpoint
    model: nn.Module
    laid: dict[str, Laid]
    further: dict[str, str]
    passed: list[str]
    make: Callable[[], nn.Module]
    files: Any = None

    @classmethod
    def of(cls, folder: Path, factory: Any) -> Original:
        """What is in a folder, looked at; an `InputError` says what is wrong with it."""
        if factory is not None:
            make = resolved(factory)
            checkpoint = opened(folder)
            model = shell_of(make)
            laid, further = laid_by_name(model, checkpoint)
            found = cls(checkpoint, model, laid, further, [], make)
        else:
            checkpoint = opened(folder)
            files = importlib.import_module(PRETRAINED_FILES)
            if not files.has_config(folder):
                raise InputError(
                    f"{folder} has no config.json that says what its model is: give factory=..., a function that builds it"
                )
            make = files.maker(folder)
            model = shell_of(make, f"{folder / 'config.json'}")
            laid, further, passed = files.laid(model, checkpoint)
            files.give_computed(model, laid)
            found = cls(checkpoint, model, laid, further, passed, make, files)
        check_laid(found.model, found.laid, checkpoint)
        weights = found.weights()
        fill_buffers(found.model, found.laid, weights.stored)
        return found

    def weights(self) -> FromFiles:
        """The values in the files."""
        return FromFiles(
            self.checkpoint, self.laid, all_tensors(self.model), Notes(self.checkpoint, self.laid)
        )


def _analyzed(
    original: Original,
    weights: FromFiles,
    example_inputs: Any,
    how: tuple[Any, ...],
    bound: int,
    dry_run: bool,
) -> DependencyGraph:
    """The graph of the model without values; where its code needs them, and they fit into memory, of the model with them."""
    names, strict, stated, granularity = how
    try:
        return analyzed(original.model, example_inputs, names, strict, stated, granularity, weights)
    except TraceError as error:
        needed = 3 * original.checkpoint.bytes + held()
        if needed > bound:
            raise TraceError(
                f"{error}\n  (it was run without values, as memory={bound / 1e9:.2g} GB allows; with them it would take "
                f"{needed / 1e9:.2f} GB)"
            ) from error
    model = shell_of(original.make)
    if original.files is not None:
        original.files.give_computed(model, original.laid)
    tensors = named_tensors(model)[0]
    source: Weights = DrawnValues(tensors, _floats(model)) if dry_run else weights
    values = {
        n: nn.Parameter(source.whole(n).to(t.dtype, copy=True), t.requires_grad)
        for n, t in tensors.items()
        if t.is_meta
    }
    assign(model, {n: tensors[n] for n in values}, values)
    fill_buffers(model, original.laid, weights.stored)
    return analyzed(model, example_inputs, names, strict, stated, granularity)


def held() -> int:
    """Bytes that this process has resident now; 0 where the system does not say it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, LookupError, AttributeError):
        return 0


def resident() -> int:
    """Bytes that this process has resident at most, so far; 0 where the system does not say it."""
    if sys.platform == "win32":
        return 0
    import resource  # noqa: PLC0415  not every system has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def needed_memory(original: Original, verify: Any) -> tuple[int, str]:
    """Bytes that a pruning takes at most, about, and the name of the tensor that takes most of it."""
    here = held() + WORKING
    if not verify:
        return here, ""
    tensors = named_tensors(original.model)[0]
    made = {n: 3 * 8 * t.numel() for n, t in tensors.items() if t.is_meta and t.dim() != 2}
    largest = max(made, key=lambda n: made[n], default="")
    return here + min(ROOM, sum(t.numel() for t in tensors.values())) * 8 + made.get(largest, 0), largest


def _check_memory(original: Original, bound: int, verify: Any) -> None:
    """Refuse a bound that can't hold."""
    needed, largest = needed_memory(original, verify)
    if needed > bound:
        most = (
            f", most of it to compare {largest!r}"
            if largest and needed_memory(original, False)[0] <= bound
            else ""
        )
        fix = "memory=..." + (", or verify=False" if most else "")
        raise InputError(
            f"memory={bound / 1e9:.3g} GB is too little: this takes about {needed / 1e9:.2f} GB{most}\n  fix: {fix}"
        )


class _Unread(DrawnValues):
    """Values that nobody looks at: a forecast takes them to be finite."""

    def kept(self, key: str, compute: Callable[[], Sequence[Any]]) -> Sequence[Any]:
        """True."""
        return [True]


def _forecast(
    original: Original, graph: DependencyGraph, example_inputs: Any, request: Request, out: Path, verify: Any
) -> Forecast:
    """What it will take, by a plan for scores that are drawn."""
    graph.weights = _Unread(all_tensors(graph.model), set())
    found = planned(graph, example_inputs, request, "random", None, False, [])
    before, after = (sum(p.numel() for p in m.parameters()) for m in (graph.model, found.model))
    size = original.checkpoint.bytes
    written = int(size * after / max(before, 1))
    block = torch.linspace(-1, 1, 1 << 22)
    begin = time.perf_counter()
    for _ in range(4):
        block.to(torch.bfloat16).float().abs_().sum()
    rate = 4 * 2 * len(block) / (time.perf_counter() - begin)
    parent = next(p for p in (out, *out.parents) if p.exists())
    return Forecast(
        size, written, (before, after), needed_memory(original, verify)[0], (size + written + size) / rate,
        shutil.disk_usage(parent).free,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- what is written


@dataclass
class Layout:
    """What the new folder will have.

    Attributes:
        files: file -> its tensors.
        metadata: file -> what its header says beside them.
        wrong: what loading by the config alone would get wrong; None where there is no config.
        stock: whether files have the names and the order of the original's.
        names: names in the files -> tensors of the model, where they are one and the same.
    """

    files: dict[str, list[Written]]
    metadata: dict[str, dict[str, str]]
    wrong: list[str] | None
    stock: bool
    notes: list[str] = field(default_factory=list)


def _written(
    original: Original, weights: FromFiles, found: Settled, example_inputs: Any, out: Path, verify: Any,
    notes: list[str], progress: bool | None,
) -> CheckpointResult:  # fmt: skip
    """Write what `found` leaves, compare it, and report."""
    plan, small = found.plan, found.model
    shell = (
        small
        if small is not None and any(p.is_meta for p in small.parameters())
        else _cut_shell(original, plan)
    )
    layout = _layout(original, weights, plan, shell)
    notes += layout.notes
    size = total(layout.files)
    proof = found.verification
    print_of = hashlib.sha256(
        json.dumps([__version__, _cuts_of(plan), original.checkpoint.state(), str(original.checkpoint.folder),
                    {f: [(t.name, t.code, t.shape) for t in tensors] for f, tensors in layout.files.items()}]).encode()
    ).hexdigest()  # fmt: skip
    with folder_for(out, print_of, size) as new:
        entries: dict[str, Entry] = {}
        weights.seen = lambda count: None
        with bytes_bar("writing", size, progress) as seen:
            for file, tensors in layout.files.items():
                sums = new.write(file, tensors, layout.metadata[file], seen)
                for one in tensors:
                    dtype = next(t for t, n in NAMES.items() if n == CODES[one.code])
                    entries[one.name] = Entry(dtype, one.shape, file, sums[one.name])
        _beside(original, layout, new, entries, shell, plan)
        if verify == "values" and graph_is_elsewhere(found):
            proof = _compared(original, weights, new, found, example_inputs, layout)
        new.finish()
    report = Report.of(found.graph, plan, small, proof, example_inputs, notes=notes)
    wrong = layout.wrong or []
    if layout.stock:
        line = f"from_pretrained({str(out)!r})"
    elif original.files is not None:
        line = f"depgraph.integrations.hugging_face.load_pretrained({type(shell).__name__}, {str(out)!r})"
    else:
        line = f"depgraph.load(factory, {str(out)!r})"
    return CheckpointResult(out, plan, report, wrong, line, resident())


def graph_is_elsewhere(found: Settled) -> bool:
    """Whether the model that was looked at has its values in files."""
    return any(p.is_meta for p in found.graph.model.parameters())


def _cuts_of(plan: Plan) -> Any:
    data = json.loads(plan.to_json())
    data.pop("request", None)
    return data


def _cut_shell(original: Original, plan: Plan) -> nn.Module:
    from ..surgery.apply import apply  # noqa: PLC0415

    return apply(original.model, plan)


def _layout(original: Original, weights: FromFiles, plan: Plan, small: nn.Module) -> Layout:
    """Files with the names of the original's where its config describes the result, else those that `depgraph.load` reads.

    Raises:
        InputError: the files have tensors that the model lacks, and the plan cuts what they may depend on.
    """
    _check_further(original, plan)
    wrong: list[str] | None = None
    notes = [f"{n!r} is not copied: its class passes over it when it loads" for n in original.passed]
    if original.files is not None:
        with tempfile.TemporaryDirectory() as trial:
            wrong = original.files.describe(small, Path(trial), partial(shell_of, what="the new config.json"))
        if not wrong:
            try:
                shapes = {n: s.shape for n, s in original.checkpoint.stored.items()}
                cuts, names = pulled_back(original.laid, plan.cuts, shapes)
                cuts |= _of_ties(original, plan)
                return Layout(*_as_stored(original, cuts, names), wrong, True, notes)
            except NotMoved as error:
                wrong = [f"the names and layout on disk can't express what is left of {error}"]
    if original.further:
        raise InputError(
            f"the files have tensors that the model lacks ({', '.join(list(original.further)[:5])}), and what is written can't keep them\n"
            "  fix: give a factory whose model has them, or take them out of the checkpoint"
        )
    return Layout(*_as_model(original, weights, plan, small), wrong, False, notes)


def _check_further(original: Original, plan: Plan) -> None:
    """Tensors that the model lacks may stay where the plan leaves all of the module that they belong to."""
    paths = dict(original.model.named_modules())
    touched = {n.rpartition(".")[0] for n in plan.cuts} | {r.path for r in plan.repairs}
    touched |= {r.path for r in plan.rewrites}
    bad = []
    for name, called in original.further.items():
        owner = called.rpartition(".")[0]
        while owner and owner not in paths:
            owner = owner.rpartition(".")[0]
        inside = f"{owner}." if owner else ""
        if any(path == owner or path.startswith(inside) for path in touched):
            bad.append(f"{name!r}, as something in {repr(owner) if owner else 'the model'} is cut")
    if bad:
        raise InputError(
            listed("the files have tensors that the model lacks, which may depend on what is cut:", bad)
            + "\n  fix: give a factory whose model has them, take them out of the checkpoint, or ignore=[...] these modules"
        )


def _of_ties(original: Original, plan: Plan) -> dict[str, Cut]:
    """The cuts of stored tensors that are further names of tied ones."""
    known = stored_names(original.laid.values())
    ties = named_tensors(original.model)[1]
    return {
        n: plan.cuts[ties[n]]
        for n in original.checkpoint.stored
        if n not in known and n in ties and ties[n] in plan.cuts
    }


def _as_stored(
    original: Original, cuts: Mapping[str, Cut], names: Mapping[str, str | None]
) -> tuple[dict[str, list[Written]], dict[str, dict[str, str]]]:
    """The files of the original, each tensor cut."""
    checkpoint = original.checkpoint
    files: dict[str, list[Written]] = {file: [] for file in checkpoint.files}
    for name, one in checkpoint.stored.items():
        new = names.get(name, name)
        if name in original.passed or new is None:
            continue
        cut = cuts.get(name)
        shape = one.shape if cut is None else cut.new_shape
        blocks = partial(
            cut_blocks,
            partial(checkpoint.rows, name),
            partial(checkpoint.whole, name),
            one.shape,
            one.dtype.itemsize,
            cut,
        )
        files[one.file].append(Written(new, one.code, shape, blocks))
    return {f: t for f, t in files.items() if t}, checkpoint.metadata


def _as_model(
    original: Original, weights: FromFiles, plan: Plan, small: nn.Module
) -> tuple[dict[str, list[Written]], dict[str, dict[str, str]]]:
    """Files with the model's own names, each tied tensor once."""
    codes = {name: code for code, name in CODES.items()}
    held = named_tensors(small)[0]
    persistent = small.state_dict().keys()
    shards: list[list[Written]] = []
    room = 0
    for name, tensor in held.items():
        if name not in persistent:
            continue
        cut = plan.cuts.get(name)
        if name in original.laid:
            laid = original.laid[name]
            rows, whole = partial(weights.rows, name), partial(weights.stored, name)
            if not weights.tensors[name].is_meta:
                rows = partial(_rows_of, partial(weights.stored, name))
            blocks = partial(cut_blocks, rows, whole, tuple(laid.shape), laid.dtype.itemsize, cut)
            one = Written(name, codes[NAMES[laid.dtype]], tuple(tensor.shape), blocks)
        else:
            one = Written(name, codes[NAMES[tensor.dtype]], tuple(tensor.shape), partial(_held, tensor))
        if not shards or one.bytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(one)
        room -= one.bytes
    count = len(shards)
    names = (
        [f"{MODEL}.safetensors"]
        if count == 1
        else [f"{MODEL}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    return dict(zip(names, shards, strict=True)), {n: {"format": "pt"} for n in names}


def _held(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor.detach().contiguous()


def _rows_of(whole: Callable[[], Tensor], first: int, last: int) -> Tensor:
    return whole()[first:last]


def _beside(
    original: Original, layout: Layout, new: Folder, entries: dict[str, Entry], small: nn.Module, plan: Plan
) -> None:
    """The index, the config, plan.json where `depgraph.load` reads the files, and copies of what else the folder has."""
    checkpoint = original.checkpoint
    if layout.stock:
        original.files.describe(small, new.work, partial(shell_of, what="the new config.json"))
    taken = {p.name for p in new.work.iterdir()}
    for path in sorted(checkpoint.folder.iterdir()):
        weights = path.name.endswith(WEIGHTS) or path.name in (FILE_NAME,)
        if (
            weights
            or path.name in taken
            or (original.files is not None and path.name == original.files.CONFIG)
        ):
            continue
        if path.is_dir():
            if not any(p.name.endswith(WEIGHTS) for p in path.rglob("*")):
                shutil.copytree(path, new.work / path.name, dirs_exist_ok=True)
        elif path.is_file():
            shutil.copyfile(path, new.work / path.name)
    if len(layout.files) > 1 or (layout.stock and checkpoint.index is not None):
        name, rest = (
            (f"{MODEL}{INDEX}", {}) if not layout.stock or checkpoint.index is None else checkpoint.index
        )
        data = {**rest, "metadata": {**rest.get("metadata", {}), "total_size": total(layout.files)},
                "weight_map": {n: e.file for n, e in entries.items()}}  # fmt: skip
        (new.work / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    document, persistent, others = described(small, [plan], values_elsewhere=True)
    readable = all(FILE.fullmatch(f) for f in layout.files) and entries.keys() == persistent.keys()
    if not layout.stock or readable:
        document.tensors = dict(entries)
        document.tensors |= write_tensors(others, new.work, OTHER, SHARD_BYTES)
        (new.work / FILE_NAME).write_text(document.to_text(), encoding="utf-8")


def _compared(
    original: Original, weights: FromFiles, new: Folder, found: Settled, example_inputs: Any, layout: Layout
) -> Verification:
    """The proof on the values in the files, those of the smaller model read from what was written."""
    made = opened(new.work)
    try:
        if layout.stock:
            laid = original.files.laid(found.model, made)[0]
        else:
            laid = laid_by_name(found.model, made)[0]
        smaller = FromFiles(made, laid, all_tensors(found.model), Notes(made, laid))
        proof = verify_values(
            found.graph.model, found.model, found.plan, example_inputs, weights=weights, smaller=smaller
        )
    except VerificationError as error:
        shutil.rmtree(new.work, ignore_errors=True)
        raise VerificationError(f"{error}\n  what was written is removed: there is no {new.out}") from error
    finally:
        made.close()
    before = found.verification
    details = "; ".join(
        dict.fromkeys(d for d in (f"values of the files: {proof.detail}", before.detail) if d)
    )
    status = proof.status if before.status == "equal" else before.status
    return Verification(
        status,
        max(proof.max_error, before.max_error),
        details,
        before.restricted,
        before.unproved,
        before.unseen,
    )
