"""What a Kronecker product leaves out: positions of one sample that go together.

The Fisher matrix of a layer's weights is the second moment of g_1 x_1' + g_2 x_2' + ... over samples, x_t the inputs and g_t the
gradients at the results for the positions t of one sample (words, windows). K-FAC takes positions for independent: H times G, the second
moments of all x_t and all g_t. Behind a mean over positions they are not: there all g_t of a sample are the same, its x_t are
alike, and what is lost at each position adds up. The trace of the matrix tells by how much: what it is of what it would be if positions
were independent, the sum of |g_t|^2 |x_t|^2. That is of all inputs; of what is left of a unit's when the others make up for it, which
scores are about, less is alike. So the product is multiplied by the root.

It is that sum and not the trace of H times G: where few inputs are very large and have small gradients, as those of the first word in
language models, the product is too large for these inputs alone.

Sources: Martens and Grosse, ICML 2015 (the product); Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for
convolution layers", ICML 2016 (positions taken for independent); George et al., "Fast Approximate Natural Gradient Descent in a
Kronecker-factored Eigenbasis", NeurIPS 2018 (products brought to what is measured, there for each eigenvector).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..data.gradients import Reached
from ..data.layout import Convolved, Einsum

Tensor = torch.Tensor
ENTRIES = 1 << 24  # of products that are made at a time


@dataclass
class Trace:
    """The trace of the Fisher matrix of one consumer's weights, as a sum over samples.

    Attributes:
        exact: of the squares in the sum of g_t x_t' over positions t.
        apart: of the sum of the squares in g_t x_t'.
    """

    exact: float = 0.0
    apart: float = 0.0

    @property
    def factor(self) -> float:
        """The root of how many times it is what it would be if positions were independent; at least 1.

        Less would say that errors cancel, as where a mean is taken off again: what is left of a unit's inputs need not.
        """
        return math.sqrt(max(1.0, self.exact / self.apart)) if self.apart else 1.0

    def add(self, reached: Reached, gradient: Tensor) -> None:
        """One call and the gradient at its result."""
        for x, g, owner in _pieces(reached, gradient):
            x, g = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, g))
            apart = float((x.double().square().sum(-1) * g.double().square().sum(-1)).sum())
            self.apart += apart
            self.exact += apart if len(owner) == len(owner.unique()) else _together(x, g, owner)


def owners(sizes: Sequence[int], samples: int) -> Tensor:
    """[product of sizes]: the sample that each row of a matrix of these leading `sizes` is of.

    One size is that of the samples, or the first is a multiple of it, as where samples are taken apart into windows. Otherwise all
    rows count as one sample.
    """
    count = math.prod(sizes)
    if samples in sizes:
        d = list(sizes).index(samples)
        shape = [samples if i == d else 1 for i in range(len(sizes))]
        return torch.arange(samples).view(shape).expand(list(sizes)).flatten()
    if samples and sizes and sizes[0] % samples == 0:
        return torch.arange(count) // max(1, count // samples)
    return torch.zeros(count, dtype=torch.long)


def _pieces(reached: Reached, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(x [parts, rows, m], g [parts, rows, n], the sample of each row [rows])."""
    call, samples = reached.call, reached.samples
    if reached.at_input:
        x = call.x.detach()
        yield x.flatten(0, -2)[None], gradient.flatten(0, -2)[None], owners(x.shape[:-1], samples)
        return
    layout = call.layout
    if isinstance(layout, Convolved):
        spatial = gradient.shape[-layout.spatial :]
        owner = owners([gradient.shape[0] if gradient.dim() > layout.spatial + 1 else 1, *spatial], samples)
    elif isinstance(layout, Einsum):
        owner = owners([gradient.shape[d] for _, d in layout.samples], samples)
    else:  # the rows are in the order of their matrices
        owner = torch.arange(len(gradient))
    for stacks, taken, x in layout.inputs(call.args, call.x.detach(), slice(None)):
        g = layout.outputs(call.args, gradient, stacks, taken)
        yield x, g, owner[taken]


def _together(x: Tensor, g: Tensor, owner: Tensor) -> float:
    """The sum over parts and samples of the squares in g'x, over the rows of the sample."""
    order = torch.argsort(owner, stable=True)
    counts = torch.unique_consecutive(owner[order], return_counts=True)[1]
    order = order.to(x.device)
    total = 0.0
    for n in counts.unique().tolist():
        mine = torch.repeat_interleave(counts == n, counts).nonzero()[:, 0].to(x.device)
        rows = order[mine].view(-1, n)
        small = n * (x.shape[-1] + g.shape[-1]) <= x.shape[-1] * g.shape[-1]
        size = x.shape[0] * (n * n if small else x.shape[-1] * g.shape[-1])
        for some in rows.split(max(1, ENTRIES // max(1, size))):
            a, b = x[:, some], g[:, some]  # [parts, samples, n, m]
            found = (a @ a.mT) * (b @ b.mT) if small else (b.mT @ a).square()
            total += float(found.double().sum())
    return total
