"""Tiny models of transformers, pruned from file to file: a sample of kinds; `python -m benchmarks.checkpoint_types` has all."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
from benchmarks.checkpoint_types import compared
from benchmarks.models import transformers as tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
# A decoder, experts that are stacked, a convolution of weights [in, out], vision, text to text, tables that no file has.
SAMPLE = ("llama", "qwen2_moe", "gpt2", "vit", "t5", "marian")


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("uniform", [False, True])
def test_plan_and_bytes_are_those_of_memory(tmp_path: Path, name: str, uniform: bool) -> None:
    row = next(r for r in tiny.load() if r.type == name)
    assert compared(row, tmp_path, pruning_ratio=0.5, uniform=uniform) == ("right", "")
