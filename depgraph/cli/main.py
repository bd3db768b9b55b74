"""The parser, exit statuses, and what becomes of errors."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

from rich.console import Console

from ..base.errors import DepgraphError
from ..depth.request import CRITERIA as DEPTHS
from ..elastic.nested import COSTS
from ..graphs import CRITERIA as CRITERIA_OF_EDGES
from ..grouping.graph import GRANULARITIES
from ..importance import AUTO, CRITERIA
from ..select import BUDGETS, OPTIONS
from ..simplify.compress import KINDS
from ..simplify.masking import CRITERIA as CRITERIA_OF_WEIGHTS
from ..simplify.masking import SCOPES
from . import commands

DONE, REFUSED, USAGE, DIFFERENT, INTERRUPTED = 0, 1, 2, 3, 130

MODEL = (
    "package.module:function that returns the model (or the name of one; the current folder is searched first), or a "
    "folder that from_pretrained loads"
)
INPUT = (
    "an example input: 1x3x224x224, or input_ids=1x16:int64<1000 for a keyword argument of whole numbers below 1000, or "
    "package.module:function that returns example inputs; once for each argument of forward. By default the model's "
    "example_input_array or dummy_inputs"
)
FOLDER = "what `depgraph prune --out` wrote"
STATUSES = """exit status:
  0 done; 1 refused, with the reason on standard error; 2 a wrong command line;
  3 the smaller model does not compute what it should (verify), or stock from_pretrained does not load what was saved for it
  (prune --pretrained); 130 interrupted"""


Add = Callable[..., argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="depgraph", description="Make any PyTorch model physically smaller, and check the result.",
        epilog="depgraph COMMAND --help has an example of each.\n\n" + STATUSES, formatter_class=Help,
    )  # fmt: skip
    top.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    add = top.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser
    for command in (
        _inspect,
        _prune,
        _fuse,
        _mask,
        _factorise,
        _compress,
        _edges,
        _elastic,
        _run,
        _sweep,
        _verify,
        _show,
        _compare,
        _completion,
    ):
        command(add)
    return top


class Help(argparse.RawDescriptionHelpFormatter):
    """Help with examples, whose lines stay as they are, and room for the names of commands."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)


def _inspect(add: Add) -> None:
    made = _command(
        add, "inspect", commands.inspect, "groups, what can shrink, and what locks the rest",
        "depgraph inspect mypackage.models:make_net --input 1x3x224x224 --html net.html",
        model=MODEL,
    )  # fmt: skip
    _ignore(made)
    made.add_argument("--html", metavar="FILE", help="also write a page to explore in a browser")
    made.add_argument(
        "--top", type=count, default=20, metavar="N", help="groups to list (default: %(default)s)"
    )


def _prune(add: Add) -> None:
    made = _command(
        add, "prune", commands.prune, "make a model smaller and save it",
        "depgraph prune mypackage.models:make_net --input 1x3x224x224 --max-macs 0.5 --out smaller",
        "depgraph prune ./folder --input 'input_ids=1x16:int64<30000' --uniform --max-params 0.8 --pretrained --out smaller",
        "depgraph prune --checkpoint ./folder --input 'input_ids=1x16:int64<30000' --max-params 0.7 --memory 6GB --out smaller",
    )  # fmt: skip
    made.add_argument(
        "model",
        nargs="?",
        help=MODEL + "; with --checkpoint what builds the model, where the folder does not say it",
    )
    budget = made.add_argument_group("how much", "without any: half of each prunable dim")
    budget.add_argument(
        "--ratio", type=float, metavar="R", help="share of each prunable dim to remove, such as 0.5"
    )
    _add_budgets(budget, number)
    budget.add_argument(
        "--depth", nargs="?", type=int, const=True, metavar="KEEP",
        help="remove branches (attention, feed-forward parts, residual blocks), too, so that KEEP stay, or as many as budgets need",
    )  # fmt: skip
    budget.add_argument(
        "--depth-by", choices=DEPTHS, default="influence", help="what ranks branches (default: %(default)s)"
    )
    _how(made)
    made.add_argument("-o", "--out", metavar="FOLDER", help="where to save the smaller model and its plan")
    made.add_argument(
        "--pretrained",
        action="store_true",
        help="save for from_pretrained (with --uniform, where a config can express the result)",
    )
    made.add_argument("--html", metavar="FILE", help="also write a page to explore in a browser")
    files = made.add_argument_group("larger than memory")
    files.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        help="a folder of safetensors files, which is pruned from file to file",
    )
    files.add_argument(
        "--memory",
        default="6GB",
        metavar="N",
        help="bytes that this may take at most, beside the libraries (default: %(default)s)",
    )
    files.add_argument(
        "--proof", choices=("values", "structure"), default="values",
        help="compare on the values in the files, too, or on drawn ones alone (default: %(default)s)",
    )  # fmt: skip
    files.add_argument(
        "--dry-run", action="store_true", help="say sizes, time and memory; read no values, write nothing"
    )


