"""Graph networks: torch-geometric's convolutions, poolings and models, and message passing written by hand.

torch-geometric runs here without its compiled companions, so what needs them (nearest neighbours, B-splines) is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as gnn
from torch import Tensor, nn
from torch_geometric.nn import models

from benchmarks.suites.case import Case, Inputs, noise, seeded

NODES, FEATURES, HIDDEN, CLASSES, EDGE, RELATIONS = 17, 10, 24, 5, 4, 3
SMALL = ("gcn", "gat", "conv_sage", "conv_pna", "hetero_sage", "hand_scatter")

_CASES: dict[str, Case] = {}


def cases() -> dict[str, Case]:
    """Every network of this file by name."""
    return dict(_CASES)


def _add(name: str, build: Callable[[], nn.Module], inputs: Callable[[], Inputs], note: str = "") -> None:
    _CASES[name] = Case(name, partial(seeded, build), inputs, note)


def _case(name: str, inputs: Callable[[], Inputs], **options: Any) -> Callable[[type], type]:
    """Register a network class, built with `options`, under `name`; its docstring is the note."""

    def register(network: type) -> type:
        note = (network.__doc__ or "").strip().partition("\n")[0]
        _add(name, partial(network, **options), inputs, note)
        return network

    return register


# --- inputs -----------------------------------------------------------------------------------------------------


def _edges() -> Tensor:
    """Both directions of a ring over the nodes and of some chords; [2 edges], sorted by target."""
    ring = torch.stack([torch.arange(NODES), (torch.arange(NODES) + 1) % NODES])
    chord = torch.tensor([[0, 2, 4, 7, 9, 11], [5, 8, 12, 13, 15, 16]])
    one = torch.cat([ring, chord], 1)
    both = torch.cat([one, one.flip(0)], 1)
    return both[:, both[1].argsort(stable=True)]


def _batch() -> Tensor:
    """Three graphs: the first 6 nodes, the next 7, the rest."""
    return torch.tensor([0] * 6 + [1] * 7 + [2] * 4)


def _edge_types() -> Tensor:
    return torch.arange(_edges().shape[1]) % RELATIONS


def _attributes() -> Tensor:
    return noise(_edges().shape[1], EDGE, seed=3)


def _weights() -> Tensor:
    return noise(_edges().shape[1], seed=4).abs() + 0.1


def _places() -> Tensor:
    """Node positions in space, a few units apart."""
    return noise(NODES, 3, seed=5) * 2


def _atoms() -> Tensor:
    return torch.arange(NODES) % 9 + 1


def graph() -> dict[str, Any]:
    """Node features and edges."""
    return {"x": noise(NODES, FEATURES), "edge_index": _edges()}


def graphs() -> dict[str, Any]:
    """The same, and which graph each node belongs to."""
    return {**graph(), "batch": _batch()}


def _typed() -> dict[str, Any]:
    return {**graph(), "edge_type": _edge_types()}


def _attributed() -> dict[str, Any]:
    return {**graph(), "edge_attr": _attributes()}


def _weighted() -> dict[str, Any]:
    return {**graph(), "edge_weight": _weights()}


def _placed() -> dict[str, Any]:
    return {**graph(), "pos": _places()}


# --- torch-geometric's convolutions, two layers of each ---------------------------------------------------------


class TwoLayers(nn.Module):
    """A linear layer, two convolutions, a linear layer."""

    def __init__(self, make: Callable[[int, int], nn.Module], width: int = HIDDEN) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, 20)
        self.a, self.b = make(20, HIDDEN), make(width, HIDDEN)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, **others: Any) -> Tensor:
        x = torch.relu(self.enter(x))
        x = torch.relu(self.a(x, **others))
        return self.head(torch.relu(self.b(x, **others)))


def _mlp(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, 22), nn.ReLU(), nn.Linear(22, o))


def _edge_mlp(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(EDGE, 14), nn.ReLU(), nn.Linear(14, i * o))


_DEGREES = torch.tensor([0, 0, 8, 6, 3])
_PNA = {
    "aggregators": ["mean", "min", "max", "std"],
    "scalers": ["identity", "amplification", "attenuation"],
    "deg": _DEGREES,
}

CONVOLUTIONS: dict[str, tuple[Callable[[int, int], nn.Module], Callable[[], Inputs]]] = {
    "gcn": (gnn.GCNConv, graph),
    "gcn_weighted": (gnn.GCNConv, _weighted),
    "cheb": (partial(gnn.ChebConv, K=3), graph),
    "sage": (gnn.SAGEConv, graph),
    "sage_max_project": (partial(gnn.SAGEConv, aggr="max", project=True, normalize=True), graph),
    "sage_lstm": (partial(gnn.SAGEConv, aggr="lstm"), graph),
    "graph": (partial(gnn.GraphConv, aggr="mean"), _weighted),
    "res_gated": (gnn.ResGatedGraphConv, graph),
    "res_gated_edge": (partial(gnn.ResGatedGraphConv, edge_dim=EDGE), _attributed),
    "gat_one_head": (gnn.GATConv, graph),
    "gat_mean_heads": (partial(gnn.GATConv, heads=4, concat=False), graph),
    "gat_edge": (partial(gnn.GATConv, heads=4, concat=False, edge_dim=EDGE), _attributed),
    "gatv2_mean_heads": (partial(gnn.GATv2Conv, heads=4, concat=False), graph),
    "gatv2_edge": (partial(gnn.GATv2Conv, heads=4, concat=False, edge_dim=EDGE), _attributed),
    "transformer_mean_heads": (partial(gnn.TransformerConv, heads=4, concat=False), graph),
    "transformer_beta_edge": (partial(gnn.TransformerConv, beta=True, edge_dim=EDGE), _attributed),
    "tag": (gnn.TAGConv, graph),
    "gin": (lambda i, o: gnn.GINConv(_mlp(i, o), train_eps=True), graph),
    "gine": (lambda i, o: gnn.GINEConv(_mlp(i, o), edge_dim=EDGE), _attributed),
    "arma": (partial(gnn.ARMAConv, num_stacks=2, num_layers=2), graph),
    "sg": (partial(gnn.SGConv, K=2), graph),
    "ssg": (partial(gnn.SSGConv, alpha=0.1, K=2), graph),
    "mf": (partial(gnn.MFConv, max_degree=4), graph),
    "rgcn": (partial(gnn.RGCNConv, num_relations=RELATIONS), _typed),
    "rgcn_bases": (partial(gnn.RGCNConv, num_relations=RELATIONS, num_bases=2), _typed),
    "rgcn_blocks": (partial(gnn.RGCNConv, num_relations=RELATIONS, num_blocks=4), _typed),
    "fast_rgcn": (partial(gnn.FastRGCNConv, num_relations=RELATIONS, num_bases=2), _typed),
    "rgat": (partial(gnn.RGATConv, num_relations=RELATIONS), _typed),
    "gmm": (partial(gnn.GMMConv, dim=EDGE, kernel_size=3), _attributed),
    "gmm_separate": (partial(gnn.GMMConv, dim=EDGE, kernel_size=3, separate_gaussians=True), _attributed),
    "nn": (lambda i, o: gnn.NNConv(i, o, _edge_mlp(i, o)), _attributed),
    "edge": (lambda i, o: gnn.EdgeConv(_mlp(2 * i, o)), graph),
    "feast": (partial(gnn.FeaStConv, heads=3), graph),
    "le": (gnn.LEConv, graph),
    "pna": (partial(gnn.PNAConv, **_PNA), graph),
    "pna_towers_edge": (partial(gnn.PNAConv, **_PNA, towers=4, edge_dim=EDGE, divide_input=False), _attributed),
    "cluster_gcn": (gnn.ClusterGCNConv, graph),
    "gen": (gnn.GENConv, graph),
    "gen_learned_edge": (partial(gnn.GENConv, aggr="softmax", learn_t=True, msg_norm=True, edge_dim=EDGE), _attributed),
    "film": (gnn.FiLMConv, graph),
    "film_relations": (partial(gnn.FiLMConv, num_relations=RELATIONS), _typed),
    "super_gat": (partial(gnn.SuperGATConv, heads=4, concat=False), graph),
    "eg": (partial(gnn.EGConv, aggregators=["sum", "mean", "max"], num_heads=4, num_bases=2), graph),
    "pdn": (partial(gnn.PDNConv, edge_dim=EDGE, hidden_channels=14), _attributed),
    "general": (partial(gnn.GeneralConv, in_edge_channels=EDGE, attention=True, heads=2), _attributed),
    "hypergraph": (gnn.HypergraphConv, lambda: {"x": noise(NODES, FEATURES), "hyperedge_index": _edges()}),
    "dir_gcn": (lambda i, o: gnn.DirGNNConv(gnn.GCNConv(i, o)), graph),
}  # fmt: skip
WIDER: dict[str, tuple[Callable[[int, int], nn.Module], int, Callable[[], Inputs]]] = {
    "gat": (partial(gnn.GATConv, heads=4), 96, graph),
    "gat_residual": (partial(gnn.GATConv, heads=4, residual=True), 96, graph),
    "gatv2": (partial(gnn.GATv2Conv, heads=4), 96, graph),
    "gatv2_shared": (partial(gnn.GATv2Conv, heads=4, share_weights=True, residual=True), 96, graph),
    "transformer": (partial(gnn.TransformerConv, heads=4), 96, graph),
    "transformer_edge": (partial(gnn.TransformerConv, heads=4, edge_dim=EDGE), 96, _attributed),
    "mix_hop": (partial(gnn.MixHopConv, powers=[0, 1, 2]), 72, graph),
    "super_gat_scaled": (partial(gnn.SuperGATConv, heads=4, attention_type="SD"), 96, graph),
}  # fmt: skip

for _name, (_make, _inputs) in CONVOLUTIONS.items():
    _add(f"conv_{_name}", partial(TwoLayers, _make), _inputs)
for _name, (_make, _width, _inputs) in WIDER.items():
    _add(f"conv_{_name}", partial(TwoLayers, _make, _width), _inputs)


class OneWidth(nn.Module):
    """Convolutions that keep the width, two of one kind between linear layers."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.enter, self.a, self.b = nn.Linear(FEATURES, HIDDEN), make(), make()
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, **others: Any) -> Tensor:
        x = self.enter(x)
        return self.head(self.b(torch.relu(self.a(x, **others)), **others))


