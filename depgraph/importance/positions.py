"""What a Kronecker product leaves out: positions of one sample that go together.

What the loss gains by a change of a layer's weights is the mean over samples of (c_1 + c_2 + ...)^2, with c_t = g_t' D x_t for the change D, x_t
the inputs and g_t the gradients at the results for the positions t of one sample (words, windows). K-FAC takes positions for
independent: the sum of c_t^2, and H times G for the mean of that, the second moments of all x_t and all g_t. Behind a mean over positions they are
not: there all g_t of a sample are the same, its x_t are alike, and what is lost at each position adds up. So scores are multiplied by
the measured ratio of the two sums. It is that of the changes which scores are about: a column is taken away, and the others make up for
it as far as they can. What is left of it, x_t' H^-1 by its own entry of H^-1, is less alike at the positions of a sample than x_t is.

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


@dataclass
class Together:
    """What positions of a sample have in common, in one consumer.

    Attributes:
        exact: the sum over samples and columns of (c_1 + c_2 + ...)^2.
        apart: of c_1^2 + c_2^2 + ...
    """

    exact: float = 0.0
    apart: float = 0.0

    @property
    def factor(self) -> float:
        """How many times the first is the second; at least 1.

        Less would say that errors cancel, as where a mean is taken off again: what is left of a unit's inputs need not.
        """
        return max(1.0, self.exact / self.apart) if self.apart else 1.0

    def add(self, x: Tensor, lost: Tensor, inverse: Tensor, owner: Tensor) -> None:
        """Some rows.

        Args:
            x: inputs [rows, m].
            lost: the gradients by these inputs, W'g [rows, m].
            inverse: of the second moments of the inputs [m, m].
            owner: the sample of each row [rows].
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        change = (x @ (inverse / inverse.diagonal()).to(x)) * lost
        self.apart += float(change.square().sum(dtype=torch.float64))
        owner = owner.unique(return_inverse=True)[1].to(x.device)
        total = change.new_zeros(int(owner.max()) + 1 if len(owner) else 0, change.shape[1]).index_add_(
            0, owner, change
        )
        self.exact += float(total.square().sum(dtype=torch.float64))


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


def pieces(reached: Reached, gradient: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(stacked matrix or group of a convolution, x [rows, m], g [rows, n] or at an input [rows, m], the sample of each row [rows])."""
    call, samples = reached.call, reached.samples
    if reached.at_input:
        x = call.x.detach()
        yield 0, x.flatten(0, -2), gradient.flatten(0, -2), owners(x.shape[:-1], samples)
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
        for part in range(len(x)):
            yield (stacks.start or 0) + part, x[part], g[part], owner[taken]