def _fuse(add: Add) -> None:
    made = _command(
        add, "fuse", commands.fuse, "fold batch norms into the layers before them",
        "depgraph fuse mypackage.models:make_net --input 1x3x224x224 --out fused",
        model=MODEL,
    )  # fmt: skip
    made.add_argument(
        "--scales", action="store_true", help="also scales of layer and RMS norms into linear layers"
    )
    _out(made)


def _mask(add: Add) -> None:
    made = _command(
        add, "mask", commands.mask, "set single weights to zero",
        "depgraph mask mypackage.models:make_net --input 1x3x224x224 --sparsity 0.8 --out masked",
        model=MODEL,
    )  # fmt: skip
    _ignore(made)
    made.add_argument(
        "--sparsity", type=float, default=0.8, metavar="R", help="share of zeros (default: %(default)s)"
    )
    made.add_argument("--scope", choices=SCOPES, default="global", help="whether all weights compete")
    made.add_argument(
        "--importance",
        choices=CRITERIA_OF_WEIGHTS,
        default="magnitude",
        help="criterion (default: %(default)s)",
    )
    made.add_argument("--pattern", metavar="N:M", help="2:4, or blocks such as 32:32")
    _data(made)
    _out(made)


def _factorise(add: Add) -> None:
    made = _command(
        add, "factorise", commands.factorise, "make two smaller layers of one, by its singular values",
        "depgraph factorise mypackage.models:make_net --input 1x3x224x224 --max-params 0.7 --out factors",
        model=MODEL,
    )  # fmt: skip
    _ignore(made)
    _add_budgets(made.add_argument_group("how much", "without any: full ranks, the same values"), number)
    made.add_argument(
        "--calibration", metavar="FUNCTION", help="package.module:function that returns batches"
    )
    _out(made)


def _compress(add: Add) -> None:
    made = _command(
        add, "compress", commands.compress, "meet a budget by widths, depth or ranks, whichever comes nearest",
        "depgraph compress mypackage.models:make_net --input 1x3x224x224 --max-params 0.7 --calibration mypackage.data:batches",
        model=MODEL,
    )  # fmt: skip
    made.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="which may be used (default: all of them)"
    )
    _ignore(made)
    _add_budgets(made.add_argument_group("how much", "at least one of these"), number)
    _data(made)
    _out(made)


def _data(to: Any) -> None:
    to.add_argument("--calibration", metavar="FUNCTION", help="package.module:function that returns batches")
    to.add_argument("--loss", metavar="FUNCTION", help="package.module:function of output and target")


def _run(add: Add) -> None:
    _command(
        add, "run", commands.run, "do the steps of a recipe: train, prune, fine-tune, export; goes on where it ended",
        "depgraph run recipe.toml",
        recipe="a TOML file (see docs/guides/a-recipe.md)",
    )  # fmt: skip


def _out(to: Any) -> None:
    to.add_argument("-o", "--out", metavar="FOLDER", help="where to save the new model and its plan")


def _edges(add: Add) -> None:
    made = _command(
        add, "edges", commands.edges, "remove edges from the graph that a model runs on",
        "depgraph edges mypackage.models:make_net mypackage.data:graph --keep 0.5 --out edges.json",
        model=MODEL, data="package.module:function that returns the graph, an object with edge_index",
    )  # fmt: skip
    made.add_argument(
        "--keep",
        type=number,
        default=0.5,
        metavar="N",
        help="share or number of edges (default: %(default)s)",
    )
    made.add_argument(
        "--by", choices=CRITERIA_OF_EDGES, default="agreement", help="criterion (default: %(default)s)"
    )
    made.add_argument("--directed", action="store_true", help="edges i→j and j→i may go apart")
    made.add_argument("-o", "--out", metavar="FILE", help="where to save which edges stay, as JSON")


