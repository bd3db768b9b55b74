"""Ops of one's own: frozen without a rule, pruned with one, and a wrong rule is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, List  # noqa: UP035  torch 2.6 knows no other list of ints

import pytest
import torch
from checks import prune_and_check, random_importance
from oracle import assert_equal_to_masked, assert_state_matches_plan
from small_models import between, frozen_texts, vectors
from torch import Tensor, nn

import depgraph

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


@torch.library.custom_op("structure::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An op that does its work outside torch, without a rule."""
    return torch.from_numpy(x.detach().numpy() * 2)


twice.register_fake(torch.empty_like)


twice.register_autograd(lambda _, gradient: gradient * 2)


@torch.library.custom_op("structure::heads", mutates_args=())
def heads_op(x: Tensor, shape: List[int], heads: int) -> Tensor:  # noqa: UP006
    """Each row's heads (x [n, heads * width]) are scaled by a number of their own, 1 / (1 + how many heads there are)."""
    return (x.view(shape[0], heads, -1) * 0.5).flatten(1)


@torch.library.custom_op("structure::scale_", mutates_args=("x",))
def scale_(x: Tensor, weight: Tensor) -> None:
    """Changes its argument and returns nothing."""
    x.mul_(weight)


@torch.library.custom_op("structure::pair", mutates_args=())
def pair(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x @ weight.T, x * 2


def prune_and_verify(net: nn.Module, x: Tensor, **options: Any) -> depgraph.PruneResult:
    """The library's own proof and the oracle's values; for nets that can't be trained."""
    result = depgraph.prune(net, x, **options)
    assert result.report.verification.status == "equal"
    assert_equal_to_masked(net, result, x)
    assert_state_matches_plan(net, result.model, result.plan)
    return result


def test_an_op_without_a_rule_is_frozen_and_says_what_to_do() -> None:
    net = between(lambda _, x: twice(x))
    result = prune_and_check(net, (vectors(5),), pruning_ratio=0.5)
    assert result.model.a.weight.shape == (12, 5)
    assert result.model.b.weight.shape == (7, 12)
    text = frozen_texts(net, vectors(5), "a.weight")
    assert "structure.twice.default" in text
    assert "depgraph.op_rule" in text
    with pytest.raises(depgraph.UnknownOpError, match=r"structure\.twice.*\n.*\n.*op_rule"):
        depgraph.analyze(net, vectors(5), strict=True)


def test_an_op_that_returns_nothing_freezes_what_it_changes() -> None:
    def change(net: nn.Module, x: Tensor) -> Tensor:
        x = x.clone()
        scale_(x, net.extra[0])
        return x

    net = between(change)
    result = prune_and_verify(net, vectors(5))
    assert result.model.a.weight.shape == (12, 5)
    assert "structure.scale_" in frozen_texts(net, vectors(5), "a.weight")


def test_a_rule_makes_an_op_prunable(stated: Callable[..., Any]) -> None:
    stated("structure::twice")(lambda site: site.dims(site.args[0]))
    result = prune_and_check(between(lambda _, x: twice(x)), (vectors(5),), pruning_ratio=0.5)
    assert result.model.a.weight.shape == (6, 5)


def test_an_equation_and_several_results(stated: Callable[..., Any]) -> None:
    product = depgraph.equation("nk,mk->nm", weight=1)
    stated("structure::pair")(lambda site: [product(site), site.dims(site.args[0])])
    net = between(lambda net, x: torch.add(*pair(x, net.extra)))
    result = prune_and_verify(net, vectors(5))
    assert result.model.extra.shape == (6, 6)  # rows and columns are one axis: the two results are added


@pytest.mark.parametrize("spelling", ["position", "name", "literal"])
def test_numbers_that_a_rule_explains_are_repaired(spelling: str, stated: Callable[..., Any]) -> None:
    @stated("structure::heads")
    def rule(site: depgraph.OpCall) -> Any:
        x = site.dims(site.args[0])
        head, width = site.algebra.factor(x[1], site.arg(2, "heads"))
        site.lock(width, "has a width that means something")
        for place in (2, "heads"):
            site.argument_is_size_of(head, place)
        return x

    calls = {
        "position": lambda net, x: heads_op(x, [x.shape[0]], net.heads),
        "name": lambda net, x: heads_op(x, heads=net.heads, shape=[x.shape[0]]),
        "literal": lambda net, x: net.literal(x),
    }

    class Net(type(between(calls[spelling]))):
        def literal(self, x: Tensor) -> Tensor:
            return torch.ops.structure.heads(x, [x.shape[0]], 4)

    net = between(calls[spelling], heads=4)
    net.__class__ = Net
    result = prune_and_verify(net, vectors(5))
    assert result.model.a.weight.shape == (6, 5)
    if spelling == "literal":
        assert result.report.rewritten == [""]
    else:
        assert result.model.heads == 2


def test_numbers_that_a_rule_does_not_explain_stay(stated: Callable[..., Any]) -> None:
    """`heads` is also used in a view, where it would follow the heads; the op pins it."""
    stated("structure::heads")(lambda site: site.dims(site.args[0]))

    def call(net: nn.Module, x: Tensor) -> Tensor:
        x = heads_op(x, [x.shape[0]], net.heads)
        return (x.view(x.shape[0], net.heads, -1).tanh()).flatten(1)

    result = prune_and_verify(between(call, heads=4), vectors(5))
    assert result.model.heads == 4
    assert result.model.a.weight.shape == (8, 5)  # two of three in each head


@pytest.mark.parametrize("verify", [True, False])
def test_a_wrong_rule_is_found(verify: bool, stated: Callable[..., Any]) -> None:
    """It says that columns are the op's own; whoever does not verify believes it."""

    @torch.library.custom_op("structure::reverse", mutates_args=())
    def reverse(x: Tensor) -> Tensor:
        return x.flip(1)

    stated("structure::reverse")(lambda site: site.dims(site.args[0]))
    net = between(lambda _, x: reverse(x))
    result = depgraph.prune(net, vectors(5), verify=verify, importance=random_importance(1))
    assert result.model.a.weight.shape == ((12, 5) if verify else (6, 5))
    if verify:
        assert "did not verify" in frozen_texts_of(result, "a.weight")
        assert_equal_to_masked(net, result, vectors(5))


def frozen_texts_of(result: depgraph.PruneResult, name: str) -> str:
    return " ".join(str(f.reason) for f in result.report.frozen if f.name == name)


def test_a_statistic_says_how_it_is_run_on_zeros(stated: Callable[..., Any]) -> None:
    @torch.library.custom_op("structure::centred", mutates_args=())
    def centred(x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)

    def on_zeroed(x: Tensor, masks: list[Tensor]) -> Tensor:
        return (x - x.sum(1, keepdim=True) / masks[0].sum(1, keepdim=True)) * masks[0]

    net = between(lambda _, x: centred(x))
    stated("structure::centred")(lambda site: site.dims(site.args[0]))
    assert depgraph.prune(net, vectors(5)).model.a.weight.shape == (12, 5)  # zeros are not nothing to a mean
    stated("structure::centred", masked=on_zeroed)(lambda site: site.dims(site.args[0]))
    result = depgraph.prune(net, vectors(5))
    assert result.report.verification.status == "equal"
    assert result.model.a.weight.shape == (6, 5)


@pytest.mark.parametrize("name", ["relu", "aten::relu", "prim::device", ""])
def test_op_rule_is_for_ops_of_ones_own(name: str) -> None:
    with pytest.raises(depgraph.InputError, match="op_rule"):
        depgraph.op_rule(name)
