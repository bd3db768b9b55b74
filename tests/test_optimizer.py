"""Carried optimizers: the pruned model's next steps are those of the original with its removed entries held at zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import depgraph
from depgraph.base.errors import InputError, PlanError

SEED = 0


class Net(nn.Module):
    """A batch norm, a residual sum, a grouped convolution and a tied matrix.

    Every gradient is more than rounding errors (a bias before the norm would have none), as some optimizers divide by it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.mix = nn.Conv2d(6, 6, 1)
        self.grouped = nn.Conv2d(6, 10, 3, groups=2, padding=1)
        self.up, self.down = nn.Linear(10, 7), nn.Linear(7, 10)
        self.again = nn.Linear(10, 7, bias=False)
        self.again.weight = self.up.weight
        self.last = nn.Linear(17, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x + self.mix(x).tanh()
        x = self.grouped(x).tanh().mean((2, 3))
        y = self.down(self.up(x).tanh())
        return self.last(torch.cat([y, self.again(x)], 1))


def made() -> tuple[nn.Module, depgraph.Plan]:
    torch.manual_seed(SEED)
    model = Net().double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    return model, depgraph.prune(model.eval(), x, pruning_ratio=0.4).plan


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range, mask: Any = None) -> None:
    model.train()
    for seed in seeds:
        dice = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=dice)
        y = torch.randint(5, (4,), generator=dice)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if mask is not None:
            mask(model)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adamw, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01, decoupled_weight_decay=True, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.3, lambd=0.5, t0=1),
    "many groups": lambda p: torch.optim.Adam(
        [{"params": [q], "lr": 0.01 / (i + 1)} for i, q in enumerate(p)]
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_next_steps_are_those_of_the_masked_original(name: str) -> None:
    model, plan = made()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(3))
    masks = {n: plan.mask(n) for n in model.state_dict()}

    def mask(m: nn.Module) -> None:
        with torch.no_grad():
            for n, p in m.named_parameters():
                p.mul_(masks[n])

    masked = copy.deepcopy(model)
    mask(masked)
    whole = OPTIMIZERS[name](masked.parameters())
    whole.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    small = depgraph.apply(model, plan)
    carried = plan.apply_to_optimizer(optimizer, model, small)
    assert carried is optimizer
    fresh_small = copy.deepcopy(small)
    fresh = OPTIMIZERS[name](fresh_small.parameters())
    train(masked, whole, range(3, 7), mask)
    train(small, carried, range(3, 7))
    train(fresh_small, fresh, range(3, 7))
    wanted = masked.state_dict()
    worst = max(
        float((v.flatten() - wanted[n][masks[n]]).abs().max())
        for n, v in small.state_dict().items()
        if v.is_floating_point()
    )
    assert worst < 1e-9
    if name != "sgd":  # without the carried state the steps are others
        other = fresh_small.state_dict()
        assert max(float((v - other[n]).abs().max()) for n, v in small.state_dict().items()) > 1e-4


def test_every_state_tensor_holds_the_kept_entries() -> None:
    model, plan = made()
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    train(model, optimizer, range(2))
    before = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    kept = [optimizer.state[p]["step"] for p in model.parameters()]
    counts = {id(t) for t in kept}
    small = depgraph.apply(model, plan)
    plan.apply_to_optimizer(optimizer, model, small)
    assert set(optimizer.state) == set(small.parameters())
    for n, p in small.named_parameters():
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(optimizer.state[p][key].flatten(), before[n][key][plan.mask(n)]), (n, key)
        assert optimizer.state[p]["step"] == before[n]["step"] == 2
    for n, p in model.named_parameters():  # nothing is shared with what the model was trained by
        assert p.shape == plan.shapes[n]
    steps = {n: optimizer.state[p]["step"] for n, p in small.named_parameters()}
    assert not {id(t) for t in steps.values()} & counts


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="of newer versions of torch")
def test_momentum_that_is_made_orthogonal() -> None:
    """Its steps mix all entries of a matrix, so they are others in a smaller one; the momentum is the same."""
    model, plan = made()
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    optimizer = torch.optim.Muon(matrices.values(), lr=0.01)
    train(model, optimizer, range(2))
    before = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in matrices.items()}
    small = depgraph.apply(model, plan)
    plan.apply_to_optimizer(optimizer, model, small)
    for n, p in small.named_parameters():
        if n in before:
            assert torch.equal(optimizer.state[p]["momentum_buffer"].flatten(), before[n][plan.mask(n)])
    train(small, optimizer, range(2, 3))


@pytest.mark.parametrize("kind", ["plateau", "one cycle", "swa"])
def test_schedules_go_on(kind: str) -> None:
    """Learning rates, momenta and counts after pruning are those of a run without."""
    schedules: dict[str, Callable[[Any], Any]] = {
        "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
        "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=11),
        "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.001, anneal_epochs=7),
    }
    rates: list[list[Any]] = []
    for cut in (False, True):
        model, plan = made()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        schedule, seen = schedules[kind](optimizer), []
        for step in range(9):
            if cut and step == 4:
                model, old = depgraph.apply(model, plan), model
                plan.apply_to_optimizer(optimizer, old, model)
            train(model, optimizer, range(step, step + 1))
            schedule.step(*([1.0] if kind == "plateau" else []))
            seen.append([(g["lr"], g["momentum"]) for g in optimizer.param_groups])
        rates.append([seen, schedule.state_dict()["last_epoch"]])
    assert rates[0] == rates[1]
    assert len({str(row) for row in rates[1][0]}) > 2


