"""The zoo: tiny networks, one for each pattern that must work, with what must shrink stated by hand.

connections   adds, concatenations, splits, shuffles, padding, reuse, ties
layers        norms, convolutions, gates, raw parameters
recurrent     layers, cells, states, packed sequences, loops
graph         message passing, masks over nodes
shapes        flatten, literals, products, patches, in-place writes, indexing, permutations
attention     every spelling
experts       routed ones, and what else is chosen by number
modes         frozen, half, train, no_grad, checkpointing, parametrizations, hooks, unreached parameters
"""

import zoo_attention  # noqa: F401
import zoo_attention_variants  # noqa: F401
import zoo_connections  # noqa: F401
import zoo_experts  # noqa: F401
import zoo_graph  # noqa: F401
import zoo_indexing  # noqa: F401
import zoo_layers  # noqa: F401
import zoo_modes  # noqa: F401
import zoo_norms  # noqa: F401
import zoo_recurrent  # noqa: F401
import zoo_shapes  # noqa: F401
from zoo_entry import ENTRIES, Entry, broken_expectations, ready

ZOO: dict[str, Entry] = dict(ENTRIES)

__all__ = ["ZOO", "Entry", "broken_expectations", "ready"]
