"""Numbers written in forward: they change in one module alone, and nothing else of the program does."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import math
import traceback
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from checks import check_result
from torch import Tensor, nn

import depgraph
from depgraph.tracing.literals import methods_of

WIDTH = 14


class Base(nn.Module):
    """What the networks below have in common: a layer that is cut, and one that reads it."""

    def __init__(self, width: int = 14) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 5)
        self.scale = 1.0


def doubled(method: Any) -> Any:
    """A decorator with a closure."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        return 2 * method(*args, **kwargs)

    return run


def rows(h: Tensor) -> int:
    return h.shape[0]


def viewed(h: Tensor) -> Tensor:
    return h.view(-1, 14)


class Position(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 14)) / self.scale


class Keyword(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).reshape(shape=(x.shape[0], 2 * 7)))


class Starred(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).reshape(*x.shape[:-1], 14))


class Named(Base):
    def forward(self, x: Tensor) -> Tensor:
        width = 14
        return self.b(self.a(x).view(-1, width) * torch.ones(width))


class Helper(Base):
    def split(self, h: Tensor, width: int) -> Tensor:
        return h.view(-1, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.split(self.a(x), 14))


class Method(Base):
    def split(self, h: Tensor) -> Tensor:
        return h.view(-1, 14)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.split(self.a(x)))


class Nested(Base):
    def forward(self, x: Tensor) -> Tensor:
        def split(h: Tensor) -> Tensor:
            return h.view(-1, 14)

        return self.b(split(self.a(x)))


class Decorated(Base):
    @doubled
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 14))


class Super(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 14)) + len(super().extra_repr())


class Inherited(Position):
    """Its forward is its parent's."""


class Halves(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.cat([h[:, :7] * 2, h[:, -7:]], 1))


class Unannotated(Base):
    def forward(self, x):
        return self.b(self.a(x)[:, :].view(-1, 14)) * 3


class Negative(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.cat([h[:, :-4], h[:, -4:].relu()], 1))


class Compared(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if h.shape[1] != 14:
            raise ValueError(h.shape[1])
        return self.b(h.view(-1, 14))


class Slots(Base):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        self.extra = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 14)) * self.extra


class Branches(Base):
    """Python that decides anew in every call."""

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        with torch.no_grad():
            h = self.a(x).view(-1, 14)
        if extra is not None:
            h = h * extra
        self.last = self.b(h)
        return {"y": self.last} if self.training else self.last


class ReadScales(Base):
    """What is computed with a size that gets smaller stays what it was, in each way to read it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h * (2 / h.shape[-1])
        return self.b(h / math.sqrt(h.size(1)) + int(h.size(dim=-1))) * x.shape[0]


class ReadHelper(Base):
    def scaled(self, h: Tensor) -> Tensor:
        h = h.view(rows(h), 14)
        return h * h.shape[1] ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.scaled(self.a(x)))


class ReadBranch(Base):
    """The size is read on the way that the example does not take."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h) if x.sum() > 100 else self.b(h * h.shape[1])


class ReadBeforeAnError(Base):
    """The way that the example does not take ends in an error, after it read a size."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if x.sum() > 100:
            g = h.relu()
            return self.b(g.view(1, g.shape[1] + 1000))
        return self.b(h * h.shape[1])


class ReadBoth(Base):
    """One read for a shape, another one of the same size for a scale."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h.view(-1, h.shape[1]) * h.shape[1])


class ReadOnce(Base):
    """One variable for a shape and for a scale: where it is a scale it becomes the number."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        rows, width = h.shape
        return self.b(h.view(rows, int(width)) * int(width))


class ReadWhereNothingElseRan(Base):
    """The variable also is a shape where these inputs do not lead."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        h = self.a(x)
        width = h.shape[-1]
        if shift is not None:
            h = h.view(-1, width) + shift
        return self.b(h * width)


