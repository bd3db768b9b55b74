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
from torch_geometric.nn import aggr, models
from torch_geometric.nn.models import dimenet, gnnff, schnet, visnet
from torch_geometric.utils import scatter, to_dense_adj, to_dense_batch

from benchmarks.suites.case import Cases, Inputs, noise

NODES, FEATURES, HIDDEN, CLASSES, EDGE, RELATIONS = 17, 10, 24, 5, 4, 3

CASES = Cases()


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


def _rgat(i: int, o: int) -> nn.Module:
    """RGATConv leaves one weight, which its default mode does not read, as it finds the memory."""
    conv = gnn.RGATConv(i, o, num_relations=RELATIONS)
    nn.init.ones_(conv.l2)
    return conv


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
    "rgat": (_rgat, _typed),
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
    CASES.add(f"conv_{_name}", partial(TwoLayers, _make), _inputs)
for _name, (_make, _width, _inputs) in WIDER.items():
    CASES.add(f"conv_{_name}", partial(TwoLayers, _make, _width), _inputs)


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
    CASES.add(f"conv_{_name}", partial(OneWidth, _keep), _inputs)

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
    CASES.add(_name, partial(_model, FEATURES, HIDDEN, 3, CLASSES), graph)
    for _jk in ("cat", "max", "lstm"):
        _options = {"jk": _jk, "norm": "batch_norm" if _jk == "cat" else "layer_norm", "dropout": 0.1}
        CASES.add(f"{_name}_jk_{_jk}", partial(_model, FEATURES, HIDDEN, 3, CLASSES, **_options), graph)


@CASES.network("mlp", lambda: (noise(NODES, FEATURES),))
class Mlp(nn.Module):
    """models.MLP with its norms."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = models.MLP([FEATURES, HIDDEN, 22, CLASSES], dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class _Around(nn.Module):
    """A model of the library between a linear layer and a linear head, as its output would else fix its width."""

    def __init__(
        self, inner: nn.Module, enter: int | None = None, leave: int = HIDDEN, act: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.act = act or nn.ReLU()
        self.enter = nn.Linear(FEATURES, enter) if enter else None
        self.inner, self.head = inner, nn.Linear(leave, CLASSES)

    def forward(self, x: Tensor, *args: Any, **others: Any) -> Tensor:
        y = self.inner(x if self.enter is None else self.act(self.enter(x)), *args, **others)
        return self.head(torch.relu(y[0] if isinstance(y, tuple) else y))


def radius_graph(pos: Tensor, r: float, batch: Tensor | None = None, **_: Any) -> Tensor:
    """Pairs of different nodes of one graph that lie within `r`; what the library's companion would return."""
    near = torch.cdist(pos, pos) < r
    near &= ~torch.eye(pos.shape[0], dtype=torch.bool)
    if batch is not None:
        near &= batch[:, None] == batch[None]
    target, source = near.nonzero().unbind(1)
    return torch.stack([source, target])


def triplets(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, ...]:
    """Pairs of edges k->j, j->i with k other than i; what the library's companion would return."""
    source, target = edge_index
    kj, ji = (target[:, None] == source[None, :]).nonzero().unbind(1)
    other = source[kj] != target[ji]
    kj, ji = kj[other], ji[other]
    return target, source, target[ji], source[ji], source[kj], kj, ji


for _module in (schnet, dimenet, gnnff, visnet):
    _module.radius_graph = radius_graph
dimenet.triplets = gnnff.triplets = triplets


def _molecules() -> dict[str, Any]:
    return {"z": _atoms(), "pos": _places(), "batch": _batch()}


def _pairs() -> Tensor:
    return torch.tensor([[0, 3, 5, 9], [2, 8, 11, 16]])


