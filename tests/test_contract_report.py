"""What the report says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from contract_models import images, parameters, residual

import depgraph

KEYS = {"params", "macs", "reachable", "groups", "locks", "rewritten", "verification", "widths"}


def test_report_prints_and_is_data() -> None:
    result = depgraph.prune(residual(), images())
    text = str(result.report)
    assert f"{parameters(result.model):,}" in text or str(parameters(result.model)) in text
    data = result.report.to_dict()
    assert set(data) >= KEYS
    json.dumps(data)


def test_report_holds_the_figures() -> None:
    model = residual()
    result = depgraph.prune(model, images())
    data = result.report.to_dict()
    numbers = set(_numbers(data["params"]))
    assert {parameters(model), parameters(result.model)} <= numbers
    assert data["groups"]
    assert not data["rewritten"]
    assert "stem" in json.dumps(data["widths"])


def test_report_says_what_locks() -> None:
    """Silence is a defect: the output's and the input's dims are in the report, with a reason."""
    data = depgraph.prune(residual(), images(), ignore=("block.0",)).report.to_dict()
    locks = json.dumps(data["locks"])
    assert "ignore" in locks
    assert "output" in locks
    counts = [lock["params"] for lock in data["locks"]]
    assert counts == sorted(counts, reverse=True), "what holds most comes first"
    assert counts[0] > counts[-1]


def test_unverified_result_says_so() -> None:
    checked = depgraph.prune(residual(), images()).report.to_dict()["verification"]
    unchecked = depgraph.prune(residual(), images(), verify=False).report.to_dict()["verification"]
    assert checked != unchecked


def _numbers(data: Any) -> list[float]:
    if isinstance(data, Mapping):
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        return [n for item in data for n in _numbers(item)]
    return [data] if isinstance(data, (int, float)) else []
