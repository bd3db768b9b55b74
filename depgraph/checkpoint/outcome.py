"""What is written of a plan: files, what stands beside them, and the proof on what was written."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.errors import InputError, VerificationError, listed
from ..base.processes import Processes
from ..base.progress import bytes_bar
from ..base.version import __version__
from ..base.weights import Weights
from ..plan.plan import Cut, Plan
from ..report import Report
from ..search import Settled
from ..store.document import FILE_NAME
from ..store.files import INDEX, PICKLES, opened
from ..store.layout import NotMoved
from ..store.pulled import check_conversion, moved_names, pulled_back, stored_names
from ..store.saving import SHARD_BYTES, described
from ..store.weights import CODES, FILE, MODEL, NAMES, OTHER, Entry
from ..store.weights import write as write_tensors
from ..surgery.apply import apply
from ..tracing.tensors import all_tensors, named_tensors
from ..verify.verify import Verification
from ..verify.verify import verify as verify_values
from .original import Original
from .recovering import Blocks, Recovered, stored_as
from .shell import laid_by_name, shell_of
from .source import FromFiles, Notes, is_plain
from .writing import Folder, Written, cut_blocks, folder_for

Tensor = torch.Tensor
WEIGHTS = (".safetensors", INDEX, *PICKLES, ".onnx", ".gguf", ".tflite", ".safetensors.partial")


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


def resident() -> int:
    """Bytes that this process has resident at most, so far; 0 where the system does not say it."""
    if sys.platform == "win32":
        return 0
    import resource  # noqa: PLC0415  not every system has it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Layout:
    """What the new folder will have.

    Attributes:
        files: file -> its tensors.
        metadata: file -> what its header says beside them.
        wrong: what loading by the config alone would get wrong; None where there is no config.
        stock: whether files have the names and the order of the original's.
        notes: sentences for the report.
    """

    files: dict[str, list[Written]]
    metadata: dict[str, dict[str, str]]
    wrong: list[str] | None
    stock: bool
    notes: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, int]:
        """File -> bytes of its tensors."""
        return {file: sum(one.bytes for one in tensors) for file, tensors in self.files.items()}


def written(
    original: Original, weights: FromFiles, found: Settled, removed: list[str], example_inputs: Any, out: Path, verify: Any,
    notes: list[str], progress: bool | None, recovered: Recovered | None, ranks: Processes,
) -> CheckpointResult:  # fmt: skip
    """Write what `found` leaves, with values that were `recovered`, compare it, and report, with the branches that were `removed`.

    Of several processes each writes its own files, and the first one does the rest.
    """
    plan, small = found.plan, found.model
    shell = small if _is_elsewhere(found) else apply(original.model, plan)
    changed = {} if recovered is None else recovered.values.changed
    layout = _layout(original, weights, plan, shell, recovered)
    notes += layout.notes
    sizes = layout.sizes
    state = original.checkpoint.state()
    files = {f: [(t.name, t.code, t.shape) for t in tensors] for f, tensors in layout.files.items()}
    what = _digest(__version__, _cuts_of(plan), files, state)
    if any(other != what for other in ranks.gathered(what)):
        raise InputError(
            "the checkpoint or its model is another one in another process: nothing was written\n"
            "  fix: give all processes the same factory and the same folder, on a disk that they share, not copies of it"
        )
    places = {name: place.crc32 for name, place in changed.items()}
    print_of = _digest(what, str(original.checkpoint.folder), places)
    report = None
    with folder_for(out, print_of, sum(sizes.values()), ranks) as new:
        own = ranks.dealt(original.checkpoint.sizes if layout.stock else sizes)
        weights.seen = lambda count: None
        with bytes_bar("writing", sum(sizes[f] for f in sizes if f in own), progress) as seen:
            sums = {
                file: new.write(file, tensors, layout.metadata[file], seen)
                for file, tensors in layout.files.items()
                if file in own
            }
        every = {file: found for others in ranks.gathered(sums) for file, found in others.items()}
        if not ranks.rank:
            proof = found.verification
            _beside(original, layout, new, _entries(layout, every), shell, plan)
            if verify == "values" and _is_elsewhere(found):
                proof = _compared(original, weights, new, found, example_inputs, layout, recovered)
            new.finish()
            won = None if recovered is None else recovered.report
            report = Report.of(
                found.graph, plan, small, proof, example_inputs, notes=notes, recovery=won, removed=removed
            )
    wrong = layout.wrong or []
    if layout.stock:
        line = f"from_pretrained({str(out)!r})"
    elif original.files is not None:
        line = f"depgraph.integrations.hugging_face.load_pretrained({type(shell).__name__}, {str(out)!r})"
    else:
        line = f"depgraph.load(factory, {str(out)!r})"
    return CheckpointResult(out, plan, ranks.of_first(report), wrong, line, resident())


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _entries(layout: Layout, sums: Mapping[str, Mapping[str, int]]) -> dict[str, Entry]:
    """Every tensor that was written, in the order of the files."""
    entries = {}
    for file, tensors in layout.files.items():
        for one in tensors:
            dtype = next(t for t, n in NAMES.items() if n == CODES[one.code])
            entries[one.name] = Entry(dtype, one.shape, file, sums[file][one.name])
    return entries


def _is_elsewhere(found: Settled) -> bool:
    """Whether the model that was looked at has its values in files."""
    return any(p.is_meta for p in found.graph.model.parameters())


def _cuts_of(plan: Plan) -> Any:
    data = json.loads(plan.to_json())
    data.pop("request", None)
    return data


def _layout(
    original: Original, weights: FromFiles, plan: Plan, small: nn.Module, recovered: Recovered | None
) -> Layout:
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
                left = {n: laid for n, laid in original.laid.items() if not plan.drops(n)}
                cuts, names = pulled_back(left, plan.cuts, shapes)
                if plan.removals:
                    names = moved_names(original.laid, plan, names)
                _check_conversion(original, plan, small, cuts, names)
                cuts |= _of_ties(original, plan)
                new = (
                    {}
                    if recovered is None
                    else stored_as(original.laid, original.model, recovered.values.written())
                )
                return Layout(*_as_stored(original, cuts, names, new), wrong, True, notes)
            except NotMoved as error:
                wrong = [f"the names and layout on disk can't express what is left of {error}"]
    if original.further:
        raise InputError(
            f"the files have tensors that the model lacks ({', '.join(list(original.further)[:5])}), and what is written can't keep them\n"
            "  fix: give a factory whose model has them, or take them out of the checkpoint"
        )
    new = {} if recovered is None else recovered.values.written()
    return Layout(*_as_model(original, weights, plan, small, new), wrong, False, notes)


def _check_conversion(
    original: Original, plan: Plan, small: nn.Module, cuts: Mapping[str, Cut], names: Mapping[str, str | None]
) -> None:
    """What the class puts together from stored tensors must come out of the smaller files as the smaller model's.

    Raises:
        NotMoved: it doesn't.
    """
    made = {n: x for n, x in original.laid.items() if len(x.parts) > 1 or not is_plain(x.parts[0], x)}
    if plan.removals:  # other names: all are looked at
        made = {n: x for n, x in original.laid.items() if not plan.drops(n)}
    if not made:
        return
    stored = {}
    for name, one in original.checkpoint.stored.items():
        new = names.get(name, name)
        if new is not None:
            stored[new] = replace(one, name=new, shape=cuts[name].new_shape if name in cuts else one.shape)
    try:
        after = original.files.laid(small, replace(original.checkpoint, stored=stored))[0]
    except InputError as error:
        raise NotMoved(str(error)) from error
    moves = plan.moves
    check_conversion(made, {moves.old(n): x for n, x in after.items()}, plan.cuts, cuts, names)


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
    original: Original,
    cuts: Mapping[str, Cut],
    names: Mapping[str, str | None],
    changed: Mapping[str, Blocks],
) -> tuple[dict[str, list[Written]], dict[str, dict[str, str]]]:
    """The files of the original, each tensor cut, those that are `changed` with their new values."""
    checkpoint = original.checkpoint
    files: dict[str, list[Written]] = {file: [] for file in checkpoint.files}
    for name, one in checkpoint.stored.items():
        new = names.get(name, name)
        if name in original.passed or new is None:
            continue
        cut = cuts.get(name)
        shape = one.shape if cut is None else cut.new_shape
        blocks = changed.get(name) or partial(
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
    original: Original, weights: FromFiles, plan: Plan, small: nn.Module, changed: Mapping[str, Blocks]
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
        old = plan.moves.old(name)
        cut = plan.cuts.get(old)
        if old in original.laid:
            laid = original.laid[old]
            rows, whole = partial(weights.rows, old), partial(weights.stored, old)
            if not weights.tensors[old].is_meta:
                rows = partial(_rows_of, partial(weights.stored, old))
            blocks = changed.get(old) or partial(
                cut_blocks, rows, whole, tuple(laid.shape), laid.dtype.itemsize, cut
            )
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
    yield tensor.detach()


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
        data = {**rest, "metadata": {**rest.get("metadata", {}), "total_size": sum(layout.sizes.values())},
                "weight_map": {n: e.file for n, e in entries.items()}}  # fmt: skip
        (new.work / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    document, persistent, others = described(small, [plan], values_elsewhere=True)
    readable = all(FILE.fullmatch(f) for f in layout.files) and entries.keys() == persistent.keys()
    if not layout.stock or readable:
        document.tensors = dict(entries)
        document.tensors |= write_tensors(others, new.work, OTHER, SHARD_BYTES)
        (new.work / FILE_NAME).write_text(document.to_text(), encoding="utf-8")


def _compared(
    original: Original, weights: FromFiles, new: Folder, found: Settled, example_inputs: Any, layout: Layout,
    recovered: Recovered | None,
) -> Verification:  # fmt: skip
    """The proof on the values in the files, those of the smaller model read from what was written.

    Of tensors that were recovered there is what was cut: that the files have the new values, their checksums say.
    """
    made, old = opened(new.work), found.plan.moves.old
    try:
        if layout.stock:
            laid = original.files.laid(found.model, made)[0]
        else:
            laid = laid_by_name(found.model, made)[0]
        tensors = {old(n): t for n, t in all_tensors(found.model).items()}
        laid = {old(n): x for n, x in laid.items()}
        smaller: Weights = FromFiles(made, laid, tensors, Notes(made, laid))
        if recovered is not None:
            smaller = recovered.values.before(smaller)
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
