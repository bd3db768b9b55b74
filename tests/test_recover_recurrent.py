"""Recovery of what reads the input of recurrent layers and cells: against least squares, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_recover import cut, normal, randomised, recovered
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from depgraph.recover import Reconstruction

KEEP = [0, 2, 3, 6, 8, 9]
BATCHES = [normal(8, 7, 5, seed=s) for s in range(5)]
EXACT = Reconstruction(damping=1e-12, everywhere=False)


class Layers(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], lengths: list[int] | None = None, **options: Any) -> None:
        super().__init__()
        self.up, self.rnn = nn.Linear(5, 11), kind(11, 6, batch_first=True, **options)
        self.lengths = lengths
        self.head = nn.LazyLinear(3)
        self(torch.zeros(8, 7, 5))

    def inputs(self, x: Tensor) -> Tensor:
        return self.up(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        if self.lengths is None:
            return self.head(self.rnn(x)[0])
        packed = pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def least_squares(x: Tensor, weight: Tensor, bias: Tensor | None, kept: list[int] = KEEP) -> Tensor:
    """[rows, kept inputs], and behind them the constant where there is a bias: what comes closest to ``x @ weight.T + bias``."""
    given = x[:, kept] if bias is None else torch.cat([x[:, kept], torch.ones(len(x), 1).double()], 1)
    wanted = x @ weight.T if bias is None else x @ weight.T + bias
    return torch.linalg.lstsq(given, wanted).solution.T.detach()


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn": (nn.RNN, {}),
    "without biases": (nn.LSTM, {"bias": False}),
    "both directions": (nn.GRU, {"bidirectional": True}),
    "stacked": (nn.LSTM, {"num_layers": 2}),
    "projected": (nn.LSTM, {"proj_size": 4}),
    "packed": (nn.LSTM, {"lengths": [7, 3, 5, 7, 1, 2, 6, 4]}),
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


def test_what_reads_states_inside_is_left_alone_with_a_reason():
    model = randomised(Layers(nn.LSTM, num_layers=2))
    graph, _ = cut(model, BATCHES[0], {"up.weight": KEEP})
    units = {
        next(m.name for m in g.members if m.name.startswith("rnn.weight_hh")): [0, 2, 3, 5]
        for g in graph.groups
        if g.units == 6
    }
    _, told = recovered(
        model, BATCHES[0], {"up.weight": KEEP, **{f"{n}:1:6": u for n, u in units.items()}}, BATCHES, "auto"
    )
    skipped = dict(told.skipped)
    for name in ("rnn.weight_hh_l0", "rnn.weight_ih_l1", "rnn.weight_hh_l1"):
        assert "computes its operand inside" in skipped[name]
    assert any(layer.name == "rnn.weight_ih_l0" and layer.kept for layer in told.layers)
    assert told.output[1] < told.output[0]


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
