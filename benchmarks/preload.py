"""What the server of `isolate` imports once, so that the processes it forks need not; what is missing is left out."""

import contextlib

import benchmarks.suites  # noqa: F401  # first: it makes torchvision importable

with contextlib.suppress(ImportError):
    import torchvision  # noqa: F401
with contextlib.suppress(ImportError):
    import timm  # noqa: F401
with contextlib.suppress(ImportError):
    from transformers.models.auto import modeling_auto  # noqa: F401
with contextlib.suppress(ImportError):
    import torch_pruning  # noqa: F401
