"""Training afterwards: a plain loop for fine-tuning, and the same loop with the dense model as the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.checks import a_module, fraction, function, number, of_kind, several, whole_number
from ..base.errors import InputError
from ..base.inputs import split_inputs
from ..base.progress import length, track
from ..base.running import Score, in_mode, score_of
from ..base.values import map_tensors, tensor_leaves
from ..data.calibration import Batch, Loss, check_batches, loss_value
from ..plan.plan import Plan
from ..tracing.tensors import named_tensors
from .hidden import Projection, captured


@dataclass
class Training:
    """What a run of `finetune` or `distill` did.

    Attributes:
        losses: of every step.
        scores: (steps done, score), from before the first step on; empty without a score function.
        best: steps after which the score was best; the model has the weights of then. None without a score function.
    """

    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    best: int | None = None

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.losses)


def finetune(
    model: nn.Module, data: Iterable[Any], loss: Loss | None = None, *, epochs: int | None = None,
    steps: int | None = None, optimizer: torch.optim.Optimizer | None = None, lr: float = 1e-3, scheduler: Any = None,
    score: Score | None = None, patience: int | None = None, progress: bool | None = None,
) -> Training:  # fmt: skip
    """Train `model` in place, in a plain loop without mixed precision.

    Args:
        model: what is trained. It is in train mode meanwhile, and afterwards as it was, also after an exception.
        data: batches, gone through anew in every epoch: pairs (inputs, target) where `loss` is given, else inputs alone, of
            which the model returns a ``loss``. They have the form of `example_inputs`, and are moved to the model's device.
        loss: ``loss(output, target)`` -> scalar. Add a regulariser here.
        epochs: passes over `data`; 1 if `steps` is not given either.
        steps: instead of `epochs`: so many batches, starting over as often as needed.
        optimizer: over parameters of `model`. By default ``AdamW(lr=lr)``, whose learning rate falls to 0 along a
            half cosine where the number of steps is known.
        lr: learning rate of the default optimizer.
        scheduler: of `optimizer`, stepped after every step.
        score: ``score(model)`` -> a number, higher is better; asked in eval mode before the first step and after every pass
            over `data`. The best weights are the model's at the end.
        patience: stop after so many scores in a row that are no better than the best.
        progress: show a bar; None: on a terminal alone.

    Returns:
        the losses and scores.

    Raises:
        InputError: contradicting arguments, no data, a batch of another form, or a loss that is NaN or infinite.
    """
    if loss is not None:
        function("loss", loss, "output", "target")

    def loss_of(batch: Batch) -> Tensor:
        return loss_value(loss, model(*batch.args, **batch.kwargs), batch.target)

    return _fit(
        model, data, loss_of, loss is not None, epochs, steps, optimizer, lr, scheduler, score, patience, progress,
        "fine-tuning",
    )  # fmt: skip


def distill(
    model: nn.Module, teacher: nn.Module, data: Iterable[Any], loss: Loss | None = None, *, plan: Plan | None = None,
    temperature: float = 2.0, alpha: float | None = None, hidden: Sequence[str] = (), hidden_weight: float = 1.0,
    epochs: int | None = None, steps: int | None = None, optimizer: torch.optim.Optimizer | None = None, lr: float = 1e-3,
    scheduler: Any = None, score: Score | None = None, patience: int | None = None, progress: bool | None = None,
) -> Training:  # fmt: skip
    """Train `model` in place to do as `teacher`, which is usually the model that it was pruned from.

    The loss is ``alpha * soft + (1 - alpha) * hard + hidden_weight * sum of the hidden terms``. *Soft*: T^2 * KL(teacher
    || student) of the softmax of logits / T over the last dim, the mean over all positions (Hinton, Vinyals and Dean,
    "Distilling the Knowledge in a Neural Network", 2015). *Hard*: the loss on the targets. *Hidden*: the mean squared
    difference between the outputs of a module in both models, the teacher's at the channels that the plan keeps.

    Args:
        model: the student.
        teacher: stays as it is; runs in eval mode without gradients. It may be on another device.
        data: as for `finetune`; without `loss`, batches are what the models take.
        loss: ``loss(output, target)`` -> scalar, for the hard term; without one, the ``loss`` that the model returns.
        plan: from `teacher` to `model`, for `hidden`.
        temperature: T, above 0.
        alpha: share of the soft term, 0 to 1: by default 0.5 with `loss` and 1 without.
        hidden: paths of modules that both models have (by the teacher's names, with a plan that removes layers) and that return a tensor (or a tuple that begins with one).
        hidden_weight: weight of the hidden terms.
        epochs: as for `finetune`, like all that follow.
        steps: likewise.
        optimizer: likewise.
        lr: likewise.
        scheduler: likewise.
        score: likewise, of the student.
        patience: likewise.
        progress: likewise.

    Returns:
        the losses and scores.

    Raises:
        InputError: as for `finetune`; an unknown module; outputs that differ in a dim that the plan does not explain.
    """
    a_module("model", model)
    a_module("teacher", teacher)
    if plan is not None:
        of_kind("plan", plan, Plan, "a depgraph.Plan")
    share = (1.0 if loss is None else 0.5) if alpha is None else alpha
    share, temperature = check_mix(share, temperature)
    number("hidden_weight", hidden_weight, 0)
    if teacher is model:
        raise InputError(
            "the teacher is the model that is trained\n  fix: prune with inplace=False, and give the original as teacher"
        )
    hidden = several("hidden", (hidden,) if isinstance(hidden, str) else hidden, str, "module paths")
    if plan is not None and hidden and plan.reorders:
        raise InputError("the plan holds an order: give the model whose units are in order as the teacher")
    paths = [dict(m.named_modules(remove_duplicate=False)) for m in (model, teacher)]
    own = {
        name: name if plan is None else plan.new_name(name) for name in hidden
    }  # what the model calls them
    for name in hidden:
        if own[name] not in paths[0] or name not in paths[1]:
            raise InputError(f"hidden names a module that is not in both models: {name!r}")
    if loss is not None:
        function("loss", loss, "output", "target")
    match = Projection(teacher, plan, hidden)
    there = _device(teacher)

    def loss_of(batch: Batch) -> Tensor:
        asked = Batch(*map_tensors((batch.args, batch.kwargs), lambda t: t.to(there)))
        with torch.no_grad(), in_mode(teacher, False), captured(teacher, hidden) as wanted:
            aim = logits_of(teacher(*asked.args, **asked.kwargs), "teacher")
        with captured(model, [own[name] or "" for name in hidden]) as got:
            output = model(*batch.args, **batch.kwargs)
        logits = logits_of(output, "model")
        total = share * soft_loss(logits, aim.to(logits.device), temperature)
        if share < 1:
            total = total + (1 - share) * loss_value(loss, output, batch.target)
        for name in hidden:
            total = total + hidden_weight * match(name, got[own[name] or ""], wanted[name], asked)
        return total

    return _fit(
        model, data, loss_of, loss is not None, epochs, steps, optimizer, lr, scheduler, score, patience, progress,
        "distilling",
    )  # fmt: skip


def check_mix(alpha: float, temperature: float) -> tuple[float, float]:
    """Both, where the share of the soft term lies in 0..1 and the temperature above 0."""
    return fraction("alpha", alpha, zero=True, one=True), number("temperature", temperature, 0, above=True)


def soft_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 * KL(teacher || student) of softmax(logits / T): [..., classes] each -> scalar, the mean over positions."""
    if student.shape != teacher.shape:
        raise InputError(
            f"the logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
        )
    wide = torch.promote_types(student.dtype, torch.float32)  # sums over many classes
    s, t = (F.log_softmax(x.flatten(0, -2).to(wide) / temperature, -1) for x in (student, teacher))
    return F.kl_div(s, t, log_target=True, reduction="batchmean") * temperature**2


# ------------------------------------------------------------------------------------------------------- the loop


def _fit(
    model: nn.Module, data: Iterable[Any], loss_of: Callable[[Batch], Tensor], pairs: bool, epochs: int | None,
    steps: int | None, optimizer: torch.optim.Optimizer | None, lr: float, scheduler: Any, score: Score | None,
    patience: int | None, progress: bool | None, text: str,
) -> Training:  # fmt: skip
    """The loop of `finetune` and `distill`; `pairs`: batches are pairs of inputs and target."""
    a_module("model", model)
    _check(data, epochs, steps, optimizer, scheduler, score, patience)
    if epochs is None and steps is None:
        epochs = 1
    if optimizer is None:
        optimizer, scheduler = _default_optimizer(model, lr, _total(data, epochs, steps))
    elif not {id(p) for g in optimizer.param_groups for p in g["params"]} & {
        id(p) for p in model.parameters()
    }:
        raise InputError(
            "the optimizer has no parameter of this model\n  fix: make it of model.parameters(), or keep that of the "
            "original: plan.apply_to_optimizer(optimizer, original, model)"
        )
    done, keeper, device = Training(), _Best(model), _device(model)
    with in_mode(model, True):
        try:
            if score is not None:
                keeper.ask(score, done)
            for n in range(epochs) if epochs is not None else count():
                before, left = done.steps, None if steps is None else steps - done.steps
                for batch in islice(track(data, f"{text}, pass {n + 1}", progress), left):
                    optimizer.zero_grad()
                    value = loss_of(_batch(batch, pairs, device))
                    number = float(value.detach())
                    if not isfinite(number):  # before a step has spoilt the weights
                        raise InputError(
                            f"the loss of step {done.steps + 1} is {number}: are weights and data finite?"
                        )
                    value.backward()
                    optimizer.step()
                    if scheduler is not None:
                        scheduler.step()
                    done.losses.append(number)
                if done.steps == before:
                    again = f" in pass {n + 1}: give a list or a DataLoader, which can be iterated again"
                    raise InputError(f"data has no batches{again if n else ''}")
                if score is not None:
                    keeper.ask(score, done)
                if keeper.waited == patience or done.steps == steps:
                    break
        finally:
            keeper.restore()
    return done


class _Best:
    """The best weights so far."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.waited = model, 0
        self.kept: dict[str, Tensor] | None = None

    def ask(self, score: Score, done: Training) -> None:
        """Score the model; keep its weights where they are better than all before."""
        value = score_of(score, self.model)
        if done.best is None or value > max(v for _, v in done.scores):
            done.best, self.waited = done.steps, 0
            self.kept = {n: t.detach().clone() for n, t in named_tensors(self.model)[0].items()}
        else:
            self.waited += 1
        done.scores.append((done.steps, value))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model the weights that were kept, if any were."""
        for name, tensor in named_tensors(self.model)[0].items() if self.kept is not None else ():
            tensor.copy_(self.kept[name])  # type: ignore[index]


def _batch(given: Any, pairs: bool, device: torch.device) -> Batch:
    """One batch as arguments of forward and a target, on the model's device."""
    target = None
    if pairs:
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise InputError(f"with a loss, batches are pairs (inputs, target), not {type(given).__name__}")
        given, target = given
    inputs = split_inputs(given)
    return Batch(*map_tensors((inputs.args, inputs.kwargs, target), lambda t: t.to(device)))


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in named_tensors(model)[0].values()), torch.device("cpu"))