def _elastic(add: Add) -> None:
    made = _command(
        add, "elastic", commands.elastic, "one set of weights with several sizes: a row for each, and a folder",
        "depgraph elastic mypackage.models:make_net --input 1x3x224x224 --sizes 1,0.5,0.25 --out elastic",
        model=MODEL,
    )  # fmt: skip
    made.add_argument(
        "--sizes", type=numbers, default=(1, 0.5, 0.25), metavar="S,S,...",
        help="shares of the cost, falling from 1 (default: 1,0.5,0.25)",
    )  # fmt: skip
    made.add_argument(
        "--cost", choices=list(COSTS), default="macs", help="what sizes are shares of (default: %(default)s)"
    )
    made.add_argument(
        "--depth", action="store_true",
        help="smaller sizes may also leave out branches (attention, feed-forward parts, residual blocks)",
    )  # fmt: skip
    _how(made, leave=("pruning_ratio", "threshold", "within"), recover=False)
    made.add_argument("--score", metavar="FUNCTION", help="package.module:function from a model to a number")
    made.add_argument("--plot", metavar="FILE", help="picture to write: score against cost (with --score)")
    made.add_argument("-o", "--out", metavar="FOLDER", help="where to save all sizes")


def _sweep(add: Add) -> None:
    made = _command(
        add, "sweep", commands.sweep, "prune at several ratios; a table and a picture of the trade-off",
        "depgraph sweep mypackage.models:make_net --input 1x3x224x224 --score mypackage.data:accuracy --plot curve.png",
        model=MODEL,
    )  # fmt: skip
    _how(made)
    made.add_argument(
        "--ratios", type=numbers, metavar="R,R,...", help="pruning ratios (default: 0.1 to 0.9, where no budget is given)",
    )  # fmt: skip
    _add_budgets(made, amounts)
    made.add_argument(
        "--score",
        required=True,
        metavar="FUNCTION",
        help="package.module:function from a model to a number, higher is better",
    )
    made.add_argument("--file", help="JSON lines to add rows to; rows already in it are not computed again")
    made.add_argument("--plot", metavar="FILE", help="picture to write")


def _verify(add: Add) -> None:
    made = _command(
        add, "verify", commands.verify, "check a saved model against the original that it was made of",
        "depgraph verify smaller --model mypackage.models:make_net --input 1x3x224x224",
        folder=FOLDER,
    )  # fmt: skip
    made.add_argument("--model", required=True, help=MODEL + "; it must have the same weights")


def _show(add: Add) -> None:
    _command(
        add, "show", commands.show, "show a saved folder: shapes before and after, provenance",
        "depgraph show smaller",
        folder=FOLDER,
    )  # fmt: skip


def _compare(add: Add) -> None:
    _command(
        add, "compare", commands.compare, "two models side by side: widths, parameters, MACs, latency",
        "depgraph compare mypackage.models:make_net smaller --input 1x3x224x224",
        first=MODEL, second="another, or the folder of a saved one, whose original is the first",
    )  # fmt: skip


def _completion(add: Add) -> None:
    made = add(
        "completion", help="print a completion script for a shell", formatter_class=Help,
        description="Print a completion script for a shell (needs shtab: pip install shtab).",
        epilog="example:\n  depgraph completion bash > ~/.local/share/bash-completion/completions/depgraph",
    )  # fmt: skip
    made.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    made.set_defaults(run=None)


def _command(
    add: Add, name: str, run: Callable[..., int], text: str, *examples: str, **positional: str
) -> argparse.ArgumentParser:
    """A command with its `positional` arguments (name: help), and --input where it runs a model."""
    made = add(
        name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=Help,
        epilog="\n  ".join(("example:", *examples)) + "\n\n" + STATUSES,
    )  # fmt: skip
    made.add_argument("--json", action="store_true", help="print figures as JSON on standard output")
    made.set_defaults(run=run)
    for argument, about in positional.items():
        made.add_argument(argument, help=about)
    if run not in (commands.show, commands.run, commands.edges):
        made.add_argument("-i", "--input", action="append", metavar="INPUT", help=INPUT)
    return made


