"""Mutants: every op rule broken in one way at a time, and the networks and probes that must notice it.

A mutant changes one statement of one rule (the `same` of a line is dropped, the pieces of a cut are exchanged ...) or
the rule as a whole (it forgets everything, it refuses everything). `verdict` prunes a network under a mutant and says
what objects, in the words that a test would fail with: the group sizes that a tiny network states by hand, what the
zoo says must shrink, an exception, or the oracle.

No list names the statements of a rule: they are found by running the unbroken rule on every network and on every row of
`probing_rows.py`. So a new rule has its mutants as soon as one of these calls its op. `python tests/mutants.py [rule ...]` prints them with their verdicts.
"""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from checks import random_importance
from oracle import assert_equal_to_masked, assert_state_matches_plan
from probing import Claim
from probing_rows import ROWS
from torch import nn
from zoo import ZOO, broken_expectations
from zoo_entry import Entry, image, tokens, vector, words

import depgraph
from depgraph import rules
from depgraph.axes.axes import Axis
from depgraph.rules import REGISTRY, OpCall, convolution

RULES_FOLDER = str(Path(rules.__file__).parent)
PRUNE, SITE = sys.modules["depgraph.prune"], sys.modules["depgraph.axes.op_call"]
TRACE = PRUNE.trace

# ------------------------------------------------------------------------------------------------ what can be broken

RULES: dict[
    str, list[str]
] = {}  # the first name that a rule function is registered under -> all of its names
# Of these test_rare_ops.py has the networks: torch's own calls in a backward pass, ops of other libraries, and one whose kernel
# reads out of bounds where a plan is wrong.
LEFT_OUT = [
    function
    for name, function in REGISTRY.items()
    if function.__module__ == "depgraph.rules.gradients"
    or name.startswith("*::")
    or name == "aten::segment_reduce"
] + [convolution._in_groups]
for _name, _function in REGISTRY.items():
    if _function in LEFT_OUT:
        continue
    RULES.setdefault(next((label for label in RULES if REGISTRY[label] is _function), _name), []).append(
        _name
    )


@dataclass(frozen=True)
class Mutant:
    """One way of breaking one rule; `at` is the (file, line) of a statement, or None for the rule as a whole."""

    rule: str
    way: str
    at: tuple[str, int] | None = None

    def __str__(self) -> str:
        where = f" in `{statements(self.at[0])[self.at[1]]}`" if self.at else ""
        return f"{self.rule.removeprefix('aten::')}: {self.way}{where}"


@cache
def statements(file: str) -> dict[int, str]:
    """First line -> text of every statement in a file; of a compound one the head, of equal ones with a number."""
    found: dict[int, str] = {}
    for node in sorted(
        (n for n in ast.walk(ast.parse(Path(file).read_text())) if isinstance(n, ast.stmt)), key=line_of
    ):
        text = ast.unparse(node).splitlines()[0][:100]
        nth = sum(other.split(" (no. ")[0] == text for other in found.values())
        found[node.lineno] = f"{text} (no. {nth + 1})" if nth else text
    return found


def line_of(node: Any) -> int:
    return node.lineno


def backwards(split: Callable[..., Any], axis: Axis, lengths: Sequence[int]) -> list[Axis]:
    """Parts of those lengths that stand in the opposite order on the axis."""
    return list(split(axis, list(lengths)[::-1]))[::-1]


def tie(site: Any, parts: Sequence[Axis]) -> None:
    for part in parts[1:]:
        site.inner.unify(part, parts[0])


