"""Callbacks: a trainer's own network gets smaller while it trains, and its optimizer goes on."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vision_ops  # noqa: F401  # makes torchvision importable, for what imports it
from torch import nn

import depgraph
from depgraph.integrations.hosted import InPlacePruner, adopt


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(5, 22), nn.BatchNorm1d(22), nn.ReLU(), nn.Linear(22, 13), nn.ReLU(), nn.Linear(13, 3)
    )


def data(batches: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    dice = torch.Generator().manual_seed(7)
    x = torch.randn(batches * 8, 5, generator=dice)
    y = (x @ torch.randn(5, 3, generator=dice)).argmax(1)
    return list(zip(x.split(8), y.split(8), strict=True))


OPTIONS = {"every": 3, "steps": 2, "ramp": "linear", "pruning_ratio": 0.5, "start": 2}
WIDTHS = [(22, 13)] * 2 + [(17, 10)] * 3 + [(11, 7)] * 7  # while batches 0, 1, ... are trained on


def plain_run(batches: Any = None) -> tuple[nn.Module, list[float], torch.optim.Optimizer]:
    """What the callbacks have to do, by hand: GradualPruner between steps of one optimizer."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    pruner = depgraph.GradualPruner(model, torch.zeros(2, 5), **{k: v for k, v in OPTIONS.items() if k not in ("every", "start")})  # fmt: skip
    losses, done = [], False
    for step, (x, y) in enumerate(data() if batches is None else batches, 1):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if step >= 2 and (step - 2) % 3 == 0 and not done:
            result = pruner.step(model, optimizer)
            model, done = result.model, result.done
    return model, losses, optimizer


def hosted_run(hosted: InPlacePruner, model: nn.Module) -> tuple[list[float], list[tuple[int, int]]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses, widths = [], []
    hosted.begin(model)
    for step, (x, y) in enumerate(data(), 1):
        widths.append((model[0].out_features, model[3].out_features))
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        hosted.after_step(model, [optimizer], step)
    return losses, widths


def test_the_object_that_is_trained_gets_smaller_as_a_new_one_would() -> None:
    model, hosted = net(), InPlacePruner(torch.zeros(2, 5), **OPTIONS)
    losses, widths = hosted_run(hosted, model)
    expected, wanted, _ = plain_run()
    assert losses == wanted
    assert widths == WIDTHS
    assert hosted.done
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    again = depgraph.apply(net(), depgraph.Plan.from_json(hosted.plan.to_json()))
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in model.parameters()]


def test_a_network_inside_another_object() -> None:
    """The trainer's reference to the part stays good, and modes of the root follow the host's."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = net()

    whole = Whole().train()
    part = whole.part
    hosted = InPlacePruner(torch.zeros(2, 5), every=1, steps=1, pruning_ratio=0.5)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    hosted.begin(part)
    assert hosted.after_step(part, [optimizer], 1)
    assert whole.part is part
    assert part[0].out_features == 11
    assert {id(p) for p in whole.parameters()} == {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert part.training


class Written(nn.Module):
    """A size as a number in the forward of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one, self.two = nn.Linear(5, 22), nn.Linear(11, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        return self.two(y[:, :11].relu() * y[:, 11:])

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(x), y)


@pytest.mark.slow
def test_a_network_whose_own_forward_is_rewritten() -> None:
    """The object has the new forward, keeps its methods, and goes on from a checkpoint."""
    model, hosted = Written(), InPlacePruner(torch.zeros(2, 5), **OPTIONS)
    methods = model.loss  # what somebody holds on to
    by_hand = Written()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, by_hand)]
    pruner = depgraph.GradualPruner(by_hand, torch.zeros(2, 5), steps=2, ramp="linear", pruning_ratio=0.5)
    hosted.begin(model)
    done, widths = False, []
    for step, (x, y) in enumerate(data(), 1):
        losses = [methods(x, y), F.cross_entropy(by_hand(x), y)]
        assert losses[0].equal(losses[1])
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        hosted.after_step(model, optimizers[:1], step)
        if step >= 2 and (step - 2) % 3 == 0 and not done:
            result = pruner.step(by_hand, optimizers[1])
            by_hand, done = result.model, result.done
        widths.append(model.one.out_features)
        if step == 6:
            state, weights = json.loads(json.dumps(hosted.state_dict())), copy.deepcopy(model.state_dict())
            wanted = model(x)
    assert widths == [22] + [18] * 3 + [12] * 8
    assert isinstance(model, Written)
    again, later = Written(), InPlacePruner(torch.zeros(2, 5), **OPTIONS)
    later.resume(again, state)
    again.load_state_dict(weights)
    assert torch.equal(again(data()[5][0]), wanted)
    assert Written()(x).shape == (8, 3), "the class itself is not touched"


