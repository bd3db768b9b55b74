"""Every rule against what its op does to numbers, over the table in `probing_rows.py`; `probing.py` says how."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from probing import Claim
from probing_rows import ROWS
from test_rules import POINTWISE, overloads
from versions import on_new_torch

from depgraph.axes.axes import Axis, concat, product
from depgraph.axes.op_call import OpCall
from depgraph.rules import REGISTRY
from depgraph.tracing.whole import WHOLE, is_composite

pytestmark = [
    pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter"),
    pytest.mark.filterwarnings("ignore:index_reduce"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid"),
]

NUMBERS = "code, or a tensor that is computed, knows positions by their numbers, which would have to change in the run"
POSITIONS = "positions are no channels, and sizes in pixels are arguments that nothing repairs"
LITERAL = "the numbers in the call could not be repaired to mean the same"
SIZE_1 = "a dim of size 1 relates nothing, so the index in it could not be followed"
RARE = "rare on channels, so not worth its lines"

# Where a rule freezes a dim though it could lose indices: the reason that it gives -> (why it stays so, which ops).
STRICT = {
    "goes into the op, whose result depends on values": (
        NUMBERS,
        "_unique2 bincount histc isin masked_select nonzero searchsorted take unique_consecutive unique_dim",
    ),
    "goes through the op, which picks entries by position": (RARE, "as_strided trace"),
    "goes through the op, whose rule does not cover this call (a step is not covered)": (RARE, "slice_scatter"),
    "goes through the op, whose rule does not cover this call (list index out of range)": (RARE, "view"),
    "goes through the op, whose rule does not cover this call (only [rows, k] x [blocks, k, m] is covered)": (
        RARE,
        "_grouped_mm",
    ),
    "is as narrow as the kernel allows": ("rows must be of a multiple of 16 bytes", "_grouped_mm"),
    "is counted in blocks of rows": (NUMBERS, "_grouped_mm"),
    "is filled in reading order by a mask": (NUMBERS, "masked_scatter"),
    "is indexed by a tensor": (
        NUMBERS,
        "_index_put_impl _unsafe_index _unsafe_index_put gather index index_add index_copy index_fill index_put "
        "index_reduce index_select scatter scatter_add scatter_reduce",
    ),
    "is indexed by a position in several dims": (NUMBERS, "argmax argmin"),
    "is laid out beside a diagonal": (RARE, "diag_embed"),
    "is looked up by number (rows of an embedding)": (NUMBERS, "embedding"),
    "is masked by position (a triangle)": (NUMBERS, "tril triu"),
    "is masked by position (causal attention)": (NUMBERS, "scaled_dot_product_attention"),
    "is padded by its own entries": (POSITIONS, "pad"),
    "is read along a diagonal": (RARE, "diagonal"),
    "is read at a fixed index": (NUMBERS, "select"),
    "is flattened and repeated": (RARE, "repeat_interleave"),
    "is rolled as a whole": (RARE, "roll"),
    "is rolled more than once around": (LITERAL, "roll"),
    "is sliced with a step": (LITERAL, "slice"),
    "is split into pieces of one size and a remainder": (LITERAL, "chunk split tensor_split unsafe_split"),
    "is taken apart index by index": (NUMBERS, "unbind"),
    "is cut out as a dim of size 1": (
        SIZE_1,
        "slice slice_scatter split split_with_sizes unsafe_split",
    ),
    "is taken apart by a slice with a step": (LITERAL, "slice"),
    "numbers layers and directions": (NUMBERS, "gru lstm rnn_relu rnn_tanh"),
    "numbers the groups of a channel shuffle": (LITERAL, "channel_shuffle"),
    "ranges over an index": (
        NUMBERS,
        "_index_put_impl _unsafe_index_put index_add index_copy index_put index_reduce",
    ),
    "ranges over the keys of an attention": (
        "tokens are no channels",
        "_scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention "
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable "
        "scaled_dot_product_attention",
    ),
    "ranges over positions that windows in memory mix": (POSITIONS, "as_strided"),
    "ranges over the positions that a convolution mixes": (POSITIONS, "convolution torchvision::deform_conv2d"),
    "ranges over the positions that a pixel shuffle mixes": (POSITIONS, "pixel_shuffle"),
    "ranges over the positions that a pooling or resampling mixes": (
        POSITIONS,
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d avg_pool3d fractional_max_pool2d "
        "fractional_max_pool3d max_unpool2d max_unpool3d reflection_pad1d reflection_pad2d reflection_pad3d "
        "replication_pad1d replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d",
    ),
    "ranges over the positions that a sampling mixes": (POSITIONS, "torchvision::roi_align"),
    "ranges over the positions that an unfold mixes": (POSITIONS, "im2col"),
    "ranges over the steps of a packed batch": (
        "their lengths stand in another argument",
        "_pack_padded_sequence gru lstm rnn_relu rnn_tanh",
    ),
    "sets the default scale of an attention, 1 / sqrt(width)": (
        "the smaller op would scale otherwise",
        "scaled_dot_product_attention",
    ),
}  # fmt: skip

every_row = pytest.mark.parametrize("name", ROWS)


@cache
def claim(name: str) -> Claim:
    """What the rule says of a row, made once."""
    return Claim(ROWS[name])


@cache
def strict(name: str) -> frozenset[tuple[str, str]]:
    """(reason, op) for every dim that is frozen without need."""
    row = ROWS[name]
    reasons = (what.partition(": ")[2] for what in claim(name).too_strict().values())
    return frozenset((r.replace(str(row.op), "the op"), row.rule.removeprefix("aten::")) for r in reasons)


@every_row
def test_what_a_rule_leaves_free_can_go(name: str):
    assert not claim(name).unequal()


@pytest.mark.slow
@every_row
def test_no_unit_reaches_beyond_itself(name: str):
    assert not claim(name).dependent()


@every_row
def test_nothing_is_frozen_without_need(name: str):
    listed = {(reason, op) for reason, (_, ops) in STRICT.items() for op in ops.split()}
    assert strict(name) - listed == set(), claim(name).too_strict()


@on_new_torch
def test_ledger_names_what_is_found():
    listed = {(reason, op) for reason, (_, ops) in STRICT.items() for op in ops.split()}
    assert listed - frozenset().union(*map(strict, ROWS)) == set(), "no longer too strict: take it out"


# ------------------------------------------------------------------------------------------------ the table is complete

FREE = {
    "generator",
    "dtype",
    "layout",
    "device",
    "pin_memory",
    "memory_format",
    "names",
}  # say nothing about dims


def signature(op: Any) -> tuple[Any, ...]:
    """What tells an overload from others as far as dims go."""
    arguments = op._schema.arguments
    return op._schema.name, *((a.name, str(a.type)) for a in arguments if a.name not in FREE)


# Derivatives mean what they do beside the forward pass alone: test_derivatives.py has networks with them.
BESIDE_OTHERS = {n for n, rule in REGISTRY.items() if rule.__module__ == "depgraph.rules.gradients"}
BESIDE_OTHERS |= {"*::roi_pool"}  # vision_ops.py has no kernel


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {POINTWISE} - BESIDE_OTHERS))
def test_every_overload_that_differs_in_its_arguments_has_a_row(name: str):
    rows = {signature(row.op) for row in ROWS.values()}
    whole = set(WHOLE.values())
    for op in overloads(name):
        written = any(a.is_out for a in op._schema.arguments) or "Dimname" in str(op._schema)
        if not written and (op in whole or not is_composite(op)):
            assert signature(op) in rows, f"{op} has no row in probing_rows.py"


# ------------------------------------------------------------------------------------------------ wrong rules are found


def wrong(rule: str, broken: Callable[[OpCall, Any], Any]) -> Callable[[OpCall], Any]:
    right = REGISTRY[f"aten::{rule}"]
    return lambda site: broken(site, right)


def reversed_pieces(site: OpCall, right: Any) -> Any:
    out = right(site)
    parts = out[1].find().parts
    return [out[0], concat(parts[::-1]), *out[2:]]


def inner_first(site: OpCall, right: Any) -> Any:
    out = right(site)
    return [*out[:-1], product(out[-1].find().parts[::-1])]


def untied(site: OpCall, right: Any) -> Any:
    return [[site.fresh(n) for n in shape] for shape in site.shapes]


def kept(site: OpCall, right: Any) -> Any:
    return site.dims(site.args[0])


def locked(site: OpCall, right: Any) -> Any:
    out = right(site)
    for axis in out:
        site.lock(axis, "for no reason")
    return out


def loose_mean(site: OpCall, right: Any) -> Any:
    out = right(site)
    site.state.statistics.clear()
    return out


WRONG: dict[str, tuple[str, Callable[[OpCall, Any], Any], str]] = {
    "pieces in the wrong order": ("cat.default", reversed_pieces, "the rule says|not the original's"),
    "factors in the wrong order": ("view.default 2", inner_first, "not the original's"),
    "operands that are not tied": ("add.Tensor", untied, "fails"),
    "a flip that keeps the order": ("flip.default", kept, "not the original's"),
    "a statistic that is not named": ("mean.dim", loose_mean, "is not stated"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_rule_is_found(what: str, monkeypatch: pytest.MonkeyPatch):
    name, broken, text = WRONG[what]
    row = ROWS[name]
    rule = row.rule if row.rule in REGISTRY else POINTWISE
    monkeypatch.setitem(REGISTRY, rule, wrong(rule.removeprefix("aten::"), broken))
    said = Claim(row).unequal()
    assert any(part in said for part in text.split("|")), said


@pytest.mark.parametrize("name", ["_softmax", "cumsum"])
def test_reaching_beyond_a_unit_is_found(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(REGISTRY, f"aten::{name}", wrong(name, kept))
    assert "reaches entries of others" in Claim(ROWS[f"{name}.default"]).dependent()


def test_needless_freezing_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(REGISTRY, "aten::permute", wrong("permute", locked))
    assert set(Claim(ROWS["permute.default"]).too_strict().values()) == {"kept: for no reason"}


def test_a_row_is_a_call_of_one_op():
    graph = claim("linear.default").trace.graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [torch.ops.aten.linear.default]
    assert all(isinstance(a, Axis) for a in claim("linear.default").free)