def test_groups_keep_their_options_and_order_and_foreign_parameters() -> None:
    model, plan = made()
    own = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD(
        [
            {"params": [model.last.weight, own], "lr": 0.5, "name": "head"},
            {"params": list(model.stem.parameters())},
        ],
        lr=0.1,
        momentum=0.9,
    )
    own.grad = torch.ones_like(own)
    train(model, optimizer, range(1))
    own_state = optimizer.state[own]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    small = depgraph.apply(model, plan)
    plan.apply_to_optimizer(optimizer, model, small)
    head, stem = optimizer.param_groups
    assert head["params"][0] is small.last.weight
    assert head["params"][1] is own
    assert optimizer.state[own] is own_state
    assert [id(p) for p in stem["params"]] == [id(p) for p in small.stem.parameters()]
    assert (head["lr"], head["name"], stem["lr"]) == (0.5, "head", 0.1)
    train(small, optimizer, range(1, 2))
    schedule.step()
    assert head["lr"] == pytest.approx(0.05)


def test_factored_second_moments_are_cut_along_what_they_have() -> None:
    model, plan = made()
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, range(2))
    name = "up.weight"
    state = {k: v.clone() for k, v in optimizer.state[model.up.weight].items() if isinstance(v, Tensor)}
    assert state["row_var"].shape == (7, 1)
    assert state["col_var"].shape == (1, 10)
    small = depgraph.apply(model, plan)
    model_without_blocks = {n for n, c in plan.cuts.items() if c.blocks is not None}
    assert model_without_blocks == {"grouped.weight"}
    with pytest.raises(InputError, match=r"grouped\.weight"):
        plan.apply_to_optimizer(optimizer, model, small)
    assert optimizer.param_groups[0]["params"][0] is model.stem.weight, "nothing was changed"
    assert optimizer.state[model.up.weight]["row_var"].shape == (7, 1)
    others = [p for n, p in model.named_parameters() if n != "grouped.weight"]
    optimizer = torch.optim.Adafactor(others)
    train(model, optimizer, range(2))
    state = {k: v.clone() for k, v in optimizer.state[model.up.weight].items() if isinstance(v, Tensor)}
    plan.apply_to_optimizer(optimizer, model, small)
    kept = plan.mask(name)
    rows, columns = kept.any(1), kept.any(0)
    assert not rows.all()
    assert not columns.all()
    after = optimizer.state[small.up.weight]
    assert torch.equal(after["row_var"], state["row_var"][rows])
    assert torch.equal(after["col_var"], state["col_var"][:, columns])


def test_an_average_of_weights_and_a_scaler_go_on() -> None:
    model, plan = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def step(m: nn.Module, seed: int) -> None:
        dice = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=dice)
        optimizer.zero_grad()
        scaler.scale(m(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(m)

    for seed in range(3):
        step(model, seed)
    weight = average.module.up.weight.detach().clone()
    count, scale = int(average.n_averaged), scaler.get_scale()
    small = depgraph.apply(model, plan)
    plan.apply_to_optimizer(optimizer, model, small)
    average.module = depgraph.apply(average.module, plan)
    assert torch.equal(average.module.up.weight.flatten(), weight[plan.mask("up.weight")])
    before = average.module.up.weight.detach().clone()
    step(small, 3)
    assert int(average.n_averaged) == count + 1
    assert scaler.get_scale() == 2 * scale
    assert torch.allclose(average.module.up.weight, 0.75 * before + 0.25 * small.up.weight, atol=1e-12)


def test_a_plan_from_a_wrapped_model_carries_the_optimizer_of_the_module_in_it() -> None:
    model, _ = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, range(2))
    result = depgraph.prune(
        nn.DataParallel(model.eval()), torch.randn(4, 3, 5, 5, dtype=torch.float64), pruning_ratio=0.4
    )
    momentum = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    small = result.model.module
    result.plan.apply_to_optimizer(optimizer, model, small)
    for name, parameter in small.named_parameters():
        kept = momentum[name][result.plan.mask(f"module.{name}")].reshape(parameter.shape)
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], kept), name


def test_what_cannot_be_carried_is_refused_before_anything_changes() -> None:
    model, plan = made()
    small = depgraph.apply(model, plan)
    with pytest.raises(InputError, match="L-BFGS"):
        plan.apply_to_optimizer(torch.optim.LBFGS(model.parameters()), model, small)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, range(1))
    first = optimizer.param_groups[0]["params"][0]
    with pytest.raises(InputError, match="same object"):
        plan.apply_to_optimizer(optimizer, model, model)
    with pytest.raises(InputError, match="no parameter of this model"):
        plan.apply_to_optimizer(optimizer, copy.deepcopy(model), small)
    with pytest.raises(PlanError, match="by the plan"):
        plan.apply_to_optimizer(optimizer, model, copy.deepcopy(model))
    optimizer.state[model.up.weight]["gram"] = torch.zeros(7, 7)
    with pytest.raises(InputError, match=r"up\.weight: 'gram'"):
        plan.apply_to_optimizer(optimizer, model, small)
    optimizer.state[model.up.weight]["gram"] = [torch.zeros(7, 10)]
    with pytest.raises(InputError, match=r"up\.weight: 'gram' is a list"):
        plan.apply_to_optimizer(optimizer, model, small)
    assert optimizer.param_groups[0]["params"][0] is first
    assert set(optimizer.state) == set(model.parameters())