def test_regularisers_act_until_the_last_step_and_are_made_anew() -> None:
    """Weight decay on everything by a factor, counted by hand."""
    made = []

    class Shrinking:
        def __init__(self, graph: Any) -> None:
            self.parameters = [p for _, p in graph.model.named_parameters()]
            self.rates: list[float] = []
            made.append(self)

        def step(self, lr: float) -> None:
            self.rates.append(lr)
            for p in self.parameters:
                p.data.mul_(0.5)

    model = net()
    hosted = InPlacePruner(
        torch.zeros(2, 5), every=2, steps=2, ramp="linear", pruning_ratio=0.5, regulariser=Shrinking
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    hosted.begin(model)
    before = model[5].bias.detach().clone()
    for step in range(1, 9):
        hosted.after_step(model, [optimizer], step)
    # After steps 1 to 6: the third pruning step (the sixth of the optimizer) finds nothing left to do.
    assert torch.equal(model[5].bias, before * 0.5**6)
    assert [m.rates for m in made] == [[0.25, 0.25]] * 3


@pytest.mark.slow
def test_a_run_that_is_taken_up_again_ends_like_one_that_was_not() -> None:
    """State of the pruner, weights and optimizer through a checkpoint, at each step of the way."""
    for stop in (1, 3, 6, 10):
        model, hosted = net(), InPlacePruner(torch.zeros(2, 5), **OPTIONS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        hosted.begin(model)
        checkpoint: dict[str, Any] = {}
        for step, (x, y) in enumerate(data(), 1):
            if step == stop + 1:  # a new process: fresh objects
                model, hosted = net(), InPlacePruner(torch.zeros(2, 5), **OPTIONS)
                hosted.resume(model, json.loads(checkpoint["pruning"]))
                model.load_state_dict(checkpoint["model"])
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
                optimizer.load_state_dict(checkpoint["optimizer"])
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            hosted.after_step(model, [optimizer], step)
            if step == stop:
                checkpoint = {
                    "model": copy.deepcopy(model.state_dict()),
                    "optimizer": copy.deepcopy(optimizer.state_dict()),
                    "pruning": json.dumps(hosted.state_dict()),
                }
        expected, _, _ = plain_run()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), (stop, name)
        wanted = InPlacePruner(torch.zeros(2, 5), **OPTIONS)
        hosted_run(wanted, net())
        assert hosted.done
        assert hosted.plan.to_json() == wanted.plan.to_json()


def test_bad_input() -> None:
    with pytest.raises(depgraph.InputError, match="every"):
        InPlacePruner(torch.zeros(2, 5), every=0)
    with pytest.raises(depgraph.InputError, match="start"):
        InPlacePruner(torch.zeros(2, 5), every=1, start=-1)
    model = net()
    hosted = InPlacePruner(torch.zeros(2, 5), every=1)
    with pytest.raises(depgraph.DepgraphError, match="begin"):
        hosted.after_step(model, [], 1)
    hosted.begin(model)
    stranger = torch.optim.SGD(net().parameters(), lr=0.1)
    with pytest.raises(depgraph.InputError, match="0 optimizers"):
        hosted.after_step(model, [stranger], 1)
    with pytest.raises(depgraph.PlanError, match="callback"):
        hosted.resume(model, {"other": 1})
    with pytest.raises(depgraph.PlanError, match="GradualPruner"):
        hosted.resume(model, {"pruner": {"plan": 3}, "done": False})
    with pytest.raises(depgraph.InputError, match="can't become"):
        adopt(net(), nn.Linear(5, 3))


# ------------------------------------------------------------------------------------------------- Lightning


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the trainer, about itself
def test_lightning(tmp_path: Any) -> None:
    """Losses, weights and widths of a run by hand; a checkpoint on the way, taken up by fresh objects."""
    lightning = pytest.importorskip("lightning.pytorch")
    from depgraph.integrations.lightning import Pruning

    seen: list[float] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            seen.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    def fit(module: Any, pruning: Any, steps: int, path: Any = None) -> Any:
        trainer = lightning.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[pruning],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data()[:1], batch_size=None), ckpt_path=path)
        return trainer

    expected, losses, _ = plain_run(
        data()[:1] * 12
    )  # one batch: where Lightning goes on in an epoch is its own affair
    module, pruning = Module(), Pruning(torch.zeros(2, 5), network="net", **OPTIONS)
    fit(module, pruning, 12)
    assert seen == losses
    assert all(torch.equal(module.net.state_dict()[n], t) for n, t in expected.state_dict().items())

    seen.clear()
    module, pruning = Module(), Pruning(torch.zeros(2, 5), network="net", **OPTIONS)
    fit(module, pruning, 6).save_checkpoint(tmp_path / "half.ckpt")
    module, pruning = Module(), Pruning(torch.zeros(2, 5), network="net", **OPTIONS)
    pruning.resume(module, tmp_path / "half.ckpt")
    assert module.net[0].out_features == 11
    fit(module, pruning, 12, tmp_path / "half.ckpt")
    assert seen == losses
    assert pruning.hosted.done


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the trainer, about itself
def test_a_whole_lightning_module() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from depgraph.integrations.lightning import Pruning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 22), nn.Linear(22, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x).relu())

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            assert self.trainer.global_step == index
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    module = Module()
    pruning = Pruning(torch.zeros(2, 5), every=2, steps=2, max_params=0.5)
    trainer = lightning.Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[pruning],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=None))
    assert pruning.hosted.done
    assert sum(p.numel() for p in module.parameters()) <= 0.5 * sum(p.numel() for p in Module().parameters())
    assert trainer.optimizers[0].param_groups[0]["params"] == list(module.parameters())


