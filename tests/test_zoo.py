"""Every network of the zoo: pruned by half, held against the oracle, and against what must shrink."""

from __future__ import annotations

import pytest
from checks import prune_and_check, random_importance, rewritten
from zoo import ZOO, broken_expectations

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

every_network = pytest.mark.parametrize("name", ZOO)


@every_network
def test_half_by_l1(name):
    """The default importance at 0.5: right, trainable, smaller where it must be, and of the same class."""
    entry = ZOO[name]
    model, inputs = entry.model(), entry.example()
    result = prune_and_check(model, inputs, check_inputs=entry.example(seed=1), pruning_ratio=0.5)
    wrong = broken_expectations(entry, model, result.model)
    assert not wrong, "\n".join([*wrong, "", str(result.report)])
    after = dict(result.model.named_modules())
    changed = {path for path, m in model.named_modules() if type(m) is not type(after.get(path))}
    assert changed <= set(rewritten(result)), f"classes changed without a word in the report: {changed}"


@pytest.mark.slow
@every_network
@pytest.mark.parametrize("seed", [1, 2])
def test_random_positions(name, seed):
    """Random scores and other weights: positions that L1 on the first seed would not choose."""
    entry = ZOO[name]
    model, inputs = entry.model(seed), entry.example(seed)
    prune_and_check(model, inputs, pruning_ratio=0.5, importance=random_importance(seed))


def test_every_entry_says_what_it_is_about_and_what_must_shrink():
    for name, entry in ZOO.items():
        assert entry.about, name
        assert entry.shrinks, name


def test_two_models_of_one_seed_are_the_same():
    """Entries are reproducible, and no two seeds give the same weights."""
    for name, entry in ZOO.items():
        states = (entry.model(seed).state_dict() for seed in (0, 0, 1))
        first, again, other = ({n: t.to_dense() for n, t in state.items()} for state in states)
        assert all((first[n] == again[n]).all() for n in first), name
        assert any((first[n] != other[n]).any() for n in first), name
