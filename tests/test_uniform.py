"""`uniform=True`: what one number of a config, or a loop, says stays one number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from oracle import assert_equal_to_masked
from torch import Tensor, nn
from torch.nn import functional as F

import depgraph
from depgraph.base.errors import BudgetError


@dataclass
class Config:
    """Sizes of a small transformer; `heads` of `hidden // heads`, and `grow` times `hidden` inside."""

    hidden: int = 24
    heads: int = 6
    inner: int = 34
    grow: int = 2
    layers: int = 2
    classes: int = 3


class Layer(nn.Module):
    """Attention, and two gated layers after it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.hidden
        self.head = width // config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, config.inner), nn.Linear(config.inner, width)
        self.wide, self.narrow = nn.Linear(width, config.grow * width), nn.Linear(config.grow * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.view(*t.shape[:2], -1, self.head).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(split(self.q(x)), split(self.k(x)), split(self.v(x)))
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(self.up(x).relu())
        return self.norm(x + self.narrow(self.wide(x).relu()))


class Encoder(nn.Module):
    """Returns the hidden state: no config can say fewer heads without a narrower state."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Linear(5, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Classifier(Encoder):
    """The same with a head."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.last = nn.Linear(config.hidden, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x).mean(1))


class Residual(nn.Module):
    """Blocks in a row without a config, one of whose inner widths matters less than the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(7, 22), nn.ReLU(), nn.Linear(22, 7)) for _ in range(3)
        )
        with torch.no_grad():
            for n, block in enumerate(self.blocks):
                block[0].weight[: 5 * n] *= 0.01
                block[2].weight[:, : 5 * n] *= 0.01

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


HALF, PARAMETERS, MACS = {"pruning_ratio": 0.5}, {"max_params": 0.6}, {"max_macs": 0.8}


# With the hidden state among the outputs no plan has 0.6 of the parameters: `test_a_kept_state_bounds_what_can_go`.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how"),
    [(Encoder, HALF), (Encoder, MACS), (Classifier, HALF), (Classifier, PARAMETERS), (Classifier, MACS)],
)
def test_the_class_builds_the_result_from_its_config(kind: type[Encoder], how: dict) -> None:
    """The class called with the changed config makes the shapes of the result, and takes its weights."""
    torch.manual_seed(0)
    model, x = kind(Config()).double().eval(), torch.randn(2, 11, 5).double()
    result = depgraph.prune(model, x, uniform=True, **how)
    config = result.model.config
    again = kind(config).double()
    assert shapes(again) == shapes(result.model)
    again.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(again.eval()(x), result.model(x))
    assert not result.report.config_mismatches
    assert config != Config()
    assert config.inner == 17 or "pruning_ratio" not in how
    assert config.hidden == 24 if kind is Encoder else config.hidden < 24
    assert bool(result.report.locked) == (
        kind is Encoder
    )  # its heads, which only the config's one width holds
    assert_equal_to_masked(model, result, x)


@pytest.mark.slow
def test_a_kept_state_bounds_what_can_go() -> None:
    """Of an encoder only the inner width can shrink, to one unit: the error says what is left then."""
    torch.manual_seed(0)
    model = Encoder(Config()).eval()
    unit = 2 * (24 + 1 + 24)  # row, bias and column of one inner unit in both layers
    least = sum(p.numel() for p in model.parameters()) - 33 * unit
    with pytest.raises(BudgetError, match=f"{least:,} remain"):
        depgraph.prune(model, torch.randn(2, 11, 5), max_params=0.6, uniform=True)


def test_without_it_a_kept_state_loses_heads_alone() -> None:
    """The default removes more, and says that no config describes it."""
    torch.manual_seed(0)
    result = depgraph.prune(Encoder(Config()).eval(), torch.randn(2, 11, 5), pruning_ratio=0.5)
    assert result.model.layers[0].q.out_features == 12
    assert result.report.config_mismatches


def test_repeated_blocks_get_one_width_and_keep_their_own_best() -> None:
    """A global budget takes as much from each block, though not the same units."""
    torch.manual_seed(0)
    model, x = Residual().double().eval(), torch.randn(2, 5).double()
    own = depgraph.prune(model, x, max_params=0.75)
    assert len({block[0].out_features for block in own.model.blocks}) > 1
    even = depgraph.prune(model, x, max_params=0.75, uniform=True)
    (width,) = {block[0].out_features for block in even.model.blocks}
    assert width < 22
    assert_equal_to_masked(model, even, x)
    kept = [even.plan.mask(f"blocks.{n}.0.bias") for n in range(3)]
    assert not kept[2][:10].any() or int(kept[2].sum()) > 12  # the weak ones of the last block go first
    assert (kept[0] != kept[2]).any()


class Copying(Classifier):
    """Forward reads every number of the config, for nothing."""

    def forward(self, x: Tensor) -> Tensor:
        numbers = {name: getattr(self.config, name) for name in vars(self.config)}
        return super().forward(x) if numbers else x


class Repeating(Classifier):
    """Forward computes with a number of the config, where no size shows it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * sum(1 for _ in range(self.config.inner))


@pytest.mark.slow
def test_numbers_that_forward_reads_follow_where_the_outputs_allow_it() -> None:
    """Reading is no use; a use is found by verification, and then the width that the number says stays."""
    torch.manual_seed(0)
    x = torch.randn(2, 11, 5).double()
    model = Copying(Config()).double().eval()
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.model.config.inner == 17
    assert not result.report.config_mismatches
    model = Repeating(Config()).double().eval()
    result = depgraph.prune(model, x, pruning_ratio=0.5)
    assert result.model.config.inner == 34
    assert result.model.layers[0].up.out_features == 17
    assert_equal_to_masked(model, result, x)
    result = depgraph.prune(model, x, pruning_ratio=0.5, uniform=True)
    assert result.model.config.inner == result.model.layers[0].up.out_features == 34
    assert not result.report.config_mismatches
    assert_equal_to_masked(model, result, x)


class Rounded(nn.Module):
    """Attention whose head width is rounded, so that its origin is lost, and a table that no state_dict holds."""

    def __init__(self, config: Config, table: bool = False, scaled: bool = False) -> None:
        super().__init__()
        self.head = int(config.hidden / config.heads)
        width = config.heads * self.head
        self.q, self.k, self.v = (nn.Linear(config.hidden, width) for _ in range(3))
        self.o = nn.Linear(width, config.hidden)
        self.scale = float(config.hidden) ** -0.5 if scaled else 1.0
        self.register_buffer(
            "table", torch.arange(1.0, self.head + 1) if table else torch.ones(()), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.view(*t.shape[:2], -1, self.head).transpose(1, 2)

        q, k, v = split(self.q(x)) * self.table, split(self.k(x)) * self.table, split(self.v(x))
        mixed = ((q @ k.mT) * 0.3).softmax(-1) @ v
        return x + self.scale * self.o(mixed.transpose(1, 2).flatten(2))


class Deep(nn.Module):
    """Two of these between a first and a last layer."""

    def __init__(self, config: Config, table: bool = False, scaled: bool = False) -> None:
        super().__init__()
        self.config = config
        self.first, self.last = nn.Linear(5, config.hidden), nn.Linear(config.hidden, 3)
        self.layers = nn.ModuleList(Rounded(config, table, scaled) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


class WithTable(Deep):
    """The table decides what each position in a head means."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, table=True)


class WithScale(Deep):
    """The scale follows from a width, as a number that no size shows."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, scaled=True)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "hidden", "heads"), [(Deep, 12, 3), (WithTable, 12, 3), (WithScale, 24, 6)])
def test_what_the_class_computes_by_itself_stays(kind: type[Deep], hidden: int, heads: int) -> None:
    """Heads go instead of positions in a head whose number or whose table the class computes; a scale holds its one width."""
    torch.manual_seed(0)
    model, x = kind(Config(hidden=24, heads=6)).double().eval(), torch.randn(2, 11, 5).double()
    result = depgraph.prune(model, x, pruning_ratio=0.5, uniform=True)
    config = result.model.config
    assert (config.hidden, config.heads) == (hidden, heads)
    assert not result.report.notes, "it is known beforehand, not found by a first try that fails"
    again = kind(config).double().eval()
    again.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(again(x), result.model(x))
    assert_equal_to_masked(model, result, x)


@dataclass
class Shared:
    """`heads` for queries, `keys` for keys and values, each of `width`."""

    heads: int = 10
    keys: int = 5
    width: int = 7


class SharedKeys(nn.Module):
    """Each head of keys serves as many heads of queries as the config's two numbers say."""

    def __init__(self, config: Shared) -> None:
        super().__init__()
        self.config, self.width, self.groups = config, config.width, config.heads // config.keys
        self.scale = config.width**-0.5
        self.q, self.o = (
            nn.Linear(11, config.heads * config.width),
            nn.Linear(config.heads * config.width, 11),
        )
        self.k, self.v = (nn.Linear(11, config.keys * config.width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.view(*t.shape[:2], -1, self.width).transpose(1, 2)

        k, v = (split(t).repeat_interleave(self.groups, 1) for t in (self.k(x), self.v(x)))
        mixed = (split(self.q(x)) @ k.mT * self.scale).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).flatten(2))


def test_heads_that_share_keys_go_where_the_width_of_a_head_is_held() -> None:
    """The scale holds the width of a head; what is counted in heads x width is then counted in heads."""
    torch.manual_seed(0)
    model, x = SharedKeys(Shared()).double().eval(), torch.randn(2, 13, 11).double()
    result = depgraph.prune(model, x, pruning_ratio=0.4, uniform=True)
    assert result.model.config == Shared(heads=6, keys=3)
    again = SharedKeys(result.model.config).double()
    again.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(again(x), result.model(x))
    assert not result.report.config_mismatches
    assert_equal_to_masked(model, result, x)


class Saved(Classifier):
    """A buffer that forward doesn't read, and that a state_dict holds."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.arange(float(config.inner)))


def test_a_saved_buffer_that_no_run_reads_holds_its_field() -> None:
    """Nothing says what of it should go, and the class would make another size."""
    torch.manual_seed(0)
    model, x = Saved(Config()).double().eval(), torch.randn(2, 11, 5).double()
    result = depgraph.prune(model, x, pruning_ratio=0.5, uniform=True)
    assert (result.model.config.inner, result.model.config.hidden) == (34, 12)
    again = Saved(result.model.config).double().eval()
    again.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(again(x), result.model(x))


@dataclass
class Strict(Config):
    """A config that checks itself, as those of libraries do."""

    def __post_init__(self) -> None:
        if self.hidden % 4:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of 4")


@dataclass
class Stricter(Config):
    """One that takes a single size of one of its fields."""

    def __post_init__(self) -> None:
        if self.inner not in (34, 1):
            raise ValueError("inner must be 34")


class Plain(nn.Module):
    """Sizes that come from two fields, and no heads that would hold them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Linear(5, config.hidden)
        self.up, self.down = nn.Linear(config.hidden, config.inner), nn.Linear(config.inner, config.hidden)
        self.last = nn.Linear(config.hidden, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.down(self.up(x).relu()))


@pytest.mark.parametrize("options", [{"pruning_ratio": 0.4}, {"max_params": 0.6}])
def test_the_config_takes_what_comes_out(options: dict[str, float]) -> None:
    """A width of 24 would become 15 or so: the config's own check says no, and the next multiple that it takes is found."""
    torch.manual_seed(0)
    model, x = Plain(Strict()).double(), torch.randn(3, 5, dtype=torch.float64)
    result = depgraph.prune(model, x, uniform=True, **options)
    config = result.model.config
    again = Plain(Strict(config.hidden, config.heads, config.inner)).double()
    again.load_state_dict(result.model.state_dict())
    assert config.hidden % 4 == 0
    assert config.hidden < 24
    assert any("multiple of 4: the config takes no other (hidden (" in note for note in result.report.notes)
    assert_equal_to_masked(model, result, x)


def test_a_field_of_which_the_config_takes_one_value_stays() -> None:
    torch.manual_seed(0)
    model, x = Plain(Stricter()).double(), torch.randn(3, 5, dtype=torch.float64)
    result = depgraph.prune(model, x, uniform=True, pruning_ratio=0.4)
    assert (result.model.config.inner, result.model.config.hidden) == (34, 15)
    assert any("the config does not take another config.inner" in note for note in result.report.notes)
    free = depgraph.prune(model, x, pruning_ratio=0.4)  # not asked to be what a config can say
    assert free.model.up.out_features < 34


@dataclass
class Fractions(Config):
    """Widths by fractions of others, rounded."""

    ratio: float = 0.5


class Fractional(Classifier):
    """A width, and a number that nothing shows, are rounded fractions of fields."""

    def __init__(self, config: Fractions) -> None:
        super().__init__(config)
        self.side = nn.Linear(config.hidden, round(config.inner * config.ratio))
        self.back = nn.Linear(math.ceil(config.inner / 2), config.hidden)
        self.tiles = math.ceil(config.hidden / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = Encoder.forward(self, x)
        return self.last((x + self.back(self.side(x).relu())).mean(1))


def test_rounded_fractions_of_fields() -> None:
    torch.manual_seed(0)
    model, x = Fractional(Fractions()).double().eval(), torch.randn(2, 4, 5).double()
    result = depgraph.prune(model, x, pruning_ratio=0.5, uniform=True)
    assert shapes(Fractional(result.model.config)) == shapes(result.model)
    assert_equal_to_masked(model, result, x)


class Quartered(nn.Module):
    """The inner width is a field; the code takes it in rows of four, whatever that field says."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.up, self.down = nn.Linear(5, config.inner), nn.Linear(config.inner, config.hidden)
        self.last = nn.Linear(config.hidden, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.up(x).view(-1, 4, 9)
        return self.last(self.down(rows.softmax(1).flatten(1)).relu())


def test_a_number_in_the_code_of_the_class_stays() -> None:
    """A stock class has the number that it has: what it counts stays whole, other widths go."""
    model, x = Quartered(Config(inner=36)).double(), torch.randn(2, 5).double()
    free = depgraph.prune(model, x, pruning_ratio=0.5)
    assert free.model.up.out_features < 36
    assert_equal_to_masked(model, free, x)
    result = depgraph.prune(model, x, pruning_ratio=0.5, uniform=True)
    assert_equal_to_masked(model, result, x)
    assert (result.model.up.out_features, result.model.down.out_features) == (36, 12)
    again = Quartered(result.model.config).double()
    again.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(again(x), result.model(x))
