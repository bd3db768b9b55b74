"""200 networks composed at random, with random scores and ratios, against the oracle."""

from __future__ import annotations

import pytest
import torch
from checks import prune_and_check, random_importance
from oracle import call, output_tensors
from random_networks import IMAGE_BLOCKS, TOKEN_BLOCKS, random_network, random_options

SEEDS, AT_ONCE, QUICK = range(200), 5, 15  # those after the first 15 are slow


@pytest.mark.parametrize(
    "start",
    [*SEEDS[:QUICK:AT_ONCE], *(pytest.param(n, marks=pytest.mark.slow) for n in SEEDS[QUICK::AT_ONCE])],
)
def test_never_wrong(start):
    wrong = []
    for seed in range(start, start + AT_ONCE):
        model, inputs = random_network(seed)
        try:
            options = random_options(seed, model)
            prune_and_check(model, inputs, importance=random_importance(seed), tol=1e-8, **options)
        except Exception as error:  # noqa: BLE001
            wrong.append(f"seed {seed}, {' -> '.join(model.kinds)}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_the_generator_is_a_function_of_the_seed():
    for seed in range(5):
        (first, x), (again, y) = random_network(seed), random_network(seed)
        assert first.kinds == again.kinds
        assert torch.equal(x[0], y[0])
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_every_kind_of_block_occurs_and_runs():
    seen = set()
    for seed in SEEDS:
        model, inputs = random_network(seed)
        seen |= set(model.kinds)
        with torch.no_grad():
            assert all(t.isfinite().all() for t in output_tensors(call(model, inputs))), seed
    assert seen == {kind.__name__ for kind in (*IMAGE_BLOCKS, *TOKEN_BLOCKS)}