KEEPING: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "gated_graph": (partial(gnn.GatedGraphConv, HIDDEN, 3), graph),
    "agnn": (gnn.AGNNConv, graph),
    "appnp": (partial(gnn.APPNP, K=3, alpha=0.1), graph),
    "lg": (gnn.LGConv, graph),
    "simple": (partial(gnn.SimpleConv, aggr="mean", combine_root="sum"), graph),
    "cg": (partial(gnn.CGConv, HIDDEN, dim=EDGE, batch_norm=True), _attributed),
    "anti_symmetric": (partial(gnn.AntiSymmetricConv, HIDDEN, num_iters=2), graph),
    "gps": (lambda: gnn.GPSConv(HIDDEN, gnn.GCNConv(HIDDEN, HIDDEN), heads=4), graphs),
    "gps_gine": (
        lambda: gnn.GPSConv(HIDDEN, gnn.GINEConv(_mlp(HIDDEN, HIDDEN), edge_dim=EDGE), heads=4),
        lambda: {**graphs(), "edge_attr": _attributes()},
    ),
    "gps_performer": (
        lambda: gnn.GPSConv(HIDDEN, gnn.GCNConv(HIDDEN, HIDDEN), heads=4, attn_type="performer"),
        graphs,
    ),
}
for _name, (_keep, _inputs) in KEEPING.items():
    _add(f"conv_{_name}", partial(OneWidth, _keep), _inputs)

