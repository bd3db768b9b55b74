"""The inputs of consumers that a watched run hands over, held against what the ops themselves compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import observe
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

import depgraph
from depgraph.base.errors import InputError
from depgraph.data.calibration import Calibration
from depgraph.data.consumers import consumers
from depgraph.data.patches import patches
from depgraph.data.watch import Call, Watch

RECURRENT = ("lstm", "gru", "rnn")


def computed(call: Call) -> Tensor:
    """Every value of X @ W.T, sorted; and each stands where the result has it."""
    layout = call.layout
    weights = layout.matrices(call.weight)
    rest = without(call)
    values = []
    for stacks, samples, x in layout.inputs(call.args, call.x, slice(None)):
        product = x @ weights[stacks].mT
        values.append(product.flatten())
        if "addbmm" not in str(call.product.node.target):
            torch.testing.assert_close(
                product, layout.outputs(call.args, rest, stacks, samples), **close(rest)
            )
    chosen_alone(call, rest)
    return in_order(torch.cat(values))


def chosen_alone(call: Call, rest: Tensor) -> None:
    """Every third sample is what it is among all of them, with its number."""
    layout = call.layout
    pieces = layout.inputs(call.args, call.x, slice(None))
    some = layout.inputs(call.args, call.x, slice(None), lambda count, start: torch.arange(1, count, 3))
    for (stacks, samples, x), (same, numbers, taken) in zip(pieces, some, strict=True):
        assert same == stacks
        assert torch.equal(numbers, torch.arange(samples.start, samples.stop)[1::3])
        assert torch.equal(taken, x[:, 1::3])
        assert torch.equal(
            layout.outputs(call.args, rest, stacks, numbers),
            layout.outputs(call.args, rest, stacks, samples)[:, 1::3],
        )


def close(values: Tensor) -> dict[str, float]:
    wide = values.dtype in (torch.float64, torch.complex128)
    scale = float(values.abs().max()) if values.numel() else 1.0
    return {"rtol": 0, "atol": (1e-9 if wide else 1e-2) * scale}


def in_order(values: Tensor) -> Tensor:
    return torch.view_as_real(values).flatten().sort().values if values.is_complex() else values.sort().values


def without(call: Call) -> Tensor:
    """The result of the op without what it adds to the product."""
    op, args = call.product.node.target, list(call.args)

    def replaced(value: Any) -> Any:
        if value is call.weight:
            return torch.zeros_like(value)
        return type(value)(map(replaced, value)) if isinstance(value, (list, tuple)) else value

    return op(*args) - op(*replaced(args))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ZOO)
def test_inputs_times_weight_is_what_the_op_computes(name: str):
    entry = ZOO[name]
    model, example = entry.model().eval(), entry.example()
    graph = depgraph.analyze(model, example)
    found = consumers(graph)
    calls: list[Call] = []

    def see(call: Call) -> None:
        calls.append(call)
        op = str(call.product.node.target).split(".")[1]
        assert all(x.shape[1] == call.consumer.width for _, x in call.inputs())
        if op.startswith(RECURRENT):
            assert torch.equal(next(call.inputs())[1], call.x.reshape(-1, call.x.shape[-1]))
            return
        got, exact = computed(call), in_order(without(call).flatten())
        if got.numel() != exact.numel():  # the op adds up the products of its stacks
            assert "addbmm" in op, op
            return
        torch.testing.assert_close(got, exact, **close(exact))

    watch = Watch(model, found, see)
    for batch in Calibration([example], example).batches():
        watch.run(batch)
    seen = {id(c.consumer) for c in calls}
    missed = [c for c in found if not c.reason and id(c) not in seen]
    assert not missed, missed


class Two(nn.Module):
    """A normed convolution, a linear layer of it that is used twice, a buffer that forward writes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 0), (1, 2)), nn.BatchNorm2d(5)
        self.again, self.last = nn.Linear(5, 5), nn.Linear(5, 2)
        self.register_buffer("runs", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.last(self.again(self.again(x)))


def observed(model: nn.Module, batches: list[Any], example: Any, **options: Any) -> dict[str, Tensor]:
    pieces: dict[str, list[Tensor]] = {}
    graph = depgraph.analyze(model, example)
    observe(
        model,
        graph,
        Calibration(batches, example),
        lambda c, x: pieces.setdefault(c.name, []).append(x.clone()),
        **options,
    )
    return {name: torch.cat(found) for name, found in pieces.items()}


def test_every_batch_and_every_call_is_handed_over():
    model = Two().double().eval()
    batches = [torch.randn(n, 3, 11, 7).double() for n in (2, 3)]
    seen = observed(model, batches, batches[0])
    x = torch.cat([model.norm(model.conv(b)).relu().mean((2, 3)) for b in batches])
    first = model.again(x)
    apart = first.split([2, 3])
    expected = torch.cat([x[:2], apart[0], x[2:], apart[1]])
    torch.testing.assert_close(seen["again.weight"], expected)
    torch.testing.assert_close(seen["last.weight"], model.again(first))
    windows = torch.cat(
        [F.unfold(b, (3, 2), (1, 2), (1, 0), (2, 1)).transpose(1, 2).reshape(-1, 3, 6) for b in batches]
    )
    torch.testing.assert_close(seen["conv.weight"], windows)
    entries = observed(model, batches, batches[0], windows=False)["conv.weight"]
    torch.testing.assert_close(entries, torch.cat([b.permute(0, 2, 3, 1).reshape(-1, 3) for b in batches]))


def test_windows_come_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 9 * 5, 2)).eval()
    batch = torch.randn(4, 3, 11, 7)
    whole = observed(model, [batch], batch)["0.weight"]
    monkeypatch.setattr("depgraph.data.patches.PIECE", 3 * 9 * 5 * 2)  # two lines of five windows
    sizes = []
    graph = depgraph.analyze(model, batch)
    pieces = []
    for c in consumers(graph)[:1]:
        observe(
            model,
            [c],
            Calibration([batch], batch),
            lambda _, x: (sizes.append(x.numel()), pieces.append(x.clone())),
        )
    assert max(sizes) <= 3 * 9 * 5 * 2
    assert torch.equal(torch.cat(pieces), whole)
    args = (batch, model[0].weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    counted = []
    some = patches(
        args, lambda count, start: counted.append((count, start)) or torch.arange(count)[-start % 7 :: 7]
    )
    assert torch.equal(torch.cat(list(some)), whole[::7])
    assert len(counted) == len(pieces) > 4
    assert sum(count for count, _ in counted) == len(whole)


def test_a_convolution_without_a_batch_dim():
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 5, 3), nn.Conv1d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model, x = Unbatched().eval(), torch.randn(3, 11)
    seen = observed(model, [x], x)
    torch.testing.assert_close(seen["b.weight"], model.a(x).T[:, :, None])
    torch.testing.assert_close(observed(model, [x], x, windows=False)["b.weight"], model.a(x).T)


