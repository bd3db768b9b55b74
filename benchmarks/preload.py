"""What the server of `isolate` imports once, so that the processes it forks need not; what is missing is left out."""

import contextlib

import networkx  # noqa: F401  # depgraph itself is imported by the processes: a server lives longer than an edit

import benchmarks.suites  # noqa: F401  # first: it makes torchvision importable

with contextlib.suppress(ImportError):
    import torchvision  # noqa: F401
with contextlib.suppress(ImportError):
    import timm  # noqa: F401
with contextlib.suppress(ImportError):
    from transformers.models.llama import modeling_llama  # noqa: F401  # and all that most models of it share
with contextlib.suppress(ImportError):
    import torch_pruning  # noqa: F401
