"""Every tiny model of transformers pruned from file to file and in memory: `python -m benchmarks.checkpoint_types`.

With names (`bert t5`) only these, with `--every 20` every twentieth; with `--suite timm` the models of that suite of coverage instead, built
by a function; with `--depth` half of the branches go, those with the smallest weights. A type is right where plan and all tensors are the same as
in memory, after the folder was loaded as its result says; a refusal is listed with its reason, and so is what differs.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model

import depgraph
from benchmarks.coverage_row import randomise
from benchmarks.models import transformers as tiny
from benchmarks.suites import suite
from depgraph.base.errors import DepgraphError

TITLES = ("right", "refused", "not savable", "different", "failed")


def compared(row: tiny.Tiny, scratch: Path, **options: Any) -> tuple[str, str]:
    """One of `TITLES`, and why."""
    from depgraph.integrations import hugging_face

    source, out = scratch / "source", scratch / "out"
    inputs = tiny.inputs(row.inputs)
    try:
        torch.manual_seed(0)
        tiny.build(row.type, row.model).save_pretrained(source)
        model = hugging_face.from_folder(source)
        wanted = depgraph.prune(model, inputs, verify=False, **options)
    except Exception as error:
        return "not savable", brief(error)
    try:
        found = depgraph.checkpoint.prune(source, inputs, out=out, verify=False, memory="20GB", **options)
    except DepgraphError as error:
        return "refused", brief(error)
    except Exception as error:
        return "failed", brief(error)
    if found.plan.to_json() != wanted.plan.to_json():
        return "different", "other plan"
    kind: Any = type(model)
    small = kind.from_pretrained(out) if not found.differences else hugging_face.load_pretrained(kind, out)
    return same(small, wanted.model)


def built(name: str, suite_name: str, scratch: Path, **options: Any) -> tuple[str, str]:
    """As `compared`, of a model that a function builds."""
    case = suite(suite_name)[name]
    source, out = scratch / "source", scratch / "out"
    given, model, inputs = randomise(case.build(), 0, case.inputs()), case.build(), case.inputs()
    source.mkdir()
    save_model(given, str(source / "model.safetensors"))
    model.load_state_dict(given.state_dict())  # one that has not been run: some keep tables of a run
    wanted = depgraph.prune(model, inputs, verify=False, **options)
    try:
        found = depgraph.checkpoint.prune(
            source, inputs, out=out, factory=case.build, verify=False, memory="20GB", **options
        )
    except DepgraphError as error:
        return "refused", brief(error)
    if found.plan.to_json() != wanted.plan.to_json():
        return "different", "other plan"
    return same(depgraph.load(case.build, out), wanted.model)


def same(small: torch.nn.Module, wanted: torch.nn.Module) -> tuple[str, str]:
    """Whether all tensors of two models are."""
    got, expected = small.state_dict(), wanted.state_dict()
    names = [
        n
        for n in {**got, **expected}
        if n not in got or n not in expected or not torch.equal(got[n], expected[n])
    ]
    return ("different", f"tensors {names[:3]}") if names else ("right", "")


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--uniform", action="store_true")
    parser.add_argument("--suite")
    parser.add_argument("--depth", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.suite is None:
        rows: list[tuple[str, Any]] = [(r.type, r) for r in tiny.load() if r.model]
    else:
        rows = [(name, name) for name in suite(arguments.suite)]
    rows = [(name, row) for name, row in rows if not arguments.types or name in arguments.types]
    counts: Counter[str] = Counter()
    for name, row in rows[:: arguments.every]:
        gc.collect()  # models are in cycles
        scratch = Path(tempfile.mkdtemp())
        how: dict[str, Any] = {"pruning_ratio": 0.5, "uniform": arguments.uniform}
        if arguments.depth:
            how["depth"] = depgraph.Depth(by="magnitude", alone=True)
        try:
            if arguments.suite is None:
                status, why = compared(row, scratch, **how)
            else:
                status, why = built(row, arguments.suite, scratch, **how)
        except Exception as error:
            status, why = "failed", brief(error)
        finally:
            shutil.rmtree(scratch)
        counts[status] += 1
        print(f"{name}: {status} {why}", flush=True)
    print(", ".join(f"{counts[t]} {t}" for t in TITLES))
    return int(bool(counts["different"] or counts["failed"]))


if __name__ == "__main__":
    sys.exit(main())
