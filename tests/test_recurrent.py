"""What only recurrent layers have: units of their own for every layer and direction, states, projections, kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo import ZOO

import depgraph
from depgraph.costs.cost import CostModel, count_macs


def widths(name: str) -> list[int]:
    entry = ZOO[name]
    return sorted(group.units for group in depgraph.analyze(entry.model(), entry.example()).groups)


def test_layers_and_directions_have_units_of_their_own_by_default():
    assert widths("DirectionsOfTheirOwn") == [7, 7, 7, 7, 11]
    assert widths("PackedLstm") == [7, 7, 7, 7, 11]  # states are reordered with the sequences


def test_states_that_are_read_or_written_tie_the_layers():
    assert widths("LastStatesOfBothDirections") == [7]
    assert widths("StatesWrittenThroughAView") == [7]
    assert widths("StatesHandedOn") == [7]


def test_layers_of_their_own_keep_one_width():
    entry = ZOO["DirectionsOfTheirOwn"]
    result = depgraph.prune(entry.model(), entry.example(), pruning_ratio=0.5)
    rnn = result.model.rnn
    assert {w.shape[1] for n, w in rnn.named_parameters() if n.startswith("weight_hh")} == {rnn.hidden_size}
    kept = {
        tuple(result.plan.mask(f"rnn.weight_hh_{n}").any(0).tolist())
        for n in ("l0", "l1", "l0_reverse", "l1_reverse")
    }
    assert len(kept) > 1, "each layer chooses its own units"


@pytest.mark.parametrize("hidden", [14, 13])
def test_a_projection_stays_narrower_than_its_layer(hidden: int):
    """Where both have one width torch runs no projection; the outputs (ignored) keep theirs here."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(5, 11)
            self.rnn = nn.LSTM(11, hidden, batch_first=True, proj_size=7)

        def forward(self, x):
            return self.rnn(self.enter(x))[0]

    x = torch.randn(2, 10, 5)
    result = depgraph.prune(Net(), x, pruning_ratio=0.5, verify=False)
    assert result.model.rnn.hidden_size > result.model.rnn.proj_size == 7
    assert result.model(x).shape == (2, 10, 7)
    assert result.model.enter.out_features < 11


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, e in ZOO.items() if e.make.__module__ == "zoo_recurrent"])
def test_work_is_what_the_counter_counts(name: str):
    entry = ZOO[name]
    model, inputs = entry.model(), entry.example()
    graph = depgraph.analyze(model, inputs)
    stated = CostModel(graph).macs({g.name: g.units for g in graph.groups})
    assert stated == count_macs(model, inputs)
