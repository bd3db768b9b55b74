"""The page of a dependency graph: its data against the graph, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import depgraph
from depgraph.exploring.html import page_data, write_html

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)


class Residual(nn.Module):
    """A layer around which the input passes, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.norm = nn.Linear(5, 14), nn.Linear(14, 14), nn.LayerNorm(14)
        self.wide, self.head = nn.Linear(14, 22), nn.Linear(22, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.wide(self.norm(x + self.inner(x))).relu())


def embedded(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    return json.loads(found.group(1))


def test_members_are_what_goes_together(tmp_path: Path) -> None:
    """The tensor dims of a group on the page are those that `coupled` finds, and shapes are those before and after."""
    model, x = Residual().eval(), torch.randn(2, 5)
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    data = embedded(write_html(result, tmp_path / "page.html"))
    assert data == json.loads(json.dumps(page_data(result)))
    names = [t[0] for t in data["tensors"]]
    graph = depgraph.analyze(model, x)
    for name, units, kept, members in data["groups"]:
        tensor, dim = name.rsplit(":", 1)
        assert {names[t] for t, _, _ in members} == set(graph.coupled(tensor, int(dim), [1]))
        assert (units, kept) in {(14, 7), (22, 11)}
    shapes = {t[0]: (t[1], t[2]) for t in data["tensors"]}
    for name, tensor in result.model.named_parameters():
        assert shapes[name] == (list(model.get_parameter(name).shape), list(tensor.shape))
    locked = {t[0]: [d[1] for d in t[3]] for t in data["tensors"]}
    (reason, count), *rest = locked["head.bias"][0]
    assert not rest
    assert count == 3
    assert "model output" in data["reasons"][reason]
    assert [m[:2] for m in data["modules"]] == [
        ["stem", "Linear"], ["inner", "Linear"], ["norm", "LayerNorm"], ["wide", "Linear"], ["head", "Linear"],
    ]  # fmt: skip


def test_nothing_is_asked_of_the_network_and_names_stay_text(tmp_path: Path) -> None:
    """The page may load nothing, and a module's name can't become part of its code."""
    model = nn.Sequential()
    model.add_module("</script><script>alert(1)", nn.Linear(5, 14))
    model.add_module("b", nn.Linear(14, 3))
    text = write_html(depgraph.analyze(model, torch.randn(2, 5)), tmp_path / "page.html").read_text()
    assert "default-src 'none'" in text
    assert text.count("<script") == 2
    assert not re.findall(r"""(?:src|href)=["']?(?!#)[\w/]""", text)
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a network of 1 000 layers."""
    layers = [m for _ in range(499) for m in (nn.Linear(6, 6), nn.LayerNorm(6))]
    model = nn.Sequential(nn.Linear(5, 6), *layers, nn.Linear(6, 3)).eval()
    return write_html(
        depgraph.analyze(model, torch.randn(2, 5)), tmp_path_factory.mktemp("page") / "page.html"
    )


def test_a_thousand_layers_fit_into_two_megabytes(deep: Path) -> None:
    assert len(embedded(deep)["modules"]) == 1000
    assert deep.stat().st_size < 2e6


def in_browser(page: Path, hash_: str) -> str:
    """The document as a browser has it once the scripts ran."""
    assert BROWSER is not None
    run = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom", f"file://{page}{hash_}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in run.stderr  # no error, no refused request
    return run.stdout


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_search_and_click_in_a_browser(deep: Path) -> None:
    """A search leaves the layers that match; a layer shows what goes with it and what locks it."""
    found = in_browser(deep, "#s=998")
    assert "1 of 1000 layers" in found
    assert found.count('style="display: none;"') == 999
    layer = in_browser(deep, "#m999")
    assert "is a dim of a model output" in layer
    assert "must be cut together with" in layer
    assert (
        re.search(r'class="row with"[^>]*data-module="998"', layer)
        or 'data-module="998" class="row with"' in layer
    )
    group = in_browser(deep, "#g0")
    assert "a unit goes from all of them or from none" in group
