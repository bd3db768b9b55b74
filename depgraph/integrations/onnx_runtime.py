"""Seconds of a forward pass in ONNX Runtime: `latency`, to be given to `prune` under that name."""

from __future__ import annotations

import io
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from ..base.errors import DepgraphError, InputError, could_not_run
from ..base.inputs import each_example
from ..base.values import tensor_leaves
from ..costs.latency import now, seconds_since

try:
    import onnxruntime
except ImportError as missing:
    raise DepgraphError(
        "depgraph.integrations.onnx_runtime needs onnxruntime\n  fix: pip install onnx onnxscript onnxruntime"
    ) from missing

RUNS = 20  # passes of one measurement, behind WARM ones
WARM = 3
_sessions: WeakKeyDictionary[nn.Module, tuple[Any, Any, dict[str, Any]]] = WeakKeyDictionary()


def latency(model: nn.Module, example_inputs: Any) -> float:
    """Median seconds of one forward pass in ONNX Runtime on the CPU, with as many threads as torch has.

    A model is exported once for the shapes that it has, and remembered as long as it lives.

    Args:
        model: what is exported, in eval mode.
        example_inputs: as for `prune`; of `Examples`, the first.

    Raises:
        InputError: it can't be exported, or the export does not run.
    """
    shapes = tuple((n, tuple(p.shape)) for n, p in model.named_parameters())
    known = _sessions.get(model)
    if known is None or known[0] != shapes:
        try:
            session, feeds = _session(model, example_inputs)
            for _ in range(WARM):
                session.run(None, feeds)
        except Exception as error:
            raise InputError(f"ONNX Runtime can't time this model: {could_not_run(error)}") from error
        known = _sessions[model] = shapes, session, feeds
    _, session, feeds = known
    times = []
    for _ in range(RUNS):
        start = now()
        session.run(None, feeds)
        times.append(seconds_since(start))
    return float(np.median(times))


def _session(model: nn.Module, example_inputs: Any) -> tuple[Any, dict[str, Any]]:
    """The model in ONNX Runtime, and what to feed it."""
    example = each_example(example_inputs)[0]
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        export: Any = torch.onnx.export
        export(model, example.args, file, kwargs=example.kwargs, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    given = [t.detach().cpu().numpy() for t in tensor_leaves(example)]
    return session, {put.name: value for put, value in zip(session.get_inputs(), given, strict=False)}


__all__ = ["latency"]
