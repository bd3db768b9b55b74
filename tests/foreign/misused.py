"""Mistakes that the type checker of a tool must see: one a line, each in a call."""

import torch

import depgraph

model, x = torch.nn.Linear(3, 3), torch.randn(2, 3)
graph = depgraph.analyze(model, x, constraints=len)  # E: arg-type
graph.multiple_of(graph.groups[0], "4")  # E: arg-type
masks = depgraph.choose(graph, [1.0, 2.0])  # E: arg-type
depgraph.apply(model, masks)  # E: arg-type
depgraph.prune(model, x, ignores=["0"])  # E: arg-type
print(depgraph.prune(model, x).plans)  # E: attr-defined
depgraph.analyse(model, x)  # E: attr-defined