class ReadCompared(Base):
    """The number that it is compared with follows it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        width = h.shape[-1]
        if width != 14:
            raise ValueError(width)
        return self.b(h * width)


CHANGED = [
    ReadCompared,
    ReadScales,
    ReadOnce,
    ReadWhereNothingElseRan,
    ReadHelper,
    ReadBranch,
    ReadBeforeAnError,
    ReadBoth,
    Position,
    Keyword,
    Starred,
    Named,
    Helper,
    Method,
    Nested,
    Decorated,
    Super,
    Inherited,
    Halves,
    Negative,
    Compared,
    Slots,
    Branches,
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_number_changes_and_nothing_else(kind: Any, inplace: bool) -> None:
    model, x = kind().eval(), torch.randn(3, 6)
    other, original, forward = kind(), copy.deepcopy(model), kind.forward
    result = depgraph.prune(model, x, verify=False, inplace=inplace)
    small = result.model
    assert small.a.out_features < 14
    assert result.report.rewritten == [""]
    if kind is Slots:  # copies of modules forget slots
        assert small.extra == 3.0
        assert small(x).shape == (3, 5)
    elif kind is not Branches:  # its gradients stop, as the original's do
        check_result(original, result, x)
    assert isinstance(small, kind)
    assert (type(small).__name__, type(small).__module__) == (kind.__name__, kind.__module__)
    assert kind.forward is forward
    other(x)
    assert (model is small) == inplace
    if not inplace:
        model(x)


class Shared(Base):
    """One number, needed as the width of one layer and as a fixed number of columns."""

    def forward(self, x: Tensor) -> Tensor:
        width = 14
        h = self.a(x)
        return self.b(h.view(-1, width)) * x.new_ones(5, width).sum(1)


class TwoWidths(Base):
    """One number for two layers: both keep as many."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Linear(6, 14), nn.Linear(14, 5)

    def split(self, h: Tensor) -> Tensor:
        return h.view(-1, 14)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.split(self.a(x))) + self.d(self.split(self.c(x)))


class Free(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(viewed(self.a(x)))


class Global(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, WIDTH))


class Default(Base):
    def forward(self, x: Tensor, width: int = 14) -> Tensor:
        return self.b(self.a(x).view(-1, width))


class Computed(Base):
    """A width and a number that the outputs are scaled by."""

    def forward(self, x: Tensor) -> Tensor:
        n = 14
        return self.b(self.a(x).view(-1, n)) * n


class SuperCall(Position):
    """Numbers in a forward that is called by way of ``super()``: no instance can replace it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class ReadOfACall(Base):
    """Without the read, the call would be gone, and what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.a(x).shape[-1])


class ReadOfSeveral(Base):
    """One read in the code, of sizes that are not the same."""

    def scaled(self, h: Tensor) -> Tensor:
        return h * h.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(self.b(self.scaled(self.a(x))))


class ReadWithRows(Base):
    """A size that other inputs change, too."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h * h.flatten().shape[0])


class ReadInFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(scaled(self.a(x)))


def scaled(h: Tensor) -> Tensor:
    return h * h.shape[-1]


class ReadToCount(Base):
    """As many steps as there are entries: with the number that it was, the last ones are not there."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h + sum(h[:, i : i + 1] for i in range(int(h.shape[-1]))))


class ReadAndKept(Base):
    """What an attribute holds may be anything to code that did not run."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.width = h.shape[-1]
        return self.b(h * self.width)


class ReadInList(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h * [x.shape[0], h.shape[-1]][1])


class ReadAndReturned(Base):
    def width(self, h: Tensor) -> int:
        return h.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h * self.width(h))


class ReadOfWhatever(Base):
    """One read, of a tensor and of something else."""

    def scaled(self, h: Any) -> Any:
        return h * h.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.scaled(self.a(x))) * float(self.scaled(np.ones((1, 3))).sum())


class ReadElsewhere(Base):
    """The method is also called where these inputs do not lead, for a tensor of another size."""

    def scaled(self, h: Tensor) -> Tensor:
        return h * h.shape[-1]

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        y = self.b(self.scaled(self.a(x)))
        return y if more is None else y + self.scaled(more)


def viewed_or_scaled(h: Tensor, width: int, view: Any) -> Tensor:
    return h * width if view is None else h.view(-1, width)


class ReadForOthers(Base):
    """What a function does with the number where it did not run, nobody sees."""

    def forward(self, x: Tensor, view: Any = None) -> Tensor:
        h = self.a(x)
        return self.b(viewed_or_scaled(h, h.shape[-1], view))


class ByAnotherName(Base):
    """The module that reads the size is also called by another name, or none, where these inputs do not lead."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Scaling()
        self.again = self.scale

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        y = self.b(self.scale(self.a(x)))
        return y if more is None else y + self.again(more)


class InAVariable(ByAnotherName):
    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        scale = self.scale
        y = self.b(scale(self.a(x)))
        return y if more is None else y + scale(more)