# kind of statement -> way of breaking it -> function of (site, the statement itself, *its arguments)
WAYS: dict[str, dict[str, Callable[..., Any]]] = {
    "same": {
        "drop same": lambda site, do, a, b: None,
        "lock both": lambda site, do, a, b: [site.inner.freeze(axis, "mutant") for axis in (a, b)],
    },
    "unify": {"drop unify": lambda site, do, a, b: None},
    "lock": {"drop lock": lambda site, do, axis, text: None},
    "fixed": {"free": lambda site, do, size, text: site.fresh(size)},
    "fixed_segment": {"free": lambda site, do, size: Axis(size)},
    "new": {"free": lambda site, do, dim: site.fresh(site.shape[dim])},
    "equal_counts": {
        "drop equal counts": lambda site, do, parts, text: None,
        "tie": lambda site, do, parts, text: tie(site, parts),
    },
    "contract": {"drop contract": lambda site, do, *axes: None},
    "statistic": {"drop statistic": lambda site, do, *axes: None},
    "weight": {"drop weight": lambda site, do, *axes: None},
    "macs": {"drop macs": lambda site, do, *factors: None},
    "looked_up": {
        "drop look-up": lambda site, do, axis, index, text: site.numbers(index) and None,
        "lock all": lambda site, do, axis, index, text: site.inner.freeze(axis, "mutant"),
    },
    "number": {"drop number": lambda site, do, axis, result=0: None},
    "at_least": {"drop floor": lambda site, do, axis, count: None},
    "reorder": {"keep the order": lambda site, do, axis, order: do(axis, order) and axis},
    "factor": {
        "swap factors": lambda site, do, axis, n: backwards(site.inner.factors, axis, (n, axis.size // n))
    },
    "factors": {"swap factors": lambda site, do, axis, lengths: backwards(do, axis, lengths)},
    "segments": {"swap pieces": lambda site, do, axis, lengths: backwards(do, axis, lengths)},
    "cut": {
        "swap pieces": lambda site, do, axis, at: backwards(site.inner.segments, axis, (at, axis.size - at))
    },
    "product": {"swap factors": lambda site, do, parts: do(parts[::-1])},
    "concat": {"swap pieces": lambda site, do, parts: do(parts[::-1])},
}
ON_SITE = (
    "same",
    "lock",
    "fixed",
    "fixed_segment",
    "new",
    "equal_counts",
    "contract",
    "statistic",
    "weight",
    "macs",
    "looked_up",
    "number",
    "at_least",
    "reorder",
)
ON_ALGEBRA = ("unify", "factor", "factors", "segments", "cut")
FUNCTIONS = ("product", "concat")


def forget(site: OpCall, rule: Callable[..., Any]) -> Any:
    """No relation at all, results of new axes."""
    return [[site.fresh(n) for n in shape] for shape in site.shapes]


def refuse(site: OpCall, rule: Callable[..., Any]) -> Any:
    """Everything that the op touches is frozen."""
    return site.lock_all("mutant")


def equal_dims(out: Any) -> tuple[int, int] | None:
    """Two dims of the first result that have one size and are not the same axis."""
    first = out[0] if out and isinstance(out[0], list) else out
    for j, b in enumerate(first):
        for i, a in enumerate(first[:j]):
            if a is not None and b is not None and a.size == b.size and a.find() is not b.find():
                return i, j
    return None


def exchange(site: OpCall, rule: Callable[..., Any]) -> Any:
    """Two dims of one size in the first result change places."""
    out = rule(site)
    found = equal_dims(out)
    if found is None:
        return out
    nested = isinstance(out[0], list)
    first = list(out[0] if nested else out)
    i, j = found
    first[i], first[j] = first[j], first[i]
    return [first, *out[1:]] if nested else first


def unnoted(name: str) -> Callable[[OpCall, Callable[..., Any]], Any]:
    """What the rule writes into the state's `name` is taken out again."""

    def run(site: OpCall, rule: Callable[..., Any]) -> Any:
        noted = getattr(site.state, name)
        before = set(noted)
        out = rule(site)
        for key in set(noted) - before:
            noted.discard(key) if isinstance(noted, set) else noted.pop(key)
        return out

    return run


NOTED = ("filled", "counted", "renumbered")
WHOLE: dict[str, Callable[[OpCall, Callable[..., Any]], Any]] = {
    "forget": forget, "refuse": refuse, "exchange dims": exchange,
    **{f"note no {name}": unnoted(name) for name in NOTED},
}  # fmt: skip


class WatchedAlgebra:
    """The algebra as a rule sees it: its statements go through the breaker."""

    def __init__(self, site: Any, inner: Any) -> None:
        self._site, self._inner = site, inner

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if name not in ON_ALGEBRA:
            return method
        return lambda *args: self._site.breaker.statement(self._site, name, method, args)


class WatchedSite(OpCall):
    """A `OpCall` whose statements go through a breaker; what a statement does inside itself is not looked at."""

    def __init__(self, site: OpCall, breaker: Breaker) -> None:
        super().__init__(site.state, site.algebra, site.node)
        self.understood = site.understood
        self.inner, self.breaker = site.algebra, breaker
        self.algebra = WatchedAlgebra(self, self.inner)


def _watch(name: str) -> None:
    plain = getattr(OpCall, name)

    def statement(self: WatchedSite, *args: Any) -> Any:
        if self.algebra is self.inner:
            return plain(self, *args)

        def do(*args: Any) -> Any:
            watched, self.algebra = self.algebra, self.inner
            try:
                return plain(self, *args)
            finally:
                self.algebra = watched

        return self.breaker.statement(self, name, do, args)

    setattr(WatchedSite, name, statement)


for _name in ON_SITE:
    _watch(_name)


class Breaker:
    """Stands between a rule and its site: breaks what `mutant` says or, without one, notes what could be broken."""

    def __init__(self, rule: str, mutant: Mutant | None = None) -> None:
        self.rule, self.mutant = rule, mutant
        self.seen: dict[Mutant, None] = {}

    def statement(self, site: WatchedSite, kind: str, do: Callable[..., Any], args: Sequence[Any]) -> Any:
        """Run a statement, broken if it is the mutant's."""
        at = rule_line()
        for way, broken in WAYS[kind].items():
            mutant = Mutant(self.rule, way, at)
            if mutant == self.mutant:
                return broken(site, do, *args)
            self.seen[mutant] = None
        return do(*args)

    def around(self, rule: Callable[..., Any]) -> Callable[[OpCall], Any]:
        """`rule` under this breaker."""

        def watched(site: OpCall) -> Any:
            with self._functions(own := WatchedSite(site, self), rule):
                return rule(own)

        def apply(site: OpCall) -> Any:
            if self.mutant is None:
                return self._note_whole(site, watched)
            return watched(site) if self.mutant.at else WHOLE[self.mutant.way](site, rule)

        return apply

    def _note_whole(self, site: OpCall, rule: Callable[..., Any]) -> Any:
        """Run the rule and note the ways of breaking it as a whole that this call allows."""
        before = {name: len(getattr(site.state, name)) for name in NOTED}
        self.seen.update({Mutant(self.rule, way): None for way in ("forget", "refuse")})
        out = rule(site)
        ways = [f"note no {name}" for name, n in before.items() if len(getattr(site.state, name)) > n]
        ways += ["exchange dims"] if equal_dims(out) else []
        self.seen.update({Mutant(self.rule, way): None for way in ways})
        return out

    @contextmanager
    def _functions(self, site: WatchedSite, rule: Callable[..., Any]) -> Iterator[None]:
        """Watch `product` and `concat` as the rule's module and `OpCall` call them."""
        places = [(names, n) for names in (rule.__globals__, vars(SITE)) for n in FUNCTIONS if n in names]
        saved = [(names, n, names[n]) for names, n in places]
        for names, n, plain in saved:
            names[n] = lambda parts, n=n, plain=plain: self.statement(site, n, plain, (list(parts),))
        try:
            yield
        finally:
            for names, n, plain in saved:
                names[n] = plain


def rule_line() -> tuple[str, int]:
    """File and first line of the innermost statement that is in depgraph/rules."""
    frame = sys._getframe(1)
    while not frame.f_code.co_filename.startswith(RULES_FOLDER):
        frame = frame.f_back
    file = frame.f_code.co_filename
    return file, max(line for line in statements(file) if line <= frame.f_lineno)


@contextmanager
def under(breakers: Sequence[Breaker]) -> Iterator[None]:
    """The registry with the rules of these breakers replaced."""
    saved = dict(REGISTRY)
    for breaker in breakers:
        broken = breaker.around(saved[breaker.rule])
        REGISTRY.update(dict.fromkeys(RULES[breaker.rule], broken))
    try:
        yield
    finally:
        REGISTRY.update(saved)


# ------------------------------------------------------------------------------------------------ tiny networks


@dataclass(frozen=True)
class Tiny(Entry):
    """A network of a line or two for one op.

    `groups` are the sizes of all its groups by hand, ascending: a rule that couples or freezes too little or too much
    changes them. `macs` are its multiply-accumulates by hand, where torch's counter does not know the op.
    """

    groups: tuple[int, ...] = ()
    macs: int | None = None


class Short(nn.Module):
    """Layers and parameters by name, and a forward in one line."""

    def __init__(self, run: Callable[..., Any], parts: dict[str, Any]) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, nn.Linear(*part) if isinstance(part, tuple) else part())

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.run(self, *inputs)


TINY: dict[str, Tiny] = {}


def tiny(
    name: str, groups: Sequence[int], run: Callable[..., Any], inputs: Callable[[], tuple] | None = None,
    macs: int | None = None, dtype: torch.dtype = torch.float64, **parts: Any,
) -> None:  # fmt: skip
    """Put a network into `TINY`: a part (a, b) is a linear layer, any other is called."""
    assert name not in TINY and name not in ZOO, name  # noqa: PT018
    TINY[name] = Tiny(
        lambda: Short(run, parts), inputs or vector(), groups=tuple(groups), macs=macs, dtype=dtype
    )


def par(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


def outer(m: Any, x: torch.Tensor, names: str = "ab") -> torch.Tensor:
    """[batch, a, b, ...]: every dim but the first ranges over the channels of another linear layer."""
    out = getattr(m, names[0])(x)
    for i, name in enumerate(names[1:], start=1):
        out = out.unsqueeze(-1) * getattr(m, name)(x)[(slice(None), *[None] * i)]
    return out


def deep(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Channels that an op may lock, behind eleven that it can't reach."""
    return m.b(torch.tanh(m.a(x)))


def flat(m: Any, y: torch.Tensor) -> torch.Tensor:
    return m.head(y.flatten(1))


def write(x: torch.Tensor, index: Any, values: Any) -> torch.Tensor:
    x[index] = values
    return x


def packed(x: torch.Tensor, lengths: Sequence[int] = (10, 7)) -> Any:
    in_order = sorted(lengths, reverse=True) == list(lengths)
    return nn.utils.rnn.pack_padded_sequence(
        x, torch.tensor(lengths), batch_first=True, enforce_sorted=in_order
    )


def unpacked(x: Any) -> torch.Tensor:
    return nn.utils.rnn.pad_packed_sequence(x, batch_first=True)[0]


OUTER = {"a": (5, 7), "b": (5, 11)}
DEEP = {"a": (5, 11), "b": (11, 7)}
BLOCKS = torch.tensor([4, 10], dtype=torch.int32)
ORDER = torch.tensor([2, 0, 3, 5])

# fmt: off

# --- contractions: in the first ones a single op both produces and consumes, so that its weight alone makes channels

tiny("Mm", [7], lambda m, x: torch.mm(torch.tanh(torch.mm(x, m.w)), m.v), w=par(5, 7), v=par(7, 3))
tiny("Mv", [7], lambda m, x: torch.mv(m.v, torch.tanh(torch.mv(m.w, x[0]))), w=par(7, 5), v=par(3, 7), macs=35 + 21)
tiny("Dot", [7], lambda m, x: torch.dot(torch.mv(m.w, x[0]), m.v), w=par(7, 5), v=par(7), macs=35 + 7)
tiny("Bmm", [7], lambda m, x: torch.bmm(torch.tanh(torch.bmm(x, m.w)), m.v), tokens(), w=par(2, 5, 7), v=par(2, 7, 3))
tiny("WeightOnTheLeft", [7, 11], lambda m, x: m.v @ torch.tanh(m.w @ torch.tanh(torch.mm(m.u, x.t()))),
     u=par(7, 5), w=par(11, 7), v=par(3, 11))
tiny("BatchOfWeightsOnTheLeft", [7], lambda m, x: torch.bmm(m.v, torch.tanh(torch.bmm(m.w, x.mT))), tokens(),
     w=par(2, 7, 5), v=par(2, 3, 7))
tiny("Addmm", [7], lambda m, x: torch.addmm(m.d, torch.tanh(torch.addmm(m.b, x, m.w)), m.v),
     w=par(5, 7), b=par(7), v=par(7, 3), d=par(3))
tiny("Baddbmm", [7], lambda m, x: torch.baddbmm(m.d, torch.tanh(torch.baddbmm(m.b, x, m.w)), m.v), tokens(),
     w=par(2, 5, 7), b=par(2, 1, 7), v=par(2, 7, 3), d=par(2, 1, 3))
tiny("Addbmm", [7], lambda m, x: torch.addbmm(m.d, torch.tanh(torch.addbmm(m.b, x, m.w))[None], m.v), tokens(),
     w=par(2, 5, 7), b=par(10, 7), v=par(1, 7, 3), d=par(10, 3), macs=700 + 210)
tiny("Addmv", [7], lambda m, x: m.head(torch.addmv(m.p, m.a(x).t(), m.u)), a=(5, 7), p=par(7), u=par(2), head=(7, 3),
     macs=70 + 14 + 21)
tiny("Matmul", [7], lambda m, x: torch.matmul(torch.tanh(torch.matmul(x, m.w)), m.v), w=par(5, 7), v=par(7, 3))
tiny("Einsum", [7], lambda m, x: torch.einsum("nc,ck->nk", torch.tanh(torch.einsum("nc,ck->nk", x, m.w)), m.v),
     w=par(5, 7), v=par(7, 3))
tiny("Bilinear", [7], lambda m, x: m.second(torch.tanh(m.first(x, x)), x), macs=2 * 5 * 5 * 7 + 2 * 7 * 5 * 3,
     first=lambda: nn.Bilinear(5, 5, 7), second=lambda: nn.Bilinear(7, 5, 3))
tiny("BilinearOverChannels", [7, 11, 13, 17], lambda m, x: flat(m, m.both(outer(m, x), outer(m, x, "cd"))),
     **OUTER, c=(5, 7), d=(5, 13), both=lambda: nn.Bilinear(11, 13, 17), head=(119, 3),
     macs=380 + 2 * 7 * 11 * 13 * 17 + 714)
tiny("MatmulOverChannels", [7, 11], lambda m, x: flat(m, outer(m, x)[:, :, None] @ outer(m, x, "cd")[..., None]),
     **OUTER, c=(5, 7), d=(5, 11), head=(7, 3))
tiny("ScaledProduct", [11, 17], lambda m, x: (m.head(m.up(x)), m.a(x) @ m.b(x).mT * 11**-0.5),
     tokens(), a=(5, 11), b=(5, 11), up=(5, 17), head=(17, 3))
tiny("Distances", [7], lambda m, x: torch.cdist(m.a(x), m.c), tokens(), a=(5, 7), c=par(4, 7), macs=700 + 560)
tiny("GroupedMm", [2], lambda m, x: torch._grouped_mm(torch.tanh(torch._grouped_mm(
    x, m.w * m.gate(x).mean(0)[:, None, None], BLOCKS)), m.v, BLOCKS), lambda: (torch.randn(10, 8),),
    w=par(2, 8, 16), v=par(2, 16, 8), gate=(8, 2), dtype=torch.bfloat16, macs=10 * (8 * 2 + 8 * 16 + 16 * 8))
for _way, _text in {"Bmm": "", "Einsum": "nc,nd->ncd", "Matmul": ""}.items():
    tiny(f"Gram{_way}", [7, 7], lambda m, x, way=_way, text=_text: flat(m, {
        "Bmm": lambda a, b: torch.bmm(a[:, :, None], b[:, None]), "Matmul": lambda a, b: a[:, :, None] @ b[:, None],
        "Einsum": lambda a, b: torch.einsum(text, a, b)}[way](m.a(x), m.b(x))), a=(5, 7), b=(5, 7), head=(49, 3))

# --- convolutions and positions: eleven channels of `b` stand where positions are, and must stay whole

tiny("ConvolvedPositions", [7, 13], lambda m, x: flat(m, m.conv(outer(m, x))), **OUTER,
     conv=lambda: nn.Conv1d(7, 13, 3), head=(117, 3))
tiny("GroupsOfTheirOwn", [5, 5, 5, 7, 7, 7], lambda m, x: flat(m, m.conv(m.stem(x)).mean((2, 3))), image(),
     stem=lambda: nn.Conv2d(3, 15, 1), conv=lambda: nn.Conv2d(15, 21, 1, groups=3), head=(21, 3))
tiny("GroupsTransposed", [5, 5, 7, 7], lambda m, x: flat(m, m.conv(m.stem(x)).mean((2, 3))), image(),
     stem=lambda: nn.Conv2d(3, 10, 1), conv=lambda: nn.ConvTranspose2d(10, 14, 1, groups=2), head=(14, 3))
tiny("DepthwiseMultiplied", [3, 7], lambda m, x: flat(m, m.conv(m.stem(x)).mean((2, 3))), image(),
     stem=lambda: nn.Conv2d(3, 7, 1), conv=lambda: nn.ConvTranspose2d(7, 21, 1, groups=7), head=(21, 3))
tiny("DepthwiseGathered", [3, 7], lambda m, x: flat(m, m.conv(m.stem(x)).mean((2, 3))), image(),
     stem=lambda: nn.Conv2d(3, 21, 1), conv=lambda: nn.Conv2d(21, 7, 1, groups=7), head=(7, 3))
tiny("Pooled1d", [7], lambda m, x: flat(m, F.interpolate(outer(m, x), size=13)), **OUTER, head=(91, 3))
tiny("Pooled2d", [7], lambda m, x: flat(m, F.avg_pool2d(outer(m, x)[:, :, None], (1, 2))), **OUTER, head=(35, 3))
tiny("Pooled3d", [7], lambda m, x: flat(m, F.avg_pool3d(outer(m, x)[:, :, None, None], (1, 1, 2))), **OUTER, head=(35, 3))
tiny("SampledPositions", [7, 13], lambda m, x: flat(m, F.grid_sample(
    outer(m, x)[:, :, None], torch.stack([m.c(x), m.c(x)], -1)[:, None].tanh(), align_corners=False)),
    **OUTER, c=(5, 13), head=(91, 3))
tiny("SampledBatch", [7], lambda m, x: m.head(F.grid_sample(
    m.a(x).t()[:, :, None, None], m.b(x).t()[:, None, None].tanh(), align_corners=False).flatten(1).t()),
    a=(5, 7), b=(5, 7), head=(7, 3))
tiny("Windows", [7], lambda m, x: flat(m, F.unfold(outer(m, x)[:, :, None], (1, 3))), **OUTER, head=(189, 3))
tiny("Folded", [7], lambda m, x: flat(m, F.fold(outer(m, x), (1, 11), (1, 3))), a=(5, 21), b=(5, 9), head=(77, 3))
tiny("FoldedToOne", [11], lambda m, x: flat(m, F.fold(deep(m, x)[..., None].expand(-1, -1, 9), (1, 11), (1, 3))),
     a=(5, 11), b=(11, 3), head=(11, 3))

# --- entries chosen by an index

tiny("EmbeddedOnly", [7], lambda m, i: (F.embedding(i, m.w) * m.s).sum(-1), words(13), w=par(13, 7), s=par(7))
tiny("EmbeddedRows", [7], lambda m, i: m.head(F.linear(F.embedding(i, m.w).tanh(), m.w)), words(13),
     w=par(13, 7), head=(13, 3))
tiny("Bags", [7], lambda m, i: m.head((F.embedding_bag(i, m.w) * m.s).t()).sum(0), words(13),
     w=par(13, 7), s=par(7), head=lambda: nn.Linear(2, 3, bias=False))
tiny("BagsOfRows", [7], lambda m, i: m.head(F.linear(F.embedding_bag(i, m.w).tanh(), m.w)), words(13),
     w=par(13, 7), head=(13, 3))
tiny("Selected", [11], lambda m, x: m.head(deep(m, x).index_select(1, ORDER)), **DEEP, head=(4, 3))
tiny("TableRowsSelected", [7], lambda m, i: (m.w.index_select(0, i[0]) * m.s).sum(-1)[None].expand(2, -1), words(13),
     w=par(13, 7), s=par(7))
tiny("TableRows", [7], lambda m, i: (m.w[i] * m.s).sum(-1), words(13), w=par(13, 7), s=par(7))
tiny("Gathered", [11], lambda m, x: m.head(deep(m, x).gather(1, ORDER.expand(2, -1))), **DEEP, head=(4, 3))
tiny("GatheredInPart", [11], lambda m, x: m.head(deep(m, x).gather(0, torch.tensor([[0, 1, 1, 0]]))), **DEEP, head=(4, 3))
tiny("Scattered", [11], lambda m, x: m.head(deep(m, x).scatter(1, ORDER.expand(2, -1), m.c(x))),
     **DEEP, c=(5, 4), head=(7, 3))
tiny("ScatteredInPart", [11], lambda m, x: m.head(deep(m, x).scatter(0, torch.tensor([[0, 1, 1, 0]]), m.c(x))),
     **DEEP, c=(5, 4), head=(7, 3))
tiny("WrittenByMask", [11], lambda m, x: m.head(write(deep(m, x), torch.tensor([[True, False] * 3 + [True]] * 2), x[0, 0])),
     **DEEP, head=(7, 3))
tiny("PositionOfAll", [11], lambda m, x: m.head(deep(m, x)) + deep(m, x).argmax(), **DEEP, head=(7, 3))
tiny("BinnedByLiterals", [11], lambda m, x: m.head(deep(m, x) * torch.histc(deep(m, x).topk(2)[1].double(), 7, 0, 6)),
     **DEEP, head=(7, 3))
tiny("BinnedByHalves", [11], lambda m, x: m.head(deep(m, x)) + torch.histc(deep(m, x).topk(2)[1].double(), 14, 0, 6)[::4].sum(),
     **DEEP, head=(7, 3))
tiny("FourOfThem", [3, 5], lambda m, x: m.head(m.c.weight[m.a(x).topk(4)[1]].sum(1)), a=(5, 5), c=(3, 5), head=(3, 3))
tiny("SelectedByPosition", [3, 7], lambda m, x: m.head(m.c.weight.index_select(0, m.a(x).argmax(-1))),
     a=(5, 7), c=(3, 7), head=(3, 3))
tiny("WrittenByPosition", [7], lambda m, x: m.head(m.a(x) * torch.zeros_like(m.a(x)[0]).index_put(
     (m.a(x).argmax(-1),), x[0, 0])), a=(5, 7), head=(7, 3))
tiny("AddedByPosition", [7], lambda m, x: m.head(m.a(x) * torch.zeros_like(m.a(x)[0]).index_add(
     0, m.a(x).argmax(-1), x[:, 0])), a=(5, 7), head=(7, 3))
tiny("Added", [11], lambda m, x: m.head(deep(m, x).t().index_add(0, ORDER, m.c(x).t()).t()),
     **DEEP, c=(5, 4), head=(7, 3))
tiny("AddedRows", [7], lambda m, x: m.head(m.a(x).index_add(0, torch.tensor([1, 0]), m.b(x))),
     a=(5, 7), b=(5, 7), head=(7, 3))
tiny("PutRows", [7], lambda m, x: m.head(torch.index_put(m.a(x), [torch.tensor([1])], m.b(x)[:1])),
     a=(5, 7), b=(5, 7), head=(7, 3))
tiny("PutChannels", [11], lambda m, x: m.head(torch.index_put(deep(m, x).t(), [ORDER], m.c(x).t()).t()),
     **DEEP, c=(5, 4), head=(7, 3))
tiny("PutByMask", [11], lambda m, x: m.head(write(deep(m, x).clone(), x.new_ones(2, 7) > 0, m.c(x).flatten())),
     **DEEP, c=(5, 7), head=(7, 3))
tiny("PutBehind", [7, 13], lambda m, x: flat(m, write(
    outer(m, m.e(x)).clone(), (slice(None), slice(None), ORDER), outer(m, x, "cd"))),
    e=(5, 13), a=(13, 7), b=(13, 11), c=(5, 7), d=(5, 4), head=(77, 3))
tiny("Taken", [11], lambda m, x: m.head(deep(m, x).take(ORDER)), **DEEP, head=(4, 3))
tiny("TakenByMask", [11], lambda m, x: deep(m, x)[m.c(x) > 0].sum(), **DEEP, c=(5, 7))
tiny("FilledByMask", [7, 11], lambda m, x: m.head(deep(m, x).masked_scatter(x.new_ones(2, 1) > 0, m.c(x))),
     **DEEP, c=(5, 7), head=(7, 3))
tiny("FilledByLiteral", [11], lambda m, x: m.head(deep(m, x).masked_scatter((x.new_ones(2, 1) > 0).expand(2, 7), m.c(x))),
     **DEEP, c=(5, 7), head=(7, 3))
tiny("FilledByEntries", [11], lambda m, x: m.head(deep(m, x).masked_scatter(torch.arange(14).view(2, 7) > 3, m.c(x))),
     **DEEP, c=(5, 7), head=(7, 3))
tiny("SplitOfOne", [7, 11], lambda m, x: m.head(deep(m, x).unsqueeze(1).split([1, 0], 1)[0].squeeze(1)), **DEEP, head=(7, 3))
tiny("PaddedByCount", [11], lambda m, x: m.head(F.pad(deep(m, x), (0, torch.tensor(2)))), **DEEP, head=(9, 3))

# --- entries moved

tiny("Reshaped", [7, 11], lambda m, x: flat(m, m.c(x).reshape_as(outer(m, x)) * outer(m, x)), **OUTER, c=(5, 77), head=(77, 3))
tiny("Transposed", [7, 7], lambda m, x: flat(m, outer(m, x).permute(0, 2, 1)), a=(5, 7), b=(5, 7), head=(49, 3))
tiny("Repeated", [7, 7], lambda m, x: flat(m, outer(m, x)[:, None].expand(-1, 4, -1, -1)), a=(5, 7), b=(5, 7), head=(196, 3))
tiny("Summed", [4, 7, 7], lambda m, x: flat(m, outer(m, x, "abc").sum(3)), a=(5, 7), b=(5, 7), c=(5, 4), head=(49, 3))
tiny("TakenApart", [7, 7], lambda m, x: flat(m, torch.stack([outer(m, x)] * 3).unbind()[0]), a=(5, 7), b=(5, 7), head=(49, 3))
tiny("SqueezedPair", [2, 11], lambda m, x: m.head(m.a(x).squeeze()) + m.d(m.c(x)), a=(5, 2), head=(2, 3), c=(5, 11), d=(11, 3))
tiny("Squeezed", [7, 7], lambda m, x: flat(m, outer(m, x)[:, None].squeeze(1)), a=(5, 7), b=(5, 7), head=(49, 3))
tiny("ExpandedInside", [7, 11], lambda m, x: m.head(torch.broadcast_tensors(m.c(x), deep(m, x))[0]), **DEEP, c=(5, 1), head=(7, 3))
tiny("Copies", [7], lambda m, x: m.head(m.a(x).repeat(1, 3)), a=(5, 7), head=(21, 3))
tiny("CopiesInside", [7], lambda m, x: m.head(m.a(x).repeat_interleave(3, 1)), a=(5, 7), head=(21, 3))
tiny("CopiesByTensor", [11], lambda m, x: m.head(deep(m, x).repeat_interleave(torch.arange(7), 1)), **DEEP, head=(21, 3))
tiny("JoinedWithOne", [7], lambda m, x: m.head(torch.cat([m.a(x), m.c(x)], 1)), a=(5, 7), c=(5, 1), head=(8, 3))
tiny("Stacked", [7], lambda m, x: flat(m, torch.stack([m.a(x), m.b(x)], 1)), a=(5, 7), b=(5, 7), head=(14, 3))
tiny("Unbound", [7], lambda m, x: m.head(sum(outer(m, x).unbind(2))), **OUTER, head=(7, 3))
tiny("OneIndex", [7], lambda m, x: m.head(outer(m, x)[:, :, 4]), **OUTER, head=(7, 3))
tiny("Halves", [7, 7], lambda m, x: m.head(torch.cat(m.a(x).chunk(2, 1)[::-1], 1)), a=(5, 14), head=(14, 3))
tiny("PiecesAndRest", [11], lambda m, x: m.head(m.b(m.a(x)).split(7, 1)[2]), a=(5, 11), b=(11, 17), head=(3, 3))
tiny("PieceOfOne", [6], lambda m, x: m.head(torch.cat(m.a(x).split(m.sizes, 1)[::-1], 1)), a=(5, 7), head=(7, 3),
     sizes=lambda: [1, 6])
tiny("UnsafePieces", [7, 7], lambda m, x: m.head(torch.cat(torch.unsafe_split(m.a(x), m.n, 1)[::-1], 1)),
     a=(5, 14), head=(14, 3), n=lambda: 7)
tiny("CutAtNumbers", [2, 5, 7], lambda m, x: m.head(torch.cat(m.a(x).tensor_split(m.cuts, 1)[::-1], 1)), a=(5, 14), head=(14, 3),
     cuts=lambda: (2, 7))
tiny("CutAcross", [2, 5, 7], lambda m, x: m.head(torch.cat(torch.hsplit(m.a(x), m.cuts)[::-1], 1)), a=(5, 14), head=(14, 3),
     cuts=lambda: [2, 7])
tiny("CutInHalf", [7, 7], lambda m, x: m.head(torch.cat(torch.hsplit(m.a(x), 2)[::-1], 1)), a=(5, 14), head=(14, 3))
tiny("CutDown", [7, 7], lambda m, x: m.head(torch.cat(torch.vsplit(m.a(x).t(), 2)[::-1], 0).t()), a=(5, 14), head=(14, 3))
tiny("CopiedPart", [4, 10], lambda m, x: m.head(m.a(x).narrow_copy(1, m.start, m.length)), a=(5, 14), head=(10, 3),
     start=lambda: 4, length=lambda: 10)
tiny("MeshOfChannels", [7, 11], lambda m, x: m.head(torch.stack([
    g * h for g, h in [torch.meshgrid(a, b, indexing="xy") for a, b in zip(m.a(x), m.b(x), strict=True)]]).flatten(1)),
    **OUTER, head=(77, 3))
tiny("SliceOfOne", [2, 4], lambda m, x: m.head(m.a(x)) + m.a(x)[:, m.start : m.stop], a=(5, 7), head=(7, 3),
     start=lambda: 2, stop=lambda: 3)
tiny("EverySecond", [7], lambda m, x: m.head(m.a(x)[:, ::2]), a=(5, 14), head=(7, 3))
tiny("SomeOfSteps", [11], lambda m, x: m.head(deep(m, x)[:, 1:6:2]), **DEEP, head=(3, 3))
tiny("OneOfSteps", [11], lambda m, x: deep(m, x)[:, ::7], **DEEP)
tiny("SliceReplaced", [2, 3, 6, 7], lambda m, x: flat(m, torch.slice_scatter(outer(m, x), outer(m, x, "cd"), 2, m.start, m.stop)),
     **OUTER, c=(5, 7), d=(5, 3), head=(77, 3), start=lambda: 2, stop=lambda: 5)
tiny("PaddedByItself", [7], lambda m, x: flat(m, F.pad(outer(m, x), (2, 2), mode="reflect")), **OUTER, head=(105, 3))
tiny("PaddedUnevenly", [7], lambda m, x: m.head(F.pad(m.a(x), (2, 3))), a=(5, 7), head=(12, 3))
tiny("PaddedByLess", [2, 5], lambda m, x: m.head(F.pad(m.a(x), (m.less, 1))), a=(5, 7), head=(6, 3), less=lambda: -2)
tiny("PaddedOne", [11], lambda m, x: m.head(deep(m, x) * F.pad(m.c(x), (3, 3))), **DEEP, c=(5, 1), head=(7, 3))
tiny("FlippedProduct", [13], lambda m, x: flat(m, outer(m, m.e(x)).flatten(1).flip(1)),
     e=(5, 13), a=(13, 7), b=(13, 11), head=(77, 3))
tiny("RotatedProduct", [13], lambda m, x: flat(m, torch.rot90(outer(m, m.e(x)).flatten(1)[..., None], 3, [1, 2])),
     e=(5, 13), a=(13, 7), b=(13, 11), head=(77, 3))
tiny("NoiseAsWide", [7], lambda m, x: m.head(next(h + 0 * torch.rand(h.shape) for h in [m.a(x)])), a=(5, 7), head=(7, 3))
tiny("StridedByHand", [11], lambda m, x: m.head(deep(m, x).as_strided((x.shape[0], 7), (7, 1))), **DEEP, head=(7, 3))
tiny("StridedOverAgain", [11], lambda m, x: flat(m, deep(m, x).as_strided((x.shape[0], 7, 3), (7, 1, 0))), **DEEP, head=(21, 3))
tiny("StridedToHeads", [3, 7], lambda m, x: flat(m, m.a(x).as_strided((x.shape[0], m.n, m.w), (m.n * m.w, m.w, 1))),
     a=(5, 21), head=(21, 3), n=lambda: 3, w=lambda: 7)
tiny("StridedWindows", [7], lambda m, x: flat(m, outer(m, x).as_strided((x.shape[0], m.n, 4, 3), (m.n * 11, 11, 2, 1))),
     a=(5, 7), b=(5, 11), head=(84, 3), n=lambda: 7)
tiny("RolledWhole", [11], lambda m, x: m.head(deep(m, x).roll(2)), **DEEP, head=(7, 3))
tiny("Shuffled", [7], lambda m, x: flat(m, F.pixel_shuffle(outer(m, x)[:, :, None], 2)), a=(5, 28), b=(5, 11), head=(308, 3))
tiny("ShuffledToOne", [11], lambda m, x: flat(m, F.pixel_shuffle(deep(m, x)[:, :, None, None], 2)),
     a=(5, 11), b=(11, 4), head=(4, 3))
tiny("Unshuffled", [7], lambda m, x: flat(m, F.pixel_unshuffle(torch.cat([outer(m, x)[:, :, None]] * 2, 2), 2)),
     a=(5, 7), b=(5, 12), head=(168, 3))
tiny("ShuffledGroups", [7], lambda m, x: flat(m, F.channel_shuffle(m.a(x)[:, :, None, None], 3)), a=(5, 21), head=(21, 3))
tiny("SlidingWindows", [7], lambda m, x: flat(m, outer(m, x).unfold(2, 3, 2)), **OUTER, head=(105, 3))
tiny("DiagonalMade", [7, 11], lambda m, x: flat(m, torch.diag_embed(deep(m, x))), **DEEP, head=(49, 3))
tiny("DiagonalRead", [7], lambda m, x: m.head(outer(m, x).diagonal(0, 1, 2)), a=(5, 7), b=(5, 7), head=(7, 3))
tiny("DiagonalAside", [13], lambda m, x: m.head(outer(m, m.e(x)).diagonal(1, 1, 2)),
     e=(5, 13), a=(13, 7), b=(13, 7), head=(6, 3))

# --- norms, reductions, entry by entry

tiny("NormOfGroups", [5, 5, 5], lambda m, x: m.head(m.norm(m.a(x))), a=(5, 15), norm=lambda: nn.GroupNorm(3, 15), head=(15, 3))
tiny("NormOfEach", [7, 11, 13], lambda m, x: flat(m, m.norm(outer(m, m.e(x)))), e=(5, 13), a=(13, 7), b=(13, 11),
     norm=lambda: nn.GroupNorm(7, 7), head=(77, 3))
tiny("Losses", [7], lambda m, x: m.head(F.mse_loss(m.a(x), m.b(x), reduction="none")), a=(5, 7), b=(5, 7), head=(7, 3))
tiny("LossSummed", [7], lambda m, x: F.mse_loss(m.a(x), m.b(x), reduction="sum"), a=(5, 7), b=(5, 7))
tiny("Triangle", [7], lambda m, x: flat(m, outer(m, x, "abc").tril()), **OUTER, c=(5, 13), head=(1001, 3))
tiny("ComplexProduct", [7], lambda m, x: flat(m, torch.view_as_real(
    torch.view_as_complex(outer(m, x)) * torch.view_as_complex(outer(m, x, "cd")))),
    a=(5, 7), b=(5, 2), c=(5, 7), d=(5, 2), head=(14, 3))
tiny("GatedByOne", [7], lambda m, x: m.head(m.a(x) * F.glu(m.c(x), 1)), a=(5, 7), c=(5, 2), head=(7, 3))
tiny("Numbered", [11], lambda m, x: m.head(deep(m, x) * torch.arange(m.n)), **DEEP, n=lambda: 7, head=(7, 3))
tiny("Compared", [7], lambda m, x: m.head(m.a(x)) + (1 if torch.equal(m.a(x), m.b(x)) else 2) * m.other(m.b(x)),
     a=(5, 7), b=(5, 7), head=(7, 3), other=(7, 3))
tiny("LargestOfAll", [7, 11], lambda m, x: m.head(outer(m, x).max(2).values), **OUTER, head=(7, 3))
tiny("LargestNumber", [7], lambda m, x: m.head(m.a(x)) * m.a(x).max(), a=(5, 7), head=(7, 3))
tiny("MiddleOne", [7], lambda m, x: m.head(outer(m, x).median(2).values), **OUTER, head=(7, 3))
tiny("RunningSums", [7], lambda m, x: flat(m, outer(m, x).cumsum(2)), **OUTER, head=(77, 3))
tiny("Frequencies", [7], lambda m, x: flat(m, torch.fft.irfft(torch.fft.fft(torch.fft.rfft(outer(m, x), n=11), dim=-1), n=11)),
     **OUTER, head=(77, 3))
tiny("Ordered", [7], lambda m, x: flat(m, outer(m, x).sort(2).values), **OUTER, head=(77, 3))
tiny("Renormed", [7, 11], lambda m, x: m.head(torch.renorm(deep(m, x), 2, 0, 1.0)), **DEEP, head=(7, 3))

# --- recurrent layers
tiny("CellOnly", [7], lambda m, x: (m.cell(x)[0] * m.s).sum(1), cell=lambda: nn.LSTMCell(5, 7), s=par(7))
tiny("CellStates", [7, 11], lambda m, x: m.head(m.cell(m.a(x), (m.b(x), m.c(x)))[0]),
     a=(5, 7), b=(5, 11), c=(5, 11), cell=lambda: nn.LSTMCell(7, 11), head=(11, 3))
tiny("CellOverChannels", [7, 11], lambda m, x: m.head(m.cell(m.a(x).t(), m.c(x)[0][:, None] * m.p).t()).sum(0),
     a=(5, 7), c=(5, 7), p=par(11), cell=lambda: nn.GRUCell(2, 11), head=lambda: nn.Linear(7, 3, bias=False))
tiny("LayerOnly", [7], lambda m, x: (m.rnn(x)[0] * m.s).sum(-1), tokens(),
     rnn=lambda: nn.GRU(5, 7, batch_first=True), s=par(7))
tiny("BothDirections", [7, 7], lambda m, x: m.head(m.rnn(x)[0]), tokens(),
     rnn=lambda: nn.LSTM(5, 7, bidirectional=True, batch_first=True), head=(14, 3))
tiny("LastStates", [7], lambda m, x: m.head(m.rnn(x)[1].permute(1, 2, 0)).sum(1), tokens(),
     rnn=lambda: nn.GRU(5, 7, 4, batch_first=True), head=(4, 3))
tiny("WidthOne", [7], lambda m, x: m.rnn(m.a(x))[0] * m.s, tokens(), a=(5, 7),
     rnn=lambda: nn.LSTM(7, 1, batch_first=True), s=par(3))
tiny("PlainLayer", [7], lambda m, x: m.head(m.rnn(x)[0]), tokens(), rnn=lambda: nn.RNN(5, 7, batch_first=True), head=(7, 3))
tiny("PackedSequence", [7], lambda m, x: m.head(m.rnn(nn.utils.rnn.pack_padded_sequence(
    x, torch.tensor([10, 7]), batch_first=True))[1][0][0].t()).sum(0), tokens(),
    rnn=lambda: nn.LSTM(5, 7, batch_first=True), head=lambda: nn.Linear(2, 3, bias=False))
tiny("PackedAndPadded", [7, 7], lambda m, x: m.head(unpacked(m.rnn(packed(m.a(x)))[0])), tokens(),
     a=(5, 7), rnn=lambda: nn.GRU(7, 7, batch_first=True), head=(7, 3))
tiny("PackedBothDirections", [7, 7], lambda m, x: m.head(unpacked(m.rnn(packed(x, [7, 10]))[0])), tokens(),
     rnn=lambda: nn.RNN(5, 7, bidirectional=True, batch_first=True), head=(14, 3))
tiny("PackedChannels", [4, 13], lambda m, x: flat(m, unpacked(packed(outer(m, m.e(x))[0][:, :, None] * m.p, [11] * 7))),
     e=(5, 13), a=(13, 7), b=(13, 11), p=par(4), head=(44, 3))
tiny("PackedSteps", [7], lambda m, x: (m.head(packed(m.a(x)).data.t()) * m.s).sum(0), tokens(), a=(5, 7), s=par(7, 1), head=(17, 3))
tiny("PackedNumbers", [7], lambda m, x: m.head(packed(x).batch_sizes.double()) + m.b(m.a(x)).sum((0, 1)), tokens(),
     a=(5, 7), b=(7, 3), head=(10, 3))
tiny("PaddedLengths", [7], lambda m, x: m.head(nn.utils.rnn.pad_packed_sequence(packed(x))[1].double()) + m.b(m.a(x)).sum((0, 1)),
     tokens(), a=(5, 7), b=(7, 3), head=(2, 3))
tiny("PaddedChannels", [11], lambda m, x: flat(m, unpacked(nn.utils.rnn.PackedSequence(
    deep(m, x).t(), torch.tensor([2, 2, 2, 1])))), **DEEP, head=(8, 3))
tiny("StatesTold", [7], lambda m, x: m.head(m.rnn(x, write(torch.zeros(4, 2, m.n).double(), 0, 0.3))[0]), tokens(),
     n=lambda: 7, rnn=lambda: nn.GRU(5, 7, 2, bidirectional=True, batch_first=True), head=(14, 3))
tiny("NarrowProjected", [3, 7], lambda m, x: m.head(m.rnn(x)[0]), tokens(),
     rnn=lambda: nn.LSTM(5, 7, proj_size=3, batch_first=True), head=(3, 3))

# fmt: on
# --- attention: [batch, heads a, queries b, width c], every dim of other channels

QKV = {"a": (5, 4), "b": (5, 3), "c": (5, 7), "e": (5, 13), "f": (5, 7), "g": (5, 13), "h": (5, 11)}


def attend(m: Any, x: torch.Tensor, q: str, k: str, v: str, mask: Any = None, **options: Any) -> torch.Tensor:
    q, k, v = (outer(m, x, names) for names in (q, k, v))
    if q.dim() > k.dim():
        k, v = k[:, None], v[:, None]
    return flat(m, F.scaled_dot_product_attention(q, k, v, mask, scale=0.4, **options))


# fmt: off
tiny("AttentionAlone", [3, 7, 11], lambda m, x: attend(m, x, "bc", "ef", "gh"), **QKV, head=(33, 3))
tiny("AttentionOneKeyHead", [3, 4, 7, 11], lambda m, x: attend(m, x, "abc", "ef", "gh"), **QKV, head=(132, 3))
tiny("AttentionHeads", [3, 4, 7, 11], lambda m, x: attend(m, x, "abc", "ief", "jgh", m.mask),
     **QKV, i=(5, 4), j=(5, 4), mask=par(4, 1, 1), head=(132, 3))
tiny("AttentionSharedHeads", [2, 2, 3, 7, 11], lambda m, x: attend(m, x, "abc", "ief", "jgh", enable_gqa=True),
     **QKV, i=(5, 2), j=(5, 2), head=(132, 3))
tiny("AttentionSharedHeadsInRows", [2, 2, 3, 5, 7, 11], lambda m, x: attend(m, x, "labc", "nief", "ojgh", enable_gqa=True),
     **QKV, i=(5, 2), j=(5, 2), l=(5, 5), n=(5, 5), o=(5, 5), head=(660, 3))
# fmt: on


# ------------------------------------------------------------------------------------------------ who objects

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}


class Subject:
    """A network that is traced once and then pruned again and again under broken rules."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entry = TINY.get(name) or ZOO[name]
        self.model, self.inputs = self.entry.model(), self.entry.example()
        self.traces: dict[Any, Any] = {}
        self.trace = self.traced()

    def traced(self, literals: bool = False, other_ways: Sequence[Any] = ()) -> Any:
        """What a run of the network records, each made once."""
        key = literals, tuple(other_ways)
        if key not in self.traces:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.traces[key] = TRACE(self.model, self.inputs, literals=literals, other_ways=other_ways)
        return self.traces[key]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """`depgraph` takes the recorded trace instead of making a new one."""
        plain = PRUNE.trace
        PRUNE.trace = lambda model, inputs, **ways: self.traced(**ways)
        try:
            yield
        finally:
            PRUNE.trace = plain

    def graph(self) -> Any:
        with self.replayed():
            return depgraph.analyze(self.model, self.inputs)

    @cached_property
    def mutants(self) -> list[Mutant]:
        """All that can be broken in the rules that this network calls."""
        breakers = [Breaker(rule) for rule in RULES]
        with under(breakers):
            self.graph()
        return [m for b in breakers for m in b.seen]

    def facts(self) -> Any:
        """Everything that a plan depends on, in a form that can be compared."""
        graph = self.graph()
        number = {g.axis: i for i, g in enumerate(graph.groups)}

        def plain(p: Any) -> list[Any]:
            return sorted((sorted(number.get(a, -1) for a in term), n) for term, n in p.items())

        members = [
            [(m.name, m.dim, m.role, m.rows, m.indices.tobytes()) for m in g.members] for g in graph.groups
        ]
        relations = sorted(str(plain(p)) for p, _ in graph.constraints)
        sizes = graph.sizes
        return members, relations, [
            sorted(str((k, plain(sizes.reduce(p, graph.by_axis)))) for k, p in sizes.attributes.items()),
            [plain(sizes.reduce(x.target, graph.by_axis)) for x in sizes.literals], sorted(graph.state.renumbered),
            [(plain(depgraph.axes.polynomials.count(axis, graph.by_axis)), n) for axis, n in graph.state.at_least],
            [plain(p) for _, factors in graph.state.work for p in [depgraph.axes.polynomials.count(f, graph.by_axis) for f in factors if isinstance(f, Axis)]],
        ]  # fmt: skip

    @cached_property
    def unbroken(self) -> Any:
        return self.facts()

    @cached_property
    def probes(self) -> list[Callable[[], str]]:
        """The checks that find nothing while no rule is broken."""
        return [check for check in self.checks().values() if not said_by(check)]

    def checks(self) -> dict[str, Callable[[], str]]:
        """Everything that may object, by name; each says what it objects to, or nothing."""

        def at_random(seed: int, **options: Any) -> Callable[[], str]:
            return lambda: self._prune({**options, "importance": random_importance(seed)})

        return {
            **({"groups": self._groups} if isinstance(self.entry, Tiny) else {}),
            "half by L1": lambda: self._prune({"pruning_ratio": 0.5}, shrinks=True),
            "half at random": at_random(1, pruning_ratio=0.5),
            "a third at random": at_random(2, pruning_ratio=0.3),
            "parameters": at_random(3, max_params=0.7),
            "MACs": self._macs,
        }

    def _groups(self) -> str:
        sizes = tuple(sorted(g.units for g in self.graph().groups))
        return "" if sizes == self.entry.groups else f"groups are {sizes}, should be {self.entry.groups}"

    def _prune(self, options: dict[str, Any], shrinks: bool = False) -> str:
        with self.replayed():
            result = depgraph.prune(self.model, self.inputs, verify=False, **options)
        assert_state_matches_plan(self.model, result.model, result.plan)
        assert_equal_to_masked(self.model, result, self.inputs, tol=TOLERANCE[self.entry.dtype])
        return "; ".join(broken_expectations(self.entry, self.model, result.model)) if shrinks else ""

    def _macs(self) -> str:
        graph, by_hand = self.graph(), getattr(self.entry, "macs", None)
        predicted = depgraph.CostModel(graph).macs({g.name: g.units for g in graph.groups})
        counted = self._counted_macs if by_hand is None else by_hand
        return "" if predicted == counted else f"{predicted} MACs are predicted, torch counts {counted}"

    @cached_property
    def _counted_macs(self) -> int:
        return depgraph.count_macs(self.model, self.inputs)

    def objection(self, mutant: Mutant) -> str | None:
        """What objects to the mutant; "" if nothing does, None if it changes nothing here."""
        unbroken, broken = self.unbroken, Breaker(mutant.rule, mutant)
        changed: list[bool] = []
        with under([broken]):
            said = said_by(lambda: changed.append(self.facts() != unbroken) or "")
        if said or changed == [False]:
            return said or None
        probes = self.probes
        with under([broken]):
            return next(filter(None, map(said_by, probes)), "")


def said_by(check: Callable[[], str]) -> str:
    """What a check objects to, an exception included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return check()
        except Exception as error:  # noqa: BLE001
            return f"{type(error).__name__}: {error}".splitlines()[0]


class Probe:
    """A call of `probing_rows.py`: the op by itself, its rule held against what it does to numbers."""

    def __init__(self, name: str) -> None:
        self.name, self.row = name, ROWS[name]

    @cached_property
    def mutants(self) -> list[Mutant]:
        """All that can be broken in the rule."""
        found = [rule for rule, names in RULES.items() if self.row.rule in names] or ["aten::pointwise"]
        breaker = Breaker(found[0])
        with under([breaker]):
            Claim(self.row)
        return list(breaker.seen)

    @cached_property
    def unbroken(self) -> tuple[Any, dict[str, str]]:
        """What the rule says, and where it is too strict."""
        claim = Claim(self.row)
        return claim.facts(), claim.too_strict()

    def objection(self, mutant: Mutant) -> str | None:
        """As `Subject.objection`."""
        facts, strict = self.unbroken
        with under([Breaker(mutant.rule, mutant)]):
            claim = Claim(self.row)
            if claim.facts() == facts:
                return None
            said = said_by(claim.unequal) or said_by(claim.dependent)
        return said or ("is too strict" if claim.too_strict().keys() - strict.keys() else "")


@cache
def networks() -> list[Subject]:
    """Every network, the smallest traces first."""
    return sorted(map(Subject, [*TINY, *ZOO]), key=lambda s: len(s.trace.graph.nodes))


@cache
def subjects() -> list[Subject | Probe]:
    """All that may object: calls of single ops, then networks."""
    return [*map(Probe, ROWS), *networks()]


@cache
def mutants() -> dict[Mutant, list[Subject | Probe]]:
    """Every mutant that the rules of some subjects have, with these."""
    found: dict[Mutant, list[Subject | Probe]] = {}
    for subject in subjects():
        for mutant in subject.mutants:
            found.setdefault(mutant, []).append(subject)
    return found


@dataclass(frozen=True)
class Verdict:
    """What objected to a mutant and where, or "" if it survives; `changed`: the networks in which it changes anything."""

    objection: str = ""
    subject: str = ""
    changed: int = 0


@cache
def verdict(mutant: Mutant) -> Verdict:
    """Try the mutant on the networks that it could matter to until one objects."""
    changed = 0
    for subject in mutants()[mutant]:
        said = subject.objection(mutant)
        changed += said is not None
        if said:
            return Verdict(said, subject.name, changed)
    return Verdict(changed=changed)


def survivors(rule: str) -> list[Mutant]:
    """The mutants of a rule that nothing objects to; an exchange of dims that changes nothing anywhere is none."""
    mine = [m for m in mutants() if m.rule == rule]
    return [m for m in mine if not verdict(m).objection and (m.way != "exchange dims" or verdict(m).changed)]


def main(labels: Sequence[str]) -> None:
    """Print every mutant of the rules (all, if none is given) with what objects to it."""
    torch.set_num_threads(1)
    noticed = left = 0
    for rule in RULES:
        if labels and rule.removeprefix("aten::") not in labels:
            continue
        mine, alive = [m for m in mutants() if m.rule == rule], survivors(rule)
        print(f"{rule}: {len(mine)} mutants" if mine else f"{rule}: no network calls it")
        for mutant in mine:
            v = verdict(mutant)
            if v.objection:
                noticed += 1
                print(f"  noticed    {mutant}\n             {v.subject}: {v.objection[:120]}")
            elif mutant in alive:
                left += 1
                print(f"  SURVIVES   {mutant} (changes {v.changed} networks)")
    print(f"{noticed} mutants are noticed, {left} survive")


if __name__ == "__main__":
    main(sys.argv[1:])
