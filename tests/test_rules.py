"""The table of rules itself: every name is an op, and no name is registered twice by accident."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import vision_ops  # noqa: F401  # declares what rules for ops of any library are about
from versions import NEW_TORCH

from depgraph import rules
from depgraph.rules import registry
from depgraph.tracing.whole import WHOLE, is_composite

POINTWISE = "aten::pointwise"  # the key of the rule for every op that torch tags as pointwise


def overloads(name: str) -> list[object]:
    """The overloads of an op of this torch, but for those that TorchScript alone can call."""
    namespace, _, op = name.replace("*", "torchvision").partition(
        "::"
    )  # of any library: one that declares it
    packet = getattr(getattr(torch.ops, namespace), op, None)
    found = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
    return [op for op in found if known(op)]


def known(op: object) -> bool:
    try:
        is_composite(op)
    except RuntimeError:
        return False
    return True


def test_every_name_is_an_op_that_a_graph_can_hold():
    """Composite ops are taken apart before they are recorded, unless they are recorded whole."""
    whole = {f"aten::{op._schema.name.partition('::')[2]}" for op in WHOLE.values()}
    for name in sorted(set(registry.REGISTRY) - {POINTWISE} - whole):
        ops = overloads(name)
        if not ops and not NEW_TORCH:
            continue
        assert ops, f"{name}: no such op in torch.ops: mistyped, or not in this torch"
        assert not all(map(is_composite, ops)), f"{name} is never recorded"


def test_no_name_is_registered_twice(monkeypatch: pytest.MonkeyPatch):
    seen: Counter[str] = Counter()

    class Noting(dict):
        def __setitem__(self, name, rule):
            seen[name] += 1
            super().__setitem__(name, rule)

    monkeypatch.setattr(registry, "REGISTRY", Noting())
    for file in sorted(Path(rules.__file__).parent.glob("*.py")):
        if file.stem not in ("__init__", "registry"):
            spec = importlib.util.spec_from_file_location(f"depgraph.rules._again_{file.stem}", file)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert set(seen) == set(rules.REGISTRY), "the files of depgraph/rules are not all there is"
    assert [name for name, times in seen.items() if times > 1] == []


def test_in_place_ops_have_the_rule_of_their_base():
    assert registry.rule_for(torch.ops.aten.cumsum_.default) is not None
    assert registry.rule_for(torch.ops.aten.add_.Tensor) is registry.REGISTRY["aten::pointwise"]
    assert registry.rule_for(torch.ops.aten.linalg_svd.default) is None


def test_an_older_torch_may_lack_an_op():
    """torch 2.6, the oldest that is supported, has no `_grouped_mm`; nothing may ask for it at import."""
    code = """
import torch
from torch._ops import _OpNamespace
found = _OpNamespace.__getattr__
def without(self, name):
    if name == "_grouped_mm":
        raise AttributeError(name)
    return found(self, name)
_OpNamespace.__getattr__ = without
vars(torch.ops.aten).pop("_grouped_mm", None)
import depgraph
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
