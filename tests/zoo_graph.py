"""Message passing: nodes are gathered along edges and summed at their targets, in every spelling; masks over nodes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_entry import CLASSES, entry

NODES = 6


def graph() -> tuple[Tensor, Tensor]:
    """Features of the nodes and edges [2 edges], sorted by target; the last node has none."""
    edges = torch.tensor([[1, 2, 0, 2, 4, 0, 1, 3, 4, 1], [0, 0, 1, 1, 1, 2, 2, 3, 3, 4]])
    return torch.randn(NODES, 5), edges


class MessagePassing(nn.Module):
    """enter -> messages along edges -> sums at the targets, by `gathered` -> update -> last."""

    def __init__(self):
        super().__init__()
        self.enter, self.message = nn.Linear(5, 7), nn.Linear(14, 11)
        self.update, self.last = nn.Linear(18, 13), nn.Linear(13, CLASSES)

    def gathered(self, messages: Tensor, edges: Tensor, nodes: int) -> Tensor:
        raise NotImplementedError

    def forward(self, x, edges):
        x = F.gelu(self.enter(x))
        messages = F.gelu(self.message(torch.cat([x[edges[0]], x[edges[1]]], 1)))
        sums = self.gathered(messages, edges, x.shape[0])
        return self.last(F.gelu(self.update(torch.cat([sums, x], 1))))


ALL = "enter.weight:0 message.weight update.weight last.weight:1"


@entry(graph, ALL)
class ScatteredMessages(MessagePassing):
    """scatter_add with an expanded index."""

    def gathered(self, messages, edges, nodes):
        index = edges[1].unsqueeze(-1).expand_as(messages)
        return messages.new_zeros(nodes, messages.size(-1)).scatter_add(0, index, messages)


@entry(graph, ALL)
class AddedMessages(MessagePassing):
    """index_add_ into zeros, then scatter_reduce for a maximum."""

    def gathered(self, messages, edges, nodes):
        out = torch.zeros(nodes, messages.shape[1], dtype=messages.dtype).index_add_(0, edges[1], messages)
        index = edges[1][:, None].repeat(1, messages.shape[1])
        return (
            torch.cat([out, torch.zeros_like(out).scatter_reduce_(0, index, messages, "amax")])
            .unflatten(0, (2, -1))
            .sum(0)
        )


@entry(graph, ALL)
class PutMessages(MessagePassing):
    """index_put_ with accumulation."""

    def gathered(self, messages, edges, nodes):
        return messages.new_zeros(nodes, messages.shape[1]).index_put_((edges[1],), messages, accumulate=True)


@entry(graph, ALL)
class MessagesOfSomeNodes(MessagePassing):
    """Messages of the nodes of each degree are summed by themselves; of one degree there are none."""

    def gathered(self, messages, edges, nodes):
        degree = torch.bincount(edges[1], minlength=nodes)
        parts = []
        for n in range(1, 5):
            chosen = (degree == n)[edges[1]]
            zeros = messages.new_zeros(nodes, messages.shape[1])
            parts.append(zeros.index_add_(0, edges[1][chosen], messages[chosen]))
        return torch.stack(parts).sum(0)


@entry(graph, ALL)
class EdgesChosenByMask(MessagePassing):
    """Edges are columns of an integer table, chosen by what the features say and counted."""

    def gathered(self, messages, edges, nodes):
        _, target = edges[:, messages.sum(1) > 0]
        count = torch.zeros(nodes, dtype=torch.long).index_add_(0, target, torch.ones_like(target))
        sums = messages.new_zeros(nodes, messages.shape[1]).index_add_(0, edges[1], messages)
        return sums / (1 + count.to(messages)).unsqueeze(1)


@entry(graph, "enter.weight:0 score.weight:0 last.weight:1")
class FilledWhereZero(nn.Module):
    """x[x == 0] = epsilon in place: the mask ranges over the channels too."""

    def __init__(self):
        super().__init__()
        self.enter, self.score, self.last = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, CLASSES)

    def forward(self, x, edges):
        y = torch.relu(self.enter(x)).clone()
        y[y == 0] = 0.3
        y[self.score(x) > 0.5] = -0.7
        return self.last(y * y)


@entry(graph, "enter.weight:0 label.weight:1 last.weight:1")
class LabelsAtMaskedNodes(nn.Module):
    """x[mask] += embedding, a mask over nodes; others get one learned row."""

    def __init__(self):
        super().__init__()
        self.enter, self.label, self.last = nn.Linear(5, 7), nn.Embedding(4, 7), nn.Linear(7, CLASSES)
        self.row = nn.Parameter(torch.randn(7))

    def forward(self, x, edges):
        known = torch.arange(x.shape[0]) % 3 == 0
        y = torch.clone(self.enter(x))
        y[known] += self.label(torch.arange(x.shape[0]) % 4)[known]
        y[~known] = self.row
        return self.last(y)


@entry(graph, "table:1")
class LearnedTable(nn.Module):
    """Rows of a raw parameter are read by number and passed on; pairs are scored by inner products."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(NODES, 7))

    def forward(self, x, edges):
        y = torch.zeros_like(self.table).index_add(0, edges[1], self.table.index_select(0, edges[0]))
        y = self.table + y / 2
        return (y[edges[0]] * y[edges[1]]).sum(-1)


