"""A report is figures, not the models they are about; and what a notebook prints of a result is the report."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

import depgraph


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mid(torch.relu(self.stem(x)))).mean((2, 3)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 12, 12)


def pruned_by_prune(model: nn.Module, x: Tensor) -> depgraph.PruneResult:
    return depgraph.prune(model, x, pruning_ratio=0.5, recover="statistics", calibration=[x])


def pruned_uniformly(model: nn.Module, x: Tensor) -> depgraph.PruneResult:
    return depgraph.prune(model, x, max_params=0.6, uniform=True, score=lambda m: 1.0, latency=True)


def pruned_by_a_step(model: nn.Module, x: Tensor) -> depgraph.PruneResult:
    return depgraph.GradualPruner(model, x, pruning_ratio=0.5, steps=1).step(model)


WAYS = (pruned_by_prune, pruned_uniformly, pruned_by_a_step)


@pytest.mark.parametrize("way", WAYS)
def test_what_python_shows_of_a_result_is_the_report(way, x):
    result = way(Net(), x)
    assert repr(result) == repr(result.report) == str(result.report)
    assert "parameters" in repr(result)
    assert len(repr(result)) < 5000
    assert len(repr(result.plan)) < 100


@pytest.mark.parametrize("way", WAYS)
def test_a_report_does_not_change_with_the_model(way, x):
    model = Net()
    result, same = way(copy.deepcopy(model), x), way(model, x)
    result.model.head = nn.Linear(77, 2)  # fits nothing: a report that ran the model would fail
    del result.model.stem
    assert result.report.to_dict()["macs"] == same.report.to_dict()["macs"]
    assert result.report.to_dict()["widths"] == same.report.to_dict()["widths"]
    assert result.report.to_dict()["layers"] == same.report.to_dict()["layers"]
    assert "MACs" in str(result.report)


@pytest.mark.parametrize("way", WAYS)
def test_a_result_does_not_keep_the_dense_model_alive(way, x, tmp_path):
    model = Net()
    gone = [weakref.ref(model), weakref.ref(model.stem.weight), weakref.ref(model.mid)]
    result = way(model, x)
    before = str(result.report)
    del model
    gc.collect()
    assert not any(ref() is not None for ref in gone)
    assert str(result.report) == before
    depgraph.write_html(result, tmp_path / "page.html")


def test_a_report_does_not_keep_the_small_model_alive(x):
    result = pruned_by_prune(Net(), x)
    report, small = result.report, weakref.ref(result.model)
    del result
    gc.collect()
    assert small() is None
    assert report.to_dict()["params"]["after"] > 0
    assert [f.name for f in report.frozen if f.name == "unused.weight"]
    assert "no run used unused.weight" in str(report)


def test_in_place_the_figures_before_are_those_of_the_model_as_it_was(x):
    model = Net()
    macs, count = depgraph.count_macs(model, x), depgraph.parameter_count(model)
    report = depgraph.prune(model, x, inplace=True).report
    assert (report.macs[0], report.parameters[0]) == (macs, count)
    assert report.macs[1] == depgraph.count_macs(model, x)


def test_a_report_says_that_nothing_was_recovered_and_what_would(x):
    told = "nothing was recovered: calibration=[...]"
    model = Net()
    assert told in str(depgraph.prune(model, x, pruning_ratio=0.5).report)
    assert 'recover="synthetic"' in str(depgraph.prune(model, x, pruning_ratio=0.5).report)
    assert told not in str(pruned_by_prune(model, x).report)
    assert told not in str(depgraph.prune(model, x, max_params=1.0).report)
