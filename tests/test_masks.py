"""Zeros among single weights: exactly as many as asked for, and they stay, whatever is done with the model."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import check_result
from oracle import assert_untouched, call, output_tensors, snapshot
from random_networks import random_network
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import depgraph
from depgraph.plan.bits import Bits
from depgraph.simplify.threshold import lowest
from depgraph.surgery.zeros import entries_of, keep_zeros

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(),
        nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.dim() > 1}


def assert_zeros(result: depgraph.Simplified, model: nn.Module | None = None) -> None:
    """Zero exactly where the plan says, nowhere else."""
    for name, weight in weights(model or result.model).items():
        kept = result.plan.mask(name)
        assert not weight[~kept].any(), name
        assert weight[kept].all() or weight.requires_grad, name


def zeros(result: depgraph.Simplified) -> int:
    return sum(int((~result.plan.mask(name)).sum()) for name in result.plan.shapes)


CRITERIA: list = [
    "magnitude",
    "gradient",
    "taylor",
    "wanda",
    "random",
    torch.square,
    lambda name, w: -w.abs(),
]


@pytest.mark.parametrize("importance", CRITERIA, ids=lambda c: getattr(c, "__name__", str(c)))
@pytest.mark.parametrize("scope", ["global", "local"])
def test_exactly_as_many_as_asked_for(importance: object, scope: str) -> None:
    model = net()
    before = snapshot(model)
    result = depgraph.mask(model, X, importance=importance, scope=scope, sparsity=0.7)
    assert_untouched(model, before)
    sizes = [w.numel() for w in weights(model).values()]
    wanted = [round(0.7 * n) for n in sizes] if scope == "local" else [round(0.7 * sum(sizes))]
    assert zeros(result) == sum(wanted)
    if scope == "local":
        assert [int((~result.plan.mask(n)).sum()) for n in weights(model)] == wanted
    assert_zeros(result)
    for name, tensor in model.state_dict().items():
        kept = result.plan.mask(name)
        assert torch.equal(result.model.state_dict()[name][kept], tensor[kept])
    assert result.report.parameters == (2668, 2668 - sum(wanted))


def test_which_ones() -> None:
    model = net()
    found = torch.cat([depgraph.mask(model, sparsity=0.3).plan.mask(n).flatten() for n in weights(model)])
    flat = torch.cat([w.detach().abs().flatten() for w in weights(model).values()])
    order = flat.argsort(stable=True)[: round(0.3 * len(flat))]
    assert torch.equal(found, torch.ones_like(found).index_fill(0, order, False))


def test_of_equal_weights_the_first_ones_go() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 5))
    for parameter in model.parameters():
        nn.init.constant_(parameter, -2.0)
    plan = depgraph.mask(model, sparsity=0.6).plan
    assert [int((~plan.mask(n)).sum()) for n in ("0.weight", "1.weight")] == [20, 4]
    assert not plan.mask("1.weight").flatten()[:4].any()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 7, 500, 999, 1000])
def test_the_threshold_of_many_scores(kind: torch.dtype, count: int) -> None:
    dice = torch.Generator().manual_seed(count)
    parts = {
        "a": torch.randn(30, 20, generator=dice, dtype=kind),
        "b": torch.randn(400, generator=dice, dtype=kind).round(),
    }
    parts["a"][0], parts["b"][:3] = -torch.inf, torch.tensor([0.0, -0.0, torch.inf], dtype=kind)
    got = dict(lowest(parts.items, count, kind))
    flat = torch.cat([p.flatten() for p in parts.values()])
    wanted = torch.zeros(1000, dtype=torch.bool)
    wanted[torch.from_numpy(np.argsort((flat + 0.0).numpy(), kind="stable"))[:count]] = True
    assert torch.equal(torch.cat([got["a"].flatten(), got["b"]]), wanted)


def test_magnitude_is_what_torch_does() -> None:
    model, theirs = net(), net()
    places = [(m, "weight") for m in theirs if isinstance(m, (nn.Conv2d, nn.Linear))]
    torch_prune.global_unstructured(places, torch_prune.L1Unstructured, amount=0.6)
    result = depgraph.mask(model, sparsity=0.6)
    for i, module in enumerate(theirs):
        if hasattr(module, "weight_mask"):
            assert torch.equal(result.plan.mask(f"{i}.weight"), module.weight_mask.bool())
    again = depgraph.import_masks(theirs)
    assert zeros(again) == zeros(result)
    assert torch.equal(again.model(X), theirs(X))
    assert_zeros(again)
    out = depgraph.export_masks(result.model)
    assert torch.equal(out[5].weight_mask.bool(), result.plan.mask("5.weight"))
    assert torch.equal(out(X), result.model(X))
    with pytest.raises(depgraph.InputError, match=r"mask it with depgraph\.mask"):
        depgraph.import_masks(model)
    with pytest.raises(depgraph.InputError, match="has no masks"):
        depgraph.export_masks(model)


def test_wanda_is_its_formula() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), torch.randn(32, 6)
    plan = depgraph.mask(model, x, importance="wanda", scope="local", sparsity=1 / 3).plan
    for name, given in (("0.weight", x), ("2.weight", model[:2](x))):
        score = model.get_parameter(name).abs() * given.norm(dim=0)
        gone = score.argsort(dim=1)[:, : score.shape[1] // 3]
        assert torch.equal(plan.mask(name), torch.ones_like(score, dtype=torch.bool).scatter(1, gone, False))


def test_wanda_of_convolutions_is_that_of_their_windows() -> None:
    torch.manual_seed(0)
    for layer in (nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 3, groups=2, bias=False)):
        x = torch.randn(5, 4, 9, 9)
        plan = depgraph.mask(layer, x, importance="wanda", sparsity=0.5).plan
        windows = (
            F.unfold(x, 3, stride=layer.stride, padding=layer.padding)
            .square()
            .sum((0, 2))
            .sqrt()
            .view(4, 3, 3)
        )
        groups = windows.view(layer.groups, -1, 3, 3).repeat_interleave(6 // layer.groups, 0)
        score = (layer.weight.abs() * groups).flatten()
        gone = score.argsort()[: round(0.5 * len(score))]
        assert not plan.mask("weight").flatten()[gone].any()
        assert int(plan.mask("weight").sum()) == len(score) - len(gone)


def test_gradients_are_of_the_mean_loss() -> None:
    model, target = net().eval(), torch.tensor([0, 1, 2, 3])
    batches = [(X[:2], target[:2]), (X[2:], target[2:])]
    F.cross_entropy(model(X), target).backward()
    for importance, power in (("gradient", 0), ("taylor", 1)):
        plan = depgraph.mask(
            model, X, importance=importance, calibration=batches, loss=F.cross_entropy, sparsity=0.5
        ).plan
        flat = torch.cat([(w.detach() ** power * w.grad).abs().flatten() for w in weights(model).values()])
        kept = torch.cat([plan.mask(n).flatten() for n in weights(model)])
        assert flat[kept].min() >= flat[~kept].max() * (1 - 1e-4)


def test_patterns() -> None:
    model = net()
    plan = depgraph.mask(model, pattern=(2, 4), ignore=["0"]).plan
    for name in ("3.weight", "5.weight", "7.weight"):
        kept = plan.mask(name).flatten(1).unflatten(1, (-1, 4))
        assert (kept.sum(-1) == 2).all()
        score = model.get_parameter(name).detach().abs().flatten(1).unflatten(1, (-1, 4))
        assert (score.masked_fill(~kept, torch.inf).amin(-1) >= score.masked_fill(kept, 0).amax(-1)).all()
    plan = depgraph.mask(model, pattern=(4, 4), sparsity=0.5, ignore=["0", model[7]]).plan
    blocks = torch.cat(
        [
            plan.mask(n).flatten(1).unfold(0, 4, 4).unfold(1, 4, 4).flatten(2).flatten(0, 1)
            for n in ("3.weight", "5.weight")
        ]
    )
    assert int((~blocks.any(1)).sum()) == int((~blocks.all(1)).sum()) == len(blocks) // 2


def test_a_threshold() -> None:
    result = depgraph.mask(net(), threshold=0.05)
    for name, weight in weights(net()).items():
        assert torch.equal(result.plan.mask(name), weight.abs() >= 0.05)


def test_what_is_no_weight_stays() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.last = nn.Embedding(11, 6), nn.Linear(6, 11)
            self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
            self.position, self.one = nn.Parameter(torch.randn(1, 5, 6)), nn.Conv1d(11, 1, 1)

        def forward(self, ids: Tensor) -> Tensor:
            return self.one(self.last(self.norm(self.table(ids) + self.position)).mT)

    result = depgraph.mask(Tokens(), sparsity=0.5)
    assert list(result.plan.entries) == ["last.weight", "one.weight"]
    assert "position stays whole: it is added to every sample alike" in result.report.notes
    assert "norm.parametrizations.weight.original1 stays whole" in str(result.report.notes)


# ------------------------------------------------------------------------------------------------- zeros stay zero

OPTIMIZERS: dict[str, Callable] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, maximize=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
    "Rprop": torch.optim.Rprop,
    "Adafactor": torch.optim.Adafactor,
    "ASGD": torch.optim.ASGD,
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.01),
    "noisy": lambda p: Noisy(p),  # noqa: PLW0108  defined below
}


class Noisy(torch.optim.Optimizer):
    """Moves every entry, whatever the gradients."""

    def __init__(self, parameters: object) -> None:
        super().__init__(parameters, {})  # type: ignore[arg-type]

    def step(self, closure: Callable) -> None:  # type: ignore[override]
        closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.data += torch.randn_like(p)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3, 8, 8)).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_zero_after_any_optimizers_step(kind: str) -> None:
    result = depgraph.mask(net(), sparsity=0.5)
    model = result.model
    before = {n: w.detach().clone() for n, w in weights(model).items()}
    train(model, OPTIMIZERS[kind](model.parameters()))
    assert_zeros(result)
    assert all(not torch.equal(before[n], w) for n, w in weights(model).items())


def test_zeros_stay_zero_with_the_momentum_of_before() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    result = depgraph.mask(model, sparsity=0.5)
    result.plan.apply_to_optimizer(optimizer, model, result.model)
    assert any(optimizer.state[p]["momentum_buffer"].any() for p in result.model.parameters())
    train(result.model, optimizer)
    assert_zeros(result)


def test_zeros_stay_zero_in_copies_pickles_and_wrappers() -> None:
    result = depgraph.mask(net(), sparsity=0.5)
    file = io.BytesIO()
    torch.save(result.model, file)
    file.seek(0)
    for model in (
        copy.deepcopy(result.model), torch.load(file, weights_only=False), nn.DataParallel(result.model).module,
        torch.optim.swa_utils.AveragedModel(result.model).module,
    ):  # fmt: skip
        train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        assert_zeros(result, model)


def test_zeros_stay_zero_under_autocast_and_a_scaler() -> None:
    result = depgraph.mask(net(), sparsity=0.5)
    optimizer = torch.optim.AdamW(result.model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = result.model(X).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_zeros(result)


def test_zeros_stay_zero_in_distributed_data_parallel() -> None:
    result = depgraph.mask(net(), sparsity=0.5)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for model in (
            result.model,
            depgraph.mask(nn.parallel.DistributedDataParallel(net()), sparsity=0.5).model.module,
        ):
            wrapped = nn.parallel.DistributedDataParallel(model)
            train(wrapped, torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9))
            assert_zeros(result, model)
    finally:
        torch.distributed.destroy_process_group()


def test_zeros_stay_zero_in_tied_weights_and_lists() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.list = nn.ParameterList([torch.randn(6, 6)])

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) @ self.list[0]

    result = depgraph.mask(Tied(), sparsity=0.5)
    model = copy.deepcopy(result.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        model(torch.randn(3, 6)).sum().backward()
        optimizer.step()
    assert model.b.weight is model.a.weight
    assert_zeros(result, model)


def test_masks_have_the_first_name_of_a_tied_parameter_and_the_whole_name_of_one_in_a_list() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.list = nn.ParameterList([torch.randn(2), torch.randn(3)])

    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": second, "again": first, "inner": Inner()})
    model.own = nn.Parameter(torch.randn(2))
    square = Bits.of(torch.tensor([[True, False], [False, True]]))
    pair, three = Bits.of(torch.tensor([True, False])), Bits.of(torch.tensor([True, False, True]))
    for name in ("a.weight", "b.weight", "again.weight"):
        keep_zeros(model, {name: square, "b.bias": pair, "inner.list.1": three, "own": pair})
        assert entries_of(model) == {"a.weight": square, "b.bias": pair, "inner.list.1": three, "own": pair}
        assert entries_of(second) == {
            "weight": square,
            "bias": pair,
        }  # a part that is copied alone keeps its own
    keep_zeros(model, {"a.bias": pair})  # instead of those before
    assert entries_of(model) == {"a.bias": pair}


def test_torch_is_as_it_was_when_no_masked_model_is_left() -> None:
    import gc

    from torch.optim import optimizer as of_torch

    model = net()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    gc.collect()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer)
    assert not of_torch._global_optimizer_post_hooks
    result = depgraph.mask(model)
    assert of_torch._global_optimizer_post_hooks
    train(result.model, torch.optim.SGD(result.model.parameters(), lr=0.1))


# ------------------------------------------------------------------------------------- what is done with it afterwards


def test_a_masked_model_is_pruned_and_its_masks_follow(tmp_path: Path) -> None:
    model = net().double().eval()
    x = X.double()
    masked = depgraph.mask(model, sparsity=0.5)
    pruned = depgraph.prune(masked.model, x, pruning_ratio=0.5)
    check_result(masked.model, pruned, x)
    left = entries_of(pruned.model)
    for name, bits in left.items():
        assert bits.shape == tuple(pruned.model.get_parameter(name).shape)
        whole = masked.plan.mask(name)[pruned.plan.mask(name)]
        assert torch.equal(bits.mask().flatten(), whole)
    optimizer = torch.optim.SGD(pruned.model.parameters(), lr=0.1, momentum=0.9)
    pruned.model(x).square().mean().backward()
    optimizer.step()
    for name, bits in left.items():
        assert not pruned.model.get_parameter(name)[~bits.mask()].any()
    both = masked.plan.then(pruned.plan)
    small = depgraph.apply(model, both)
    assert {n: b.packed for n, b in entries_of(small).items()} == {n: b.packed for n, b in left.items()}
    assert depgraph.verify(model, small, both, x).status == "equal"
    for name in weights(small):
        kept = both.mask(name)[pruned.plan.mask(name)]
        assert torch.equal(small.get_parameter(name).flatten() != 0, kept)
    again = depgraph.load(lambda: net().double().eval(), depgraph.save(pruned, tmp_path / "both"))
    assert torch.equal(again(x), pruned.model(x))
    assert entries_of(again).keys() == left.keys()


def test_a_pruned_model_is_masked() -> None:
    model = net().eval()
    pruned = depgraph.prune(model, X, pruning_ratio=0.5)
    masked = depgraph.mask(pruned.model, sparsity=0.5)
    both = pruned.plan.then(masked.plan)
    small = depgraph.apply(model, both)
    assert torch.equal(small(X), masked.model(X))
    for name in weights(small):
        assert int(both.mask(name).sum()) == int(masked.plan.mask(name).sum())
    assert depgraph.verify(model, masked.model, both, X).status == "equal"


def test_a_plan_replays_and_is_read_with_suspicion() -> None:
    model = net()
    result = depgraph.mask(model, sparsity=0.5)
    text = result.plan.to_json()
    plan = depgraph.Plan.from_json(text)
    again = depgraph.apply(net(), plan)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), result.model.parameters(), strict=True))
    assert len(text) < 3000 + sum(w.numel() for w in weights(model).values()) / 4
    bits = result.plan.entries["5.weight"].to_text()
    for wrong in ("", "!!", bits[:-8], Bits.of(torch.ones(3, 3, dtype=torch.bool)).to_text()):
        with pytest.raises(depgraph.PlanError, match=r"'5\.weight' has invalid entries"):
            depgraph.Plan.from_json(text.replace(bits, wrong))
    with pytest.raises(depgraph.InputError, match=r"does not fit this model(.|\n)*fix: apply it to"):
        depgraph.apply(nn.Sequential(nn.Linear(5, 4)), plan)


def test_rewinding_to_the_weights_of_before() -> None:
    model = net()
    early = {n: t.clone() for n, t in model.state_dict().items()}
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    result = depgraph.mask(model, sparsity=0.5)
    ticket = depgraph.rewind(result.plan, early, result.model)
    for name, tensor in ticket.state_dict().items():
        kept = result.plan.mask(name)
        assert torch.equal(tensor[kept], early[name][kept])  # bit for bit
        assert not tensor[~kept].any()
    train(ticket, torch.optim.SGD(ticket.parameters(), lr=0.1, momentum=0.9))
    assert_zeros(result, ticket)
    small = depgraph.prune(result.model.eval(), X, pruning_ratio=0.5)
    ticket = depgraph.rewind(result.plan.then(small.plan), early, small.model)
    for name, bits in entries_of(small.model).items():
        assert not ticket.get_parameter(name)[~bits.mask()].any()


def test_what_was_masked_before_stays_masked_and_counts() -> None:
    first = depgraph.mask(net(), sparsity=0.5)
    train(first.model, torch.optim.SGD(first.model.parameters(), lr=0.1))
    for sparsity, wanted in ((0.7, 1831), (0.2, 1308)):
        again = depgraph.mask(first.model, sparsity=sparsity, importance="random")
        assert zeros(again) == wanted
        assert all((first.plan.mask(n) | ~again.plan.mask(n)).all() for n in weights(first.model))


def test_a_masked_model_is_fused() -> None:
    result = depgraph.mask(net().eval(), sparsity=0.5)
    fused = depgraph.fuse(result.model, X)
    assert fused.plan.fusions
    assert not fused.model[0].weight[~result.plan.mask("0.weight")].any()


# ---------------------------------------------------------------------------------------------------- step by step


def test_step_by_step_with_roll_back() -> None:
    model, seen = net(), []
    before = snapshot(model)

    def training(small: nn.Module, step: int) -> None:
        train(small, torch.optim.SGD(small.parameters(), lr=0.01, momentum=0.9))
        seen.append(sum(int((w == 0).sum()) for w in weights(small).values()))

    def score(small: nn.Module) -> float:
        return -sum(float((w == 0).sum()) for w in weights(small).values()) / 2616

    for ramp in ("linear", "cubic", "exponential", "cosine", "sinusoidal", "one_shot"):
        seen.clear()
        result = depgraph.mask_gradually(model, sparsity=0.8, steps=4, ramp=ramp, train=training)
        assert zeros(result) == seen[-1] == round(0.8 * 2616)
        assert seen == sorted(seen)
        assert [t.way for t in result.history] == [0.25, 0.5, 0.75, 1]
    assert seen == [round(0.8 * 2616)] * 4
    assert_untouched(model, before)
    result = depgraph.mask_gradually(
        model, sparsity=0.8, steps=4, ramp="linear", score=score, max_drop=0.45, backtracks=2
    )
    assert [(t.way, t.kept) for t in result.history] == [
        (0.25, True),
        (0.5, True),
        (0.75, False),
        (0.625, False),
        (0.5625, True),
    ]
    assert zeros(result) == round(0.45 * 2616)
    assert "given up" in str(result.report)
    result = depgraph.mask_gradually(model, threshold=(0.02, 0.05), steps=3)
    assert all(torch.equal(result.plan.mask(n), w.abs() >= 0.05) for n, w in weights(model).items())


def test_a_checkpoint_that_is_not_loaded(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = net()
    tensors = {n: t.contiguous() for n, t in model.state_dict().items()}
    parts = {
        "a.safetensors": [n for n in tensors if n < "3"],
        "b.safetensors": [n for n in tensors if n >= "3"],
    }
    (tmp_path / "whole").mkdir()
    for file, names in parts.items():
        save_file({n: tensors[n] for n in names}, tmp_path / "whole" / file, metadata={"format": "pt"})
    (tmp_path / "whole" / "config.json").write_text("{}")
    for options in (
        {"sparsity": 0.7},
        {"sparsity": 0.7, "scope": "local"},
        {"pattern": (2, 4), "ignore": ["0.*"]},
    ):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        plan = depgraph.mask_checkpoint(tmp_path / "whole", out, **options)
        wanted = depgraph.mask(model, **{**options, **({"ignore": ["0"]} if "ignore" in options else {})})
        got = {n: t for file in parts for n, t in load_file(out / file).items()}
        assert got.keys() == tensors.keys()
        for name, tensor in wanted.model.state_dict().items():
            assert torch.equal(got[name], tensor)
            assert torch.equal(plan.mask(name), wanted.plan.mask(name))
        assert (out / "config.json").read_text() == "{}"
        assert depgraph.Plan.from_json((out / "masks.json").read_text()).entries == plan.entries
    for folder, into, text in (
        ("whole", "whole", "exists"), ("none", "new", "no safetensors files"),
    ):  # fmt: skip
        with pytest.raises(depgraph.InputError, match=text):
            depgraph.mask_checkpoint(tmp_path / folder, tmp_path / into)
    with pytest.raises(depgraph.InputError, match="sparsity must be"):
        depgraph.mask_checkpoint(tmp_path / "whole", tmp_path / "new", sparsity=1.0)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------------- bad input

WRONG = [
    ({"sparsity": 1}, "sparsity must be from 0 to below 1, not 1"),
    ({"sparsity": -0.1}, "sparsity must be"),
    ({"sparsity": "half"}, "sparsity must be"),
    ({"sparsity": float("nan")}, "sparsity must be"),
    ({"scope": "row"}, "scope must be one of global, local"),
    ({"importance": "best"}, "importance must be a function of a weight or one of magnitude"),
    ({"importance": "wanda"}, "give example inputs"),
    ({"importance": 3}, "importance must be a function"),
    ({"importance": lambda w: w[0]}, "scores of shape"),
    ({"importance": lambda w: w * float("nan")}, "NaN"),
    ({"pattern": (2, 5)}, "pattern \\(2, 5\\) does not divide(.|\n)*fix: leave them alone, ignore="),
    ({"pattern": (32, 32)}, "does not divide"),
    ({"pattern": (4, 2)}, "pattern \\(4, 2\\)"),
    ({"pattern": 2}, "pattern must be two whole numbers"),
    ({"pattern": (2, 4), "sparsity": 0.7}, "means a sparsity of 0.5"),
    ({"ignore": ["nothing"]}, "'nothing' is no module or parameter"),
    ({"ignore": ["*"]}, "there is no weight to mask"),
    ({"threshold": 0.1, "sparsity": 0.3}, "leave sparsity and pattern away"),
]


@pytest.mark.parametrize(
    ("options", "text"), WRONG, ids=[" ".join(o) + f" {i}" for i, (o, _) in enumerate(WRONG)]
)
def test_bad_input(options: dict, text: str) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(depgraph.InputError, match=text):
        depgraph.mask(model, **options)
    assert_untouched(model, before)


@pytest.mark.parametrize("start", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 200, 10))])
def test_random_networks(start: int) -> None:
    """Random masks: the masked model is the original with those entries zero, and pruned, it equals that."""
    for seed in range(start, start + (10 if start else 3)):
        dice, (model, inputs) = random.Random(seed), random_network(seed)
        importance = dice.choice(["magnitude", "random", "taylor", "wanda"])
        result = depgraph.mask(
            model, inputs, sparsity=dice.choice([0.1, 0.5, 0.9]), scope=dice.choice(["global", "local"]), importance=importance,
        )  # fmt: skip
        reference = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                parameter *= result.plan.mask(name)
        pairs = zip(
            output_tensors(call(result.model, inputs)), output_tensors(call(reference, inputs)), strict=True
        )
        assert all(torch.equal(got, wanted) for got, wanted in pairs), seed
        if seed % 2 and result.report.parameters[1]:
            try:
                pruned = depgraph.prune(result.model, inputs, pruning_ratio=0.3, verify=False)
            except depgraph.NothingToPruneError:
                continue
            check_result(reference, pruned, inputs, 1e-8)
