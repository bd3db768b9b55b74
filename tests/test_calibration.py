"""Batches of calibration: what they are taken for, what is refused, and the loss on them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import observe
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import depgraph
from depgraph.base.errors import InputError
from depgraph.data.calibration import Batch, Calibration

X, Y, T = torch.randn(3, 5), torch.randn(3, 7), torch.tensor([0, 2, 1])


def only(given: Any, example: Any, **options: Any) -> Batch:
    """The one batch that `given` is read as."""
    (batch,) = Calibration([given], example, progress=False, **options).batches()
    return batch


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and torch.equal(found, expected)
    if isinstance(expected, (tuple, list)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize(
    ("given", "example", "args", "target"),
    [
        (X, X, (X,), None),
        ((X,), X, (X,), None),
        ((X, T), X, (X,), T),
        ([X, T], X, (X,), T),  # as a DataLoader collates
        ((X, Y), (X, Y), (X, Y), None),
        (((X, Y), T), (X, Y), (X, Y), T),
        ([[X, Y], T], (X, Y), (X, Y), T),
        (
            ([X, X], Y),
            ([X, X], Y),
            ([X, X], Y),
            None,
        ),  # a list and a tensor are two arguments where forward takes these
        ((([X, X], Y), T), ([X, X], Y), ([X, X], Y), T),
        ((X, Y, T), (X, Y, T), (X, Y, T), None),
    ],
)
def test_a_batch_is_read_in_the_form_of_the_example(given: Any, example: Any, args: Any, target: Any) -> None:
    batch = only(given, example)
    assert same(batch.args, args)
    assert batch.kwargs == {}
    assert same(batch.target, target)


def test_a_loss_needs_a_target() -> None:
    batch = only((X, Y), (X, Y), loss=nn.functional.mse_loss)
    assert same(batch.args, (X,))
    assert same(batch.target, Y)
    with pytest.raises(InputError, match=r"pairs.*not Tensor"):
        only(X, X, loss=nn.functional.mse_loss)


def test_keyword_arguments() -> None:
    batch = only({"x": X, "deep": True}, {"x": X, "deep": True})
    assert batch.args == ()
    assert batch.kwargs.keys() == {"x", "deep"}
    assert torch.equal(batch.kwargs["x"], X)
    batch = only(({"x": X}, T), {"x": X})
    assert torch.equal(batch.kwargs["x"], X)
    assert torch.equal(batch.target, T)


def test_a_model_may_write_into_a_batch() -> None:
    x = X.clone()
    batch = only([x], x)
    batch.args[0].zero_()
    assert torch.equal(x, X)
    first = only(x, x)
    second = first.copy()
    second.args[0].zero_()
    assert torch.equal(first.args[0], X)


class Counting(IterableDataset):  # type: ignore[type-arg]
    """Has no length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(6.0).view(6, 1)


def test_batches_can_be_gone_through_again() -> None:
    rows = [torch.full((2, 5), float(i)) for i in range(3)]
    loader = DataLoader(TensorDataset(torch.cat(rows), torch.arange(6)), batch_size=2)
    for source in (rows, iter(rows), (r for r in rows), loader):
        data = Calibration(source, X, progress=False)
        for _ in range(2):
            assert [float(b.args[0].sum()) for b in data.batches()] == [0, 10, 20]


@pytest.mark.parametrize("progress", [None, True])
def test_a_loader_without_a_length(progress: bool | None) -> None:
    data = Calibration(DataLoader(Counting(), batch_size=2), torch.zeros(2, 1), progress=progress)
    assert [b.args[0].flatten().tolist() for b in data.batches()] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("wrong", [X, {"x": X}, "x", 3, None])
def test_what_is_no_iterable_of_batches_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="put a single batch into a list"):
        Calibration(wrong, X)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64])