# --- its models -------------------------------------------------------------------------------------------------

BASIC: dict[str, Callable[..., nn.Module]] = {
    "gcn": models.GCN,
    "graph_sage": models.GraphSAGE,
    "gin": models.GIN,
    "gat": partial(models.GAT, heads=4),
    "gat_v2": partial(models.GAT, heads=4, v2=True),
    "pna": partial(models.PNA, **_PNA),
    "edge_cnn": models.EdgeCNN,
}
for _name, _model in BASIC.items():
    _add(_name, partial(_model, FEATURES, HIDDEN, 3, CLASSES), graph)
    for _jk in ("cat", "max", "lstm"):
        _options = {"jk": _jk, "norm": "batch_norm" if _jk == "cat" else "layer_norm", "dropout": 0.1}
        _add(f"{_name}_jk_{_jk}", partial(_model, FEATURES, HIDDEN, 3, CLASSES, **_options), graph)


@_case("mlp", lambda: (noise(NODES, FEATURES),))
class Mlp(nn.Module):
    """models.MLP with its norms."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = models.MLP([FEATURES, HIDDEN, 22, CLASSES], dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


# --- by hand ----------------------------------------------------------------------------------------------------


@_case("hand_scatter", graph, how="scatter_add")
@_case("hand_index_add", graph, how="index_add")
@_case("hand_index_reduce", graph, how="index_reduce")
@_case("hand_scatter_reduce_max", graph, how="amax")
@_case("hand_scatter_reduce_mean", graph, how="mean")
@_case("hand_index_put", graph, how="index_put")
@_case("hand_segment", graph, how="segment")
@_case("hand_one_hot", graph, how="one_hot")
@_case("hand_dense", graph, how="dense")
@_case("hand_sparse", graph, how="sparse")
@_case("hand_csr", graph, how="csr")
class HandWritten(nn.Module):
    """Messages by a linear map of both ends, summed at the targets in one of many ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.enter = how, nn.Linear(FEATURES, 20)
        self.message, self.update = nn.Linear(40, HIDDEN), nn.Linear(HIDDEN + 20, 22)
        self.head = nn.Linear(22, CLASSES)

    def gather(self, messages: Tensor, target: Tensor, nodes: int) -> Tensor:
        out = messages.new_zeros(nodes, messages.size(-1))
        if self.how == "scatter_add":
            return out.scatter_add(0, target.unsqueeze(-1).expand_as(messages), messages)
        if self.how == "index_add":
            return out.index_add_(0, target, messages)
        if self.how == "index_reduce":
            return out.index_reduce(0, target, messages, "mean", include_self=False)
        if self.how in ("amax", "mean"):
            index = target[:, None].repeat(1, messages.shape[1])
            return out.scatter_reduce(0, index, messages, self.how, include_self=False)
        if self.how == "index_put":
            return out.index_put_((target,), messages, accumulate=True)
        if self.how == "segment":
            return torch.segment_reduce(messages, "sum", lengths=torch.bincount(target, minlength=nodes))
        edges = torch.arange(target.numel())
        if self.how == "one_hot":
            return F.one_hot(target, nodes).to(messages.dtype).t() @ messages
        if self.how == "dense":
            incidence = messages.new_zeros(nodes, target.numel())
            incidence[target, edges] = 1.0
            return incidence @ messages
        sparse = torch.sparse_coo_tensor(
            torch.stack([target, edges]), torch.ones_like(messages[:, 0]), (nodes, target.numel())
        )
        return torch.sparse.mm(sparse.to_sparse_csr() if self.how == "csr" else sparse, messages)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        source, target = edge_index
        messages = torch.relu(self.message(torch.cat([x[source], x[target]], -1)))
        gathered = self.gather(messages, target, x.shape[0])
        return self.head(torch.relu(self.update(torch.cat([gathered, x], -1))))