class Scaling(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * h.shape[-1]


HELD = [ReadForOthers, ByAnotherName, InAVariable, Shared, Free, Global, Default, Computed, SuperCall, ReadOfACall, ReadOfSeveral, ReadWithRows,
        ReadInFunction, ReadToCount, ReadAndKept, ReadInList, ReadAndReturned, ReadOfWhatever, ReadElsewhere]  # fmt: skip


def test_ways_that_the_example_does_not_take_are_right() -> None:
    torch.manual_seed(0)
    model, x = ReadWhereNothingElseRan(), torch.randn(3, 6)
    small = depgraph.prune(model, x, verify=False)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in masked.named_parameters():
            p.mul_(small.plan.mask(name))
    torch.testing.assert_close(small.model(x, torch.zeros(1)), masked(x, torch.zeros(1)))


def test_what_an_instance_calls_by_the_name_of_a_method_is_left_as_it_is() -> None:
    model, x = Method(), torch.randn(3, 6)
    model.split = lambda h: h * 3  # type: ignore[method-assign]
    result = depgraph.prune(model, x, pruning_ratio=0.3)
    check_result(model, result, x)


@pytest.mark.parametrize("kind", HELD, ids=lambda kind: kind.__name__)
def test_a_number_that_can_not_change_holds_its_axis(kind: Any) -> None:
    """Also without verification."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), kind()), torch.randn(3, 8)
    graph = depgraph.analyze(model, x)
    reasons = [f.reason for f in graph.frozen if f.name == "2.a.weight" and f.dim == 0]
    assert reasons
    assert all("test_rewrite.py" in r.source for r in reasons)
    result = depgraph.prune(model, x, verify=False)
    assert not result.plan.rewrites
    check_result(model, result, x)


def test_one_number_for_two_layers_ties_their_counts() -> None:
    model, x = TwoWidths(), torch.randn(3, 6)
    result = depgraph.prune(model, x, pruning_ratio=0.4, verify=False)
    assert result.model.a.out_features == result.model.c.out_features < 14
    check_result(model, result, x)


def test_two_modules_of_one_class_get_numbers_of_their_own() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 14), nn.Linear(14, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(-1, 14))

    model, x = nn.Sequential(Block(), Block(), nn.Linear(6, 3)), torch.randn(3, 6)
    result = depgraph.prune(model, x, pruning_ratio={"0.a": 0.3, "1.a": 0.6}, verify=False)
    assert result.model[0].a.out_features > result.model[1].a.out_features
    check_result(model, result, x)


def copies(small: nn.Module) -> list[nn.Module]:
    buffer = io.BytesIO()
    torch.save(small, buffer)
    buffer.seek(0)
    return [small, copy.copy(small), copy.deepcopy(small), torch.load(buffer, weights_only=False)]


@pytest.mark.parametrize("kind", [Position, Decorated, Method, ReadScales], ids=lambda kind: kind.__name__)
def test_copies_and_pickles(kind: Any) -> None:
    x = torch.randn(3, 6)
    once = depgraph.prune(kind(), x, pruning_ratio=0.3).model
    again = depgraph.prune(once, x, pruning_ratio=0.3).model
    assert again.a.out_features < once.a.out_features < 14
    for small in (once, again):
        for one in copies(small):
            assert type(one) is type(small)
            assert torch.equal(one(x), small(x))
            assert type(one).__mro__.count(kind) == 1
    with torch.no_grad():
        copies(again)[2].a.weight.zero_()
    assert again.a.weight.abs().min() > 0


def test_attributes_and_buffers_are_read_in_each_call() -> None:
    model, x = Position(), torch.randn(3, 6)
    small = depgraph.prune(model, x).model
    before = small(x)
    small.scale = 4.0
    torch.testing.assert_close(small(x), before / 4)


def test_the_source_is_the_users_with_the_new_number() -> None:
    small: Any = depgraph.prune(Position(), torch.randn(3, 6)).model
    assert "view(-1, 7)" in inspect.getsource(small.forward)
    assert "view(-1, 14)" in inspect.getsource(Position.forward)
    assert inspect.getsourcefile(small.forward) == __file__
    assert inspect.signature(small.forward) == inspect.signature(Position().forward)


def test_the_source_has_the_size_that_was_read() -> None:
    small: Any = depgraph.prune(ReadScales(), torch.randn(3, 6)).model
    source = inspect.getsource(small.forward)
    assert "h * (2 / 14)" in source
    assert "math.sqrt(14) + int(14)) * x.shape[0]" in source
    assert torch.equal(torch.jit.script(small)(torch.ones(4, 6)), small(torch.ones(4, 6)))


def test_a_traceback_names_the_users_file_and_line() -> None:
    small = depgraph.prune(Position(), torch.randn(3, 6)).model
    with pytest.raises(RuntimeError) as caught:
        small(torch.randn(3, 5))
    frames = traceback.extract_tb(caught.value.__traceback__)
    mine = [f for f in frames if f.filename == __file__ and f.name == "forward"]
    assert [f.line for f in mine] == ["return self.b(self.a(x).view(-1, 14)) / self.scale"]


def test_other_tools_read_the_new_number() -> None:
    """Scripting, tracing, export, compilation and torch.fx; of the original and of two sizes, in one process."""
    x = torch.randn(3, 6)
    for ratio in (0.3, 0.5):
        model = Position().eval()
        small = depgraph.prune(model, x, pruning_ratio=ratio).model
        expected = small(x)
        assert torch.equal(torch.jit.script(small)(x), expected)
        assert torch.equal(torch.jit.script(model)(x), model(x))
        assert torch.equal(torch.jit.trace(small, x)(x), expected)
        assert torch.equal(torch.export.export(small, (x,)).module()(x), expected)
        assert torch.equal(torch.fx.symbolic_trace(small)(x), expected)
        torch.testing.assert_close(torch.compile(small, backend="eager", fullgraph=True)(x), expected)


def test_a_plan_replays_from_json_and_refuses_other_code() -> None:
    x = torch.randn(3, 6)
    plan = depgraph.Plan.from_json(depgraph.prune(Position(), x, pruning_ratio=0.3).plan.to_json())
    assert depgraph.apply(Position(), plan)(x).shape == (3, 5)
    model: Any = Keyword()  # the same tensors, other code
    wrong = "number 0 in the code of forward of 'the model' is 7|holds no number 0"
    assert plan.rewrites[0].number == 0
    depgraph.apply(model, plan)  # its number is 14, too: it may be changed
    for kind in (Base, Halves):
        with pytest.raises(depgraph.PlanError, match=wrong):
            depgraph.apply(kind(), plan, inplace=True)


def test_a_graph_module_changes_in_its_graph() -> None:
    x = torch.randn(3, 6)
    given = torch.fx.symbolic_trace(Unannotated())
    result = depgraph.prune(given, x, pruning_ratio=0.4)
    small = result.model
    assert result.plan.rewrites
    for one in copies(small):
        assert torch.equal(one(x), small(x))
        assert one.a.out_features < 14
    again = depgraph.prune(small, x, pruning_ratio=0.4).model
    assert again.a.out_features < small.a.out_features


class Counting(Base):
    """Methods, a property and modes of its own, and a constructor that takes what nobody keeps."""

    kind = "counting"

    def __init__(self, secret: object) -> None:
        super().__init__()
        self.calls = 0
        self.unused, self.note = nn.Linear(2, 3), "kept"

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 14))

    @property
    def width(self) -> int:
        return self.a.out_features

    def train(self, mode: bool = True) -> Counting:
        super().train(mode)
        self.calls += 1
        return self

    def twice(self, x: Tensor) -> Tensor:
        return 2 * self(x)


def test_a_changed_module_has_all_that_it_had() -> None:
    x = torch.randn(3, 6)
    model = Counting(object())
    once = depgraph.prune(model, x, pruning_ratio=0.3).model
    again = depgraph.prune(once, x, pruning_ratio=0.3).model
    assert again.width < once.width < 14
    for small in (once, again):
        for one in copies(small):
            assert isinstance(one, Counting)
            assert (one.width, one.kind, one.note) == (small.a.out_features, "counting", "kept")
            assert torch.equal(one.twice(x), 2 * small(x))
            assert list(one.state_dict()) == list(model.state_dict())
            calls = one.calls
            assert one.eval() is one
            assert one.calls == calls + 1


def test_a_plan_can_set_numbers_and_loads_alone() -> None:
    """What else is marked in a run is no number of the code."""
    model = Position()
    plan = depgraph.prune(model, torch.randn(3, 6)).plan
    count = len(methods_of(Position)["forward"][1].kinds)
    told = count - 1  # behind the numbers and the loads
    with pytest.raises(depgraph.PlanError, match="holds no number"):
        depgraph.apply(model, replace(plan, rewrites=[replace(plan.rewrites[0], number=told)]))
