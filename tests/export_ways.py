"""The ways out of eager torch: each sends a pruned model through and returns what came out beside what should have."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from outputs import Inputs, call, tensors
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import depgraph

Pairs = list[tuple[Any, Any]]  # (expected, output)


@dataclass(frozen=True)
class Sent:
    """A pruned model, what it comes from, and inputs of two batch sizes."""

    model: nn.Module
    original: nn.Module
    plan: depgraph.Plan
    inputs: Inputs
    others: Inputs

    def arguments(self, other: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for one of the two batches."""
        inputs = self.others if other else self.inputs
        if isinstance(inputs, dict):
            return (), inputs
        return (inputs if isinstance(inputs, tuple) else (inputs,)), {}

    def compared(self, model: Callable[..., Any], expected: nn.Module | None = None) -> Pairs:
        """`model` beside the pruned model, or `expected`, on both batches."""
        reference = self.model if expected is None else expected
        return [(call(reference, x), call(model, x)) for x in (self.inputs, self.others)]  # type: ignore[arg-type]


def other_batch(inputs: Inputs) -> Inputs:
    """Inputs for a batch of three: the last example once more, its tokens or pixels in another order."""

    def more(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.cat([value, value[-1:].roll(1, -1)])

    if isinstance(inputs, dict):
        return {key: more(value) for key, value in inputs.items()}
    return tuple(more(v) for v in inputs) if isinstance(inputs, tuple) else more(inputs)


@dataclass(frozen=True)
class Way:
    """One way out, and the largest relative deviation that its arithmetic explains."""

    send: Callable[[Sent], Pairs]
    tolerance: float = 1e-5


WAYS: dict[str, Way] = {}


def way(name: str, tolerance: float = 1e-5) -> Callable[[Callable[[Sent], Pairs]], Callable[[Sent], Pairs]]:
    """Decorator that enters a way."""

    def enter(send: Callable[[Sent], Pairs]) -> Callable[[Sent], Pairs]:
        WAYS[name] = Way(send, tolerance)
        return send

    return enter


# ------------------------------------------------------------------------------------------------------- export


def _exported(sent: Sent, strict: bool) -> Any:
    args, kwargs = sent.arguments()
    batch = torch.export.Dim("batch", min=1, max=64)

    def dynamic(value: Any) -> Any:
        return {0: batch} if isinstance(value, Tensor) else None

    shapes = pytree.tree_map(dynamic, kwargs if kwargs else args)
    return torch.export.export(sent.model, args, kwargs, dynamic_shapes=shapes, strict=strict)


def _export(sent: Sent, strict: bool) -> Pairs:
    """Exported with a batch of any size, written, read, and run."""
    file = io.BytesIO()
    torch.export.save(_exported(sent, strict), file)
    file.seek(0)
    return sent.compared(torch.export.load(file).module())


way("torch.export, strict")(partial(_export, strict=True))
way("torch.export, non-strict")(partial(_export, strict=False))


@way("ONNX, run by onnxruntime", 1e-4)
def _onnx(sent: Sent) -> Pairs:
    import onnxruntime

    args, kwargs = sent.arguments()
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = pytree.tree_map(lambda v: {0: batch} if isinstance(v, Tensor) else None, kwargs or args)
    program = torch.onnx.export(
        sent.model, args, kwargs=kwargs, dynamo=True, dynamic_shapes=shapes, verbose=False
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [i.name for i in session.get_inputs()]
    pairs = []
    for other in (False, True):
        given, named = sent.arguments(other)
        values = [v for v in (*given, *named.values()) if isinstance(v, Tensor)]
        feed = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        outputs = [torch.from_numpy(o) for o in session.run(None, feed)]
        pairs.append((tensors(sent.model(*given, **named)), outputs))
    return pairs


# ------------------------------------------------------------------------------------------------------- compile


def _compile(sent: Sent, backend: str) -> Pairs:
    return sent.compared(torch.compile(copy.deepcopy(sent.model), backend=backend, fullgraph=True))


for _backend in ("eager", "aot_eager", *(("inductor",) if shutil.which("g++") else ())):
    way(f"torch.compile, {_backend}")(partial(_compile, backend=_backend))


@way("torch.jit.trace")
def _jit(sent: Sent) -> Pairs:
    args, kwargs = sent.arguments()
    given = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
    traced = torch.jit.trace(sent.model, **given, strict=False, check_trace=False)
    return sent.compared(traced)


# ----------------------------------------------------------------------------------------------------- precision


def _cast(value: Any, dtype: torch.dtype) -> Any:
    def one(v: Any) -> Any:
        return v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v

    return pytree.tree_map(one, value)


def _half(sent: Sent, dtype: torch.dtype) -> Pairs:
    small = copy.deepcopy(sent.model).to(dtype)
    return [
        (call(sent.model, x), _cast(call(small, _cast(x, dtype)), torch.float32))
        for x in (sent.inputs, sent.others)
    ]


way("bfloat16", 0.1)(partial(_half, dtype=torch.bfloat16))
way("float16", 0.02)(partial(_half, dtype=torch.float16))
way("float64", 1e-4)(partial(_half, dtype=torch.float64))


@way("torchao, int8 weights")
def _int8_weights(sent: Sent) -> Pairs:
    """Beside the pruned model with the rounded weights in floating point, each within half a step of what it was."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    small, expected = copy.deepcopy(sent.model), copy.deepcopy(sent.model)
    quantize_(small, Int8WeightOnlyConfig())
    for name, module in expected.named_modules():
        if isinstance(module, nn.Linear):
            stored = small.get_submodule(name).weight.dequantize()
            step = module.weight.abs().amax(1, keepdim=True) / 127.5
            if not bool(((stored - module.weight).abs() <= 0.501 * step).all()):
                raise AssertionError(f"{name}.weight is further off than half a step of int8")
            module.weight = nn.Parameter(stored)
    return sent.compared(small, expected)


@way("torchao, int8 activations and weights", 0.1)
def _int8_dynamic(sent: Sent) -> Pairs:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    small = copy.deepcopy(sent.model)
    quantize_(small, Int8DynamicActivationInt8WeightConfig())
    return sent.compared(small)


# -------------------------------------------------------------------------------------------------------- copies


def _same(one: nn.Module, other: nn.Module) -> None:
    """Refuse a copy that lost something on the way."""
    for kind in ("modules", "parameters", "buffers"):
        mine, its = (dict(getattr(m, f"named_{kind}")(remove_duplicate=False)) for m in (one, other))
        if list(mine) != list(its):
            raise AssertionError(f"{kind}: {sorted(mine.keys() ^ its.keys())}")
        if kind == "modules":
            for name, module in mine.items():
                gone = vars(module).keys() ^ vars(its[name]).keys()
                if gone or type(module).__name__ != type(its[name]).__name__:
                    raise AssertionError(f"attributes of {name or 'the model'}: {sorted(gone)}")


@way("copy.deepcopy", 0.0)
def _deepcopy(sent: Sent) -> Pairs:
    """A copy, and a copy of the copy, of which the first is then overwritten."""
    first = copy.deepcopy(sent.model)
    second = copy.deepcopy(first)
    _same(sent.model, second)
    with torch.no_grad():
        for tensor in (*first.parameters(), *first.buffers()):
            tensor.zero_()
    return sent.compared(second)


@way("pickle of the model", 0.0)
def _pickle(sent: Sent) -> Pairs:
    again = pickle.loads(pickle.dumps(sent.model))
    _same(sent.model, again)
    return sent.compared(again)


@way("torch.save of the model", 0.0)
def _save(sent: Sent) -> Pairs:
    file = io.BytesIO()
    torch.save(sent.model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    _same(sent.model, again)
    return sent.compared(again)


@way("state_dict into apply(original, plan)", 0.0)
def _state(sent: Sent) -> Pairs:
    file = io.BytesIO()
    torch.save(sent.model.state_dict(), file)
    file.seek(0)
    again = depgraph.apply(sent.original, depgraph.Plan.from_json(sent.plan.to_json()))
    with torch.no_grad():
        for tensor in again.parameters():
            tensor.zero_()
    again.load_state_dict(torch.load(file, weights_only=True))
    return sent.compared(again)


@way("an fx rewrite of the whole", 0.0)
def _fx(sent: Sent) -> Pairs:
    """Exported, and its graph run through a pass that rewrites: what tools that build on torch.fx do."""
    module = _exported(sent, strict=False).module()
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.relu.default:
            node.target = torch.ops.aten.clamp_min.default
            node.args = (node.args[0], 0)
    module.graph.lint()
    module.recompile()
    return sent.compared(module)
