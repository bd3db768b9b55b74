"""Whether the proof objects to results that are wrong: `python -m benchmarks.corruption` (`--small`: a minute).

Each network is pruned without a proof, and the result is spoilt in one way after another: two kept indices swapped, one
index off in a tensor or in the plan itself, a repair missing or off by one, a scale changed by 1 %, a tie broken, a buffer
uncut, damage that only train mode shows. A judge that shares no code with the proof (the tests' oracle, and plain runs of the right result beside the spoilt
one) says whether an output changes by more than 1e-4 of its spread, in eval or train mode, at the example's size or another
batch, with floats drawn anew. Where it does, the proof must refuse, or name what it spoilt among what is not proved. Prints misses by kind; exit
status 1 if there is one.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_map

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from checks import random_importance
from oracle import is_inexact
from outputs import Inputs, call, tensors
from random_networks import random_network, random_options

import depgraph
from benchmarks.randomise import randomise
from benchmarks.suites import suite

NOTICEABLE = 1e-4  # of an output's spread
MODELS = {
    "transformers": 24,
    "timm": 14,
    "torchvision": 8,
    "recurrent": 5,
    "graph": 4,
    "detection": 3,
    "other": 2,
}

Spoilt = tuple[
    nn.Module, str, Any
]  # the model, the tensor that was spoilt ("" where it is none), the plan it claims
Spoiler = Callable[[nn.Module, Any, random.Random], Spoilt | None]


def _cut_tensors(small: nn.Module, plan: Any, floats: bool = True) -> list[tuple[str, Tensor]]:
    named = [*small.named_parameters(), *small.named_buffers()]
    return [(n, t) for n, t in named if n in plan.cuts and (is_inexact(t) or not floats) and t.numel()]


def swapped(original: nn.Module, result: Any, dice: random.Random) -> Spoilt | None:
    """Two kept indices of one tensor change places."""
    small = copy.deepcopy(result.model)
    pairs = [(n, t, d) for n, t in _cut_tensors(small, result.plan)
             for d, k in enumerate(result.plan.cuts[n].keep) if k is not None and t.shape[d] > 1]  # fmt: skip
    if not pairs:
        return None
    name, tensor, dim = dice.choice(pairs)
    order = list(range(tensor.shape[dim]))
    i, j = dice.sample(order, 2)
    order[i], order[j] = j, i
    with torch.no_grad():
        tensor.copy_(tensor.index_select(dim, torch.tensor(order)))
    return small, name, result.plan


def index_off(original: nn.Module, result: Any, dice: random.Random) -> Spoilt | None:
    """Instead of one kept index of one tensor, one that was removed."""
    small, state = copy.deepcopy(result.model), dict(original.state_dict())
    pairs = [(n, t, d) for n, t in _cut_tensors(small, result.plan)
             for d, k in enumerate(result.plan.cuts[n].keep)
             if k is not None and result.plan.cuts[n].blocks is None and n in state]  # fmt: skip
    if not pairs:
        return None
    name, tensor, dim = dice.choice(pairs)
    cut = result.plan.cuts[name]
    gone = sorted(set(range(cut.shape[dim])) - set(cut.keep[dim].tolist()))
    here = dice.randrange(tensor.shape[dim])
    value = state[name]
    for d, kept in enumerate(cut.keep):
        if kept is not None:
            kept = torch.from_numpy(kept.copy())
            if d == dim:
                kept[here] = dice.choice(gone)
            value = value.index_select(d, kept)
    with torch.no_grad():
        tensor.copy_(value)
    return small, name, result.plan


def repair_spoilt(original: nn.Module, result: Any, dice: random.Random) -> Spoilt | None:
    """A number that a module remembers is left as it was, or is one off."""
    repairs = result.plan.repairs
    if not repairs:
        return None
    i = dice.randrange(len(repairs))
    if dice.random() < 0.5:
        others = [r for n, r in enumerate(repairs) if n != i]
    else:
        others = [replace(r, value=r.value + 1) if n == i else r for n, r in enumerate(repairs)]
    plan = copy.copy(result.plan)
    plan.repairs = others
    return depgraph.apply(original, plan), "", plan


def plan_spoilt(original: nn.Module, result: Any, dice: random.Random) -> Spoilt | None:
    """The plan itself keeps another index of one tensor, in place of a kept one; the result is made by it."""
    cuts = {n: c for n, c in result.plan.cuts.items() if c.blocks is None}
    pairs = [
        (n, d, k)
        for n, c in cuts.items()
        for d, k in enumerate(c.keep)
        if k is not None and 0 < len(k) < c.shape[d]
    ]
    if not pairs:
        return None
    name, dim, kept = dice.choice(pairs)
    gone = sorted(set(range(cuts[name].shape[dim])) - set(kept.tolist()))
    kept = kept.copy()
    kept[dice.randrange(len(kept))] = dice.choice(gone)
    kept.sort()
    plan = copy.copy(result.plan)
    keep = tuple(kept if d == dim else k for d, k in enumerate(cuts[name].keep))
    plan.cuts = {**result.plan.cuts, name: replace(cuts[name], keep=keep)}
    return depgraph.apply(original, plan), name, plan


def scaled(original: nn.Module, result: Any, dice: random.Random) -> Spoilt | None:
    """One tensor is 1 % too large."""
    small = copy.deepcopy(result.model)
    named = _cut_tensors(small, result.plan)
    if not named:
        return None
    name, tensor = dice.choice(named)
    with torch.no_grad():
        tensor.mul_(1.01)
    return small, name, result.plan


def trained_only(original: nn.Module, result: Any, dice: random.Random) -> Spoilt | None:
    """A hook bends the output of one module in train mode."""
    small = copy.deepcopy(result.model)
    modules = [m for m in small.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if not modules:
        return None
    module = dice.choice(modules)

    def bend(m: nn.Module, _: Any, out: Any) -> Any:
        return out * 1.01 if m.training else out

    module.register_forward_hook(bend)
    return small, "", result.plan


def buffer_spoilt(original: nn.Module, result: Any, dice: random.Random) -> Spoilt | None:
    """A buffer that is cut holds the first entries instead of the kept ones."""
    small, before = copy.deepcopy(result.model), dict(original.named_buffers())
    named = [(n, t) for n, t in small.named_buffers() if n in result.plan.cuts and is_inexact(t)]
    named = [(n, t) for n, t in named if n in before and t.dim() and t.numel()]
    if not named:
        return None
    name, tensor = dice.choice(named)
    with torch.no_grad():
        tensor.copy_(before[name][tuple(slice(0, n) for n in tensor.shape)])
    return small, name, result.plan


def untied(original: nn.Module, result: Any, dice: random.Random) -> Spoilt | None:
    """A tied tensor gets values of its own under its second name."""
    if not result.plan.aliases:
        return None
    small = copy.deepcopy(result.model)
    alias = dice.choice(sorted(result.plan.aliases))
    path, _, key = alias.rpartition(".")
    module = small.get_submodule(path)
    tensor = module._parameters.get(key)
    if tensor is None:
        return None
    module._parameters[key] = nn.Parameter(tensor.detach().flip(0).clone())
    return small, alias, result.plan


KINDS: dict[str, Spoiler] = {
    "two indices swapped": swapped,
    "one index off": index_off,
    "one index of the plan off": plan_spoilt,
    "a repair spoilt": repair_spoilt,
    "scaled by 1 %": scaled,
    "train mode alone": trained_only,
    "a buffer spoilt": buffer_spoilt,
    "a tie broken": untied,
}

# ----------------------------------------------------------------------------------------------------- the judge


def _outputs(model: nn.Module, inputs: Inputs, training: bool) -> list[Tensor] | None:
    """What a copy of the model returns; None where it fails."""
    torch.manual_seed(0)
    random.seed(0)
    try:
        with torch.no_grad():
            return [t for t in tensors(call(copy.deepcopy(model).train(training), inputs)) if is_inexact(t)]
    except Exception:
        return None


def others(inputs: Inputs) -> Iterator[Inputs]:
    """The inputs with their floats drawn anew, and if they are images or the like, more of them."""
    dice = torch.Generator().manual_seed(3)

    def drawn(x: Any, more: int = 0) -> Any:
        return (
            torch.randn(len(x) + more, *x.shape[1:], generator=dice, dtype=x.dtype)
            if is_inexact(x) and x.dim()
            else x
        )

    yield tree_map(drawn, inputs)
    if isinstance(inputs, tuple) and all(is_inexact(x) and x.dim() > 1 for x in inputs):
        yield tuple(drawn(x, 2) for x in inputs)


def changes(right: nn.Module, spoilt: nn.Module, inputs: Inputs) -> float:
    """The largest change of an output over its spread, in either mode, on the example and on others."""
    worst = 0.0
    for given in (inputs, *others(inputs)):
        for training in (False, True):
            wanted = _outputs(right, given, training)
            if wanted is None:
                continue
            got = _outputs(spoilt, given, training)
            if got is None or [t.shape for t in got] != [t.shape for t in wanted]:
                return float("inf")
            for a, b in zip(got, wanted, strict=True):
                if b.numel() and b.isfinite().all():
                    spread = float(b.std(correction=0)) if b.numel() > 1 else float(b.abs().max())
                    gap = float((a - b).abs().max()) / max(spread, 1e-12)
                    worst = max(worst, float("inf") if math.isnan(gap) else gap)
    return worst


def verdict(original: nn.Module, spoilt: nn.Module, plan: Any, inputs: Any, tensor: str) -> str:
    """What the proof says where it neither objects nor admits that it can't tell; else nothing."""
    try:
        proof = depgraph.verify(original, spoilt, plan, inputs)
    except depgraph.VerificationError:
        return ""
    unproved = tensor and tensor in proof.unproved
    return "" if unproved or proof.status != "equal" else f"equal, {proof.max_error:.1e}"