def test_nothing_is_left_behind_also_after_an_exception():
    model = Two().train()
    x = torch.randn(2, 3, 11, 7)
    graph = depgraph.analyze(model, x)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    call, sqrt = nn.Module.__call__, __import__("math").sqrt

    class Stop(BaseException):
        pass

    def visit(consumer: Any, inputs: Tensor) -> None:
        assert not inputs.requires_grad
        if consumer.name == "again.weight":
            raise Stop

    with pytest.raises(Stop):
        observe(model, graph, Calibration([x], x), visit)
    observe(model, graph, Calibration([x], x), lambda *_: None)
    assert model.training
    assert nn.Module.__call__ is call
    assert __import__("math").sqrt is sqrt
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_visit_raises_passes_through_a_model_that_catches_errors():
    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.b(self.a(x))
            except KeyError:
                return x

    model, x = Catches(), torch.randn(2, 5)

    def visit(consumer: Any, inputs: Tensor) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        observe(model, depgraph.analyze(model, x), Calibration([x], x), visit)


def test_a_batch_that_the_model_rejects_is_an_input_error():
    model, x = Two().eval(), torch.randn(2, 3, 11, 7)
    with pytest.raises(InputError, match="calibration batch"):
        observed(model, [torch.randn(2, 4, 11, 7)], x)


class Routed(nn.Module):
    """Experts in one tensor, called one by one and only where a token chose them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 7, 5)), nn.Parameter(torch.randn(4, 5, 7))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            hidden = F.linear(x[chosen == e], self.up[e]).relu()
            out[chosen == e] = F.linear(hidden, self.down[e])
        return out


def test_an_expert_is_known_by_its_weight_not_by_the_order_of_calls():
    model = Routed().eval()
    x = torch.randn(6, 5)
    traced, chosen = torch.tensor([0, 1, 2, 3, 3, 3]), torch.tensor([3, 1, 1, 3, 3, 1])
    graph = depgraph.analyze(model, (x, traced))
    found = consumers(graph)
    assert [c.name for c in found] == ["up", "down"] * 4
    seen: dict[int, Tensor] = {}

    def visit(consumer: Any, inputs: Tensor) -> None:
        seen[found.index(consumer)] = inputs.clone()

    observe(model, found, Calibration([(x, chosen)], (x, traced)), visit)
    assert seen.keys() == {2, 3, 6, 7}
    assert torch.equal(seen[2], x[chosen == 1])
    assert torch.equal(seen[6], x[chosen == 3])
    assert torch.equal(seen[7], F.linear(x[chosen == 3], model.up[3]).relu())


def test_consumers_say_which_dims_meet():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(5, 7, 2), nn.Conv2d(7, 7, 1, groups=7), nn.Flatten(),
                          nn.Linear(7 * 9, 2)).eval()  # fmt: skip
    graph = depgraph.analyze(model, torch.randn(2, 3, 4, 4))
    a, b, c, d = consumers(graph)
    assert (a.name, a.dim, a.width) == ("0.weight", 1, 3)
    assert (b.name, b.dim, b.width) == ("1.weight", 0, 5)
    assert (c.name, c.dim, c.width) == ("2.weight", 0, 7)
    assert (d.name, d.dim, d.width) == ("4.weight", 1, 63)
    unit = next(g.axis for g in graph.groups if g.units == 7)
    assert depgraph.axes.axes.positions(d.axis, unit).tolist() == [
        [9 * u + i for i in range(9)] for u in range(7)
    ]
    assert b.calls[0].activation is a.node


def test_inner_inputs_of_a_recurrent_layer_are_refused_with_a_reason():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(5, 7, 2, batch_first=True), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    model, x = Net().eval(), torch.randn(2, 11, 5)
    reasons = {c.name: c.reason for c in consumers(depgraph.analyze(model, x))}
    assert {n for n, r in reasons.items() if not r} == {"rnn.weight_ih_l0", "out.weight"}
    assert "lstm" in reasons["rnn.weight_hh_l0"]
    assert observed(model, [x], x).keys() == {"rnn.weight_ih_l0", "out.weight"}