def test_values_that_are_not_finite_are_refused_by_position(value: float, dtype: torch.dtype) -> None:
    bad = X.to(dtype).clone()
    bad[1, 2] = value
    batches = Calibration([X.to(dtype), bad], X.to(dtype), progress=False).batches()
    next(batches)
    with pytest.raises(InputError, match="batch 1 contains NaN"):
        next(batches)
    with pytest.raises(InputError, match="batch 0 contains NaN"):
        only(bad.to_sparse(), X.to(dtype).to_sparse())


def test_masks_of_minus_infinity_are_taken_where_the_example_has_them() -> None:
    mask = torch.tensor([[0.0, -float("inf")]])
    assert torch.equal(only((X, mask), (X, mask)).args[1], mask)
    with pytest.raises(InputError, match="NaN"):
        only((X, mask * 0), (X, mask))


def test_empty_data_and_other_devices_are_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        list(Calibration([], X).batches())
    with pytest.raises(InputError, match=r"batch 0.*no example inputs"):
        only((), X)
    with pytest.raises(InputError, match="batch 0 is on meta, the example inputs on cpu"):
        only(X.to("meta"), X)
    assert only(X.to("meta"), (X, X.to("meta"))).args[0].is_meta  # a model on two devices


def test_the_loss_is_that_of_the_function_or_of_the_model() -> None:
    data = Calibration([(X, T)], X, nn.functional.cross_entropy)
    (batch,) = data.batches()
    assert float(data.loss_of(X, batch)) == pytest.approx(-float(X.log_softmax(1)[range(3), T].mean()))
    plain = Calibration([X], X)
    for output in ({"loss": torch.tensor(3.0)}, SimpleNamespace(loss=torch.tensor(3.0))):
        assert float(plain.loss_of(output, batch)) == 3
    for output in (X, {"logits": X}, (torch.tensor(3.0), X)):
        with pytest.raises(InputError, match="the model returns none"):
            plain.loss_of(output, batch)


@pytest.mark.parametrize(
    ("loss", "target", "text"),
    [
        (lambda out, t: out - t, Y[:, :5], "one number"),
        (lambda out, t: 3.0, T, "one number, not 3.0"),
        (lambda out, t: out.sum() * float("nan"), T, "loss of a batch is nan: are weights and data finite"),
        (nn.functional.mse_loss, X * float("nan"), "is nan: its target contains NaN"),
        (
            nn.functional.cross_entropy,
            T[:2],
            r"output float32 \[3, 5\] on cpu and target int64 \[2\] on cpu: ValueError",
        ),
        (nn.functional.mse_loss, X.to("meta"), r"target float32 \[3, 5\] on meta"),
        (nn.functional.cross_entropy, None, "target NoneType: TypeError"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, target: Any, text: str) -> None:
    data = Calibration([(X, target)], X, loss)
    (batch,) = data.batches()
    with pytest.raises(InputError, match=text):
        data.loss_of(X, batch)


class Stop(BaseException):
    pass


def test_batches_are_let_go_when_a_run_is_broken_off() -> None:
    """Ends of a generator's work (a worker pool, a file) come at once, not when it is collected."""
    ended: list[bool] = []

    class Source:
        def __iter__(self) -> Iterator[Tensor]:
            try:
                yield from [X, X]
            finally:
                ended.append(True)

    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    graph = depgraph.analyze(model, X)
    kept: list[BaseException] = []

    def visit(consumer: Any, inputs: Tensor) -> None:
        raise Stop

    def fails(output: Any, target: Any) -> Tensor:
        raise Stop

    for run in (
        lambda: observe(model, graph, Calibration(Source(), X, progress=False), visit),
        lambda: depgraph.scores_of(
            graph, "taylor", calibration=Calibration(Pairs(Source()), X, fails, False)
        ),
    ):
        ended.clear()
        with pytest.raises(Stop) as caught:
            run()
        kept.append(caught.value)  # with its traceback, which holds the frames
        assert ended == [True]


class Pairs:
    """The batches of a source, each with a target."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.source)
        try:
            for x in batches:
                yield x, T
        finally:
            batches.close()
