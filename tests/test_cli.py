"""The command line, as a user meets it: figures against direct calls, exit statuses, errors without tracebacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import depgraph
from depgraph.base.tables import printed, table
from depgraph.cli import main

GRAPH = """
from types import SimpleNamespace

import torch
from torch import nn


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)

    def forward(self, x, edge_index):
        source, target = edge_index
        return self.head(torch.zeros_like(x).index_add(0, target, x[source]))


def ring():
    nodes = torch.arange(12)
    edges = torch.stack([nodes, nodes.roll(1)])
    return SimpleNamespace(x=torch.arange(48.0).reshape(12, 4), edge_index=torch.cat([edges, edges.flip(0)], 1))
"""

SOURCE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 22), nn.LayerNorm(22), nn.Linear(22, 3)

    def forward(self, x):
        return self.b(self.norm(self.a(x)).relu())


class Told(Net):
    example_input_array = torch.zeros(2, 5)


def net():
    torch.manual_seed(0)
    return Net()


def other():
    torch.manual_seed(1)
    return Net()


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 2))


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 22), nn.BatchNorm1d(22), nn.Linear(22, 3))


def told():
    return Told()


def broken():
    raise ValueError("no such file")


def number():
    return 3


def score(model):
    return -float(model.a.weight.detach().abs().sum())


def inputs():
    return torch.ones(2, 5)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of the user's, which is the present one."""
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("mine", None)
    return tmp_path


