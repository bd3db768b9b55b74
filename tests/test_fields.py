"""Sizes as equations in fields of a config: each solved by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from depgraph.axes.axes import Axis, product
from depgraph.config.described import Described
from depgraph.select.repeated import _Fields

F, G = ("attr", "", "config", "f"), ("attr", "", "config", "g")
A, B, C = Axis(6), Axis(3), Axis(8)
ONE = {(): 1}


def fields_of(exprs: dict[Any, Any], dims: dict[str, Axis]) -> _Fields:
    """Fields 6 and 3, and parameters of one dim each."""
    graph: Any = SimpleNamespace(
        by_axis={A: 0, B: 1, C: 2}, dims=lambda name: [dims[name]],
        sizes=SimpleNamespace(attributes={}), trace=SimpleNamespace(reads=set(), aliases={}),
    )  # fmt: skip
    places = {("shape", name, 0) for name in dims}
    return _Fields(graph, Described(exprs, {}, {F: 6, G: 3}, places))


@pytest.mark.parametrize(
    ("expr", "wanted"),
    [
        (F, ({(A,): 1}, ONE)),
        (("add", F, G), ({(A,): 1, (B,): -1}, ONE)),
        (("add", G, F), ({(A,): 1, (B,): -1}, ONE)),
        (("add", F, 2.0), ({(A,): 1, (): -2}, ONE)),
        (("sub", F, G), ({(A,): 1, (B,): 1}, ONE)),
        (("sub", G, F), ({(A,): -1, (B,): 1}, ONE)),
        (("mul", F, G), ({(A,): 1}, {(B,): 1})),
        (("mul", G, F), ({(A,): 1}, {(B,): 1})),
        (("floordiv", F, G), ({(A, B): 1}, ONE)),
        (("floordiv", 12, F), ({(): 12}, {(A,): 1})),
        (("add", ("mul", F, 2), 1), ({(A,): 1, (): -1}, {(): 2})),
        (("floordiv", F, 4), None),  # is rounded
        (("add", F, 2.5), None),
        (("mul", F, F), None),
        (("pow", F, 2), None),
        (("abs", F), None),
    ],
)  # fmt: skip
def test_the_field_of_an_equation(expr: Any, wanted: Any) -> None:
    """`expr` is A indices, where the other field is B: what is F?"""
    fields = fields_of({}, {})
    fields.fields = {G: ({(B,): 1}, ONE)}
    assert fields._solved(expr, ({(A,): 1}, ONE)) == wanted


def test_a_field_is_what_is_nothing_but_it() -> None:
    """Whatever the order of names: what is computed from it follows, and is what a reason names."""
    places = [("shape", name, 0) for name in ("a", "z")]
    fields = fields_of(dict(zip(places, (("add", F, 2), F), strict=True)), {"a": C, "z": A})
    ((tie, why),) = [(p, why) for p, why in fields.ties() if p]
    assert (tie, why.text) == ({(A,): 1, (): 2, (C,): -1}, "must stay what the config says of a (uniform)")
    fields = fields_of(dict.fromkeys(places, F), {"a": product([B, C]), "z": A})  # one count before a product
    ((tie, why),) = [(p, why) for p, why in fields.ties() if p]
    assert (tie, why.text) == ({(A,): 1, (B, C): -1}, "must stay what the config says of a (uniform)")
