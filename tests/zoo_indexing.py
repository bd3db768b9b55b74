"""Channels through in-place writes, through indexing over tokens and nodes, and permuted."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from zoo_connections import conv, conv_bn, pooled
from zoo_entry import BATCH, CLASSES, entry, image, tokens

# --- in-place ops and writes ------------------------------------------------------------------------------------


@entry(image(), "stem.0.weight:0 a.weight:0 a.weight:1 last.weight:1")
class InplaceOnViews(nn.Module):
    """Slices of a map are written in place: relu_, +=, *= by a parameter, then the whole map is used."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.scale = conv_bn(3, 13), conv(6, 7), nn.Parameter(torch.ones(6, 1, 1))
        self.last = nn.Linear(13, CLASSES)

    def forward(self, x):
        x = self.stem(x).clone()
        first = x[:, :6]
        rest = x[:, 6:]
        first.mul_(self.scale)
        rest += self.a(first.clone())
        rest.relu_()
        return self.last(pooled(x))


@entry(image(), "a.0.weight:0 b.0.weight:0 c.0.weight:0 c.0.weight:1 last.weight:1")
class WriteIntoNew(nn.Module):
    """Branches written into slices of a new tensor of channels whose number stands in forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.last = (
            conv_bn(3, 5),
            conv_bn(3, 7),
            conv_bn(12, 11),
            nn.Linear(11, CLASSES),
        )

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        n, _, height, width = x.shape
        both = x.new_zeros(n, 12, height, width)
        both[:, 7:] = a
        both[:, :7] = b
        return self.last(pooled(self.c(both)))


@entry(image(), "a.0.weight:0 b.0.weight:0 c.0.weight:0 c.0.weight:1 last.weight:1")
class WriteIntoNewStarred(nn.Module):
    """The same by torch.zeros with a starred shape."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.last = (
            conv_bn(3, 5),
            conv_bn(3, 7),
            conv_bn(12, 11),
            nn.Linear(11, CLASSES),
        )

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        both = torch.zeros(x.shape[0], 12, *x.shape[2:], dtype=x.dtype)
        both[:, 7:] = a
        both[:, :7] = b
        return self.last(pooled(self.c(both)))


@entry(image(), "shift.0.weight:0 last.weight:1")
class TemporalShift(nn.Module):
    """TSM: a quarter of the channels, floor(C / 4), moves along rows, written into zeros_like; the stem may stay."""

    def __init__(self):
        super().__init__()
        self.stem, self.shift, self.last = conv_bn(3, 11), conv_bn(11, 7), nn.Linear(7, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        fold = x.shape[1] // 4
        out = torch.zeros_like(x)
        out[:, :fold, :-1] = x[:, :fold, 1:]
        out[:, fold : 2 * fold, 1:] = x[:, fold : 2 * fold, :-1]
        out[:, 2 * fold :] = x[:, 2 * fold :]
        return self.last(pooled(self.shift(out)))


@entry(tokens(), "enter.weight:0 step.weight last.weight:1")
class WriteTokens(nn.Module):
    """Results of a loop over tokens stored in new_empty(batch, tokens, width); masked_fill; out-of-place cumsum."""

    def __init__(self):
        super().__init__()
        self.enter, self.step, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, CLASSES)

    def forward(self, x):
        mask = x[..., :1] < 0
        x = self.enter(x)
        out = x.new_empty(x.shape)
        state = x[:, 0]
        for t in range(x.shape[1]):
            state = torch.tanh(self.step(state) + x[:, t])
            out[:, t] = state
        return self.last(out.masked_fill(mask, 0).cumsum(1))


# --- indexing over tokens and nodes -----------------------------------------------------------------------------


