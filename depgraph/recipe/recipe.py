"""A pipeline as plain data: train, make smaller in any way, fine-tune or distil, quantise, export.

Each step starts from a copy of what the one before left; where the score falls by more than the step's `drop`, that copy is what
the next one starts from. What steps leave is saved, so that a run that was ended goes on.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.checks import function, is_number, needs_an_argument, shown
from ..base.errors import DepgraphError, InputError, listed
from ..base.inputs import each_example
from ..base.running import score_of
from ..base.tables import printed, table
from ..costs.cost import count_macs, parameter_count
from ..costs.latency import pairs_of
from ..integrations import QUANTISATION
from ..plan.plan import Plan
from ..prune import PruneResult, prune
from ..select import BUDGETS
from ..simplify.compress import compress
from ..simplify.fusion import fuse
from ..simplify.low_rank import factorise
from ..simplify.masking import mask
from ..simplify.result import Simplified
from ..store import load, save
from ..surgery.lineage import plans_of
from ..training.train import distill, finetune
from . import sources

FIELDS = ("model", "inputs", "out", "steps", "score", "calibration", "loss", "data")
GIVEN = {"model", "example_inputs", "x", "data", "loss", "calibration", "score", "teacher", "graph", "inplace", "optimizer",
         "scheduler", "plan"}  # fmt: skip  # arguments that the recipe itself gives, or that are no plain data
STATE = "recipe.json"


@dataclass
class _Run:
    """What steps work on."""

    model: nn.Module
    dense: nn.Module
    inputs: Any
    named: dict[str, Any]
    out: Path
    plans: tuple[Plan, ...] = ()  # from the dense model to `model`

    def data(self) -> Any:
        """The batches to train on.

        Raises:
            InputError: the recipe names none, or a function of more than the model.
        """
        if "data" not in self.named:
            raise InputError("training needs data: give data = 'package.module:function' in the recipe")
        found = self.named["data"]
        if not needs_an_argument(found):
            return found()
        function("data", found, "model")
        return found(self.model)


def _known(run: _Run, *names: str) -> dict[str, Any]:
    found = {n: run.named[n] for n in names if n in run.named}
    return {n: v() if n == "calibration" else v for n, v in found.items()}


def _planned(run: _Run, result: PruneResult | Simplified) -> nn.Module:
    run.plans = (*run.plans, *(*result.before, result.plan)[len(plans_of(run.model)) :])
    return result.model


def _prune(run: _Run, **options: Any) -> nn.Module:
    return _planned(run, prune(run.model, run.inputs, **_known(run, "calibration", "loss"), **options))


def _mask(run: _Run, **options: Any) -> nn.Module:
    return _planned(run, mask(run.model, run.inputs, **_known(run, "calibration", "loss"), **options))


def _fuse(run: _Run, **options: Any) -> nn.Module:
    return _planned(run, fuse(run.model.eval(), run.inputs, **options))


def _factorise(run: _Run, **options: Any) -> nn.Module:
    return _planned(run, factorise(run.model, run.inputs, **_known(run, "calibration"), **options))


def _compress(run: _Run, **options: Any) -> nn.Module:
    return _planned(run, compress(run.model, run.inputs, **_known(run, "calibration", "loss"), **options))


def _finetune(run: _Run, **options: Any) -> nn.Module:
    finetune(run.model, run.data(), **_known(run, "loss", "score"), **options)
    return run.model


def _distill(run: _Run, **options: Any) -> nn.Module:
    distill(run.model, run.dense, run.data(), **_known(run, "loss", "score"), **options)
    return run.model


def _quantise(run: _Run, **options: Any) -> nn.Module:
    made: nn.Module = importlib.import_module(QUANTISATION).quantise(run.model.eval(), **options)
    return made


def _export(run: _Run, to: str = "model.pt2") -> nn.Module:
    example, path = each_example(run.inputs)[0], run.out / to
    model = run.model.eval()
    if to.endswith(".onnx"):
        torch.onnx.export(model, example.args, path, kwargs=example.kwargs, dynamo=True, verbose=False)
    else:
        torch.export.save(torch.export.export(model, example.args, example.kwargs), path)
    return model


@dataclass(frozen=True)
class _Kind:
    """What a step does: `run` does it, `like` has its arguments; `saved`: what it leaves can be saved."""

    run: Callable[..., nn.Module]
    like: Callable[..., Any]
    saved: bool = True
    trains: bool = False

    def options(self) -> set[str]:
        """What a step of this kind takes beside `do` and `drop`."""
        found = {p.name for p in signature(self.like).parameters.values() if p.kind is not p.VAR_KEYWORD}
        budgets = set(BUDGETS) if self.like in (prune, factorise, compress) else set()
        return (found | budgets) - GIVEN


KINDS = {
    "train": _Kind(_finetune, finetune, trains=True), "prune": _Kind(_prune, prune), "mask": _Kind(_mask, mask),
    "fuse": _Kind(_fuse, fuse), "factorise": _Kind(_factorise, factorise), "compress": _Kind(_compress, compress),
    "finetune": _Kind(_finetune, finetune, trains=True), "distill": _Kind(_distill, distill, trains=True),
    "quantise": _Kind(_quantise, lambda kind: kind, saved=False),
    "export": _Kind(_export, lambda to: to, saved=False),
}  # fmt: skip


@dataclass
class RecipeResult:
    """What a recipe came to.

    Attributes:
        model: what the last step left.
        rows: one a step, and first the model as it was: `step`, `parameters`, `macs`, `zeros` (share of the parameters),
            `bytes` (on disk, of what was saved), `faster` (than the first, measured here), `score`, `kept` (whether its
            result was).
    """

    model: nn.Module
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        shown_ = table(
            "recipe", "step", "parameters", "smaller", "MACs", "zeros", "MB on disk", "faster", "score", ""
        )
        first = self.rows[0]["parameters"]
        for row in self.rows:
            disk = "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}"
            shown_.add_row(
                row["step"], f"{row['parameters']:,}", f"{first / max(row['parameters'], 1):.2f}x",
                "-" if row["macs"] is None else f"{row['macs']:,}", f"{row['zeros']:.1%}", disk,
                "-" if row["faster"] is None else f"{row['faster']:.2f}x",
                "-" if row["score"] is None else f"{row['score']:.4g}", "" if row["kept"] else "taken back",
            )  # fmt: skip
        return printed(shown_)


class Recipe:
    """A pipeline: where the model, its inputs and data come from, and the steps.

    ``depgraph.Recipe.read("recipe.toml").run()``. Names stand for functions, ``"package.module:function"``; the present folder is
    searched first.
    """

    def __init__(self, **given: Any) -> None:
        """What a file says.

        Args:
            **given: the keys of a file:

                * `model`: a function that makes the model, with the same weights each time, unless `train` is the first step.
                * `inputs`: descriptions of example inputs (``"1x3x32x32"``, or a list), or a function that returns some.
                * `out`: the folder where what each step leaves is saved.
                * `steps`: tables, each with `do` (train, prune, mask, fuse, factorise, compress, finetune, distill, quantise, export, or a
                  function from a model to a model), the options of that function of depgraph, and perhaps `drop`: by how
                  much the score may fall before the step is taken back.
                * `score`: a function from a model to a number, higher is better.
                * `calibration`: a function that returns batches for criteria and recovery.
                * `loss`: a function of output and target.
                * `data`: a function that returns batches to train on. One with an argument is given the model that is trained,
                  as what makes batches that are hard for it needs.

        Raises:
            InputError: all that is wrong, at once.
        """
        problems = [
            f"unknown key {name!r}: there are {', '.join(FIELDS)}" for name in given.keys() - set(FIELDS)
        ]
        problems += [
            f"{name} is missing" for name in ("model", "inputs", "out", "steps") if name not in given
        ]
        texts = ("model", "out", "score", "calibration", "loss", "data")
        problems += [
            f"{n} must be a text, not {shown(given[n])}"
            for n in texts
            if not isinstance(given.get(n, ""), str)
        ]
        inputs = given.get("inputs", "")
        if not isinstance(inputs, str) and not (
            isinstance(inputs, list) and all(isinstance(t, str) for t in inputs)
        ):
            problems.append(f"inputs must be a text or a list of texts, not {shown(inputs)}")
        self.steps = given.get("steps", [])
        if not isinstance(self.steps, list) or not all(isinstance(s, dict) for s in self.steps):
            problems.append(f"steps must be tables, not {shown(self.steps)}")
            self.steps = []
        for number, step in enumerate(self.steps, 1):
            problems += [f"step {number}: {text}" for text in _wrong(step, "score" in given)]
        kinds = [KINDS.get(str(step.get("do"))) for step in self.steps]
        ends = [n for n, kind in enumerate(kinds) if kind is not None and not kind.saved]
        if ends and any(kind is None or kind.saved for kind in kinds[ends[0] :]):
            problems.append("quantise and export come last: nothing else can follow on what they leave")
        if problems:
            raise InputError(listed("this recipe can't be run:", problems))
        self.given = given

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recipe:
        """The recipe in a TOML file.

        Args:
            path: of the file.

        Raises:
            InputError: it can't be read, or all that is wrong with what it says.
        """
        try:
            import tomllib  # noqa: PLC0415
        except ImportError:  # Python 3.10
            import tomli as tomllib  # type: ignore[import-not-found,no-redef]  # noqa: PLC0415
        try:
            data = tomllib.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path} can't be read as TOML: {error}") from error
        return cls(**data)

    def run(self) -> RecipeResult:
        """Do the steps that are not done yet.

        Raises:
            InputError: a name that leads nowhere; what a step's own function raises.
            DepgraphError: what the steps raise, with the number of the step; those before it are saved.
        """
        given, out = self.given, Path(self.given["out"])
        model = sources.model_of(given["model"])
        texts = [given["inputs"]] if isinstance(given["inputs"], str) else given["inputs"]
        named: dict[str, Any] = {
            n: sources.function(given[n], n) for n in ("score", "calibration", "loss", "data") if n in given
        }
        run = _Run(model, model, sources.inputs_of(texts, model), named, out)
        out.mkdir(parents=True, exist_ok=True)
        result = RecipeResult(model, [self._row("as it was", run, None)])
        done = self._done(out)
        result.rows += done
        run.model = self._left_by(len(done), done)
        run.plans = plans_of(run.model)
        leading = self._leading()
        run.dense = self._left_by(min(leading, len(done)), done)
        for number in range(len(done) + 1, len(self.steps) + 1):
            before = next(row for row in reversed(result.rows) if row["kept"])
            row = self._step(number, run, before)
            result.rows.append(row)
            if number <= leading:
                run.dense = copy.deepcopy(run.model)
            if self._saved(number):
                done.append(row)
                (out / STATE).write_text(json.dumps({"steps": self.steps, "rows": done}, indent=1))
        result.model = run.model
        return result

    def _saved(self, number: int) -> bool:
        """Whether what step `number` leaves is saved."""
        kind = KINDS.get(self.steps[number - 1]["do"])
        return kind is None or kind.saved

    def _leading(self) -> int:
        """How many steps train the dense model, before others make it smaller."""
        for count, step in enumerate(self.steps):
            if step["do"] not in KINDS or not KINDS[step["do"]].trains:
                return count
        return len(self.steps)

    def _folder(self, number: int) -> Path:
        return Path(self.given["out"]) / f"{number}-{self.steps[number - 1]['do'].rpartition(':')[2]}"

    def _left_by(self, number: int, done: list[dict[str, Any]]) -> nn.Module:
        """The model that the first `number` steps, all done, left."""
        for last in range(number, 0, -1):
            if done[last - 1]["kept"]:
                found: nn.Module = load(lambda: sources.model_of(self.given["model"]), self._folder(last))
                return found
        return sources.model_of(self.given["model"])

    def _done(self, out: Path) -> list[dict[str, Any]]:
        """The rows of the steps that an earlier run of this recipe has done."""
        path = out / STATE
        if not path.exists():
            return []
        try:
            state = json.loads(path.read_text())
            rows: list[dict[str, Any]] = state["rows"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is damaged ({error}): remove {out}, and the recipe begins anew"
            ) from error
        if state["steps"][: len(rows)] != self.steps[: len(rows)]:
            raise InputError(f"{out} has the steps of another recipe: give another out, or remove it")
        return rows

    def _step(self, number: int, run: _Run, before: dict[str, Any]) -> dict[str, Any]:
        """Do one step on a copy; take it back where the score falls too far."""
        step = self.steps[number - 1]
        kind = KINDS.get(step["do"])
        options = {k: v for k, v in step.items() if k not in ("do", "drop")}
        kept = run.model, run.plans
        run.model = copy.deepcopy(run.model)
        try:
            if kind is not None:
                run.model = kind.run(run, **options)
            else:
                run.model = sources.function(step["do"], f"step {number}")(run.model, **options)
        except DepgraphError as error:
            raise type(error)(f"step {number} ({step['do']}): {error}") from error
        if not isinstance(run.model, nn.Module):
            raise InputError(f"step {number}: {step['do']} returned {shown(run.model)}, not a model")
        folder = self._folder(number) if self._saved(number) else None
        if folder is not None:
            save(run.model, folder, plans=list(run.plans))
        row = self._row(step["do"], run, folder)
        if "drop" in step and not row["score"] >= before["score"] - step["drop"]:
            run.model, run.plans = kept
            row["kept"] = False
        return row

    def _row(self, name: str, run: _Run, folder: Path | None) -> dict[str, Any]:
        """The figures of the model as it is."""
        parameters = [p for p in run.model.parameters() if p.is_floating_point()]
        zeros = sum(int((p == 0).sum()) for p in parameters) if not _is_special(parameters) else 0
        count = parameter_count(run.model)
        try:
            macs: int | None = count_macs(run.model, run.inputs)
            faster: float | None = 1 / pairs_of(run.dense, run.model, run.inputs).ratio
        except Exception:  # noqa: BLE001  quantised models: their tensors are of types that can't be counted
            macs = faster = None
        size = None if folder is None else sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        score = score_of(run.named["score"], run.model) if "score" in run.named else None
        return {"step": name, "parameters": count, "macs": macs, "zeros": zeros / max(count, 1), "bytes": size,
                "faster": faster, "score": score, "kept": True}  # fmt: skip


def _is_special(parameters: list[nn.Parameter]) -> bool:
    """Whether some are of another library's type."""
    return any(type(p.data) is not torch.Tensor for p in parameters)


def _wrong(step: Mapping[str, Any], scored: bool) -> Iterator[str]:
    """What is wrong with one step."""
    do = step.get("do")
    if not isinstance(do, str) or (do not in KINDS and ":" not in do):
        yield f"do must be one of {', '.join(KINDS)} or 'package.module:function', not {shown(do)}"
        return
    if "drop" in step and not (is_number(step["drop"]) and step["drop"] >= 0):
        yield f"drop must be a number from 0 on, not {shown(step['drop'])}"
    elif "drop" in step and not scored:
        yield "drop needs a score: give score = 'package.module:function'"
    if do in KINDS:
        known = KINDS[do].options()
        to = step.get("to", "model.pt2")
        if do == "export" and not (isinstance(to, str) and to.endswith((".pt2", ".onnx"))):
            yield f"to must end in .pt2 or .onnx, not {shown(to)}"
        for name in step.keys() - known - {"do", "drop"}:
            yield f"unknown key {name!r}: {do} takes {', '.join(sorted(known)) or 'none'}"
