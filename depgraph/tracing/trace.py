"""Model and example inputs -> a torch.fx graph of the ATen calls that one run makes.

The run happens on a skeleton of the model, a deep copy that shares its parameters, and what it writes into these is
undone, so it can't leave a mark on the user's model. Real tensors come first: on the small inputs that a trace needs, arithmetic is cheaper than faking it, and
every path that depends on data works. Where it becomes more expensive than that, the run is begun anew on fake tensors, which
cost no arithmetic and no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..base.checks import flag, several
from ..base.errors import InputError, TraceError, could_not_run, listed
from ..base.inputs import Arguments, each_example
from ..base.running import WriteGuard, set_mode
from ..base.switches import eagerly, quiet_fakes, same_random_state
from ..base.values import map_tensors, tensor_leaves
from . import sizes
from .caches import Kept, nothing_kept
from .fakes import Fakes
from .literals import track_literals
from .outputs import Call
from .patched import open_python_functions, watch_functions, watch_modules, watch_scripts
from .record import AtenMode, PythonMode
from .recorder import RETURNED, Choice, Comparison, Loss, ModuleCall, Node, Recorder, record_of, write_record
from .size_uses import ScalarUse, SizeUse
from .tensors import all_tensors, is_elsewhere, named_tensors, skeleton
from .training import differs_in_training
from .unfit import check_fit, types_that_differ

PATIENCE = 0.5  # seconds by which the arithmetic of a run on real tensors may exceed the cost of faking it


@dataclass(repr=False)
class Trace:
    """What one run of the model recorded.

    Attributes:
        graph: the ATen calls; what was seen of each is its `NodeRecord`, ``node.meta["depgraph"]``.
        outputs: the nodes that the model returns.
        tensors: canonical name of each parameter and buffer that the run used -> its get_attr node.
        aliases: every other name of a tied parameter or buffer -> its canonical name.
        unreached: canonical names that the run did not use.
        constants: tensors that are in no module, by a name made up for them.
        attribute_tensors: names of tensors that are plain attributes of modules; in `tensors`, too, where a run read them.
        values: all of these by name; the user's own, not copies.
        size_uses: numbers given to ops that repeat a size.
        scalar_uses: numbers that ops compute with.
        comparisons: of sizes, in the user's code.
        places: the module and the line of each of these.
        choices: tests in methods of modules -> the sizes that were tested, () where it was values.
        other_ways: those that came out as they did not in further runs.
        losses: sizes that became plain numbers there.
        sizes_read: the dims that each load of a size in the code of methods was of, where those were tracked; None among them
            where it was of something else, or goes on to other code.
        not_run: the attributes that are named in those parts of methods that ran which did not run.
        reads: attributes that forward took numbers from, for whatever purpose.
        parametrized: path of a list of parametrizations, the weight that it made.
        calls: path of a module -> what each call of it returned.
        escapes: what can't be followed any further: why, in which module, where.
        counted: what counts of what the model returns, where `outputs` say so.
        returned: path of a module that returns several tensors -> these.
        fake: whether it ran on fake tensors.
        tracked: whether the attributes of modules were.
        train: whether it ran in train mode, too.
        grad: whether it needs grad mode, for a gradient that forward itself computes.
    """

    graph: torch.fx.Graph
    outputs: list[Node]
    tensors: dict[str, Node]
    aliases: dict[str, str]
    unreached: list[str]
    constants: dict[str, torch.Tensor]
    attribute_tensors: set[str]
    values: dict[str, torch.Tensor]
    size_uses: list[SizeUse]
    scalar_uses: list[ScalarUse]
    comparisons: list[Comparison]
    places: dict[Comparison, tuple[str, str]]
    choices: dict[Choice, tuple[sizes.Expr, ...]]
    other_ways: tuple[Choice, ...]
    losses: list[Loss]
    sizes_read: dict[sizes.Place, set[sizes.Expr]]
    not_run: frozenset[str]
    reads: set[sizes.Expr]
    parametrized: list[tuple[str, Node]]
    calls: dict[str, list[ModuleCall]]
    escapes: list[tuple[Node, str, str, str]]
    returned: dict[str, list[Node]]
    counted: Any
    fake: bool
    tracked: bool
    train: bool
    grad: bool


def trace(
    model: nn.Module, example_inputs: Any, *, literals: bool = False, other_ways: Sequence[Choice] = (),
    elsewhere: bool = False,
) -> Trace:  # fmt: skip
    """Run `model` once in eval mode and record it.

    Args:
        model: any module; it is not touched.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or `Examples` of these,
            on each of which the model is run.
        literals: track the numbers in the code of its modules, too.
        other_ways: tests in forward; for each the model is run again with the other outcome, as far as it gets.
        elsewhere: parameters on the meta device have values elsewhere: it is run on fake tensors, beside buffers and inputs that
            have theirs.

    Raises:
        InputError: there are no example inputs, an argument is something else, the model can't be pruned as it is, or forward
            reaches tensors of the model by a way that is not part of it.
        TraceError: the model rejects them; its own error is the cause.
    """
    examples = each_example(example_inputs)
    if hasattr(model, "graph_signature") and hasattr(model, "module"):  # an ExportedProgram
        model = model.module()  # type: ignore[operator]
    flag("elsewhere", elsewhere)
    check_fit(model, example_inputs, elsewhere)
    flag("literals", literals)
    choices = several("other_ways", other_ways, tuple, "places of tests (function and line, number)")
    with nothing_kept(model):
        return _first_that_runs(model, examples, {"literals": literals, "other_ways": tuple(choices)})


def _first_that_runs(model: nn.Module, examples: list[Arguments], ways: dict[str, Any]) -> Trace:
    """The trace of the first way to run the model that works."""
    failure: Exception | None = None
    without = is_elsewhere(named_tensors(model)[0].values(), tensor_leaves(examples))
    for fake, tracked, seconds, grad in (
        (False, True, PATIENCE, False),
        (True, True, None, False),
        (False, True, None, False),
        (False, True, None, True),
        (False, False, None, False),
    ):
        if without and not fake:
            continue
        try:
            found = _run(model, examples, fake, tracked, seconds, grad=grad, **ways)
            if fake and failure is not None and not isinstance(failure, TimeoutError):
                _check_types(model, examples, failure)
            return _reach_more(found, model, examples, fake, tracked, {"grad": grad, **ways})
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  any failure of the user's model means: try the next way to run it
            failure = error
    _check_types(model, examples, failure)
    raise TraceError(could_not_run(failure)) from failure


def _check_types(model: nn.Module, examples: list[Arguments], failure: Exception | None) -> None:
    """Say so where a run on real tensors failed and the inputs are of another type than the model."""
    if text := types_that_differ(model, examples):
        raise InputError(f"{text}\n  ({type(failure).__name__}: {failure})") from failure


def _reach_more(
    found: Trace, model: nn.Module, examples: list[Arguments], fake: bool, tracked: bool, ways: dict[str, Any]
) -> Trace:
    """`found`, or a trace of both modes: where train mode reaches parameters that it lacks (auxiliary heads), or differs."""
    missing = {n for n in found.unreached if isinstance(found.values[n], nn.Parameter)}
    other = differs_in_training(model, examples, fake)
    if not missing and not other:
        return found
    try:
        both = _run(model, examples, fake, tracked, train=True, **ways)
    except Exception:  # noqa: BLE001  the model can't be run in train mode on these inputs (targets are missing ...)
        return found
    return both if other or missing - set(both.unreached) else found


def replay(model: nn.Module, example_inputs: Any, like: Trace) -> Trace:
    """A trace of `model` that is run as `like` was.

    Raises:
        Exception: whatever the model raises.
    """
    ways: dict[str, Any] = {"train": like.train, "grad": like.grad, "other_ways": like.other_ways}
    return _run(model, each_example(example_inputs), like.fake, like.tracked, **ways)


def _run(
    model: nn.Module,
    examples: list[Arguments],
    fake: bool,
    tracked: bool,
    seconds: float | None = None,
    train: bool = False,
    literals: bool = False,
    grad: bool = False,
    other_ways: tuple[Choice, ...] = (),
) -> Trace:
    """`_recorded`, in which no memoised function knows anything from before."""
    given = model, examples, fake, tracked, seconds, train, literals, grad, other_ways
    kept = Kept()
    try:
        with nothing_kept(model, kept):
            found = _recorded(*given)
    except Exception:
        if not kept.stale:
            raise
    if kept.stale:  # no longer
        with nothing_kept(model):
            found = _recorded(*given)
    return found


def _recorded(
    model: nn.Module,
    examples: list[Arguments],
    fake: bool,
    tracked: bool,
    seconds: float | None,
    train: bool,
    literals: bool,
    grad: bool,
    other_ways: tuple[Choice, ...],
) -> Trace:
    """Record a run on each example in eval mode, and with `train` all in train mode behind them.

    On fake tensors, or on the model's own (buffers and inputs are copied); given up `seconds` behind what fake ones would take.
    """
    tensors, aliases = named_tensors(model)
    every = all_tensors(model)
    attribute_tensors = every.keys() - tensors.keys()
    with ExitStack() as stack:
        mode: Any = nullcontext()
        kept = WriteGuard(() if fake else model.parameters())
        stack.callback(kept.restore)
        if fake:
            stack.enter_context(quiet_fakes())
            mode = Fakes()
            stand_in = mode.stand_ins(every.values(), tensor_leaves(examples))
            examples = map_tensors(examples, mode.given)
        else:
            parameters = {id(p) for p in model.parameters()}
            stand_in = {id(t): _same_values(t) if id(t) in parameters else t.clone() for t in every.values()}
            examples = map_tensors(examples, torch.clone)
        twin = skeleton(model, stand_in)
        outside = {id(t): name for name, t in tensors.items() if stand_in[id(t)] is not t}
        recorder = Recorder(
            {id(stand_in[id(t)]): name for name, t in every.items()}, attribute_tensors, outside
        )
        if tracked:
            sizes.track_attributes(twin, model, recorder.run)
        if tracked and literals:
            not_run = track_literals(twin, recorder.run, recorder.size_read)
        for i, tensor in enumerate(tensor_leaves(examples)):
            node = recorder.graph.placeholder(f"input_{i}")
            write_record(node, [tensor], kind="input")
            recorder.remember(tensor, node)
        if seconds is not None:
            recorder.patience = seconds
        stack.enter_context(_recording(twin, recorder, mode, kept, grad))
        outputs = []
        for training in (False, True) if train else (False,):
            recorder.training = training
            set_mode(twin, training)
            for example in examples:
                outputs += _given_away(twin, example, recorder)
        recorder.training = False
        set_mode(twin, False)
        for recorder.other_way in other_ways:
            for example in examples:
                with recorder.attempt():
                    outputs += _given_away(twin, example, recorder)
        if tracked and literals:
            recorder.not_run = not_run()
        if not outputs:  # nothing to see in what the model returns: whatever no op reads may be in it
            made = [n for n in recorder.graph.nodes if n.op == "call_function" and not n.users]
            outputs = [n for n in made if len(record_of(n).shapes) == 1]
    if recorder.outside_reads:
        reads = [f"{name!r} is read in {where}" for name, where in recorder.outside_reads.items()]
        raise InputError(
            listed("a copy of this model would read tensors of the model itself:", reads)
            + "\n  fix: reach them through an attribute of the module that reads them, not through a global or a registry"
        )
    recorder.graph.output(tuple(outputs))
    recorder.forget_other_runs()
    return _written_down(
        recorder,
        outputs,
        every,
        (tensors, aliases),
        (fake, tracked, train, grad),
        other_ways,
        examples[0].outputs,
    )


def _given_away(twin: nn.Module, example: Arguments, recorder: Recorder) -> list[Node]:
    """Call `twin`; the nodes of what it gives away."""
    with recorder.unseen():
        call = Call(twin, example)
    out = example.run(twin)
    for expr in sizes.expressions_in(example.counting(out)):
        recorder.losses.append((expr, RETURNED, "", ""))
    with recorder.unseen():
        found = call.outputs(out)
    return [recorder.node(t) for t in found]


def _same_values(parameter: Any) -> torch.Tensor:
    """A parameter of its own on the memory of another one, so that reading either can be told apart."""
    if type(parameter) is not nn.Parameter or parameter.is_inference():
        return parameter
    made = nn.Parameter(parameter.detach(), parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


@contextmanager
def _recording(
    twin: nn.Module, recorder: Recorder, fakes: Any, kept: WriteGuard, grad: bool
) -> Iterator[None]:
    """Whatever runs inside is recorded; the order matters, as each mode sees what those entered later let through."""
    with (
        same_random_state(),
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
        open_python_functions(),
        eagerly(),
        watch_modules(twin, recorder),
        watch_functions(recorder),
        watch_scripts(recorder),
        fakes,
        AtenMode(recorder, kept),
        sizes.telling(recorder),
        PythonMode(recorder),
    ):
        yield


def _written_down(
    recorder: Recorder,
    outputs: list[Node],
    every: dict[str, torch.Tensor],
    names: tuple[dict[str, torch.Tensor], dict[str, str]],
    modes: tuple[bool, bool, bool, bool],
    other_ways: tuple[Choice, ...],
    counted: Any,
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
        attribute_tensors=recorder.attribute_tensors,
        values={**every, **recorder.constants},
        size_uses=recorder.size_uses,
        scalar_uses=recorder.scalar_uses,
        comparisons=recorder.comparisons,
        places=recorder.places,
        choices=recorder.choices,
        other_ways=other_ways,
        losses=recorder.losses,
        sizes_read=recorder.sizes_read,
        not_run=recorder.not_run,
        reads=recorder.all_reads(),
        parametrized=recorder.parametrized,
        calls=recorder.calls,
        escapes=recorder.escapes,
        returned=recorder.returned,
        counted=counted,
        fake=modes[0],
        tracked=modes[1],
        train=modes[2],
        grad=modes[3],
    )