@entry(tokens(), "enter.weight:0 mix.weight last.weight:1")
class IndexTokens(nn.Module):
    """index_select, fancy indexing, gather and boolean masks over tokens; channels pass through."""

    def __init__(self):
        super().__init__()
        self.enter, self.mix, self.last = nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, CLASSES)

    def forward(self, x):
        order = x.sum(-1).argsort(1)
        x = self.enter(x)
        x = torch.gather(x, 1, order[..., None].expand(-1, -1, x.shape[-1]))
        x = x.index_select(1, torch.tensor([0, 3, 4, 8, 9]))
        x = F.gelu(self.mix(x))
        x = x[torch.arange(x.shape[0])[:, None], order[:, :4] // 3]
        return self.last(x.mean(1) + x[:, [0, 2]].sum(1))


def graph():
    return torch.randn(9, 5), torch.tensor(
        [[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 4], [1, 2, 3, 4, 5, 6, 7, 8, 0, 4, 0]]
    )


@entry(graph, "enter.weight:0 message.weight update.weight last.weight:1")
class GraphConvolution(nn.Module):
    """Message passing: fancy indexing by edges, index_add into new_zeros, mean by degree."""

    def __init__(self):
        super().__init__()
        self.enter, self.message = nn.Linear(5, 7), nn.Linear(7, 11)
        self.update, self.last = nn.Linear(18, 13), nn.Linear(13, CLASSES)

    def forward(self, x, edges):
        source, target = edges
        x = F.gelu(self.enter(x))
        messages = self.message(x[source])
        total = x.new_zeros(x.shape[0], messages.shape[1]).index_add_(0, target, messages)
        degree = torch.bincount(target, minlength=x.shape[0]).to(x.dtype)
        return self.last(F.gelu(self.update(torch.cat([x, total / degree[:, None]], -1))))


@entry(graph, "mlp.*.weight:0 last.weight:1")
class EdgeConvolution(nn.Module):
    """DGCNN: cat(x_i, x_j - x_i), an MLP, scatter_reduce with amax over neighbours."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(5, 7)
        self.mlp = nn.Sequential(nn.Linear(14, 11), nn.GELU(), nn.Linear(11, 13))
        self.last = nn.Linear(13, CLASSES)

    def forward(self, x, edges):
        source, target = edges
        x = self.enter(x)
        e = self.mlp(torch.cat([x[target], x[source] - x[target]], dim=-1))
        index = target[:, None].expand_as(e)
        x = torch.zeros(x.shape[0], e.shape[1], dtype=x.dtype).scatter_reduce(0, index, e, "sum")
        return self.last(torch.tanh(x))


@entry(graph, "lin.weight:0 att.* last.weight:1")
class GraphAttention(nn.Module):
    """GAT: heads by view(-1, H, C), attention vectors as [1, H, C], weighted sums over edges."""

    def __init__(self):
        super().__init__()
        self.heads, self.width = 3, 7
        self.lin, self.last = nn.Linear(5, 21, bias=False), nn.Linear(21, CLASSES)
        self.att = nn.ParameterDict({k: nn.Parameter(torch.randn(1, 3, 7)) for k in ("source", "target")})

    def forward(self, x, edges):
        source, target = edges
        h = self.lin(x).view(-1, self.heads, self.width)
        score = (h * self.att["source"]).sum(-1)[source] + (h * self.att["target"]).sum(-1)[target]
        score = F.leaky_relu(score, 0.2).exp()
        total = score.new_zeros(x.shape[0], self.heads).index_add(0, target, score)
        out = torch.zeros_like(h).index_add(0, target, h[source] * (score / total[target])[..., None])
        return self.last(F.gelu(out.reshape(-1, self.heads * self.width)))


@entry(
    lambda: (torch.randn(BATCH, 3, 8, 6), torch.rand(BATCH, 5, 4, 2) * 2 - 1),
    "stem.0.weight:0 mix.weight last.weight:1",
)
class GridSample(nn.Module):
    """Maps sampled at given places; channels pass through."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.last = conv_bn(3, 7), conv(7, 11), conv(11, 2)

    def forward(self, x, grid):
        x = F.grid_sample(self.stem(x), grid, align_corners=False)
        return self.last(F.gelu(self.mix(x)))


# --- permutations of channels -----------------------------------------------------------------------------------


@entry(image(), "stem.0.weight:0 last.0.weight:1")
class PermuteByBuffer(nn.Module):
    """Channels reordered by a buffer of indices, then used plainly."""

    def __init__(self):
        super().__init__()
        self.stem, self.last, self.head = conv_bn(3, 7), conv_bn(7, 11), nn.Linear(11, CLASSES)
        self.register_buffer("order", torch.tensor([3, 0, 6, 1, 5, 2, 4]))

    def forward(self, x):
        return self.head(pooled(self.last(self.stem(x).index_select(1, self.order))))


@entry(image(), "stem.0.weight:0 last.0.weight")
class PermutationCycles(nn.Module):
    """Channels added to themselves in another order: units are the cycles of the permutation."""

    def __init__(self):
        super().__init__()
        self.stem, self.last, self.head = conv_bn(3, 11), conv_bn(11, 7), nn.Linear(7, CLASSES)
        self.register_buffer("order", torch.tensor([1, 0, 3, 2, 5, 4, 7, 6, 9, 10, 8]))

    def forward(self, x):
        x = self.stem(x)
        return self.head(pooled(self.last(x + x[:, self.order].tanh())))


@entry(image(), "last.0.weight:0")
class PermuteByList(nn.Module):
    """The order of channels is a list in forward: what it permutes may stay."""

    def __init__(self):
        super().__init__()
        self.stem, self.last, self.head = conv_bn(3, 7), conv_bn(7, 11), nn.Linear(11, CLASSES)

    def forward(self, x):
        return self.head(pooled(self.last(self.stem(x)[:, [1, 0, 3, 2, 5, 6, 4]])))


@entry(image(), "a.0.weight:0 b.0.weight:0 last.0.weight:0")
class FlipChannels(nn.Module):
    """One branch reversed along channels and added to another; flipped along pixels as well."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last, self.head = (
            conv_bn(3, 7),
            conv_bn(3, 7),
            conv_bn(7, 11),
            nn.Linear(11, CLASSES),
        )

    def forward(self, x):
        return self.head(pooled(self.last(self.a(x).flip(1) + self.b(x).flip(-1))))


@entry(image(), "a.0.weight:0 b.0.weight:0 last.0.weight:0")
class RollChannels(nn.Module):
    """One branch rolled along channels (and pixels) and multiplied with another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last, self.head = (
            conv_bn(3, 7),
            conv_bn(3, 7),
            conv_bn(7, 11),
            nn.Linear(11, CLASSES),
        )

    def forward(self, x):
        return self.head(pooled(self.last(self.a(x).roll((2, 1), (1, 2)) * self.b(x))))


@entry(image(), "stem.0.weight:0 last.0.weight:0")
class EveryOtherChannel(nn.Module):
    """Strided slices of channels: even ones gate odd ones."""

    def __init__(self):
        super().__init__()
        self.stem, self.last, self.head = conv_bn(3, 14), conv_bn(7, 11), nn.Linear(11, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        return self.head(pooled(self.last(x[:, ::2] * x[:, 1::2].sigmoid())))


@entry(tokens(), "enter.weight side.weight head.weight:1")
class FilledRows(nn.Module):
    """Features of another branch take the places of marked tokens, as in models that read images among words."""

    def __init__(self):
        super().__init__()
        self.enter, self.side, self.head = nn.Linear(5, 11), nn.Linear(5, 11), nn.Linear(11, CLASSES)

    def forward(self, x):
        y = self.enter(x)
        marked = (torch.arange(x.shape[1]) % 3 == 1)[:, None].expand(x.shape[0], -1, 1)
        return self.head(y.masked_scatter(marked.expand_as(y), self.side(x).flatten(0, 1)).relu())


@entry(tokens(), "enter.weight head.weight:1")
class TriangularSystem(nn.Module):
    """Each channel is solved for by itself, with a matrix over the tokens; and one with the channels in rows."""

    def __init__(self):
        super().__init__()
        self.enter, self.head = nn.Linear(5, 11), nn.Linear(11, CLASSES)

    def forward(self, x):
        y = self.enter(x)
        matrix = (x @ x.transpose(1, 2) * 0.1).tril(-1) + torch.eye(x.shape[1], dtype=x.dtype)
        y = torch.linalg.solve_triangular(matrix, y, upper=False)
        rows = torch.linalg.solve_triangular(matrix, y.transpose(1, 2), upper=False, left=False)
        return self.head(rows.transpose(1, 2))


@entry(tokens(), "enter.weight project")
class VectorWeight(nn.Module):
    """F.linear with a weight of one dim: a projection to a number."""

    def __init__(self):
        super().__init__()
        self.enter, self.project = nn.Linear(5, 11), nn.Parameter(torch.randn(11))

    def forward(self, x):
        return F.linear(self.enter(x).relu(), self.project)
