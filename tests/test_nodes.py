"""What is known of the nodes of a recorded graph, and what an op is asked by: its name as a whole, not a part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import check_result
from torch import Tensor, nn

import depgraph
from depgraph.axes import nodes
from depgraph.rules import equation
from depgraph.rules.registry import REGISTRY
from depgraph.tracing.recorder import record_of

aten = torch.ops.aten


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("order", torch.arange(8))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        return self.last(torch.cat([a, b], 1) * torch.tensor(2.0))


def test_every_node_but_the_output_has_a_record() -> None:
    recorded = depgraph.trace(Two().eval(), torch.randn(4, 5))
    *all_, output = recorded.graph.nodes
    records = {str(n.target): record_of(n) for n in all_}
    assert output.op == "output"
    assert {n.op: record_of(n).kind for n in all_ if n.op == "placeholder"} == {"placeholder": "input"}
    assert (records["first.weight"].kind, records["first.weight"].shape) == ("tensor", (8, 5))
    assert records["constant_0"].kind == "constant"
    call = records["aten.linear.default"]
    assert (call.kind, call.module, call.function, call.dtype) == ("call", "last", "linear", torch.float32)
    assert call.source.endswith("in forward")
    assert call.source.startswith(__file__)
    chunk = records["aten.chunk.default"]
    assert (chunk.several, chunk.one_tensor, chunk.shapes) == (True, False, ((4, 4), (4, 4)))
    items = [record_of(n) for n in all_ if "getitem" in str(n.target)]
    assert [(r.one_tensor, r.shape) for r in items] == [(True, (4, 4))] * 2
    assert all(set(n.meta) == {"depgraph"} for n in all_), "nothing else lies in meta, no memo of an analysis"


def test_two_analyses_of_one_trace_do_not_know_of_each_other() -> None:
    recorded = depgraph.trace(Two().eval(), torch.randn(4, 5))
    one, other = depgraph.propagate(recorded), depgraph.propagate(recorded)
    weight = recorded.tensors["last.weight"]
    assert one.leaves_of(weight) == other.leaves_of(weight) == [weight]
    assert one.multiplying == other.multiplying
    assert one.dims[weight][0][0] is not other.dims[weight][0][0]


# ------------------------------------------------------------------------------------------------------ ops by name


def test_the_name_of_an_op() -> None:
    assert nodes.op_name(aten.view.default) == "view"
    assert nodes.op_name(torch.sin) == ""
    assert nodes.base_name(aten.add_.Tensor) == "add"
    assert nodes.base_name(aten.add.Tensor) == "add"
    assert nodes.base_name(aten.__and__.Tensor) == "__and__"


def test_what_draws_or_writes_is_no_function_of_its_arguments() -> None:
    assert nodes.is_function(aten.arange.default)
    assert nodes.is_function(aten.__and__.Tensor)
    for op in (aten.rand.default, aten.randperm.default, aten.bernoulli.default, aten.multinomial.default,
               aten.add_.Tensor, aten.sort.values, max):  # fmt: skip
        assert not nodes.is_function(op)


@pytest.mark.parametrize("names", [nodes.CONVOLUTIONS, nodes.GROUPED_PRODUCTS, nodes.GATES, nodes.NORMS])
def test_the_ops_of_a_family_have_rules(names: Any) -> None:
    ruled = {n.removeprefix("aten::") for n in REGISTRY}
    assert set(names) - ruled <= {"_fused_rms_norm"}  # which reaches no trace: rms_norm is taken whole


@torch.library.custom_op("nodes::pointwise_convolution", mutates_args=())
def pointwise_convolution(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nchw,oc->nohw", x, weight)


@pointwise_convolution.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


def _saved(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return torch.einsum("nohw,oc->nchw", grad, weight), torch.einsum("nohw,nchw->oc", grad, x)


pointwise_convolution.register_autograd(_backward, setup_context=_saved)


class NamedLike(nn.Module):
    """An op of a library whose name holds that of another: it has none of the other's arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(6, 8))
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(pointwise_convolution(self.stem(x).relu(), self.weight))


@pytest.mark.parametrize("importance", ["l1", "wanda"])
def test_an_op_whose_name_holds_anothers_is_not_that_op(stated: Callable[..., Any], importance: str) -> None:
    depgraph.op_rule("nodes::pointwise_convolution")(equation("nchw,oc->nohw", weight=1))
    torch.manual_seed(0)
    model, x = NamedLike().eval(), torch.randn(2, 3, 9, 9)
    data = {} if importance == "l1" else {"calibration": [x]}
    result = depgraph.prune(model, x, pruning_ratio=0.5, importance=importance, **data)
    assert result.model.weight.shape == (3, 4)
    check_result(model, result, x)


class WrittenTable(nn.Module):
    """A table of indices that forward changes before it reads it: what it held before is no constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(8)
        order[0], order[7] = 7, 0
        return self.last(self.first(x)[:, order])


def test_what_is_written_into_is_no_constant() -> None:
    recorded = depgraph.trace(WrittenTable().eval(), torch.randn(4, 5))
    state = depgraph.propagate(recorded)
    made = next(n for n in recorded.graph.nodes if nodes.op_name(n.target) == "arange")
    assert state.constant(made) is None
