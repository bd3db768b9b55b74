"""Small parts of folders: what a row of plan.json says, what is no field of it, and where entries of tensors lie."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

from depgraph.store.document import _document, _entry, _row
from depgraph.store.factory import left_on_meta
from depgraph.store.layout import Laid, NotMoved, Part, Span
from depgraph.store.weights import Entry, _stride


def test_a_row_says_the_stride_of_a_tensor_that_has_one_of_its_own() -> None:
    row = {"dtype": "bfloat16", "shape": [2, 3], "file": "model.safetensors", "crc32": 7}
    plain = Entry(torch.bfloat16, (2, 3), "model.safetensors", 7)
    turned = Entry(torch.bfloat16, (2, 3), "model.safetensors", 7, (1, 2))
    assert _row(plain) == row
    assert _row(turned) == {**row, "stride": [1, 2]}
    assert _entry(_row(plain)) == plain
    assert _entry(_row(turned)) == turned


@pytest.mark.parametrize(
    ("tensor", "stride"),
    [
        (torch.zeros(2, 3), None),
        (torch.zeros(3, 2).T, (1, 2)),
        (torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), (60, 1, 15, 3)),
        (torch.zeros(6).as_strided((2, 1, 3), (3, 99, 1)), (3, 99, 1)),
        (torch.zeros(4, 4)[:, :2], None),  # gaps
        (torch.zeros(3).expand(2, 3), None),  # one place for several entries
        (torch.zeros(3, 0).T, None),
        (torch.tensor(1.0), None),
    ],
)
def test_a_stride_is_written_where_it_is_dense_and_not_the_usual_one(
    tensor: torch.Tensor, stride: tuple[int, ...] | None
) -> None:
    assert _stride(tensor) == stride


FULL: dict[str, Any] = {
    "format": 1, "provenance": {"torch": 2}, "plans": [], "tensors": {}, "ties": {}, "views": {}, "held": {}, "frozen": ["a"],
    "training": ["", "b"], "extra_state": {"": 3}, "config": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("frozen", [1], "list of names"), ("frozen", ["a", None], "list of names"), ("frozen", {}, "list of names"),
        ("training", [["a"]], "list of names"), ("training", None, "list of names"),
        ("ties", {"a": 1}, "table of names"), ("ties", [], "table of names"),
        ("views", {"a": ["b"]}, "table of names"), ("views", "a", "table of names"),
        ("provenance", [], "table"), ("plans", {}, "list"), ("tensors", [], "table"), ("held", [], "table"),
        ("extra_state", 1, "table"), ("config", [], "table"), ("sizes", {}, "list"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_refused(name: str, value: Any, kind: str) -> None:
    problems: list[str] = []
    found = _document(FULL, problems)
    assert problems == []
    assert (found.frozen, found.training, found.extra_state) == (["a"], ["", "b"], {"": 3})
    _document({**FULL, name: value}, problems)
    assert len(problems) == 1
    assert problems[0].startswith(f"field {name!r} is not a {kind}: ")


def test_what_is_left_on_the_meta_device_is_found_wherever_it_is() -> None:
    elsewhere = torch.empty(2, device="meta")

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proxy = weakref.proxy(elsewhere)
            table = torch.empty(2, device="meta")
            self.layer, self.real = nn.Linear(2, 3, bias=False, device="meta"), nn.Linear(2, 3)
            self.tables = {"a": [torch.zeros(1), torch.empty(1, device="meta")], "none": []}
            self.shift = lambda x: x + table
            self.device, self.other = torch.device("meta"), torch.device("cpu")
            self.loop = [self, "meta", 1]

    assert sorted(left_on_meta(Keeps())) == [
        "_modules.layer._parameters.weight", "device", "proxy", "shift.table", "tables.a.1",
    ]  # fmt: skip
    assert left_on_meta(nn.Linear(2, 3)) == []


def test_what_is_asked_of_a_stand_in_is_answered_as_of_a_tensor() -> None:
    stand, tensor = Laid.stored("a", (4, 6), torch.float16), torch.zeros(4, 6)
    assert stand.size() == tensor.size() == stand.shape
    assert [stand.size(d) for d in (0, 1, -1, -2)] == [4, 6, 6, 4]
    assert stand.dim() == stand.ndim == 2
    assert stand.contiguous() is stand
    assert stand.to(torch.float64) is stand
    assert stand[...] is stand
    assert stand.squeeze(1) is stand
    assert stand.dtype == torch.float16
    assert stand.parts == (Part("a", (Span(0, 0, 0, 4), Span(1, 0, 0, 6))),)
    with pytest.raises(NotMoved, match="indexing with 0"):
        stand[0]
    with pytest.raises(NotMoved, match=r"Tensor\.numel"):
        stand.numel()


def test_pieces_of_a_stand_in_have_the_shapes_of_pieces_of_a_tensor() -> None:
    stand, tensor = Laid.stored("a", (7, 5)), torch.zeros(7, 5)
    for way in (
        lambda t: t.chunk(2), lambda t: t.chunk(3), lambda t: t.chunk(7), lambda t: t.chunk(2, 1), lambda t: t.chunk(4, -1),
        lambda t: t.split(3), lambda t: t.split(7), lambda t: t.split([1, 4], 1), lambda t: t.split([2, 2, 3], -2),
        lambda t: t.unbind(), lambda t: t.unbind(1), lambda t: (t.unsqueeze(0), t.unsqueeze(1), t.unsqueeze(-1), t.unsqueeze(-3)),
        lambda t: (t.transpose(0, 1), t.transpose(-1, 0), t.unsqueeze(1).squeeze(1), t.unsqueeze(-1).squeeze(-1)),
    ):  # fmt: skip
        assert [tuple(t.shape) for t in way(stand)] == [tuple(t.shape) for t in way(tensor)]
    first, second = stand.chunk(2)
    assert first.parts == (Part("a", (Span(0, 0, 0, 4), Span(1, 0, 0, 5))),)
    assert second.parts == (Part("a", (Span(0, 4, 0, 3), Span(1, 0, 0, 5))),)
    assert stand.unbind(1)[3].parts == (Part("a", (Span(0, 0, 0, 7),), ((1, 3),)),)
    assert stand.unsqueeze(1).parts == (Part("a", (Span(0, 0, 0, 7), 0, Span(1, 0, 0, 5))),)


def test_parts_are_moved_and_narrowed() -> None:
    part = Part("a", (3, Span(1, 10, 4, 6)), ((0, 2),))  # entries 10 .. 16, which lie at 4 .. 10
    assert part.moved(0, 2) == Part("a", (5, Span(1, 10, 4, 6)), ((0, 2),))
    assert part.moved(1, 2) == Part("a", (3, Span(1, 10, 6, 6)), ((0, 2),))
    for first, size, span in (
        (0, 99, Span(1, 10, 4, 6)),
        (2, 4, Span(1, 10, 2, 2)),
        (6, 10, Span(1, 12, 0, 4)),
        (5, 2, Span(1, 11, 0, 2)),
        (0, 5, Span(1, 10, 4, 1)),
        (9, 3, Span(1, 15, 0, 1)),
    ):
        assert part.narrowed(1, first, size) == Part("a", (3, span), ((0, 2),))
    for first, size, index in ((3, 1, 0), (1, 3, 2), (0, 4, 3)):
        assert part.narrowed(0, first, size) == Part("a", (index, Span(1, 10, 4, 6)), ((0, 2),))
    for dim, first, size in ((1, 0, 4), (1, 10, 2), (0, 2, 1), (0, 4, 2)):
        assert part.narrowed(dim, first, size) is None