def data(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_says_what_analyze_finds(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    found = data(capsys, "inspect", "mine:net", "-i", "2x5", "--html", "page.html")
    (group,) = found["groups"]
    assert (group["units"], group["modules"]) == (22, ["a", "b", "norm"])
    assert [lock["params"] for lock in found["locks"]] == [3]
    assert (own / "page.html").stat().st_size > 1000
    assert main(["inspect", "mine:net", "-i", "2x5"]) == 0
    text = capsys.readouterr().out
    assert "22" in text
    assert "model output" in text


def test_depth(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    """--depth alone, and with a number; what is saved is verified with its removed modules."""
    text = """
import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.rise, self.fall = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.fall(self.rise(x).relu())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), Layer(), Layer(), Layer(), nn.Linear(8, 3))
"""
    (own / "layered.py").write_text(text)
    inputs = ["--input", "2x5"]
    report = data(
        capsys, "prune", "layered:net", *inputs, "--depth", "2", "--depth-by", "magnitude", "-o", "short"
    )
    assert len(report["removed"]) == 1
    assert len(data(capsys, "show", "short")["removed modules"]) == 3
    assert data(capsys, "verify", "short", "--model", "layered:net", *inputs)["status"] == "equal"
    report = data(capsys, "prune", "layered:net", *inputs, "--depth", "--max-params", "0.5")
    assert report["params"]["after"] <= 0.5 * report["params"]["before"]
    assert main(["prune", "layered:net", *inputs, "--depth", "9"]) == 1
    assert "more than the 3 branches" in capsys.readouterr().err
    import layered

    words = [
        "elastic",
        "layered:net",
        *inputs,
        "--depth",
        "--sizes",
        "1,0.4",
        "--cost",
        "params",
        "-o",
        "deep",
    ]
    assert data(capsys, *words)["verified"] == {"1": "equal", "0.4": "equal"}
    assert len(depgraph.load(layered.net, "deep", size=0.4)) < len(layered.net())
    assert data(capsys, "verify", "deep", "--model", "layered:net", *inputs)["status"] == "equal"
    assert data(capsys, "show", "deep")["sizes"] == [1.0, 0.4]
    assert main(["elastic", "mine:net", "-i", "2x5", "--depth"]) == 1
    assert "no branch of this model can go" in capsys.readouterr().err


@pytest.mark.parametrize("inputs", [["-i", "2x5"], ["-i", "x=2x5:float32"], ["-i", "mine:inputs"]])
def test_prune_save_show_verify_compare(
    capsys: pytest.CaptureFixture[str], own: Path, inputs: list[str]
) -> None:
    """The saved model is what `prune` returns; the other commands say of it what is so."""
    import mine

    report = data(capsys, "prune", "mine:net", *inputs, "--max-params", "0.5", "-o", "small")
    direct = depgraph.prune(mine.net().eval(), torch.randn(2, 5), max_params=0.5)
    loaded = depgraph.load(mine.net, "small")
    assert report["params"]["after"] == sum(p.numel() for p in loaded.parameters())
    for name, tensor in direct.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    shown = data(capsys, "show", "small")
    after = {w["name"]: w["after"] for w in shown["widths"]}
    assert after["a.weight"] == list(loaded.a.weight.shape)
    assert data(capsys, "verify", "small", "--model", "mine:net", *inputs)["status"] == "equal"
    assert main(["verify", "small", "--model", "mine:other", *inputs]) == 3  # other weights
    said = capsys.readouterr().out
    assert "it was made from other weights, or trained since" in " ".join(said.split())
    compared = data(capsys, "compare", "mine:net", "small", *inputs)
    assert compared["parameters"] == [report["params"]["before"], report["params"]["after"]]
    assert {w["name"] for w in compared["widths"]} == set(after)
    assert compared["latency [s]"][0] > 0


def test_ratio_ignore_and_inputs_of_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    report = data(capsys, "prune", "mine:told", "--ratio", "0.5", "--round-to", "4", "--no-verify")
    assert {tuple(w["after"]) for w in report["widths"]} >= {(12, 5), (3, 12)}
    assert report["verification"]["status"] == "skipped"
    assert main(["prune", "mine:told", "--ignore", "a"]) == 1
    assert "no axis of this model can shrink" in capsys.readouterr().err


def test_mask(capsys, own):
    import mine

    words = ["mask", "mine:net", "-i", "2x5", "--sparsity", "0.5", "--importance", "wanda", "-o", "masked"]
    assert data(capsys, *words)["zeros"] == 88
    loaded = depgraph.load(mine.net, "masked")
    assert sum(int((p == 0).sum()) for n, p in loaded.named_parameters() if p.dim() > 1) == 88
    assert data(capsys, "show", "masked")["masked weights"] == 2
    assert data(capsys, "verify", "masked", "--model", "mine:net", "-i", "2x5")["status"] == "equal"
    assert main(["verify", "masked", "--model", "mine:other", "-i", "2x5"]) == 3
    capsys.readouterr()
    assert main(["mask", "mine:net", "--pattern", "2:4"]) == 1
    assert "does not divide" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["60", "80", "110"])
def test_no_column_is_lost_where_lines_are_short(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    shown = table("steps", "step", "parameters", "smaller", "MACs", "MB on disk", "faster", "score", "")
    shown.add_row("mask", "12,345", "1.00x", "1,234,567", "0.05", "1.25x", "0.9342", "taken back")
    text = printed(shown)
    assert all(word in text for word in ("step ", "mask", "MB on disk", "1,234,567", "taken back"))


def test_factorise(capsys, own):
    import mine

    report = data(capsys, "factorise", "mine:wide", "-i", "2x5", "--max-params", "0.6", "-o", "factors")
    assert report["params"]["after"] <= 0.6 * report["params"]["before"]
    loaded = depgraph.load(mine.wide, "factors")
    assert data(capsys, "verify", "factors", "--model", "mine:wide", "-i", "2x5")["status"] == "shapes"
    assert sum(p.numel() for p in loaded.parameters()) == report["params"]["after"]


def test_compress(capsys, own):
    with open("mine.py", "a") as more:
        more.write("\n\ndef batches():\n    return [torch.ones(4, 5) * i for i in range(1, 4)]\n")
    import mine

    report = data(
        capsys, "compress", "mine:wide", "-i", "2x5", "--max-params", "0.6", "--kinds", "width", "rank",
        "--calibration", "mine:batches", "-o", "smaller",
    )  # fmt: skip
    assert report["params"]["after"] <= 0.6 * report["params"]["before"]
    assert [row["way"] for row in report["layers"]] == ["width", "rank", "width, then rank"]
    loaded = depgraph.load(mine.wide, "smaller")
    assert sum(p.numel() for p in loaded.parameters()) == report["params"]["after"]


def test_edges(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    Path("graph.py").write_text(GRAPH)
    found = data(
        capsys, "edges", "graph:Mean", "graph:ring", "--keep", "0.5", "--by", "degree", "-o", "edges.json"
    )
    assert found["edges"] == {"before": 24, "after": 12}
    import graph  # type: ignore[import-not-found]

    fewer = depgraph.graphs.EdgePlan.from_json(Path("edges.json").read_text()).apply(graph.ring())
    direct = depgraph.graphs.prune_edges(graph.Mean(), graph.ring(), keep=0.5, by="degree")
    assert torch.equal(fewer.edge_index, direct.data.edge_index)
    words = ["edges", "graph:Mean", "graph:ring", "--keep", "5", "--by", "random"]
    assert data(capsys, *words)["edges"]["after"] == 6  # both directions go together
    assert data(capsys, *words, "--directed")["edges"]["after"] == 5
    assert main(words) == 0
    assert "not saved" in capsys.readouterr().out
    assert main([*words, "-o", "nowhere/edges.json"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert main(["edges", "graph:Mean", "graph:ring", "--keep", "half"]) == 1
    assert "keep" in capsys.readouterr().err
    assert main(["edges", "graph:Mean", "graph:ring", "--keep", "25"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main(["edges", "graph:Mean", "graph:none"]) == 1


def test_fuse(capsys, own):
    report = data(capsys, "fuse", "mine:normed", "-i", "2x5", "-o", "fused")
    assert report["layers"] == [{"layer": "0", "norm": "1", "bias": "as before"}]
    import mine

    x = torch.randn(2, 5)
    torch.testing.assert_close(depgraph.load(mine.normed, "fused")(x), mine.normed().eval()(x))
    assert data(capsys, "show", "fused")["fused norms"] == 1
    assert data(capsys, "verify", "fused", "--model", "mine:normed", "-i", "2x5")["status"] == "equal"
    small = depgraph.prune(depgraph.load(mine.normed, "fused"), x)
    depgraph.save(small, "both")
    assert data(capsys, "show", "both")["plans"] == 2
    assert data(capsys, "verify", "both", "--model", "mine:normed", "-i", "2x5")["status"] == "equal"


def test_sweep_writes_rows_and_a_picture(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    import mine

    words = [
        "sweep",
        "mine:net",
        "-i",
        "2x5",
        "--ratios",
        "0.25,0.5",
        "--score",
        "mine:score",
        "--importance",
        "l2",
    ]
    found = data(capsys, *words, "--file", "rows.jsonl", "--plot", "curve.png")
    direct = depgraph.sweep(
        mine.net(), torch.randn(2, 5), (0.25, 0.5), score=mine.score, importance="l2", latency=False
    )
    assert found == direct.to_dict()
    assert [r["params"] for r in found["rows"]] == [(5 + 2 + 1 + 3) * n + 3 for n in (17, 11)]
    assert len({r["score"] for r in (found["dense"], *found["rows"])}) == 3
    assert (own / "curve.png").read_bytes().startswith(b"\x89PNG")
    header, *rows = map(json.loads, (own / "rows.jsonl").read_text().splitlines())
    assert "subject" in header
    assert rows == [found["dense"], *found["rows"]]
    assert main([*words, "--file", "rows.jsonl"]) == 0
    text = capsys.readouterr().out
    assert "pruning_ratio=0.25" in text
    assert "rows: rows.jsonl" in text
    assert max(map(len, text.splitlines())) <= 110


def test_several_sizes_on_one_set_of_weights(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    import mine

    found = data(capsys, "elastic", "mine:net", "-i", "2x5", "--sizes", "1,0.5", "--cost", "params", "-o", "wide",
                 "--score", "mine:score", "--plot", "wide.png")  # fmt: skip
    assert [row["value"] for row in found["rows"]] == [0.5]
    assert found["verified"] == {"1": "equal", "0.5": "equal"}
    assert data(capsys, "show", "wide")["sizes"] == [1.0, 0.5]
    assert (own / "wide.png").stat().st_size > 1000
    small = depgraph.load(mine.net, "wide", size=0.5)
    assert sum(p.numel() for p in small.parameters()) == found["rows"][0]["params"]
    assert data(capsys, "verify", "wide", "--model", "mine:net", "-i", "2x5")["status"] == "equal"
    assert main(["verify", "wide", "--model", "mine:other", "-i", "2x5"]) == 3
    assert "made from other weights" in " ".join(capsys.readouterr().out.split())
    compared = data(capsys, "compare", "mine:net", "wide", "-i", "2x5")
    assert compared["parameters"][0] == compared["parameters"][1]
    assert main(["elastic", "mine:net", "-i", "2x5"]) == 0
    assert "size=0.25" in capsys.readouterr().out


def test_a_picture_that_can_not_be_drawn_is_refused_before_the_run(
    capsys: pytest.CaptureFixture[str], own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = [
        "sweep",
        "mine:net",
        "-i",
        "2x5",
        "--ratios",
        "0.5",
        "--score",
        "mine:score",
        "--file",
        "rows.jsonl",
        "--plot",
        "curve.png",
    ]
    assert main(words) != 0
    assert "pictures need matplotlib" in capsys.readouterr().err
    assert not (own / "rows.jsonl").exists()


def test_tables_as_people_see_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Whole lines, matrices alone, and what looks like markup."""
    assert main(["prune", "mine:net", "-i", "2x5", "--max-params", "0.5", "-o", "small"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("depgraph")
    assert text.endswith("saved in small\n")
    heading = next(line for line in text.splitlines() if "removed" in line)
    assert heading.startswith("┃ parameter")
    assert heading.endswith("┃")
    assert main(["show", "small"]) == 0
    text = capsys.readouterr().out
    assert "│ a.weight  │ 22 x 5 │ 10 x 5 │" in text
    assert "norm.bias" not in text
    assert "... and 3 of one dim" in text
    assert "parameters and buffers: 113 of 245 (46.1%)" in text
    assert "request: pruning_ratio=None" not in text
    assert "max_params=0.5" in text
    assert main(["compare", "mine:net", "small", "-i", "2x5"]) == 0
    text = capsys.readouterr().out
    assert "latency [ms]" in text
    assert "│ b.weight  │ 3 x 22 │ 3 x 10 │" in text
    assert main(["compare", "mine:net", "mine:other", "-i", "2x5"]) == 0
    assert "all shapes are the same" in capsys.readouterr().out


def test_a_time_as_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "mine:net", "-i", "2x5", "--max-latency", "1us"]) == 1
    assert "can't be reached" in capsys.readouterr().err
    for words in (["--max-latency", "0.5kg"], ["--max-params", "few"], ["--max-macs", "nan"]):
        assert main(["prune", "mine:net", "-i", "2x5", *words]) == 1
        assert words[0][2:].replace("-", "_") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["inspect", "mine"], "package.module:name"),
        (["inspect", "nothing:net"], "ModuleNotFoundError: No module named 'nothing'"),
        (["inspect", "mine:missing"], "has no attribute 'missing'"),
        (["inspect", "mine:broken"], "no such file"),
        (["inspect", "mine:number"], "not a torch.nn.Module"),
        (["inspect", "mine:net"], "--input"),
        (["inspect", "mine:net", "-i", "2by5"], "can't be read"),
        (["inspect", "mine:net", "-i", "2x5:floatish"], "floatish"),
        (["inspect", "mine:net", "-i", "2x7"], "could not be run"),
        (["inspect", "mine:net", "-i", "x=2x5", "-i", "2x5"], "keyword"),
        (["prune", "mine:net", "-i", "2x5", "--max-params", "0.01"], "can't be reached"),
        (["prune", "mine:net", "-i", "2x5", "--importance", "best"], "best"),
        (["show", "nowhere"], "nowhere"),
        (["elastic", "mine:net", "-i", "2x5", "--sizes", "0.5,1"], "fall from 1"),
        (["elastic", "mine:net", "-i", "2x5", "--plot", "a.png"], "give --score"),
        (["inspect", "mine:net", "-i", "mine:broken"], "no such file"),
        (["prune", "mine:net", "-i", "2x5", "--calibration", "mine:broken"], "no such file"),
    ],
)
def test_refusals_are_one_message(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1, the reason on standard error, nothing on standard output, no traceback unless asked for."""
    assert main(words) == 1
    captured = capsys.readouterr()
    assert text in captured.err
    assert "Traceback" not in captured.err
    assert not captured.out
    main(["--traceback", *words])
    assert "Traceback" in capsys.readouterr().err


def test_a_checkpoint_is_pruned_from_file_to_file(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    (own / "large").mkdir()
    model = sys.modules["mine"].net() if "mine" in sys.modules else __import__("mine").net()
    save_file(model.state_dict(), own / "large" / "model.safetensors")
    words = ["prune", "mine:net", "--checkpoint", "large", "--input", "2x5", "--ratio", "0.5"]
    told = data(capsys, *words, "--dry-run")
    assert told["parameters"]["after"] < told["parameters"]["before"]
    assert not (own / "small").exists()
    found = data(capsys, *words, "--memory", "3GB", "--out", "small")
    assert found["verification"]["status"] == "equal"
    assert "depgraph.load(factory" in found["load"]
    assert depgraph.load("mine:net", own / "small").a.out_features == 11
    (own / "more.py").write_text("import torch\nbatches = lambda: [torch.randn(16, 5) for _ in range(4)]\n")
    with_data = ["--importance", "obs", "--calibration", "more:batches", "--recover", "reconstruction"]
    found = data(capsys, *words, "--out", "recovered", *with_data)
    assert found["recovery"]["layers"]
    for extra, text in (
        (["--out", "x", "--latency"], "--checkpoint does not take --latency"),
        ([], "give --out FOLDER"),
        (["--out", "x", "--html", "page.html"], "--checkpoint does not take --html"),
        (["--out", "x", "--memory", "some"], "memory must be a number of bytes"),
        (["--out", "large"], "exists"),
        (["--out", "x", "--depth", "1"], "no branch of this model can go"),
    ):
        assert main([*words, *extra]) == 1
        assert text in capsys.readouterr().err
    assert main(["prune", "mine:net", "--input", "2x5", "--dry-run"]) == 1


def test_wrong_command_lines_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["prune"], ["dance"], ["prune", "mine:net", "--scope", "everything"],
                  ["sweep", "mine:net", "--score", "mine:score", "--ratios", "0.1,half"], ["inspect", "mine:net", "--top", "0"],
                  ["verify", "small", "--model", "mine:net", "--ignore", "a"]):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 2
    with pytest.raises(SystemExit) as end:
        main(["prune", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "--max-macs" in out
    assert "exit status" in out


def test_as_a_program(own: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "depgraph", "inspect", "mine:net", "-i", "2x5", "--json"],
        capture_output=True, text=True, timeout=300, check=True, env={**os.environ, "PYTHONPATH": str(Path(depgraph.__file__).parent.parent)},
    )  # fmt: skip
    assert json.loads(run.stdout)["groups"][0]["units"] == 22


def test_completion_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    assert "depgraph" in capsys.readouterr().out


def test_the_package_carries_its_types_and_its_page() -> None:
    """Type checkers look for `py.typed`; the page's template is data of the package."""
    folder = Path(depgraph.__file__).parent
    assert (folder / "py.typed").is_file()
    assert (folder / "exploring" / "page.html").is_file()
