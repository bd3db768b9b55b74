"""Model and example inputs -> a torch.fx graph of the ATen calls that one run makes.

The run happens on a skeleton of the model, a deep copy that shares its parameters, and what it writes into these is
undone, so it can't leave a mark on the user's model. Real tensors come first: on the small inputs that a trace needs, arithmetic is cheaper than faking it, and
every path that depends on data works. Where it becomes dearer than that, the run is begun anew on fake tensors, which
cost no arithmetic and no memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..base.errors import InputError, TraceError
from ..base.inputs import Arguments, each_example
from ..base.running import WriteGuard
from ..base.values import map_tensors, tensor_leaves
from . import sizes
from .outputs import Call
from .patched import open_python_functions, watch_functions, watch_modules
from .record import AtenMode, PythonMode
from .recorder import Comparison, Node, Recorder
from .size_uses import ScalarUse, SizeUse
from .tensors import all_tensors, named_tensors, skeleton
from .training import CallLog, NoDropout, asks_for_training
from .wrappers import check_unsharded, eagerly

PATIENCE = 0.5  # seconds by which the arithmetic of a run on real tensors may exceed the cost of faking it


@dataclass
class Trace:
    """What one run of the model recorded.

    Attributes:
        graph: the ATen calls; each node has shapes, module and the user's line in its `meta`.
        outputs: the nodes that the model returns.
        tensors: canonical name of each parameter and buffer that the run used -> its get_attr node.
        aliases: every other name of a tied parameter or buffer -> its canonical name.
        unreached: canonical names that the run did not use.
        constants: tensors that are in no module, by a name made up for them.
        held: names of tensors that are plain attributes of modules; in `tensors`, too, where a run read them.
        values: all of these by name; the user's own, not copies.
        size_uses: numbers given to ops that repeat a size.
        scalar_uses: numbers that ops compute with.
        comparisons: of sizes, in the user's code.
        reads: attributes that forward took numbers from, for whatever purpose.
        parametrized: path of a list of parametrizations, the weight that it made.
        escapes: what can't be followed any further: why, in which module, where.
        fake: whether it ran on fake tensors.
        tracked: whether numbers remembered where they came from.
    """

    graph: torch.fx.Graph
    outputs: list[Node]
    tensors: dict[str, Node]
    aliases: dict[str, str]
    unreached: list[str]
    constants: dict[str, torch.Tensor]
    held: set[str]
    values: dict[str, torch.Tensor]
    size_uses: list[SizeUse]
    scalar_uses: list[ScalarUse]
    comparisons: list[Comparison]
    reads: set[sizes.Expr]
    parametrized: list[tuple[str, Node]]
    escapes: list[tuple[Node, str, str, str]]
    fake: bool


def trace(model: nn.Module, example_inputs: Any) -> Trace:
    """Run `model` once in eval mode and record it.

    Args:
        model: any module; it is not touched.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or `Examples` of these,
            on each of which the model is run.

    Raises:
        InputError: there are no example inputs.
        TraceError: the model rejects them; its own error is the cause.
    """
    examples = each_example(example_inputs)
    if hasattr(model, "graph_signature") and hasattr(model, "module"):  # an ExportedProgram
        model = model.module()  # type: ignore[operator]
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model must be a torch.nn.Module, a GraphModule or an ExportedProgram, not {type(model)}"
        )
    check_unsharded(model, [*model.parameters(), *model.buffers()])
    failure: Exception | None = None
    for fake, tracked, seconds in (
        (False, True, PATIENCE),
        (True, True, None),
        (False, True, None),
        (False, False, None),
    ):
        try:
            found = _run(model, examples, fake, tracked, seconds)
            return _reach_more(found, model, examples, fake, tracked)
        except Exception as error:  # noqa: BLE001  any failure of the user's model means: try the next way to run it
            failure = error
    raise TraceError(
        f"the model could not be run on the example inputs: {type(failure).__name__}: {failure}\n"
        "  fix: call model(*example_inputs) yourself first; pass a tuple for positional arguments, a dict for "
        "keyword arguments, on the model's device"
    ) from failure


def _reach_more(
    found: Trace, model: nn.Module, examples: list[Arguments], fake: bool, tracked: bool
) -> Trace:
    """`found`, or a trace of both modes: where train mode reaches parameters that it lacks (auxiliary heads), or differs."""
    missing = {n for n in found.unreached if isinstance(found.values[n], nn.Parameter)}
    other = other_in_training(model, examples, fake)
    if not missing and not other:
        return found
    try:
        both = _run(model, examples, fake, tracked, train=True)
    except Exception:  # noqa: BLE001  the model can't be run in train mode on these inputs (targets are missing ...)
        return found
    return both if other or missing - set(both.unreached) else found


def other_in_training(model: nn.Module, examples: list[Arguments], fake: bool = False) -> bool | None:
    """Whether `model` makes other calls in train mode than in eval mode: two bare runs tell, for models that ask.

    Args:
        model: any module; it is not touched.
        examples: the arguments of each call.
        fake: run on fake tensors.

    Returns:
        None where it can't be run in one of the modes.
    """
    if not asks_for_training(model):
        return False
    calls = []
    for training in (False, True):
        try:
            with ExitStack() as stack:
                run = _Prepared(stack, model, examples, fake)
                run.twin.train(training)
                stack.enter_context(_apart())
                log = CallLog()
                with run.mode, log, NoDropout():
                    for args, kwargs in run.examples:
                        call = Call(run.twin, args, kwargs)
                        log.give_away(call.outputs(run.twin(*args, **kwargs)))
                calls.append(log.calls)
        except Exception:  # noqa: BLE001  the model can't be run in train mode on these inputs (targets are missing ...)
            return None
    return calls[0] != calls[1]


@contextmanager
def quiet_fakes() -> Iterator[None]:
    """Torch logs a traceback for each op that fails on fake tensors; here a failure only means the next way to run."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _run(
    model: nn.Module,
    examples: list[Arguments],
    fake: bool,
    tracked: bool,
    seconds: float | None = None,
    train: bool = False,
) -> Trace:
    """Record a run on each example in eval mode, and with `train` all in train mode behind them.

    On fake tensors, or on the model's own (buffers and inputs are copied); given up `seconds` behind what fake ones would take.
    """
    tensors, aliases = named_tensors(model)
    with ExitStack() as stack:
        run = _Prepared(stack, model, examples, fake)
        every, twin = run.every, run.twin
        if tracked:
            sizes.track_attributes(twin)
        names = {id(run.stand_in[id(t)]): name for name, t in every.items()}
        recorder = Recorder(names, every.keys() - tensors.keys())
        for i, tensor in enumerate(tensor_leaves(run.examples)):
            node = recorder.graph.placeholder(f"input_{i}")
            node.meta.update(
                shapes=[tuple(tensor.shape)], dtype=tensor.dtype, module="", source="", kind="input"
            )
            recorder.remember(tensor, node)
        if seconds is not None:
            recorder.patience = seconds
        stack.enter_context(_recording(twin, recorder, run.mode, run.kept))
        outputs = []
        for training in (False, True) if train else (False,):
            recorder.training = training
            twin.train(training)
            for args, kwargs in run.examples:
                recorder.paused += 1
                call = Call(twin, args, kwargs)
                recorder.paused -= 1
                out = twin(*args, **kwargs)
                recorder.paused += 1
                given_away = call.outputs(out)
                recorder.paused -= 1
                outputs += [recorder.node(t) for t in given_away]
        if not outputs:  # nothing to see in what the model returns: whatever no op reads may be in it
            made = [n for n in recorder.graph.nodes if n.op == "call_function" and not n.users]
            outputs = [n for n in made if len(n.meta["shapes"]) == 1]
    recorder.graph.output(tuple(outputs))
    recorder.forget_other_runs()
    return _written_down(recorder, outputs, every, (tensors, aliases), fake)