_DIME: dict[str, Any] = {"out_channels": 3, "num_blocks": 2, "num_spherical": 3, "num_radial": 4}
PUBLISHED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "graph_unet": (lambda: models.GraphUNet(FEATURES, HIDDEN, CLASSES, depth=2), graphs),
    "graph_unet_cat": (lambda: models.GraphUNet(FEATURES, HIDDEN, CLASSES, depth=2, sum_res=False), graphs),
    "schnet": (lambda: models.SchNet(HIDDEN, 22, 2, 14, cutoff=5.0), _molecules),
    "dimenet": (lambda: models.DimeNet(HIDDEN, num_bilinear=6, **_DIME), _molecules),
    "dimenet_pp": (
        lambda: models.DimeNetPlusPlus(
            HIDDEN, int_emb_size=14, basis_emb_size=6, out_emb_channels=26, **_DIME
        ),
        _molecules,
    ),
    "gnnff": (lambda: models.GNNFF(HIDDEN, 22, 2), _molecules),
    "visnet": (lambda: models.ViSNet(num_heads=4, num_layers=2, hidden_channels=24, num_rbf=6), _molecules),
    "attentive_fp": (
        lambda: models.AttentiveFP(FEATURES, HIDDEN, CLASSES, EDGE, num_layers=2, num_timesteps=2),
        lambda: {**graphs(), "edge_attr": _attributes()},
    ),
    "rect": (lambda: models.RECT_L(FEATURES, HIDDEN), graph),
    "linkx": (lambda: models.LINKX(NODES, FEATURES, HIDDEN, CLASSES, 2, 2, 2), graph),
    "light_gcn": (
        lambda: models.LightGCN(NODES, HIDDEN, 2),
        lambda: {"edge_index": _edges(), "edge_label_index": _pairs()},
    ),
    "pmlp": (lambda: models.PMLP(FEATURES, HIDDEN, CLASSES, 3), graph),
    "neural_fingerprint": (lambda: models.NeuralFingerprint(FEATURES, HIDDEN, CLASSES, 2), graphs),
    "sgformer": (lambda: models.SGFormer(FEATURES, HIDDEN, CLASSES, trans_num_heads=2), graphs),
    "polynormer": (lambda: models.Polynormer(FEATURES, HIDDEN, CLASSES, 2, 2, heads=2), graphs),
    "ar_link_predictor": (
        lambda: models.ARLinkPredictor(FEATURES, HIDDEN, 20, 3),
        lambda: (noise(NODES, FEATURES), _pairs()),
    ),
    "signed_gcn": (
        lambda: _Around(models.SignedGCN(FEATURES, HIDDEN, 2)),
        lambda: (noise(NODES, FEATURES), _edges()[:, ::2], _edges()[:, 1::2]),
    ),
    "mask_label": (
        lambda: _Around(models.MaskLabel(CLASSES, HIDDEN), HIDDEN),
        lambda: (noise(NODES, FEATURES), torch.arange(NODES) % CLASSES, torch.arange(NODES) % 3 == 0),
    ),
    "mask_label_cat": (
        lambda: _Around(models.MaskLabel(CLASSES, 14, "concat"), HIDDEN, HIDDEN + 14),
        lambda: (noise(NODES, FEATURES), torch.arange(NODES) % CLASSES, torch.arange(NODES) % 3 == 0),
    ),
    "group_add_rev": (
        lambda: _Around(models.GroupAddRev(gnn.GCNConv(12, 12), num_groups=2), HIDDEN, act=nn.Identity()),
        lambda: (noise(NODES, FEATURES), _edges()),
    ),
}
for _name, (_build, _inputs) in PUBLISHED.items():
    CASES.add(_name, _build, _inputs)


@CASES.network("deep_gcn", graph, block="res+")
@CASES.network("deep_gcn_dense", graph, block="dense")
class DeepGcn(nn.Module):
    """models.DeepGCNLayer around GENConv, residual or densely joined."""

    def __init__(self, block: str) -> None:
        super().__init__()
        self.enter, self.layers, width = nn.Linear(FEATURES, HIDDEN), nn.ModuleList(), HIDDEN
        for _ in range(3):
            out = width if block == "res+" else 10
            conv = gnn.GENConv(width, out, aggr="softmax", t=1.0, learn_t=True, num_layers=2, norm="layer")
            norm = nn.LayerNorm(width if block == "res+" else out)
            self.layers.append(models.DeepGCNLayer(conv, norm, nn.ReLU(), block=block, dropout=0.1))
            width = width if block == "res+" else width + out
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x, edge_index)
        return self.head(x)


