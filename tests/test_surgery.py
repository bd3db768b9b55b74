"""What modules remember of their sizes says what their weights are, after pruning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checks import prune_and_check
from torch import Tensor, nn

from depgraph.plan.plan import Repair
from depgraph.surgery.apply import TABLE, _repair_standard, follows_weight, repeated_size
from depgraph.surgery.copied import what_copies_need


class Between(nn.Module):
    """first -> `part` -> last, all of which can shrink: 14 channels before the part, what it puts out behind it."""

    def __init__(self, part: nn.Module, out: int) -> None:
        super().__init__()
        self.first, self.part, self.last = nn.Linear(5, 14), part, nn.Linear(out, 3)

    def middle(self, y: Tensor) -> Tensor:
        return self.part(y)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


class Pairs(Between):
    """The part is given its input twice."""

    def middle(self, y: Tensor) -> Tensor:
        return self.part(y, y.tanh())


class Channels(Between):
    """The part is given tokens as positions, channels before them."""

    def middle(self, y: Tensor) -> Tensor:
        return self.part(y.mT).mT


class Sequences(Between):
    """The part returns a state beside its output."""

    def middle(self, y: Tensor) -> Tensor:
        return self.part(y)[0]


class Words(nn.Module):
    """Words are looked up."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.last = part, nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(x))


X, WORDS = torch.randn(4, 6, 5).double(), torch.arange(12).view(3, 4)
# Each has an attribute for every size that it was built with, under the name of the argument.
CASES: dict[str, tuple[nn.Module, Any, tuple[str, ...]]] = {
    "linear": (Between(nn.Linear(14, 22), 22), X, ("in_features", "out_features")),
    "embedding": (Words(nn.Embedding(19, 14)), WORDS, ("num_embeddings", "embedding_dim")),
    "embedding bag": (Words(nn.EmbeddingBag(19, 14, mode="sum")), WORDS, ("num_embeddings", "embedding_dim")),
    "batch norm": (Channels(nn.BatchNorm1d(14), 14), X, ("num_features",)),
    "batch norm without weights": (Channels(nn.BatchNorm1d(14, affine=False), 14), X, ("num_features",)),
    "group norm": (Channels(nn.GroupNorm(2, 14), 14), X, ("num_groups", "num_channels")),
    "slopes": (Channels(nn.PReLU(14), 14), X, ("num_parameters",)),
    "one slope": (Channels(nn.PReLU(), 14), X, ("num_parameters",)),
    "bilinear": (Pairs(nn.Bilinear(14, 14, 22), 22), X, ("in1_features", "in2_features", "out_features")),
    "cell": (Between(nn.GRUCell(14, 22), 22), X[0], ("input_size", "hidden_size")),
    "recurrent": (Sequences(nn.LSTM(14, 22, batch_first=True), 22), X, ("input_size", "hidden_size")),
    "convolution": (Channels(nn.Conv1d(14, 22, 3), 22), X, ("in_channels", "out_channels", "kernel_size")),
    "transposed": (Channels(nn.ConvTranspose1d(14, 22, 3), 22), X, ("in_channels", "out_channels", "kernel_size")),
}  # fmt: skip
OPTIONS = {"batch norm without weights": {"affine": False}}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_a_module_built_from_what_it_remembers_has_the_shapes_that_it_has(kind: str) -> None:
    model, x, names = CASES[kind]
    part = prune_and_check(model.double().eval(), x, pruning_ratio=0.5).model.part
    again = type(part)(**{name: getattr(part, name) for name in names}, **OPTIONS.get(kind, {}))
    shapes = {name: tensor.shape for name, tensor in part.state_dict().items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes
    assert kind == "one slope" or shapes != {n: t.shape for n, t in model.part.state_dict().items()}


def test_no_module_that_is_repaired_is_left_out() -> None:
    """A row of the table without a case above would be one that no test guards."""
    parts = [model.part for model, _, _ in CASES.values()]
    assert [kind for kind in TABLE if not any(isinstance(part, kind) for part in parts)] == []


ROWS: list[tuple[nn.Module, str, str, int]] = [  # attribute, tensor, dim
    (nn.Linear(2, 3), "in_features", "weight", 1), (nn.Linear(2, 3), "out_features", "weight", 0),
    (nn.Embedding(2, 3), "num_embeddings", "weight", 0), (nn.Embedding(2, 3), "embedding_dim", "weight", 1),
    (nn.EmbeddingBag(2, 3), "num_embeddings", "weight", 0), (nn.EmbeddingBag(2, 3), "embedding_dim", "weight", 1),
    (nn.BatchNorm2d(3), "num_features", "weight", 0), (nn.InstanceNorm1d(3, affine=True), "num_features", "weight", 0),
    (nn.GroupNorm(1, 3), "num_channels", "weight", 0), (nn.PReLU(3), "num_parameters", "weight", 0),
    (nn.Bilinear(2, 3, 4), "in1_features", "weight", 1), (nn.Bilinear(2, 3, 4), "in2_features", "weight", 2),
    (nn.Bilinear(2, 3, 4), "out_features", "weight", 0),
    (nn.GRUCell(2, 3), "input_size", "weight_ih", 1), (nn.GRUCell(2, 3), "hidden_size", "weight_hh", 1),
    (nn.LSTM(2, 3), "input_size", "weight_ih_l0", 1),
    (nn.Conv1d(2, 3, 1), "in_channels", "weight", 1), (nn.Conv1d(2, 3, 1), "out_channels", "weight", 0),
    (nn.ConvTranspose1d(2, 3, 1), "in_channels", "weight", 0), (nn.ConvTranspose1d(2, 3, 1), "out_channels", "weight", 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "attribute", "tensor", "dim"), ROWS, ids=[f"{type(m).__name__}.{a}" for m, a, _, _ in ROWS]
)
def test_the_size_that_an_attribute_repeats_is_known_and_set(
    module: nn.Module, attribute: str, tensor: str, dim: int
) -> None:
    assert repeated_size(module, attribute) == (tensor, dim)
    assert follows_weight(module, attribute)
    assert getattr(module, attribute) == getattr(module, tensor).shape[dim]
    module = copy.deepcopy(module)
    weight = getattr(module, tensor)
    setattr(module, tensor, nn.Parameter(weight.detach().repeat_interleave(2, dim)))
    if isinstance(module, nn.BatchNorm2d):
        module.running_mean = torch.zeros(6)
    others = {a: getattr(module, a) for m, a, _, _ in ROWS if type(m) is type(module) and a != attribute}
    before = getattr(module, attribute)
    _repair_standard(nn.Sequential(nn.ReLU(), module))
    assert getattr(module, attribute) == 2 * before
    assert {a: getattr(module, a) for a in others} == others


def test_what_repeats_no_size_of_a_tensor() -> None:
    grouped = nn.Conv1d(4, 6, 1, groups=2)
    for module, attribute in (
        (grouped, "in_channels"), (grouped, "out_channels"), (nn.Conv1d(2, 3, 1), "kernel_size"), (nn.Linear(2, 3), "num_features"),
        (nn.ReLU(), "in_features"), (nn.LSTM(2, 3), "hidden_size"),
    ):  # fmt: skip
        assert repeated_size(module, attribute) is None
    assert follows_weight(grouped, "in_channels")
    assert not follows_weight(grouped, "groups")
    assert not follows_weight(nn.ReLU(), "in_features")
    grouped.weight = nn.Parameter(torch.zeros(8, 3, 1))
    _repair_standard(grouped)
    assert (grouped.in_channels, grouped.out_channels) == (6, 8)


class Split(nn.Module):
    """Splits heads; it is copied and pickled by what it was built from, and reads what that was turned into."""

    def __init__(self, **lengths: int) -> None:
        super().__init__()
        self.lengths = lengths
        self.pairs = tuple(lengths.items())

    def __getstate__(self) -> dict[str, Any]:
        return {"lengths": self.lengths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["lengths"])

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.pairs[0][1], -1)).transpose(1, 2)


class SplitAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 24) for _ in range(3))
        self.split, self.o = Split(h=4), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(t) for t in (self.q(x), self.k(x), self.v(x)))
        return self.o(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_modules_that_are_copied_in_a_way_of_their_own_keep_their_new_sizes():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    result = prune_and_check(SplitAttention().double().eval(), x.double())
    assert result.model.split.lengths == {"h": 2}
    assert result.model.q.out_features == 12
    again = copy.deepcopy(result.model)
    assert torch.equal(again(x.double()), result.model(x.double()))


class NoCopies(Split):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("it can't be copied")


def test_what_a_copy_is_made_from_is_repaired_with_what_it_was_turned_into() -> None:
    pairs = Repair("split", "pairs", (0, 1), 2, 4)
    lengths = Repair("split", "lengths", ("h",), 2, 4)

    def needed(split: nn.Module, *repairs: Repair) -> list[Repair]:
        return what_copies_need(nn.ModuleDict({"split": split}), repairs)

    assert needed(Split(w=3, h=5), Repair("split", "pairs", (1, 1), 2, 5)) == [
        Repair("split", "lengths", ("h",), 2, 5)
    ]
    assert needed(Split(h=4, w=4), pairs) == [lengths]  # of two equal numbers the one that helps
    assert needed(Split(h=4), pairs, lengths) == []
    assert needed(NoCopies(h=4), pairs) == []
    assert needed(nn.Linear(4, 4), Repair("split", "in_features", (), 2, 4)) == []
