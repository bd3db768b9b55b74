"""The table of rules itself: every name is an op, and no name is registered twice by accident."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch

from depgraph import rules
from depgraph.rules import registry

# Names that are no op of this torch, with the reason why they may stand in the table all the same.
ABSENT = {
    "aten::pointwise": "the key of the rule for every op that torch tags as pointwise",
    "aten::grouped_mm": "dead: F.grouped_mm is recorded as _grouped_mm",
    "aten::lp_pool2d": "dead: a function of torch.nn.functional, made of other ops",
    "aten::unique": "dead: torch.unique is recorded as _unique2 or unique_dim",
    "aten::where.condition": "dead: rules are looked up by names without overload",
    "aten::local_response_norm": "dead: a function of torch.nn.functional, made of other ops",
}
# Names that a second rule takes over from the one registered first.
TAKEN_OVER = {
    **dict.fromkeys(("aten::prelu", "aten::_prelu_kernel"), "in pointwise.ALSO, but `prelu` has a rule of its own"),
    **dict.fromkeys(("aten::mse_loss", "aten::smooth_l1_loss", "aten::l1_loss"), "in pointwise.ALSO, but `loss` is the rule"),
}  # fmt: skip


def exists(name: str) -> bool:
    namespace, _, op = name.partition("::")
    return hasattr(getattr(torch.ops, namespace), op)


def test_every_name_is_an_op():
    unknown = {name for name in registry.REGISTRY if not exists(name)}
    assert unknown - set(ABSENT) == set(), "no such op in torch.ops: mistyped, or not in this torch"
    assert set(ABSENT) <= set(registry.REGISTRY), "ABSENT lists names that no rule is registered under"


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
    assert {name for name, times in seen.items() if times > 1} == set(TAKEN_OVER)


def test_in_place_ops_have_the_rule_of_their_base():
    assert registry.rule_for(torch.ops.aten.cumsum_.default) is not None
    assert registry.rule_for(torch.ops.aten.add_.Tensor) is registry.REGISTRY["aten::pointwise"]
    assert registry.rule_for(torch.ops.aten.linalg_svd.default) is None
