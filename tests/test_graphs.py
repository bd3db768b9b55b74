"""Fewer edges: which go, what follows them, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import depgraph
from depgraph.graphs import EdgePlan, Ramp, Threshold, prune_edges

CLUB = nx.karate_club_graph()  # Zachary's karate club: real people, who saw whom, and which half each joined


def club(**more: Any) -> SimpleNamespace:
    one_way = torch.tensor(list(CLUB.edges)).T
    edges = torch.cat([one_way, one_way.flip(0)], 1)
    weight = torch.tensor([float(d["weight"]) for *_, d in CLUB.edges(data=True)]).repeat(2)
    labels = torch.tensor([int(CLUB.nodes[n]["club"] == "Officer") for n in CLUB])
    return SimpleNamespace(
        x=torch.eye(34), edge_index=edges, edge_weight=weight, y=labels, name="club", **more
    )


class Convolution(nn.Module):
    """Two layers of weighted sums over neighbours, the node itself included."""

    def __init__(self, width: int = 34) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        source, target = edge_index
        weight = torch.ones(len(source), dtype=x.dtype) if edge_weight is None else edge_weight

        def gather(h: Tensor) -> Tensor:
            return h + torch.zeros_like(h).index_add(0, target, h[source] * weight[:, None])

        return self.two(gather(self.one(gather(x)).relu()))


@pytest.fixture(scope="module")
def model() -> Convolution:
    torch.manual_seed(0)
    made, data = Convolution(), club()
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(data.x, data.edge_index, data.edge_weight), data.y).backward()
        optimizer.step()
    return made.train()


def pairs(edges: Tensor) -> set[tuple[int, int]]:
    return {(int(a), int(b)) for a, b in edges.T}


BY: list = ["agreement", "gradient", "degree", "random", lambda data: data.edge_weight]


@pytest.mark.parametrize("by", BY, ids=lambda b: getattr(b, "__name__", str(b)))
def test_half_of_the_edges(model: Convolution, by: Any) -> None:
    data = club()
    before = data.edge_index.clone()
    result = prune_edges(model, data, keep=0.5, by=by)
    assert torch.equal(data.edge_index, before)
    assert len(data.edge_weight) == 156
    assert model.training
    kept = result.plan.mask("edge_index")
    assert kept.shape == (156,)
    assert int(kept.sum()) == 78
    assert torch.equal(result.data.edge_index, before[:, kept])
    assert torch.equal(result.data.edge_weight, data.edge_weight[kept])
    assert result.data.x is data.x
    assert result.data.name == "club"
    found = pairs(result.data.edge_index)
    assert {(b, a) for a, b in found} == found  # both directions together
    assert result.model is model
    assert result.report.edges == (156, 78)
    assert result.report.degrees[0] == (2 * 156 / 34, 34)
    left = nx.Graph([(a, b) for a, b in found])
    assert result.report.isolated == (0, 34 - len(left))
    assert result.report.components == (1, nx.number_connected_components(left) + 34 - len(left))
    assert 0 <= result.report.same_predictions <= 1
    assert "78" in str(result)
    assert result.report.to_dict()["edges"] == {"before": 156, "after": 78}
    again = EdgePlan.from_json(result.plan.to_json()).apply(club())
    assert torch.equal(again.edge_index, result.data.edge_index)


def test_the_lowest_go(model: Convolution) -> None:
    data = club()
    scores = torch.rand(156, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = (scores[:78] + scores[78:]) / 2
    plan = prune_edges(model, data, keep=100, by=lambda _: scores).plan
    assert torch.equal(
        plan.mask()[:78], torch.ones(78, dtype=torch.bool).index_fill(0, mean.argsort()[:28], False)
    )
    alone = prune_edges(model, data, keep=101, by=lambda _: scores, undirected=False).plan
    assert not alone.mask()[scores.argsort()[:55]].any()
    assert int(alone.mask().sum()) == 101
    above = prune_edges(model, data, keep=Threshold(0.5), by=lambda _: scores).plan
    assert torch.equal(above.mask()[:78], mean >= 0.5)


def test_scores_are_what_they_say(model: Convolution) -> None:
    data = club()
    with torch.no_grad():
        share = model.eval()(data.x, data.edge_index, data.edge_weight).double().softmax(1)
    source, target = data.edge_index
    agreement = (share[source] * share[target]).sqrt().sum(1)
    kept = prune_edges(model, data, keep=0.5).plan.mask()
    assert agreement[kept].min() >= agreement[~kept].max()
    weight = data.edge_weight.clone().requires_grad_()
    nn.functional.cross_entropy(model(data.x, data.edge_index, weight), data.y).backward()
    score = (weight.grad * data.edge_weight).abs()
    both = (score[:78] + score[78:]).repeat(2)
    kept = prune_edges(model, data, keep=0.5, by="gradient").plan.mask()
    assert both[kept].min() >= both[~kept].max()
    degree = torch.bincount(source, minlength=34)
    kept = prune_edges(model, data, keep=0.5, by="degree").plan.mask()
    assert (degree[source] * degree[target])[kept].max() <= (degree[source] * degree[target])[~kept].min()
    model.train()


def test_loops_and_parallel_edges(model: Convolution) -> None:
    edges = torch.tensor([[0, 0, 1, 1, 2, 3, 0], [0, 1, 0, 0, 2, 4, 1]])
    data = SimpleNamespace(x=torch.eye(34), edge_index=edges, edge_type=torch.arange(7))
    scores = torch.tensor([0.0, 3, 1, 9, 0, 5, 8])
    result = prune_edges(model, data, keep=3, by=lambda _: scores)
    assert result.data.edge_type.tolist() == [
        0,
        3,
        4,
        5,
        6,
    ]  # loops stay; the first 0→1 goes with the first 1→0
    assert prune_edges(model, data, keep=0, by="random").data.edge_type.tolist() == [0, 4]


def test_what_belongs_to_edges_follows(model: Convolution) -> None:
    more = {
        "edge_attr": torch.rand(156, 3),
        "time": torch.arange(156),
        "edge_label": torch.zeros(156),
        "train_mask": torch.ones(34),
    }
    result = prune_edges(model, club(**more), keep=0.5, by="random")
    kept = result.plan.mask()
    assert torch.equal(result.data.edge_attr, more["edge_attr"][kept])
    assert torch.equal(result.data.time, more["time"][kept])
    assert result.data.edge_label is more["edge_label"]
    assert result.data.train_mask is more["train_mask"]


def test_in_steps(model: Convolution) -> None:
    calls = []

    def by(data: Any) -> Tensor:
        calls.append(data.edge_index.shape[1])
        return data.edge_weight

    result = prune_edges(model, club(), keep=Ramp(0.25, steps=3, ramp="linear"), by=by)
    assert calls == [156, 118, 78]
    assert result.report.edges == (156, 40)  # 39 is odd
    kept = prune_edges(
        model, club(), keep=Ramp(0.1, steps=4), by=lambda d: -torch.arange(d.edge_index.shape[1])
    ).plan.mask()
    assert kept.nonzero().flatten().tolist() == [*range(8), *range(78, 86)]  # the last ones go first


def test_outputs_are_those_on_the_subgraph(model: Convolution) -> None:
    data = club()
    result = prune_edges(model, data, keep=0.3, by="degree")
    got = model(data.x, result.data.edge_index, result.data.edge_weight)
    adjacency = torch.zeros(34, 34)
    for (a, b), w in zip(result.data.edge_index.T, result.data.edge_weight, strict=True):
        adjacency[b, a] = w
    hop = torch.eye(34) + adjacency
    torch.testing.assert_close(got, model.two(hop @ model.one(hop @ data.x).relu()))


class Store(SimpleNamespace):
    pass


class Kinds:
    """Data with two kinds of nodes, in objects of our own."""

    def __init__(self, **stores: Any) -> None:
        self.stores = stores
        self.edge_types = list(stores["edges"])

    def __getitem__(self, key: Any) -> Any:
        return self.stores["edges"][key] if isinstance(key, tuple) else self.stores["nodes"][key]

    def __copy__(self) -> Kinds:
        return Kinds(
            **{group: {k: Store(**vars(v)) for k, v in found.items()} for group, found in self.stores.items()}
        )


def women() -> Kinds:
    """Who of 18 women came to which of 14 events (Davis, 1941)."""
    graph = nx.davis_southern_women_graph()
    people, events = graph.graph["top"], graph.graph["bottom"]
    edges = torch.tensor([[people.index(a), events.index(b)] for a, b in graph.edges]).T
    back = edges.flip(0)[:, torch.randperm(edges.shape[1], generator=torch.Generator().manual_seed(0))]
    return Kinds(
        nodes={"woman": Store(x=torch.eye(18)), "event": Store(x=torch.eye(14))},
        edges={
            ("woman", "came_to", "event"): Store(edge_index=edges, edge_attr=torch.arange(edges.shape[1])),
            ("event", "was_seen_by", "woman"): Store(edge_index=back),
        },
    )


def test_several_kinds_of_nodes() -> None:
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.woman, self.event = nn.Linear(18, 3), nn.Linear(14, 3)

        def forward(self, data: Any) -> dict[str, Tensor]:
            return {"woman": self.woman(data["woman"].x), "event": self.event(data["event"].x)}

    data = women()
    came, seen = data.edge_types
    for by in ("agreement", "random", "degree", lambda d: {k: torch.arange(89) for k in d.edge_types}):
        result = prune_edges(Embed(), data, keep=0.5, by=by)
        assert (
            result.plan.mask(came).sum()
            == result.plan.mask(["event", "was", "seen", "by", "woman"] and seen).sum()
            == 45  # of 89: sets of two
        )
        assert pairs(result.data[came].edge_index) == {(b, a) for a, b in pairs(result.data[seen].edge_index)}
        assert torch.equal(result.data[came].edge_attr, torch.arange(89)[result.plan.mask(came)])
    assert data[came].edge_index.shape[1] == 89
    assert set(result.report.kinds) == {"woman came_to event", "event was_seen_by woman"}
    with pytest.raises(depgraph.InputError, match="needs a forward"):
        prune_edges(Embed(), data, by="gradient")


@pytest.mark.slow
def test_data_of_torch_geometric(model: Convolution) -> None:
    pyg = pytest.importorskip("torch_geometric")
    from torch_geometric.data import Data, HeteroData

    data = Data(**vars(club()))
    result = prune_edges(model, data, keep=0.5)
    assert isinstance(result.data, Data)
    assert result.data.num_edges == 78
    assert data.num_edges == 156
    gcn = pyg.nn.GCN(34, 8, 2, 2)
    assert prune_edges(gcn, data, keep=0.5, by="gradient").data.edge_weight.shape == (78,)
    hetero, plain = HeteroData(), women()
    for kind in ("woman", "event"):
        hetero[kind].x = plain[kind].x
    for kind in plain.edge_types:
        hetero[kind].edge_index = plain[kind].edge_index
    network = pyg.nn.to_hetero(pyg.nn.GraphSAGE((-1, -1), 8, 2, 3), hetero.metadata())
    network(hetero.x_dict, hetero.edge_index_dict)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x_dict: Any, edge_index_dict: Any) -> Any:
            return self.inner(x_dict, edge_index_dict)

    result = prune_edges(Named(), hetero, keep=0.5)
    assert [s.num_edges for s in result.data.edge_stores] == [45, 45]


WRONG = [
    ({"keep": 1.5}, "keep must be a share from 0 to 1"),
    ({"keep": 157}, "keep=157, and there are 156 edges"),
    ({"keep": "half"}, "keep must be"),
    ({"keep": Ramp(2.0)}, "keep must be"),
    ({"keep": Ramp(0.5, steps=0)}, "steps must be a whole number"),
    ({"keep": Threshold(float("nan"))}, "must be a finite number"),
    ({"by": "best"}, "by must be a function of the data or one of agreement"),
    ({"by": lambda data: [1.0]}, "by must return 156 numbers, one for each edge"),
    ({"undirected": 1}, "undirected must be True or False"),
]


@pytest.mark.parametrize(
    ("options", "text"), WRONG, ids=[" ".join(o) + f" {i}" for i, (o, _) in enumerate(WRONG)]
)
def test_bad_arguments(model: Convolution, options: dict, text: str) -> None:
    with pytest.raises(depgraph.InputError, match=text):
        prune_edges(model, club(), **options)


def test_bad_data(model: Convolution) -> None:
    data = club()
    data.edge_index = torch.cat([data.edge_index, torch.tensor([[3, 40], [34, 1]])], 1)
    with pytest.raises(
        depgraph.InputError,
        match=r"edge_index names node 40, and there are nodes 0 to 33: 1 such edges(.|\n)*fix",
    ):
        prune_edges(model, data)
    with pytest.raises(depgraph.InputError, match="has none"):
        prune_edges(model, SimpleNamespace(x=torch.eye(3)))
    with pytest.raises(depgraph.InputError, match="shape \\[2, edges\\]"):
        prune_edges(model, SimpleNamespace(x=torch.eye(3), edge_index=torch.zeros(3, 2).long()))
    with pytest.raises(depgraph.InputError, match="could not be run on the data"):
        prune_edges(model, SimpleNamespace(x=torch.eye(3), edge_index=torch.zeros(2, 2).long()))
    with pytest.raises(depgraph.InputError, match="forward needs 'x'"):
        prune_edges(model, SimpleNamespace(edge_index=torch.zeros(2, 2).long()))
    plan = prune_edges(model, club(), by="random").plan
    with pytest.raises(depgraph.PlanError, match="the plan is for 156 edges, the data have 2 edges"):
        plan.apply(SimpleNamespace(x=torch.eye(3), edge_index=torch.zeros(2, 2).long()))
    for text in ("", "{}", plan.to_json().replace("156", "1560")):
        with pytest.raises(depgraph.PlanError, match="not a plan of edges"):
            EdgePlan.from_json(text)


@pytest.mark.slow
def test_a_large_graph_is_linear() -> None:
    """100 000 edges of nearest neighbours among scikit-learn's digits take about a second."""
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    graph = kneighbors_graph(load_digits().data, 50).tocoo()
    data = SimpleNamespace(
        num_nodes=1797, edge_index=torch.from_numpy(np.stack([graph.row, graph.col])).long()
    )
    result = prune_edges(nn.Identity(), data, keep=0.2, by="random")
    assert abs(result.report.edges[1] - 0.2 * graph.nnz) <= 1
