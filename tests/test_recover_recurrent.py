"""Recovery of recurrent layers and cells, what reads their input and what reads their states: against least squares, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_recover import normal, randomised, recovered
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import depgraph
from depgraph.data.states import states
from depgraph.recover import Reconstruction, recover

KEEP = [0, 2, 3, 6, 8, 9]
BATCHES = [normal(8, 7, 5, seed=s) for s in range(5)]
EXACT = Reconstruction(damping=1e-12, everywhere=False)
LENGTHS = [7, 3, 5, 7, 1, 2, 6, 4]


class Layers(nn.Module):
    def __init__(
        self, kind: type[nn.RNNBase], lengths: list[int] | None = None, begun: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.up, self.rnn = nn.Linear(5, 11), kind(11, 6, batch_first=True, **options)
        self.lengths = lengths
        count = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
        self.first = nn.Parameter(torch.zeros(count, 1, 6)) if begun else None
        self.head = nn.LazyLinear(3)
        self(torch.zeros(8, 7, 5))

    def inputs(self, x: Tensor) -> Tensor:
        return self.up(x).relu()

    def begin(self, count: int) -> Any:
        """The states before the first step, learned, or None: zeros."""
        if self.first is None:
            return None
        h = self.first.expand(-1, count, -1)
        return (h, h / 2) if isinstance(self.rnn, nn.LSTM) else h

    def forward(self, x: Tensor) -> Tensor:
        x, first = self.inputs(x), self.begin(len(x))
        if self.lengths is None:
            return self.head(self.rnn(x, first)[0])
        packed = pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed, first)[0], batch_first=True)[0])


def least_squares(x: Tensor, weight: Tensor, bias: Tensor | None, kept: list[int] = KEEP) -> Tensor:
    """[rows, kept inputs], and behind them the constant where there is a bias: what comes closest to ``x @ weight.T + bias``."""
    given = x[:, kept] if bias is None else torch.cat([x[:, kept], torch.ones(len(x), 1).double()], 1)
    wanted = x @ weight.T if bias is None else x @ weight.T + bias
    return torch.linalg.lstsq(given, wanted).solution.T.detach()


def fitted_rows(batches: list[Tensor], weight: Tensor, bias: Tensor | None, kept: list[int]) -> Tensor:
    """As `least_squares` of all batches, in the rows that it brings closer on the last one when fitted to the others."""
    before = weight[:, kept] if bias is None else torch.cat([weight[:, kept], bias[:, None]], 1)
    fit = least_squares(torch.cat(batches[:-1]), weight, bias, kept)

    def errors(found: Tensor) -> Tensor:
        x = batches[-1]
        ones = torch.ones(len(x), found.shape[1] - len(kept)).double()
        change = torch.cat([x[:, kept], ones], 1) @ (found - before).T
        return (x @ weight.T - x[:, kept] @ weight[:, kept].T - change).square().sum(0)

    better = errors(fit) < errors(before)
    return torch.where(
        better[:, None], least_squares(torch.cat(batches), weight, bias, kept), before
    ).detach()


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn": (nn.RNN, {}),
    "without biases": (nn.LSTM, {"bias": False}),
    "both directions": (nn.GRU, {"bidirectional": True}),
    "stacked": (nn.LSTM, {"num_layers": 2}),
    "projected": (nn.LSTM, {"proj_size": 4}),
    "packed": (nn.LSTM, {"lengths": LENGTHS}),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", KINDS)
def test_what_reads_the_input_is_fitted(name: str):
    kind, options = KINDS[name]
    model: Any = randomised(Layers(kind, **options))
    small, told = recovered(model, BATCHES[0], {"up.weight": KEEP}, BATCHES, EXACT)
    x = torch.cat([model.inputs(b) for b in BATCHES])
    lengths = options.get("lengths", [7] * 8) * 5
    x = torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])
    ends = ["_l0", "_l0_reverse"] if model.rnn.bidirectional else ["_l0"]
    for end in ends:
        bias = getattr(model.rnn, f"bias_ih{end}", None)
        wanted = least_squares(x, getattr(model.rnn, f"weight_ih{end}"), bias)
        torch.testing.assert_close(
            getattr(small.rnn, f"weight_ih{end}").detach(), wanted[:, :6], rtol=1e-6, atol=1e-7
        )
        if bias is not None:
            torch.testing.assert_close(
                getattr(small.rnn, f"bias_ih{end}").detach(), wanted[:, 6], rtol=1e-6, atol=1e-7
            )
    assert [layer.name for layer in told.layers if layer.kept] == [f"rnn.weight_ih{end}" for end in ends]
    assert told.output[1] < 0.7 * told.output[0]


INSIDE: dict[str, tuple[Any, dict[str, Any]]] = {
    **KINDS,
    "stacked, both directions": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "packed, stacked, both directions": (
        nn.LSTM,
        {"num_layers": 2, "bidirectional": True, "lengths": LENGTHS},
    ),
    "begun": (nn.LSTM, {"begun": True}),
    "begun, packed, stacked, both directions": (
        nn.GRU,
        {"begun": True, "num_layers": 2, "bidirectional": True, "lengths": LENGTHS},
    ),
}


def inside(model: Any, x: Tensor) -> dict[str, Tensor]:
    """What each weight of the layers reads for one sequence x [steps, inputs], layer by layer and step by step.

    The states before a step are what a layer of one direction ends with when it is run over the steps before, or those behind.
    """
    rnn, found, first = model.rnn, {}, model.begin(1)
    ends = ["", "_reverse"] if rnn.bidirectional else [""]
    for layer in range(rnn.num_layers):
        outs = []
        for direction, end in enumerate(ends):
            options = {"proj_size": rnn.proj_size} if rnn.proj_size else {}
            own: Any = type(rnn)(x.shape[1], 6, bias=rnn.bias, **options).double()
            suffix = f"_l{layer}{end}"
            own.load_state_dict(
                {n: getattr(rnn, n.replace("_l0", suffix)).detach() for n in own.state_dict()}
            )
            place = slice(layer * len(ends) + direction, layer * len(ends) + direction + 1)
            start = (
                None
                if first is None
                else [s[place, 0] for s in (first if isinstance(first, tuple) else [first])]
            )
            hx = start and (tuple(start) if len(start) > 1 else start[0])
            order = x.flip(0) if end else x
            states = [start[0] if start else torch.zeros(1, rnn.proj_size or 6).double()]
            states += [own(order[:n], hx)[0][-1:] for n in range(1, len(x) + 1)]
            before, after = torch.cat(states[:-1]), torch.cat(states[1:])
            found[f"weight_ih{suffix}"] = x
            found[f"weight_hh{suffix}"] = before.flip(0) if end else before
            outs.append(after.flip(0) if end else after)
        x = torch.cat(outs, 1)
    return found


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", INSIDE)
def test_what_reads_states_inside_is_fitted_to_those_of_the_original(name: str):
    kind, options = INSIDE[name]
    model: Any = randomised(Layers(kind, **options))
    width, units = model.rnn.proj_size or 6, [0, 2, 3]
    graph = depgraph.analyze(model, BATCHES[0])
    masks = {
        g.name: torch.isin(torch.arange(width), torch.tensor(units)).numpy()
        for g in graph.groups
        if g.units == width and any(m.name.startswith("rnn.weight_hh") and m.dim == 1 for m in g.members)
    }
    plan = depgraph.build_plan(graph, masks)
    small: Any = depgraph.apply(model, plan)
    told = recover(model, small, plan, graph, BATCHES, EXACT, example_inputs=BATCHES[0])
    lengths = options.get("lengths", [7] * 8) * 5
    with torch.no_grad():
        sequences = [
            row[:n] for row, n in zip(torch.cat([model.inputs(b) for b in BATCHES]), lengths, strict=True)
        ]
        reads = [inside(model, x) for x in sequences]
    fitted = []
    for weight in reads[0]:
        given = [torch.cat([r[weight] for r in reads[i : i + 8]]) for i in range(0, 40, 8)]
        if weight.startswith("weight_ih_l0"):
            continue
        whole, bias = getattr(model.rnn, weight), getattr(model.rnn, weight.replace("weight", "bias"), None)
        ends = given[0].shape[1] // width
        kept = [u + width * end for end in range(ends) for u in units]
        rows = torch.tensor(
            [u + 6 * g for g in range(len(whole) // 6) for u in (range(6) if model.rnn.proj_size else units)]
        )
        wanted = fitted_rows(given, whole[rows], None if bias is None else bias[rows], kept)
        found = getattr(small.rnn, weight)
        torch.testing.assert_close(found.detach(), wanted[:, : len(kept)], rtol=1e-6, atol=1e-7)
        if bias is not None:
            found = getattr(small.rnn, weight.replace("weight", "bias"))
            torch.testing.assert_close(found.detach(), wanted[:, -1], rtol=1e-6, atol=1e-7)
        fitted.append(f"rnn.{weight}")
    assert {layer.name for layer in told.layers if layer.kept} == {*fitted, "head.weight"}
    assert not told.skipped
    assert told.output[1] < told.output[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_states_stand_beside_the_inputs_of_their_steps(packed: bool, batch_first: bool):
    """What an Elman network gives at a step follows from what both its weights are given there."""
    rnn: Any = randomised(nn.RNN(5, 6, num_layers=2, bidirectional=True, batch_first=batch_first))
    x, first = normal(8, 7, 5), normal(4, 8, 6)
    params, settings = [getattr(rnn, name) for name in rnn._flat_weights_names], (True, 2, 0.0, False, True)
    if packed:
        sequences = pack_padded_sequence(x, sorted(LENGTHS)[::-1], batch_first=True)
        op: Any = torch.ops.aten.rnn_tanh.data
        args = (sequences.data, sequences.batch_sizes, first, params, *settings)
    else:
        op = torch.ops.aten.rnn_tanh.input
        args = (x if batch_first else x.transpose(0, 1), first, params, *settings, batch_first)
    given = []
    for direction in range(2):
        i, h = (states(op, args, place) for place in (8 + 4 * direction, 9 + 4 * direction))
        w = dict(zip("ih", params[8 + 4 * direction :][:2], strict=True))
        biases = params[10 + 4 * direction] + params[11 + 4 * direction]
        given.append((i @ w["i"].T + h @ w["h"].T + biases).tanh())
    torch.testing.assert_close(torch.cat(given, 1), op(*args)[0].flatten(0, -2))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projection_is_left_alone_with_a_reason():
    model = randomised(Layers(nn.LSTM, proj_size=4))
    graph = depgraph.analyze(model, BATCHES[0])
    (group,) = (g for g in graph.groups if g.units == 6)
    plan = depgraph.build_plan(graph, {group.name: torch.arange(6).numpy() != 2})
    small = depgraph.apply(model, plan)
    told = recover(model, small, plan, graph, BATCHES, "auto", example_inputs=BATCHES[0])
    assert "computes its operand inside" in dict(told.skipped)["rnn.weight_hr_l0"]


def test_a_layer_that_is_called_twice_is_fitted_to_the_states_of_both_calls():
    class Twice(Layers):
        def forward(self, x: Tensor) -> Tensor:
            x = self.inputs(x)
            return self.head(self.rnn(x)[0] + self.rnn(x.flip(1))[0])

    model: Any = randomised(Twice(nn.GRU))
    units = [0, 2, 3]
    small, told = recovered(model, BATCHES[0], {"rnn.weight_hh_l0:1:6": units}, BATCHES, EXACT)
    with torch.no_grad():
        xs = [model.inputs(b) for b in BATCHES]
        given = [torch.cat([inside(model, row)["weight_hh_l0"] for row in [*x, *x.flip(1)]]) for x in xs]
    rows = torch.tensor([u + 6 * g for g in range(3) for u in units])
    wanted = fitted_rows(given, model.rnn.weight_hh_l0[rows], model.rnn.bias_hh_l0[rows], units)
    torch.testing.assert_close(small.rnn.weight_hh_l0.detach(), wanted[:, :3], rtol=1e-6, atol=1e-7)
    assert not told.skipped


class Cells(nn.Module):
    """A cell that the model's own code calls step by step."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.up, self.cell, self.head = nn.Linear(5, 11), kind(11, 6), nn.Linear(6, 3)

    def states(self, x: Tensor) -> list[Tensor]:
        x = self.up(x).relu()
        found = [x.new_zeros(len(x), 6)]
        state: Any = (found[0], found[0]) if isinstance(self.cell, nn.LSTMCell) else found[0]
        for step in x.unbind(1):
            state = self.cell(step, state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return found

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.states(x)[-1])


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_fitted_to_what_the_original_gives_them(kind: Any):
    """Inputs and states: all steps together, as they share a weight."""
    model: Any = randomised(Cells(kind))
    units = [0, 2, 3, 5]
    kept = {"up.weight": KEEP, "cell.weight_hh:1:6": units}
    small, told = recovered(model, BATCHES[0], kept, BATCHES, EXACT)
    rows = torch.cat([torch.tensor(units) + 6 * g for g in range(len(model.cell.bias_ih) // 6)])
    x = torch.cat([model.up(b).relu().flatten(0, 1) for b in BATCHES])
    h = torch.cat([torch.cat(model.states(b)[:-1]) for b in BATCHES])
    for which, given, columns in (("ih", x, KEEP), ("hh", h, units)):
        weight, bias = (
            getattr(model.cell, f"weight_{which}")[rows],
            getattr(model.cell, f"bias_{which}")[rows],
        )
        wanted = least_squares(given, weight, bias, columns)
        found = torch.cat(
            [getattr(small.cell, f"weight_{which}"), getattr(small.cell, f"bias_{which}")[:, None]], 1
        )
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-6, atol=1e-7)
    assert {layer.name for layer in told.layers} == {"cell.weight_ih", "cell.weight_hh", "head.weight"}
    assert told.output[1] < told.output[0]
