"""What each op does to the dims of its arguments: one short rule per op or family, a file per family.

A rule is a function of a `OpCall`. It states relations (`site.same`, `site.lock`, `site.equal_counts` ...) and returns
the dims of the result, or a list of dims for several results. `equation` writes the common case as an einsum.
"""

from __future__ import annotations

from ..axes.op_call import OpCall
from . import (
    attention,
    contraction,
    convolution,
    gradients,
    indexing,
    movement,
    normalisation,
    pointwise,
    quantisation,
    recurrent,
    reduction,
)
from .registry import REGISTRY, STATED, Rule, equation, is_pointwise, op_rule, rule, rule_for

__all__ = ["REGISTRY", "STATED", "OpCall", "Rule", "equation", "is_pointwise", "op_rule", "rule", "rule_for"]
__all__ += ["attention", "contraction", "convolution", "gradients", "indexing", "movement", "normalisation"]
__all__ += ["pointwise", "quantisation", "recurrent", "reduction"]