class _Prepared:
    """A skeleton of the model to run, on fake tensors or its own; what it writes into parameters is undone by `stack`."""

    def __init__(self, stack: ExitStack, model: nn.Module, examples: list[Arguments], fake: bool) -> None:
        self.every = all_tensors(model)
        self.mode: Any = nullcontext()
        self.kept = WriteGuard(() if fake else model.parameters())
        stack.callback(self.kept.restore)
        if fake:
            stack.enter_context(quiet_fakes())
            self.mode = FakeTensorMode(allow_non_fake_inputs=True)
            self.stand_in = {id(t): self.mode.from_tensor(t) for t in self.every.values()}
            self.examples = map_tensors(examples, self.mode.from_tensor)
        else:
            parameters = {id(p) for p in model.parameters()}
            self.stand_in = {id(t): t if id(t) in parameters else t.clone() for t in self.every.values()}
            self.examples = map_tensors(examples, torch.clone)
        self.twin = skeleton(model, self.stand_in)


@contextmanager
def _apart() -> Iterator[None]:
    """Outside of whatever mode the caller is in, and without a trace in torch's random state."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad(), eagerly():
        torch.manual_seed(0)
        yield


@contextmanager
def _recording(twin: nn.Module, recorder: Recorder, fakes: Any, kept: WriteGuard) -> Iterator[None]:
    """Whatever runs inside is recorded; the order matters, as each mode sees what those entered later let through."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.no_grad(),
        open_python_functions(),
        eagerly(),
        watch_modules(twin, recorder),
        watch_functions(recorder),
        fakes,
        AtenMode(recorder, kept),
        sizes.recording_comparisons(recorder.comparisons),
        sizes.recording_reads(recorder.reads),
        PythonMode(recorder),
    ):
        yield


def _written_down(
    recorder: Recorder,
    outputs: list[Node],
    every: dict[str, torch.Tensor],
    names: tuple[dict[str, torch.Tensor], dict[str, str]],
    fake: bool,
) -> Trace:
    """What `recorder` has of a finished run; `every` tensor of the model, and the `names` of those registered."""
    tensors, aliases = names
    return Trace(
        graph=recorder.graph,
        outputs=outputs,
        tensors=recorder.tensors,
        aliases=aliases,
        unreached=[name for name in tensors if name not in recorder.tensors],
        constants=recorder.constants,
        held=recorder.held,
        values={**every, **recorder.constants},
        size_uses=recorder.size_uses,
        scalar_uses=recorder.scalar_uses,
        comparisons=recorder.comparisons,
        reads=recorder.all_reads(),
        parametrized=recorder.parametrized,
        escapes=recorder.escapes,
        fake=fake,
    )
