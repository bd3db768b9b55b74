"""Fine-tuning and distillation against the same loops and losses written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import depgraph
from depgraph import distill, finetune
from depgraph.base.errors import InputError
from depgraph.training.train import soft_loss


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.0), nn.Linear(7, 3)
    )


def pairs(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    dice = torch.Generator().manual_seed(1)
    return [(torch.randn(11, 5, generator=dice), torch.randint(3, (11,), generator=dice)) for _ in range(n)]


def by_hand(model: nn.Module, batches: list[Any], optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


def test_epochs_and_steps_are_the_loop_by_hand() -> None:
    data = pairs()
    for given, batches in (({"epochs": 2}, data + data), ({"steps": 5}, (data + data)[:5]), ({}, data)):
        model, wanted = small_net(), small_net()
        result = finetune(
            model, data, F.cross_entropy, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **given
        )
        expected = by_hand(wanted, batches, torch.optim.SGD(wanted.parameters(), lr=0.1))
        assert same(model, wanted)
        assert result.losses == expected
        assert (result.steps, result.scores, result.best) == (len(batches), [], None)


def test_the_default_optimizer_falls_along_a_cosine() -> None:
    model, wanted = small_net(), small_net()
    data = pairs()
    finetune(model, data, F.cross_entropy, epochs=2, lr=0.02)
    optimizer = torch.optim.AdamW(wanted.parameters(), lr=0.02)
    for i, batch in enumerate(data + data):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + torch.cos(torch.tensor(i * torch.pi / 6)).item())
        by_hand(wanted, [batch], optimizer)
    for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_scheduler_is_stepped_after_every_step() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    finetune(model, pairs(), F.cross_entropy, steps=5, optimizer=optimizer, scheduler=schedule)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)


class OwnLoss(nn.Module):
    """Takes keyword arguments and returns its loss, as an object or a dict."""

    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.net, self.as_dict = small_net(), as_dict

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(x)
        found = {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels)}
        return found if self.as_dict else SimpleNamespace(**found)


@pytest.mark.parametrize("as_dict", [True, False])
def test_models_that_return_their_loss_take_dicts(as_dict: bool) -> None:
    model, wanted = OwnLoss(as_dict), small_net()
    data = pairs()
    finetune(
        model, [{"x": x, "labels": y} for x, y in data], optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    by_hand(wanted, data, torch.optim.SGD(wanted.parameters(), lr=0.1))
    assert same(model.net, wanted)


def test_modes_are_as_they_were() -> None:
    model = small_net().train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    seen = []
    model[3].register_forward_hook(lambda module, args, out: seen.append(module.training))
    finetune(model, pairs(1), F.cross_entropy, score=lambda m: m(torch.ones(2, 5)).sum())
    assert [m.training for m in model.modules()] == modes
    assert seen == [False, True, False]


def test_the_best_weights_are_kept_and_patience_ends_the_run() -> None:
    model = small_net()
    values, states = iter([0.1, 0.5, 0.9, 0.9, 0.7, 1.0]), []

    def score(m: nn.Module) -> float:
        states.append(copy.deepcopy(m.state_dict()))
        return next(values)

    result = finetune(model, pairs(), F.cross_entropy, epochs=9, lr=0.05, score=score, patience=2)
    assert result.scores == [(0, 0.1), (3, 0.5), (6, 0.9), (9, 0.9), (12, 0.7)]
    assert (result.best, result.steps) == (6, 12)
    assert all(torch.equal(v, states[2][k]) for k, v in model.state_dict().items())
    assert not torch.equal(states[2]["0.weight"], states[4]["0.weight"])


def test_training_that_only_harms_leaves_the_model_as_it_was() -> None:
    model, before = small_net(), small_net()
    values = iter([1.0, 0.5, 0.4])
    result = finetune(model, pairs(), F.cross_entropy, epochs=2, score=lambda m: next(values))
    assert result.best == 0
    assert same(model, before)


def test_an_interrupted_run_leaves_the_best_weights_and_the_modes() -> None:
    model, states, calls = small_net().eval(), [], []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return F.cross_entropy(output, target)

    def score(m: nn.Module) -> float:
        states.append(copy.deepcopy(m.state_dict()))
        return float(len(states))

    with pytest.raises(KeyboardInterrupt):
        finetune(model, pairs(), loss, epochs=3, score=score)
    assert len(states) == 2
    assert all(torch.equal(v, states[1][k]) for k, v in model.state_dict().items())
    assert not any(m.training for m in model.modules())


def test_the_soft_loss_is_the_divergence_at_a_temperature() -> None:
    torch.manual_seed(3)
    s, t = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    p, q = torch.softmax(t / 3, -1), torch.softmax(s / 3, -1)
    expected = 9 * (p * (p / q).log()).sum(-1).mean()
    assert soft_loss(s, t, 3.0).item() == pytest.approx(expected.item(), rel=1e-12)
    with pytest.raises(InputError, match="teacher's"):
        soft_loss(s, t[:1])


@pytest.mark.parametrize(("alpha", "share"), [(None, 0.5), (0.3, 0.3), (1.0, 1.0)])
def test_distilling_steps_along_the_stated_loss(alpha: float | None, share: float) -> None:
    teacher = small_net().double().train()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    before, wanted = copy.deepcopy(teacher.state_dict()), copy.deepcopy(model)
    data = [(x.double(), y) for x, y in pairs()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    distill(model, teacher, data, F.cross_entropy, temperature=3.0, alpha=alpha, optimizer=optimizer)
    optimizer = torch.optim.SGD(wanted.parameters(), lr=0.1)
    for x, y in data:
        optimizer.zero_grad()
        with torch.no_grad():
            aim = copy.deepcopy(teacher).eval()(x)
        out = wanted(x)
        soft = (
            9
            * (aim / 3).softmax(-1).mul((aim / 3).log_softmax(-1) - (out / 3).log_softmax(-1)).sum(-1).mean()
        )
        (share * soft + (1 - share) * F.cross_entropy(out, y)).backward()
        optimizer.step()
    for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(m.training for m in teacher.modules())


class Tokens(nn.Module):
    """A stream of 8 channels and two heads of 4: all dims of the square matrices have one size, and other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.qkv, self.out = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm, self.rise, self.fall = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.block = nn.Identity()
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.enter(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        x = self.block(x + self.fall(self.rise(self.norm(x)).relu()))
        return SimpleNamespace(logits=self.last(x))


def test_hidden_states_are_compared_at_the_kept_channels() -> None:
    """`block` has no weights, and every matrix is 8 x 8 before and 4 x 4 after: only the run itself tells them apart."""
    torch.manual_seed(5)
    teacher = Tokens().double().eval()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    dice = torch.Generator().manual_seed(2)
    result = depgraph.prune(
        teacher, x, pruning_ratio=0.5, importance=lambda g: torch.rand(g.units, generator=dice)
    )
    model, plan = result.model, result.plan
    stream = plan.mask("enter.weight")[:, 0]
    inner = plan.mask("rise.weight").any(1)
    assert stream.sum() == inner.sum() == 4
    assert not torch.equal(stream, inner)
    with torch.no_grad():
        seen: dict[str, Tensor] = {}
        handles = [
            m.get_submodule(n).register_forward_hook(lambda _, a, out, k=(w, n): seen.update({k: out}))
            for w, m in (("teacher", teacher), ("model", model))
            for n in ("block", "rise")
        ]
        a, b = teacher(x).logits, model(x).logits
        for handle in handles:
            handle.remove()
        expected = (
            soft_loss(b, a, 2.0)
            + 0.7 * F.mse_loss(seen["model", "block"], seen["teacher", "block"][..., stream])
            + 0.7 * F.mse_loss(seen["model", "rise"], seen["teacher", "rise"][..., inner])
        )
    done = distill(
        model, teacher, [x], plan=plan, hidden=["block", "rise"], hidden_weight=0.7,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
    )  # fmt: skip
    assert done.losses == [pytest.approx(expected.item(), rel=1e-12)]
    assert not any(m._forward_hooks for m in [*model.modules(), *teacher.modules()])


def test_a_module_that_is_called_twice_counts_once() -> None:
    """The mean over its calls."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(self.inner(x).tanh()))

    torch.manual_seed(4)
    student, teacher, x = Twice(), Twice(), torch.randn(7, 5)
    done = distill(
        student, teacher, [x], hidden="inner", alpha=1.0, hidden_weight=0.5,
        optimizer=torch.optim.SGD(student.parameters(), lr=0.0),
    )  # fmt: skip
    with torch.no_grad():
        firsts = [m.inner(x) for m in (student, teacher)]
        seconds = [m.inner(f.tanh()) for m, f in zip((student, teacher), firsts, strict=True)]
        hidden = (F.mse_loss(*firsts) + F.mse_loss(*seconds)) / 2
        wanted = soft_loss(student(x), teacher(x)) + 0.5 * hidden
    assert done.losses == pytest.approx([float(wanted)], rel=1e-5)


def test_hidden_states_of_compiled_models_are_seen() -> None:
    torch.manual_seed(5)
    teacher = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5)).eval()
    result = depgraph.prune(teacher, torch.randn(2, 3), pruning_ratio=0.5)
    kept = result.plan.mask("0.weight").any(1)
    x = torch.randn(4, 3)
    with torch.no_grad():
        difference = F.mse_loss(result.model[1](result.model[0](x)), teacher[1](teacher[0](x))[:, kept])
        expected = soft_loss(result.model(x), teacher(x)) + difference
    models = [torch.compile(m, backend="eager") for m in (result.model, teacher)]
    for m in models:
        m(x)
    compiled = depgraph.Plan.from_json(depgraph.prune(models[1], x, pruning_ratio=0.5).plan.to_json())
    done = distill(
        models[0], models[1], [x], plan=compiled, hidden="_orig_mod.1", optimizer=torch.optim.SGD(models[0].parameters(), lr=0.0)
    )  # fmt: skip
    assert done.losses == [pytest.approx(expected.item(), rel=1e-5)]


@pytest.mark.slow
def test_distilling_brings_the_model_back_to_its_teacher() -> None:
    torch.manual_seed(6)
    teacher = Tokens().eval()
    data = [torch.randn(16, 6, 3) for _ in range(4)]
    result = depgraph.prune(teacher, data[0], pruning_ratio=0.25)

    def closeness(model: nn.Module) -> float:
        with torch.no_grad():
            return -float(soft_loss(model(data[0]).logits, teacher(data[0]).logits))

    done = distill(
        result.model, teacher, data, plan=result.plan, hidden="block", epochs=30, lr=0.01, score=closeness
    )
    first, best = done.scores[0][1], max(v for _, v in done.scores)
    assert best > 0.2 * first  # both negative: at most a fifth of the distance is left
    assert closeness(result.model) == pytest.approx(best)


def test_bad_input_is_refused_before_anything_changes() -> None:
    model, before = small_net(), small_net()
    data = pairs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for match, given in {
        "contradict": {"epochs": 1, "steps": 2},
        "steps must": {"steps": 0},
        "epochs must": {"epochs": 1.5},
        "belongs to": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)},
        "needs a score": {"patience": 2},
    }.items():
        with pytest.raises(InputError, match=match):
            finetune(model, data, F.cross_entropy, **given)
    for match, bad in {
        "no batches": [],
        "pairs": [data[0][0]],
        "single batch": data[0][0],
        "loss of a batch is nan": [(data[0][0] * float("nan"), data[0][1])],
    }.items():
        with pytest.raises(InputError, match=match):
            finetune(model, bad, F.cross_entropy)
    with pytest.raises(InputError, match="no parameter of this model"):  # it would train nothing
        finetune(model, data, F.cross_entropy, optimizer=torch.optim.SGD(before.parameters(), lr=0.1))
    with pytest.raises(InputError, match="returns none"):
        finetune(model, [data[0][0]])
    with pytest.raises(InputError, match="iterated again"):
        finetune(model, iter(data), F.cross_entropy, epochs=2, lr=1e-30)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        finetune(model, data, F.cross_entropy)
    assert all(torch.allclose(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_soft_loss_of_narrow_types_is_computed_in_a_wide_one(dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(3)
    a, b = (torch.randn(2, 3, 997, generator=dice, dtype=torch.float64).to(dtype) * 4 for _ in range(2))
    found, wanted = soft_loss(a, b, 1.5), soft_loss(a.double(), b.double(), 1.5)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(abs(found - wanted)) < 1e-5 * float(wanted)


def test_bad_distillation_is_refused() -> None:
    torch.manual_seed(7)
    teacher = Tokens().eval()
    x = torch.randn(2, 6, 3)
    result = depgraph.prune(teacher, x, pruning_ratio=0.5)
    with pytest.raises(InputError, match="a module that is not in both models: 'blocks'"):
        distill(result.model, teacher, [x], hidden=["blocks"])
    with pytest.raises(InputError, match="give plan="):
        distill(result.model, teacher, [x], hidden=["block"])
    other = depgraph.prune(teacher, x, pruning_ratio=0.25).plan
    with pytest.raises(InputError, match="the plan that made this model"):
        distill(result.model, teacher, [x], hidden=["block"], plan=other)
    nan = float("nan")
    for bad in ({"alpha": 1.5}, {"temperature": 0.0}, {"temperature": float("inf")}, {"hidden_weight": -1.0}, {"hidden_weight": nan}):  # fmt: skip
        with pytest.raises(InputError, match="must be"):
            distill(result.model, teacher, [x], **bad)
    with pytest.raises(InputError, match="the teacher is the model"):
        distill(teacher, teacher, [x])
    before = copy.deepcopy(result.model.state_dict())
    with pytest.raises(InputError, match="loss of step 1 is nan"):
        distill(result.model, teacher, [x * nan])
    assert all(torch.equal(v, before[k]) for k, v in result.model.state_dict().items())
    with pytest.raises(InputError, match="the teacher returns no logits"):
        distill(result.model, nn.Flatten(0), [x])


def test_one_pass_over_an_iterator_is_fine() -> None:
    def batches() -> Iterator[Any]:
        yield from pairs()

    assert finetune(small_net(), batches(), F.cross_entropy).steps == 3