def subjects(networks: int, start: int, models: dict[str, int]) -> Iterator[tuple[str, nn.Module, Any, dict]]:
    """Name, model, inputs and options of what is pruned."""
    for seed in range(start, start + networks):
        model, inputs = random_network(seed)
        yield (
            f"seed {seed}",
            model,
            inputs,
            random_options(seed, model) | {"importance": random_importance(seed)},
        )
    for name, count in models.items():
        cases = suite(name)
        for case in list(cases)[:: len(cases) // count][:count]:
            model, inputs = cases[case].build().eval(), cases[case].inputs()
            yield f"{name} {case}", randomise(model, 0, inputs), inputs, {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=500, help="how many random networks")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--small", action="store_true", help="a dozen networks and no other models")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    networks, models = (12, {}) if arguments.small else (arguments.networks, MODELS)
    console, began = Console(), time.perf_counter()
    subject_count = 0
    tried, harmless, misses = Counter(), Counter(), Counter()
    every = networks + sum(models.values())
    for name, model, inputs, options in track(
        subjects(networks, arguments.start, models), "corruptions", total=every, console=console
    ):
        dice = random.Random(name)
        try:
            result = depgraph.prune(model, inputs, verify=False, **options)
        except depgraph.NothingToPruneError:
            continue
        subject_count += 1
        for kind, spoil in KINDS.items():
            try:
                spoilt = spoil(model, result, dice)
            except depgraph.DepgraphError:
                continue
            if spoilt is None:
                continue
            if not changes(result.model, spoilt[0], inputs) > NOTICEABLE:
                harmless[kind] += 1
                continue
            tried[kind] += 1
            said = verdict(model, spoilt[0], spoilt[2], inputs, spoilt[1])
            if said:
                misses[kind] += 1
                console.print(f"{name}: {kind} {spoilt[1]}: {said}", style="red", markup=False)
    table = Table("corruption", "noticeable", "not noticeable", "misses")
    for kind in KINDS:
        table.add_row(kind, str(tried[kind]), str(harmless[kind]), str(misses[kind]))
    console.print(table)
    console.print(
        f"{subject_count} models, {sum(tried.values())} corruptions, {sum(misses.values())} misses, {time.perf_counter() - began:.0f} s"
    )
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