def step_by_hand(model: nn.Module, teacher: nn.Module, batch: Any, alpha: float) -> torch.Tensor:
    """alpha * T^2 * KL(teacher || student) at T = 1.7, and the rest on the targets."""
    x, y = batch
    logits = model(x)
    with torch.no_grad():
        p = torch.log_softmax(teacher(x) / 1.7, -1)
    soft = (p.exp() * (p - torch.log_softmax(logits / 1.7, -1))).sum(-1).mean() * 1.7**2
    return alpha * soft + (1 - alpha) * F.cross_entropy(logits, y)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the trainer, about itself
@pytest.mark.parametrize("way", ["tensor", "dict", "whole"])
def test_distilling_in_lightning(way: str) -> None:
    """Weights of a run by hand, with pruning on the way; afterwards everything is as it was."""
    lightning = pytest.importorskip("lightning.pytorch")
    from depgraph.integrations.lightning import Distilling, Pruning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Any:
            with torch.no_grad():
                self.net[0](batch[0])  # of no account
            logits = self(batch[0]) if way == "whole" else self.net(batch[0])
            with torch.no_grad():
                self.eval()
                self(batch[0] + 1)  # likewise: no gradient
                self.train()
            loss = F.cross_entropy(logits, batch[1])
            return {"loss": loss, "more": 1} if way == "dict" else loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    teacher = net()
    with torch.no_grad():
        teacher[5].weight.mul_(3)
    teacher.train()
    before = copy.deepcopy(teacher.state_dict())
    name = "" if way == "whole" else "net"
    distilling = Distilling(teacher, network=name, temperature=1.7, alpha=0.3)
    pruning = Pruning(torch.zeros(2, 5), network=name, **OPTIONS)
    module = Module()
    trainer = lightning.Trainer(
        max_steps=9, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[distilling, pruning],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data(9), batch_size=None))

    model, by_hand = net(), copy.deepcopy(teacher).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    hosted = InPlacePruner(torch.zeros(2, 5), **OPTIONS)
    hosted.begin(model)
    for step, batch in enumerate(data(9), 1):
        loss = step_by_hand(model, by_hand, batch, 0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hosted.after_step(model, [optimizer], step)
    assert model[0].out_features == module.net[0].out_features == 11
    for key, value in model.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    assert "training_step" not in vars(module)
    assert "training_step" not in vars(pruning.hosted.result.model)
    assert not module._forward_hooks
    assert not module.net._forward_hooks


@pytest.mark.filterwarnings("ignore")  # of the trainer, about itself
def test_what_lightning_can_not_distil_is_refused() -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from depgraph.integrations.lightning import Distilling

    class Module(lightning.LightningModule):
        def __init__(self, automatic: bool) -> None:
            super().__init__()
            self.net, self.automatic_optimization = net(), automatic

        def training_step(self, batch: Any, index: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    for automatic, match in ((True, "did not call forward"), (False, "calls its optimizers itself")):
        module = Module(automatic)
        trainer = lightning.Trainer(
            max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[Distilling(net())],
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with pytest.raises(depgraph.InputError, match=match):
            trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=None))
        assert "training_step" not in vars(module)
    for bad in ({"alpha": 1.5}, {"temperature": 0.0}):
        with pytest.raises(depgraph.InputError, match="must be"):
            Distilling(net(), **bad)


# ---------------------------------------------------------------------------------------------- transformers


def trainer_of(
    model: nn.Module, folder: Any, steps: int, callbacks: Any = (), kind: Any = None, **options: Any
) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    dice = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 29, (16, 11), generator=dice)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=0.01, report_to=[],
        use_cpu=True, disable_tqdm=True, save_steps=4, logging_steps=1, seed=5, lr_scheduler_type="linear",
    )  # fmt: skip
    return (kind or transformers.Trainer)(
        model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks), **options
    )


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=29, hidden_size=24, intermediate_size=34, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def losses_of(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the trainer, about itself
def test_transformers_trainer(tmp_path: Any) -> None:
    """Smaller while it trains; it can be saved, and a checkpoint on the way, taken up by fresh objects, ends alike."""
    pytest.importorskip("transformers")
    from depgraph.integrations import hugging_face
    from depgraph.integrations.transformers import Pruning

    inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.long)}
    options = {"every": 2, "start": 2, "steps": 2, "pruning_ratio": 0.5, "ramp": "linear"}
    model, pruning = llama(), Pruning(inputs, **options)
    whole = trainer_of(model, tmp_path / "whole", 8, [pruning])
    whole.train()
    assert pruning.hosted.done
    assert model.config.intermediate_size == model.model.layers[0].mlp.gate_proj.out_features == 17
    widths = [p.shape for p in depgraph.apply(llama(), pruning.hosted.plan).parameters()]
    assert [p.shape for p in model.parameters()] == widths
    assert whole.model is model
    hugging_face.save_pretrained(whole.model, tmp_path / "saved")
    loaded = hugging_face.load_pretrained(type(model), tmp_path / "saved").eval()
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)
    plain = trainer_of(llama(), tmp_path / "plain", 8)
    plain.train()
    assert losses_of(plain)[:2] == losses_of(whole)[:2]  # until the first pruning step
    assert losses_of(plain)[2:] != losses_of(whole)[2:]

    again, later = llama(), Pruning(inputs, **options)
    later.resume(again, tmp_path / "whole/checkpoint-4")
    assert again.model.layers[0].mlp.gate_proj.out_features == 17
    rest = trainer_of(again, tmp_path / "again", 8, [later])
    rest.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-4"))
    assert losses_of(rest) == losses_of(whole)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with pytest.raises(depgraph.PlanError, match="without this callback"):
        Pruning(inputs, **options).resume(llama(), tmp_path / "plain/checkpoint-4")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_stock_folder_after_training(tmp_path: Any) -> None:
    """What a trainer notes in the model is no size: the folder is as stock as before it trained."""
    transformers = pytest.importorskip("transformers")
    from depgraph.integrations import hugging_face

    inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.long)}
    result = depgraph.prune(llama(), inputs, max_params=0.7, uniform=True)
    trainer = trainer_of(result.model, tmp_path / "run", 3)
    trainer.train()
    assert hugging_face.save_pretrained(trainer.model, tmp_path / "saved") == []
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_reload_and_merge(tmp_path: Any, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "up_proj"], **options)
    model = peft.get_peft_model(llama(), config).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.long)}
    small = depgraph.prune(model, inputs, max_params=0.6).model
    assert {p.shape[0] for n, p in small.named_parameters() if "lora_A" in n} == {8}
    wanted = small(**inputs).logits
    small.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(small).unload(), tmp_path / "adapter").eval()
    assert torch.equal(again(**inputs).logits, wanted)
    assert torch.allclose(small.merge_and_unload()(**inputs).logits, wanted, atol=1e-5)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_distilling_trainer(tmp_path: Any, accumulated: int) -> None:
    """The gradient of a step is that of the formula, also where batches are gathered."""
    pytest.importorskip("transformers")
    from depgraph.integrations.transformers import DistillingTrainer

    teacher, model = llama(), llama()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(3)
    trainer = trainer_of(
        model, tmp_path, 1, kind=DistillingTrainer, teacher=teacher, temperature=1.7, alpha=0.3
    )
    trainer.args.gradient_accumulation_steps = accumulated
    dice = torch.Generator().manual_seed(9)
    parts = [
        {"input_ids": (ids := torch.randint(0, 29, (3, 11), generator=dice)), "labels": ids}
        for _ in range(accumulated)
    ]
    count = torch.tensor(sum(int((p["labels"][:, 1:] != -100).sum()) for p in parts))
    model.eval()
    got = sum(trainer.compute_loss(model, dict(part), num_items_in_batch=count) for part in parts)
    hard = soft = 0.0
    for part in parts:
        logits, aim = model(part["input_ids"]).logits, teacher(part["input_ids"]).logits
        hard += (
            F.cross_entropy(logits[:, :-1].flatten(0, 1), part["labels"][:, 1:].flatten(), reduction="sum")
            / count
        )
        p, q = (torch.log_softmax(t / 1.7, -1) for t in (aim, logits))
        soft += (p.exp() * (p - q)).sum(-1).mean() * 1.7**2 / accumulated
    assert abs(float((got - (0.3 * soft + 0.7 * hard)).detach())) < 1e-5
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("library", "fix"), [("lightning", "pip install lightning"), ("transformers", "pip install")]
)
def test_what_is_missing_is_named(library: str, fix: str, monkeypatch: Any) -> None:
    import builtins
    import importlib
    import sys

    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.partition(".")[0] == library and not (len(rest) == 4 and rest[3]):  # not a relative one
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.delitem(sys.modules, f"depgraph.integrations.{library}", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(depgraph.DepgraphError, match=fix):
        importlib.import_module(f"depgraph.integrations.{library}")


def sandwich_by_hand(steps: int) -> depgraph.Elastic:
    elastic = depgraph.Elastic(net(), torch.zeros(2, 5))
    elastic.train()
    optimizer = torch.optim.AdamW(elastic.parameters(), lr=0.01)
    for batch in data(steps):
        loss = elastic.sandwich(batch, F.cross_entropy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return elastic


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the trainer, about itself
def test_all_sizes_train_in_lightning() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.elastic = depgraph.Elastic(net(), torch.zeros(2, 5))

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.elastic.sandwich(batch, F.cross_entropy)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(data(6), batch_size=None))
    wanted = sandwich_by_hand(6)
    x = data()[0][0]
    for size in wanted.sizes:
        assert torch.equal(module.elastic.eval().at(size)(x), wanted.eval().at(size)(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the trainer, about itself
def test_all_sizes_train_in_a_trainer(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from test_hugging_face import llama

    ids = torch.randint(1, 97, (8, 7), generator=torch.Generator().manual_seed(3))
    elastic = depgraph.Elastic(llama(), {"input_ids": ids[:1]}, sizes=[1, 0.7], cost="params")

    class Sandwich(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
            return elastic.sandwich(inputs, lambda out: out.loss, largest=model)

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True,
    )  # fmt: skip
    before = elastic.at(0.7)(ids).logits.detach()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Sandwich(elastic.model, arguments, train_dataset=rows).train()
    elastic.eval()
    with torch.no_grad():
        assert torch.equal(elastic.at(0.7)(ids).logits, elastic.extract(0.7)(ids).logits)
        assert not torch.equal(elastic.at(0.7)(ids).logits, before)