def _total(data: Iterable[Any], epochs: int | None, steps: int | None) -> int | None:
    known = length(data)
    return steps if epochs is None else None if known is None else epochs * known


def _default_optimizer(model: nn.Module, lr: float, total: int | None) -> tuple[torch.optim.Optimizer, Any]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError("no parameter of the model requires a gradient: there is nothing to train")
    optimizer = torch.optim.AdamW(trained, lr=number("lr", lr, 0))
    return optimizer, total and torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)


def _check(
    data: Any, epochs: Any, steps: Any, optimizer: Any, scheduler: Any, score: Any, patience: Any
) -> None:
    check_batches("data", data)
    if epochs is not None and steps is not None:
        raise InputError("epochs and steps contradict each other: give one of them")
    for name, value in (("epochs", epochs), ("steps", steps), ("patience", patience)):
        if value is not None:
            whole_number(name, value, 1)
    if score is not None:
        function("score", score, "model")
    if optimizer is not None:
        of_kind("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    if scheduler is not None and optimizer is None:
        raise InputError("a scheduler belongs to an optimizer: give both")
    if patience is not None and score is None:
        raise InputError("patience needs a score function")


def logits_of(output: Any, whose: str) -> Tensor:
    """The logits in what a model returns: the tensor, its ``logits``, or the first tensor of a tuple."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and not isinstance(output, Mapping):
        found = next(iter(tensor_leaves(output)), None)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        raise InputError(
            f"the {whose} returns no logits: distilling needs a tensor [..., classes], alone, as output.logits, or as the "
            "first of a tuple"
        )
    return found