def _ignore(to: Any) -> None:
    to.add_argument(
        "--ignore", action="append", default=[], metavar="GLOB", help="modules or parameters to leave alone"
    )


def _add_budgets(to: Any, kind: Callable[[str], Any]) -> None:
    """An option for every budget that there is."""
    for budget in BUDGETS.values():
        to.add_argument(
            _flag(budget.name), type=kind, metavar="N" if kind is number else "N,N,...",
            help=f"at most so many {budget.what}: {budget.ways}".replace("%", "%%"),
        )  # fmt: skip


def _add_options(to: Any, leave: Sequence[str] = ()) -> None:
    """An option for every field of a request that a command line can express."""
    for name, field in OPTIONS.items():
        text, kind, choices = (field.metadata[k] for k in ("text", "kind", "choices"))
        if kind is None or name in leave:
            continue
        if kind is bool:
            to.add_argument(_flag(name), action="store_true", help=text)
        else:
            shown = {"choices": choices} if choices else {"metavar": "N" if kind is int else "R"}
            to.add_argument(_flag(name), type=kind, help=text, **shown)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _how(
    to: argparse.ArgumentParser, leave: Sequence[str] = ("pruning_ratio",), recover: bool = True
) -> None:
    what = to.add_argument_group("what")
    _ignore(what)
    what.add_argument(
        "--importance", default=AUTO, metavar="NAME",
        help=f"criterion (default: %(default)s): {', '.join((AUTO, *CRITERIA))}",
    )  # fmt: skip
    _add_options(what, leave=leave)
    what.add_argument(
        "--granularity",
        choices=GRANULARITIES,
        help="coarse: whole heads; fine: widths in them (by default coarse)",
    )
    _data(what)
    what.add_argument("--latency", action="store_true", help="measure seconds per forward pass")
    if recover:
        what.add_argument(
            "--recover", metavar="HOW",
            help="recover accuracy from calibration data: auto, reconstruction, compensation, statistics or none; or without any: synthetic",
        )  # fmt: skip
        what.add_argument("--no-verify", action="store_true", help="do not compare with the masked original")


def number(text: str) -> float | int | str:
    """0.5 is a share, 1000 a number, 1e9 a number too; what else there is (``12ms``, ``3MB``, ``50%``) has a unit."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if isfinite(value) and value > 1 and value == int(value) else value


def numbers(text: str) -> tuple[float, ...]:
    """``0.1,0.2``."""
    return tuple(float(part) for part in text.split(","))


def amounts(text: str) -> tuple[float | int | str, ...]:
    """``0.8,0.6`` or ``12ms,9ms``."""
    return tuple(number(part) for part in text.split(","))


def count(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: the command line without the program's name; by default that of this process.

    Returns:
        the exit status (see `STATUSES`).
    """
    whole = parser()
    options = whole.parse_args(words)
    if options.command == "prune" and options.model is None and options.checkpoint is None:
        whole.error("prune needs a model, or --checkpoint FOLDER")
    errors = Console(stderr=True, highlight=False)
    if options.command == "completion":
        return _script(whole, options.shell, errors)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        errors.print("interrupted: nothing was changed", markup=False)
        return INTERRUPTED
    except DepgraphError as error:
        return _refused(errors, str(error), options.traceback)
    except (OSError, ImportError) as error:
        return _refused(errors, f"{type(error).__name__}: {error}", options.traceback)
    except Exception as error:  # noqa: BLE001  a fault of the user's model or of ours: one line, and how to see more
        return _refused(
            errors,
            f"{type(error).__name__}: {error}\n  depgraph --traceback ... shows where",
            options.traceback,
        )


def _refused(errors: Console, text: str, with_traceback: bool) -> int:
    if with_traceback:
        errors.print(traceback.format_exc(), markup=False)
    errors.print(f"depgraph: {text}", markup=False, soft_wrap=True)
    return REFUSED


def _script(whole: argparse.ArgumentParser, shell: str, errors: Console) -> int:
    try:
        import shtab  # noqa: PLC0415  only this command needs it
    except ImportError:
        return _refused(errors, "completion scripts are made by shtab: pip install shtab", False)
    sys.stdout.write(shtab.complete(whole, shell=shell))
    return DONE