@_case("hetero_sage", lambda: {"x_dict": _hetero_x(), "edge_index_dict": _hetero_edges()})
class HeteroSage(nn.Module):
    """HeteroConv over three edge types, two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            gnn.HeteroConv(
                {
                    ("paper", "cites", "paper"): gnn.GCNConv(-1, HIDDEN),
                    ("author", "writes", "paper"): gnn.SAGEConv((-1, -1), HIDDEN),
                    ("paper", "rev_writes", "author"): gnn.GATConv((-1, -1), HIDDEN, add_self_loops=False),
                },
                aggr="sum",
            )
            for _ in range(2)
        )
        self.head = nn.Linear(HIDDEN, CLASSES)
        with torch.no_grad():
            self(_hetero_x(), _hetero_edges())

    def forward(self, x_dict: dict[str, Tensor], edge_index_dict: dict[Any, Tensor]) -> Tensor:
        for conv in self.convs:
            x_dict = {key: x.relu() for key, x in conv(x_dict, edge_index_dict).items()}
        return self.head(x_dict["author"])


def _hetero_x() -> dict[str, Tensor]:
    return {"paper": noise(13, FEATURES), "author": noise(9, 8, seed=2)}


def _hetero_edges() -> dict[tuple[str, str, str], Tensor]:
    papers, authors = torch.arange(26) % 13, torch.arange(26) * 5 % 9
    writes = torch.stack([authors, papers])
    return {
        ("paper", "cites", "paper"): torch.stack([papers, (papers * 3 + 1) % 13]),
        ("author", "writes", "paper"): writes,
        ("paper", "rev_writes", "author"): writes.flip(0),
    }
