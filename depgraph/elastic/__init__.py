"""One set of weights, many widths: sub-models of every size on the weights of the largest.

nested.py    the order of the units, and a plan for each size in that of the next larger one
parts.py     a sub-model whose weights are views of the whole's
elastic.py   the module that has all sizes: running, switching, training, statistics
cascade.py   the size chosen by the input
"""

from .cascade import Cascade, CascadeReport
from .elastic import Elastic, Served

__all__ = ["Cascade", "CascadeReport", "Elastic", "Served"]