@entry(graph, "enter.weight:0 weight:1 cell.weight_hh last.weight:1")
class WidthAtMost(nn.Module):
    """A width that is only ever compared: more is an error, less is filled up with zeros."""

    def __init__(self):
        super().__init__()
        self.out_channels = 7
        self.enter, self.weight = nn.Linear(5, 7), nn.Parameter(torch.randn(2, 7, 7))
        self.cell, self.last = nn.GRUCell(7, 7), nn.Linear(7, CLASSES)

    def forward(self, x, edges):
        x = self.enter(x)
        if x.size(-1) > self.out_channels:
            raise ValueError("too wide")
        if x.size(-1) < self.out_channels:
            zeros = x.new_zeros(x.size(0), self.out_channels - x.size(-1))
            x = torch.cat([x, zeros], 1)
        for weight in self.weight:
            m = torch.matmul(x, weight)
            x = self.cell(torch.zeros_like(m).index_add_(0, edges[1], m[edges[0]]), x)
        return self.last(x)


@entry(graph, "enter.weight:0 assign.weight:0 last.weight:1")
class TraceOfClusters(nn.Module):
    """Soft clusters; the trace of what they have in common, by an einsum with a letter that stands twice."""

    def __init__(self):
        super().__init__()
        self.enter, self.assign, self.last = nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(7, CLASSES)

    def forward(self, x, edges):
        x = self.enter(x)
        s = self.assign(x)
        common = torch.einsum("nij,nkj->nik", s[None].transpose(1, 2), s[None].transpose(1, 2))
        return self.last(x) * torch.einsum("nii->n", common)


@entry(graph, "enter.weight:0 query.weight:0 key.weight:0 value.weight:0 last.weight:1")
class AveragedHeads(nn.Module):
    """Heads are averaged; one attribute is the width of values and of scaled queries, so it stays and heads go."""

    def __init__(self):
        super().__init__()
        self.heads, self.width = 4, 7
        self.enter, self.last = nn.Linear(5, 11), nn.Linear(14, CLASSES)
        self.query, self.key, self.value = (nn.Linear(11, 28) for _ in range(3))
        self.deep = nn.Linear(7, 14)

    def forward(self, x, edges):
        x = F.gelu(self.enter(x))
        q, k, v = (f(x).view(-1, self.heads, self.width) for f in (self.query, self.key, self.value))
        score = (q[edges[1]] * k[edges[0]]).sum(-1) / self.width**0.5
        y = torch.zeros_like(v).index_add_(0, edges[1], v[edges[0]] * score.sigmoid().unsqueeze(-1))
        return self.last(F.gelu(self.deep(y.mean(1))))


@entry(graph, ALL)
class DecidedByATensorOfSizes(MessagePassing):
    """A heuristic puts sizes into a tensor and branches on what comes of it; pruned, it decides alike."""

    def gathered(self, messages, edges, nodes):
        sizes = torch.tensor([nodes, messages.size(1)])
        scale, weight = torch.tensor([3.0, 100.0]), torch.tensor([1.0, 0.2])
        zeros = messages.new_zeros(nodes, messages.size(1))
        if bool((sizes / scale) @ weight >= 1.5):
            return zeros.index_add_(0, edges[1], messages)
        return zeros - zeros.index_add(0, edges[1], messages)


@entry(lambda: (torch.randn(NODES, 5),), "enter.weight:0 inner last.weight:1", trainable=False)
class SparseAdjacency(nn.Module):
    """Neighbours are summed by a sparse matrix in a buffer: torch.sparse.mm and `@`."""

    def __init__(self):
        super().__init__()
        self.enter, self.last = nn.Linear(5, 7), nn.Linear(11, CLASSES)
        self.inner = nn.Parameter(torch.randn(7, 11))
        edges = (torch.rand(NODES, NODES, generator=torch.Generator().manual_seed(0)) > 0.5).double()
        self.register_buffer("edges", edges.to_sparse())

    def forward(self, x):
        x = F.gelu(torch.sparse.mm(self.edges, self.enter(x)))
        return self.last(F.gelu(self.edges @ (x @ self.inner)))
