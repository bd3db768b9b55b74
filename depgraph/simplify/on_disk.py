"""Zeros among the weights of a checkpoint that is not loaded: two readings find the threshold, one writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..base.checks import a_path
from ..base.errors import InputError
from ..plan.bits import Bits
from ..plan.plan import Plan
from ..surgery.zeros import zeroed
from .masking import DEFAULT, Pattern, chosen

PLAN = "masks.json"


def mask_checkpoint(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, sparsity: float = DEFAULT, scope: str = "global",
    pattern: Pattern | None = None, ignore: str | Sequence[str] = (),
) -> Plan:  # fmt: skip
    """`mask` by magnitude for a folder of safetensors files, of which one file at a time is in memory.

    Args:
        folder: where the files are. It is not touched.
        out: a new folder: gets the same files with zeros in them, all other files as they are, and the plan as ``masks.json``.
        sparsity: as for `mask`.
        scope: as for `mask`.
        pattern: as for `mask`.
        ignore: names of tensors that stay whole, or globs of them: embeddings can't be told from other weights here.

    Returns:
        the plan, whose names are those in the files; ``mask(name)`` tells single entries.

    Raises:
        InputError: there are no safetensors files, one can't be read, `out` exists, or as for `mask`.
    """
    source, target = a_path("folder", folder), a_path("out", out)
    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise InputError(f"there are no safetensors files in {source}")
    if target.exists():
        raise InputError(f"{target} exists: give a new folder")
    globs = [ignore] if isinstance(ignore, str) else list(ignore)
    try:
        handles = {file: safe_open(file, framework="pt") for file in files}
        home = {name: handle for handle in handles.values() for name in handle.keys()}  # noqa: SIM118  no mapping
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in home.items()}
        kinds = {name: handle.get_slice(name).get_dtype() for name, handle in home.items()}
        weights = {
            name: torch.empty(
                shape, device="meta", dtype=torch.float64 if kinds[name] == "F64" else torch.float32
            )
            for name, shape in shapes.items()
            if len(shape) > 1
            and kinds[name] in ("F64", "F32", "F16", "BF16")
            and not any(fnmatch(name, g) for g in globs)
        }
        if not weights:
            raise InputError("there is no weight to mask: no tensor of two dims or more is left")

        def score(name: str) -> torch.Tensor:
            given: torch.Tensor = home[name].get_tensor(name)
            return given.to(weights[name].dtype).abs()

        found = chosen(weights, score, sparsity, scope, pattern)
        entries = {name: Bits.of(~gone) for name, gone in found if bool(gone.any())}
        plan = Plan(
            shapes=shapes,
            entries=entries,
            request={"sparsity": sparsity, "scope": scope, "importance": "magnitude"},
        )
        target.mkdir(parents=True)
        for file, handle in handles.items():
            tensors = {n: zeroed(handle.get_tensor(n), entries.get(n)).contiguous() for n in handle.keys()}  # noqa: SIM118
            save_file(tensors, target / file.name, metadata=handle.metadata())
        for other in source.iterdir():
            if other.is_file() and other not in handles:
                shutil.copy2(other, target / other.name)
        (target / PLAN).write_text(plan.to_json(), encoding="utf-8")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{source} can't be masked into {target}: {error}") from error
    return plan