@CASES.network("gae", graph, kind="gae")
@CASES.network("vgae", graph, kind="vgae")
@CASES.network("arga", graph, kind="arga")
@CASES.network("argva", graph, kind="argva")
class Autoencoder(nn.Module):
    """models.GAE and its relatives: encode, then score edges by inner products."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        encoder: nn.Module = _TwoHeads() if kind in ("vgae", "argva") else models.GCN(FEATURES, HIDDEN, 2, 14)
        makers: dict[str, Callable[[], nn.Module]] = {
            "gae": lambda: models.GAE(encoder),
            "vgae": lambda: models.VGAE(encoder),
            "arga": lambda: models.ARGA(encoder, _mlp(14, 1)),
            "argva": lambda: models.ARGVA(encoder, _mlp(14, 1)),
        }
        self.kind, self.model = kind, makers[kind]()

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        z = self.model.encode(x, edge_index)
        scores = self.model.decode(z, edge_index)
        return (scores, self.model.discriminator(z)) if self.kind.startswith("ar") else scores


class _TwoHeads(nn.Module):
    """A mean and a spread from one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = gnn.GCNConv(FEATURES, HIDDEN)
        self.mean, self.spread = gnn.GCNConv(HIDDEN, 14), gnn.GCNConv(HIDDEN, 14)

    def forward(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        x = self.hidden(x, edge_index).relu()
        return self.mean(x, edge_index), self.spread(x, edge_index)


@CASES.network("deep_graph_infomax", graph)
class Infomax(nn.Module):
    """models.DeepGraphInfomax: embeddings of a graph and of a corrupted one, scored against a summary."""

    def __init__(self) -> None:
        super().__init__()
        self.model = models.DeepGraphInfomax(
            HIDDEN,
            models.GCN(FEATURES, 22, 2, HIDDEN),
            summary=lambda z, *_, **__: z.mean(dim=0).sigmoid(),
            corruption=lambda x, edge_index: (x.flip(0), edge_index),
        )

    def forward(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        good, bad, summary = self.model(x, edge_index)
        return self.model.discriminate(good, summary), self.model.discriminate(bad, summary)


@CASES.network(
    "meta_layer", lambda: (noise(NODES, FEATURES), _edges(), _attributes(), noise(3, 6, seed=7), _batch())
)
class GraphNetwork(nn.Module):
    """models.MetaLayer: edges, nodes and graphs are updated from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a = models.MetaLayer(
            _Edges(FEATURES, EDGE, 6, 14), _Nodes(FEATURES, 14, 6, 20), _Global(20, 6, 12)
        )
        self.b = models.MetaLayer(_Edges(20, 14, 12, 16), _Nodes(20, 16, 12, 22), _Global(22, 12, 18))
        self.head = nn.Linear(18, CLASSES)

    def forward(self, x: Tensor, edges: Tensor, attributes: Tensor, u: Tensor, batch: Tensor) -> Tensor:
        x, attributes, u = self.a(x, edges, attributes, u, batch)
        return self.head(self.b(x, edges, attributes, u, batch)[2])


class _Edges(nn.Module):
    def __init__(self, node: int, edge: int, graph: int, out: int) -> None:
        super().__init__()
        self.mlp = _mlp(2 * node + edge + graph, out)

    def forward(self, src: Tensor, dst: Tensor, edge_attr: Tensor, u: Tensor, batch: Tensor) -> Tensor:
        return self.mlp(torch.cat([src, dst, edge_attr, u[batch]], 1))


class _Nodes(nn.Module):
    def __init__(self, node: int, edge: int, graph: int, out: int) -> None:
        super().__init__()
        self.first, self.second = _mlp(node + edge, 18), _mlp(node + 18 + graph, out)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, u: Tensor, batch: Tensor) -> Tensor:
        source, target = edge_index
        message = self.first(torch.cat([x[source], edge_attr], 1))
        message = scatter(message, target, dim=0, dim_size=x.size(0), reduce="mean")
        return self.second(torch.cat([x, message, u[batch]], 1))


class _Global(nn.Module):
    def __init__(self, node: int, graph: int, out: int) -> None:
        super().__init__()
        self.mlp = _mlp(node + graph, out)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, u: Tensor, batch: Tensor) -> Tensor:
        return self.mlp(torch.cat([u, scatter(x, batch, dim=0, reduce="mean")], 1))


# --- pooling to one vector a graph ------------------------------------------------------------------------------

AGGREGATIONS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "sum": (aggr.SumAggregation, HIDDEN),
    "mean": (aggr.MeanAggregation, HIDDEN),
    "max": (aggr.MaxAggregation, HIDDEN),
    "mul": (aggr.MulAggregation, HIDDEN),
    "var": (aggr.VarAggregation, HIDDEN),
    "std": (aggr.StdAggregation, HIDDEN),
    "softmax": (partial(aggr.SoftmaxAggregation, learn=True), HIDDEN),
    "power_mean": (partial(aggr.PowerMeanAggregation, learn=True), HIDDEN),
    "median": (aggr.MedianAggregation, HIDDEN),
    "lstm": (partial(aggr.LSTMAggregation, HIDDEN, 22), 22),
    "gru": (partial(aggr.GRUAggregation, HIDDEN, 22), 22),
    "set2set": (partial(aggr.Set2Set, HIDDEN, processing_steps=2), 2 * HIDDEN),
    "sort": (partial(aggr.SortAggregation, k=3), 3 * HIDDEN),
    "attention": (lambda: aggr.AttentionalAggregation(_mlp(HIDDEN, 1), _mlp(HIDDEN, 20)), 20),
    "deep_sets": (lambda: aggr.DeepSetsAggregation(_mlp(HIDDEN, 20), _mlp(20, 18)), 18),
    "multi": (lambda: aggr.MultiAggregation(["mean", "max", "std"]), 3 * HIDDEN),
    "multi_attention": (
        lambda: aggr.MultiAggregation(
            ["mean", "max"],
            mode="attn",
            mode_kwargs={"in_channels": HIDDEN, "out_channels": 20, "num_heads": 4},
        ),
        20,
    ),
    "multiset_transformer": (partial(aggr.GraphMultisetTransformer, HIDDEN, k=4, heads=4), HIDDEN),
    "set_transformer": (partial(aggr.SetTransformerAggregation, HIDDEN, heads=4, layer_norm=True), HIDDEN),
    "mlp": (lambda: aggr.MLPAggregation(HIDDEN, 20, 7, num_layers=1), 20),
    "variance_preserving": (aggr.VariancePreservingAggregation, HIDDEN),
    "equilibrium": (lambda: aggr.EquilibriumAggregation(HIDDEN, 16, [14], grad_iter=2), 16),
    "lcm": (lambda: aggr.LCMAggregation(HIDDEN, 20), 20),
    "patch_transformer": (
        lambda: aggr.PatchTransformerAggregation(HIDDEN, 20, patch_size=2, hidden_channels=16, heads=4),
        20,
    ),
}


class Pooled(nn.Module):
    """Two convolutions, an aggregation over each graph, a head."""

    def __init__(self, make: Callable[[], nn.Module], width: int) -> None:
        super().__init__()
        self.a, self.b = gnn.GCNConv(FEATURES, 20), gnn.GCNConv(20, HIDDEN)
        self.pool, self.head = make(), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.b(self.a(x, edge_index).relu(), edge_index).relu()
        return self.head(self.pool(x, batch))


for _name, (_make_pool, _width) in AGGREGATIONS.items():
    CASES.add(f"pool_{_name}", partial(Pooled, _make_pool, _width), graphs)


@CASES.network("pool_topk", graphs, make=partial(gnn.TopKPooling, HIDDEN, ratio=0.6))
@CASES.network("pool_sag", graphs, make=partial(gnn.SAGPooling, HIDDEN, ratio=0.6))
@CASES.network("pool_sag_gat", graphs, make=partial(gnn.SAGPooling, HIDDEN, ratio=0.6, GNN=gnn.GATConv))
@CASES.network("pool_asa", graphs, make=partial(gnn.ASAPooling, HIDDEN, ratio=0.6))
@CASES.network("pool_edge", graphs, make=partial(gnn.EdgePooling, HIDDEN))
@CASES.network("pool_cluster", graphs, make=partial(gnn.ClusterPooling, HIDDEN))
class HierarchicallyPooled(nn.Module):
    """Nodes are dropped or merged by a learned score between convolutions; mean and maximum of each stage."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.b = gnn.GraphConv(FEATURES, HIDDEN), gnn.GraphConv(HIDDEN, HIDDEN)
        self.first, self.second = make(), make()
        self.head = _mlp(2 * HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        read = []
        for conv, pool in ((self.a, self.first), (self.b, self.second)):
            x = conv(x, edge_index).relu()
            if isinstance(pool, (gnn.EdgePooling, gnn.ClusterPooling)):
                x, edge_index, batch, *_ = pool(x, edge_index, batch)
            else:
                out = pool(x, edge_index, batch=batch)
                x, edge_index, batch = out[0], out[1], out[3]
            read.append(torch.cat([gnn.global_max_pool(x, batch), gnn.global_mean_pool(x, batch)], 1))
        return self.head(read[0] + read[1])


@CASES.network("diff_pool", graphs)
class DiffPool(nn.Module):
    """Dense convolutions and soft assignments of nodes to clusters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.assign = gnn.DenseSAGEConv(FEATURES, HIDDEN), gnn.DenseSAGEConv(FEATURES, 4)
        self.again, self.head = gnn.DenseGCNConv(HIDDEN, 22), nn.Linear(22, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x, mask = to_dense_batch(x, batch)
        adjacency = to_dense_adj(edge_index[:, batch[edge_index[0]] == batch[edge_index[1]]], batch)
        z = self.embed(x, adjacency, mask).relu()
        x, adjacency, _, _ = gnn.dense_diff_pool(z, adjacency, self.assign(x, adjacency, mask), mask)
        return self.head(self.again(x, adjacency).relu().mean(1))


@CASES.network("min_cut_pool", graphs)
class MinCutPool(nn.Module):
    """Assignments by a linear layer, pooled adjacency normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.assign = gnn.GCNConv(FEATURES, HIDDEN), nn.Linear(HIDDEN, 4)
        self.again, self.head = gnn.DenseGraphConv(HIDDEN, 22), nn.Linear(22, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x, mask = to_dense_batch(self.conv(x, edge_index).relu(), batch)
        adjacency = to_dense_adj(edge_index[:, batch[edge_index[0]] == batch[edge_index[1]]], batch)
        x, adjacency, _, _ = gnn.dense_mincut_pool(x, adjacency, self.assign(x), mask)
        return self.head(self.again(x, adjacency).relu().mean(1))


@CASES.network("mem_pool", graphs)
class MemPool(nn.Module):
    """MemPooling: learned keys, a convolution over heads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = gnn.GATConv(FEATURES, HIDDEN)
        self.a, self.b = gnn.MemPooling(HIDDEN, 22, heads=3, num_clusters=4), gnn.MemPooling(22, 20, 3, 1)
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x, _ = self.a(self.conv(x, edge_index).relu(), batch)
        return self.head(self.b(x.relu())[0].squeeze(1))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": partial(gnn.BatchNorm, HIDDEN),
    "instance": partial(gnn.InstanceNorm, HIDDEN, affine=True),
    "layer_graph": partial(gnn.LayerNorm, HIDDEN, mode="graph"),
    "layer_node": partial(gnn.LayerNorm, HIDDEN, mode="node"),
    "graph": partial(gnn.GraphNorm, HIDDEN),
    "graph_size": gnn.GraphSizeNorm,
    "pair": gnn.PairNorm,
    "mean_subtraction": gnn.MeanSubtractionNorm,
    "diff_group": partial(gnn.DiffGroupNorm, HIDDEN, groups=3),
}


class Normed(nn.Module):
    """Convolution, norm, two convolutions."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.a, self.norm, self.b = gnn.GCNConv(FEATURES, HIDDEN), make(), gnn.GCNConv(HIDDEN, 20)
        self.c = gnn.GCNConv(20, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.a(x, edge_index)
        x = self.norm(x) if isinstance(self.norm, (gnn.BatchNorm, gnn.DiffGroupNorm)) else self.norm(x, batch)
        return self.c(self.b(x.relu(), edge_index).relu(), edge_index)


for _name, _norm in NORMS.items():
    CASES.add(f"norm_{_name}", partial(Normed, _norm), graphs)


# --- points in space --------------------------------------------------------------------------------------------


@CASES.network("point_net", lambda: {"pos": _places(), "edge_index": _edges(), "batch": _batch()})
class PointNet(nn.Module):
    """PointNetConv on positions, global maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.a = gnn.PointNetConv(_mlp(3, HIDDEN), _mlp(HIDDEN, 20))
        self.b = gnn.PointNetConv(_mlp(20 + 3, HIDDEN))
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, pos: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.a(None, pos, edge_index).relu()
        return self.head(gnn.global_max_pool(self.b(x, pos, edge_index).relu(), batch))


@CASES.network("point_transformer", _placed)
class PointTransformer(nn.Module):
    """PointTransformerConv with networks for positions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, 20)
        self.a = gnn.PointTransformerConv(20, HIDDEN, _mlp(3, HIDDEN), _mlp(HIDDEN, HIDDEN))
        self.b = gnn.PointTransformerConv(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, pos: Tensor) -> Tensor:
        x = self.a(self.enter(x).relu(), pos, edge_index).relu()
        return self.head(self.b(x, pos, edge_index))


@CASES.network("point_gnn", _placed)
class PointGnn(nn.Module):
    """PointGNNConv with three networks."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, HIDDEN)
        self.conv = gnn.PointGNNConv(_mlp(HIDDEN, 3), _mlp(HIDDEN + 3, 20), _mlp(20, HIDDEN))
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, pos: Tensor) -> Tensor:
        return self.head(self.conv(self.enter(x), pos, edge_index))


@CASES.network("ppf", lambda: {**_placed(), "normal": F.normalize(noise(NODES, 3, seed=8))})
class PointPair(nn.Module):
    """PPFConv on distances and angles."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = gnn.PPFConv(_mlp(FEATURES + 4, HIDDEN), _mlp(HIDDEN, 20))
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, pos: Tensor, normal: Tensor) -> Tensor:
        return self.head(self.conv(x, pos, normal, edge_index))


@CASES.network("dgcnn", lambda: (noise(2, 3, 16),))
class Dgcnn(nn.Module):
    """The usual DGCNN: neighbours by distance in feature space, edge convolutions as 1x1 convolutions, maxima."""

    def __init__(self) -> None:
        super().__init__()
        self.k = 4
        self.a, self.na = nn.Conv2d(6, 20, 1, bias=False), nn.BatchNorm2d(20)
        self.b, self.nb = nn.Conv2d(40, HIDDEN, 1, bias=False), nn.BatchNorm2d(HIDDEN)
        self.c, self.nc = nn.Conv1d(20 + HIDDEN, 30, 1, bias=False), nn.BatchNorm1d(30)
        self.deep, self.head = nn.Linear(60, 22), nn.Linear(22, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        n, c, points = x.size()
        inner = -2 * torch.matmul(x.transpose(2, 1), x)
        square = torch.sum(x**2, dim=1, keepdim=True)
        index = (-square - inner - square.transpose(2, 1)).topk(k=self.k, dim=-1)[1]
        index = (index + torch.arange(0, n).view(-1, 1, 1) * points).view(-1)
        x = x.transpose(2, 1).contiguous()
        near = x.view(n * points, -1)[index, :].view(n, points, self.k, c)
        x = x.view(n, points, 1, c).repeat(1, 1, self.k, 1)
        return torch.cat((near - x, x), dim=3).permute(0, 3, 1, 2).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        one = F.leaky_relu(self.na(self.a(self.features(x))), 0.2).max(dim=-1, keepdim=False)[0]
        two = F.leaky_relu(self.nb(self.b(self.features(one))), 0.2).max(dim=-1, keepdim=False)[0]
        x = F.leaky_relu(self.nc(self.c(torch.cat((one, two), 1))), 0.2)
        x = torch.cat((F.adaptive_max_pool1d(x, 1).view(n, -1), F.adaptive_avg_pool1d(x, 1).view(n, -1)), 1)
        return self.head(F.leaky_relu(self.deep(x), 0.2))


@CASES.network("point_net_pp", lambda: (noise(2, 16, 3),))
class PointNetPlusPlus(nn.Module):
    """Set abstraction by farthest points and balls, feature propagation back to every point."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 18, 1), nn.BatchNorm2d(18), nn.ReLU(), nn.Conv2d(18, HIDDEN, 1))
        self.b = nn.Sequential(
            nn.Conv2d(HIDDEN + 3, 30, 1), nn.BatchNorm2d(30), nn.ReLU(), nn.Conv2d(30, 28, 1)
        )
        self.up = nn.Sequential(nn.Conv1d(28 + HIDDEN, 26, 1), nn.BatchNorm1d(26), nn.ReLU())
        self.head = nn.Conv1d(26, CLASSES, 1)

    @staticmethod
    def pick(points: Tensor, index: Tensor) -> Tensor:
        rows = torch.arange(points.shape[0]).view(-1, *[1] * (index.dim() - 1))
        return points[rows, index, :]

    def farthest(self, xyz: Tensor, count: int) -> Tensor:
        n, points, _ = xyz.shape
        chosen = torch.zeros(n, count, dtype=torch.long)
        distance, last = torch.ones(n, points).to(xyz) * 1e10, torch.zeros(n, dtype=torch.long)
        for i in range(count):
            chosen[:, i] = last
            centre = xyz[torch.arange(n), last, :].view(n, 1, 3)
            distance = torch.minimum(distance, torch.sum((xyz - centre) ** 2, -1))
            last = torch.max(distance, -1)[1]
        return chosen

    def abstract(self, xyz: Tensor, x: Tensor | None, mlp: nn.Module, count: int) -> tuple[Tensor, Tensor]:
        centres = self.pick(xyz, self.farthest(xyz, count))
        index = torch.cdist(centres, xyz).sort(dim=-1)[1][:, :, :4]
        near = self.pick(xyz, index) - centres.unsqueeze(2)
        near = near if x is None else torch.cat([near, self.pick(x, index)], -1)
        return centres, mlp(near.permute(0, 3, 2, 1)).max(2)[0].transpose(1, 2)

    def forward(self, xyz: Tensor) -> Tensor:
        one, x = self.abstract(xyz, None, self.a, 8)
        two, y = self.abstract(one, x, self.b, 4)
        distance, index = torch.cdist(one, two).sort(dim=-1)
        weight = 1.0 / (distance[:, :, :3] + 1e-8)
        weight = weight / weight.sum(2, keepdim=True)
        y = torch.sum(self.pick(y, index[:, :, :3]) * weight.unsqueeze(-1), 2)
        return self.head(self.up(torch.cat([x, y], -1).permute(0, 2, 1)))


@CASES.network("egnn", _placed)
class Equivariant(nn.Module):
    """EGNN: messages from squared distances move positions as well as features."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(FEATURES, HIDDEN)
        self.edge, self.node = _mlp(2 * HIDDEN + 1, 20), _mlp(HIDDEN + 20, HIDDEN)
        self.move, self.head = nn.Linear(20, 1, bias=False), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        source, target = edge_index
        h = self.enter(x)
        for _ in range(2):
            away = pos[target] - pos[source]
            m = F.silu(self.edge(torch.cat([h[target], h[source], away.square().sum(-1, keepdim=True)], 1)))
            pos = pos.index_add(0, target, away * self.move(m))
            gathered = torch.zeros(h.size(0), m.size(1)).to(m).index_add_(0, target, m)
            h = h + self.node(torch.cat([h, gathered], 1))
        return self.head(h), pos


# --- by hand ----------------------------------------------------------------------------------------------------


@CASES.network("hand_scatter", graph, how="scatter_add")
@CASES.network("hand_index_add", graph, how="index_add")
@CASES.network("hand_index_reduce", graph, how="index_reduce")
@CASES.network("hand_scatter_reduce_max", graph, how="amax")
@CASES.network("hand_scatter_reduce_mean", graph, how="mean")
@CASES.network("hand_index_put", graph, how="index_put")
@CASES.network("hand_segment", graph, how="segment")
@CASES.network("hand_one_hot", graph, how="one_hot")
@CASES.network("hand_dense", graph, how="dense")
@CASES.network("hand_sparse", graph, how="sparse")
@CASES.network("hand_csr", graph, how="csr")
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
            torch.stack([target, edges]), messages.new_ones(target.numel()), (nodes, target.numel())
        )
        return torch.sparse.mm(sparse.to_sparse_csr() if self.how == "csr" else sparse, messages)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        source, target = edge_index
        messages = torch.relu(self.message(torch.cat([x[source], x[target]], -1)))
        gathered = self.gather(messages, target, x.shape[0])
        return self.head(torch.relu(self.update(torch.cat([gathered, x], -1))))


# --- nodes and edges of several types ---------------------------------------------------------------------------

METADATA = (
    ["paper", "author"],
    [("paper", "cites", "paper"), ("author", "writes", "paper"), ("paper", "rev_writes", "author")],
)


def _hetero_x() -> dict[str, Tensor]:
    return {"paper": noise(13, FEATURES), "author": noise(9, 8, seed=2)}


def _hetero_edges() -> dict[tuple[str, str, str], Tensor]:
    papers, authors = torch.arange(26) % 13, torch.arange(26) * 5 % 9
    writes = torch.stack([authors, papers])
    cites = torch.stack([papers, (papers * 3 + 1) % 13])
    return dict(zip(METADATA[1], (cites, writes, writes.flip(0)), strict=True))


def _hetero() -> dict[str, Any]:
    return {"x_dict": _hetero_x(), "edge_index_dict": _hetero_edges()}


@CASES.network("hetero_sage", lambda: {"x_dict": _hetero_x(), "edge_index_dict": _hetero_edges()})
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


@CASES.network("hgt", _hetero, kind="hgt")
@CASES.network("han", _hetero, kind="han")
class HeteroAttention(nn.Module):
    """A linear layer for each node type, two layers of HGTConv or HANConv."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.enter = nn.ModuleDict({"paper": nn.Linear(FEATURES, HIDDEN), "author": nn.Linear(8, HIDDEN)})
        make = gnn.HGTConv if kind == "hgt" else gnn.HANConv
        self.convs = nn.ModuleList(make(HIDDEN, HIDDEN, METADATA, heads=4) for _ in range(2))
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x_dict: dict[str, Tensor], edge_index_dict: dict[Any, Tensor]) -> Tensor:
        x_dict = {key: self.enter[key](x).relu() for key, x in x_dict.items()}
        for conv in self.convs:
            x_dict = conv(x_dict, edge_index_dict)
        return self.head(x_dict["paper"])


@CASES.network("to_hetero_sage", lambda: (_hetero_x(), _hetero_edges()))
class ToHetero(nn.Module):
    """A homogeneous model that to_hetero turns into a graph of copies."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gnn.to_hetero(models.GraphSAGE((-1, -1), HIDDEN, 2, 20), METADATA)
        self.head = nn.Linear(20, CLASSES)
        with torch.no_grad():
            self.model(_hetero_x(), _hetero_edges())

    def forward(self, x_dict: dict[str, Tensor], edge_index_dict: dict[Any, Tensor]) -> Tensor:
        return self.head(self.model(x_dict, edge_index_dict)["paper"].relu())


@CASES.network("hetero_jumping", _hetero)
class HeteroJumping(nn.Module):
    """models.HeteroJumpingKnowledge over two layers, norms by type."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = gnn.HeteroDictLinear({"paper": FEATURES, "author": 8}, HIDDEN)
        self.a, self.b = self.layer(), self.layer()
        self.jump = models.HeteroJumpingKnowledge(METADATA[0], "cat")
        self.head = nn.Linear(2 * HIDDEN, CLASSES)

    def layer(self) -> nn.Module:
        return gnn.HeteroConv({edge: gnn.SAGEConv(HIDDEN, HIDDEN) for edge in METADATA[1]})

    def forward(self, x_dict: dict[str, Tensor], edge_index_dict: dict[Any, Tensor]) -> Tensor:
        one = self.a({k: x.relu() for k, x in self.enter(x_dict).items()}, edge_index_dict)
        two = self.b({k: x.relu() for k, x in one.items()}, edge_index_dict)
        return self.head(self.jump({k: [one[k], two[k]] for k in one})["author"])


@CASES.network("heat", lambda: {**_typed(), "node_type": torch.arange(NODES) % 2, "edge_attr": _attributes()})
class Heat(nn.Module):
    """HEATConv: linear layers by node type, embeddings of edge types."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = gnn.HEATConv(FEATURES, 20, 2, RELATIONS, 6, EDGE, 8, heads=4, concat=False)
        self.head = nn.Linear(20, CLASSES)

    def forward(
        self, x: Tensor, edge_index: Tensor, edge_type: Tensor, node_type: Tensor, edge_attr: Tensor
    ) -> Tensor:
        return self.head(self.conv(x, edge_index, node_type, edge_type, edge_attr).relu())


@CASES.network("gcn2", graph)
class Gcn2(nn.Module):
    """GCNII: an initial residual in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.convs = nn.ModuleList(gnn.GCN2Conv(HIDDEN, 0.1, 0.5, i + 1) for i in range(3))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = first = self.enter(x).relu()
        for conv in self.convs:
            x = conv(x, first, edge_index).relu()
        return self.head(x)


@CASES.network("fa", graph)
class Fagcn(nn.Module):
    """FAConv: signed attention against the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.convs = nn.ModuleList(gnn.FAConv(HIDDEN, 0.2) for _ in range(2))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = first = self.enter(x).relu()
        for conv in self.convs:
            x = conv(x, first, edge_index)
        return self.head(x)


@CASES.network("dna", graph)
class Dna(nn.Module):
    """DNAConv: attention over the earlier layers of each node."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.convs = nn.ModuleList(gnn.DNAConv(HIDDEN, heads=4, groups=2) for _ in range(2))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        layers = self.enter(x).relu().unsqueeze(1)
        for conv in self.convs:
            layers = torch.cat([layers, conv(layers, edge_index).relu().unsqueeze(1)], 1)
        return self.head(layers[:, -1])


@CASES.network("signed", lambda: (noise(NODES, FEATURES), _edges()[:, ::2], _edges()[:, 1::2]))
class Signed(nn.Module):
    """SignedConv twice: sums over friends and foes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = gnn.SignedConv(FEATURES, HIDDEN, first_aggr=True)
        self.b, self.head = gnn.SignedConv(HIDDEN, 20, first_aggr=False), nn.Linear(40, CLASSES)

    def forward(self, x: Tensor, friends: Tensor, foes: Tensor) -> Tensor:
        x = self.a(x, friends, foes).relu()
        return self.head(self.b(x, friends, foes))


@CASES.network(
    "gcn_dense_adjacency", lambda: (noise(2, 11, FEATURES), (noise(2, 11, 11, seed=2) > 0).float())
)
class DenseGcn(nn.Module):
    """The textbook GCN: a dense adjacency, degrees by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 22)
        self.head = nn.Linear(22, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        adjacency = adjacency + torch.eye(adjacency.shape[-1]).to(x)
        degree = adjacency.sum(-1).clamp(min=1).rsqrt()
        adjacency = degree[:, :, None] * adjacency * degree[:, None, :]
        x = torch.relu(adjacency @ self.a(x))
        return self.head(torch.relu(adjacency @ self.b(x)))


@CASES.network("gat_dense_adjacency", lambda: (noise(11, FEATURES), (noise(11, 11, seed=2) > 0).float()))
class DenseGat(nn.Module):
    """The original GAT in plain torch: several one-head layers joined, -9e15 where there is no edge."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList(nn.Parameter(torch.randn(FEATURES, 12) * 0.3) for _ in range(3))
        self.a = nn.ParameterList(nn.Parameter(torch.randn(24, 1) * 0.3) for _ in range(3))
        self.head = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        out = []
        for w, a in zip(self.w, self.a, strict=True):
            h = torch.mm(x, w)
            width = w.shape[1]
            e = F.leaky_relu(torch.matmul(h, a[:width, :]) + torch.matmul(h, a[width:, :]).T, 0.2)
            attention = torch.where(adjacency > 0, e, -9e15 * torch.ones_like(e)).softmax(1)
            out.append(F.elu(torch.matmul(attention, h)))
        return self.head(torch.cat(out, 1))


@CASES.network(
    "gcn_sparse_parameter", lambda: (noise(11, FEATURES), (noise(11, 11, seed=2) > 0.5).float().to_sparse())
)
class SparseGcn(nn.Module):
    """The reference GCN: raw weights, torch.spmm with a sparse adjacency as input."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = (
            nn.Parameter(torch.randn(FEATURES, HIDDEN) * 0.3),
            nn.Parameter(torch.zeros(HIDDEN)),
        )
        self.w2, self.b2 = (
            nn.Parameter(torch.randn(HIDDEN, CLASSES) * 0.3),
            nn.Parameter(torch.zeros(CLASSES)),
        )

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = torch.relu(torch.spmm(adjacency, torch.mm(x, self.w1)) + self.b1)
        return (torch.spmm(adjacency, torch.mm(x, self.w2)) + self.b2).log_softmax(1)


@CASES.network("st_gcn", lambda: (noise(2, 3, 8, 11), noise(3, 11, 11, seed=2).abs()))
class StGcn(nn.Module):
    """Skeletons: a convolution for each part of the adjacency by einsum, then over time."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = 3
        self.a, self.b = nn.Conv2d(3, 3 * 20, 1), nn.Conv2d(20, 3 * HIDDEN, 1)
        self.ta = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 20, (3, 1), padding=(1, 0)))
        self.skip, self.head = nn.Conv2d(20, HIDDEN, 1), nn.Linear(HIDDEN, CLASSES)

    def spread(self, x: Tensor, adjacency: Tensor) -> Tensor:
        n, kc, t, v = x.size()
        x = x.view(n, self.parts, kc // self.parts, t, v)
        return torch.einsum("nkctv,kvw->nctw", x, adjacency).contiguous()

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = self.ta(self.spread(self.a(x), adjacency))
        x = torch.relu(self.spread(self.b(x), adjacency) + self.skip(x))
        return self.head(x.mean((2, 3)))


@CASES.network("gru_update", graph)
class GruUpdate(nn.Module):
    """MPNN: an edge network in place of a weight, a GRU cell on nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.message, self.cell = (
            nn.Linear(FEATURES, HIDDEN),
            nn.Linear(HIDDEN, 20),
            nn.GRUCell(20, HIDDEN),
        )
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = self.enter(x)
        for _ in range(3):
            m = self.message(h)[edge_index[0]]
            gathered = torch.zeros(h.shape[0], m.shape[1]).to(m).index_add_(0, edge_index[1], m)
            h = self.cell(gathered, h)
        return self.head(h)


@CASES.network("temporal_gcn", lambda: (noise(4, NODES, FEATURES), _edges()))
class TemporalGcn(nn.Module):
    """A GRU whose products are graph convolutions, over a few snapshots."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.new = (
            gnn.GCNConv(FEATURES + HIDDEN, 2 * HIDDEN),
            gnn.GCNConv(FEATURES + HIDDEN, HIDDEN),
        )
        self.width, self.head = HIDDEN, nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], self.width)
        for step in x.unbind(0):
            z, r = self.gates(torch.cat([step, h], 1), edge_index).sigmoid().chunk(2, 1)
            h = z * h + (1 - z) * torch.tanh(self.new(torch.cat([step, r * h], 1), edge_index))
        return self.head(h)
