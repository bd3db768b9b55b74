"""Peers for language models: with nothing removed each is the dense model, and each keeps to its budget."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import language_peers as peers

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", peers.PEERS)
def test_nothing_removed_is_the_dense_model(name: str) -> None:
    dense, windows = peers.tiny()
    small = copy.deepcopy(dense)
    peers.PEERS[name](small, 1.0, windows[:4])
    with torch.no_grad():
        expected, found = dense(windows[5]), small(windows[5])
    assert float((found - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.parametrize("name", peers.PEERS)
def test_the_budget_holds(name: str) -> None:
    dense, windows = peers.tiny()
    small = copy.deepcopy(dense)
    peers.PEERS[name](small, 0.8, windows[:4])
    most = 0.86 if name in ("shortgpt", "greedy-depth") else 0.801  # whole layers, as near as they come
    assert 0.6 < peers.counted(small) / peers.counted(dense) <= most
    with torch.no_grad():
        assert bool(torch.isfinite(small(windows[5])).all())
