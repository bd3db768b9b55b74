"""The smallest model of every timm model file, and the smallest image it runs on, kept in `timm.json`.

python -m benchmarks.models.timm      # regenerate the file: builds every timm architecture once, some minutes
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import vision_ops  # noqa: F401  # timm imports torchvision
from torch import nn

from benchmarks.suites.case import Cases, tensor_inputs

DATA = Path(__file__).with_suffix(".json")
BATCH = 2
# Tried in this order. 104 comes first because its feature maps (52, 26, 13, 7, 4) share no size with common widths.
IMAGE_SIZES = (104, 96, 128, 160, 192, 224, 256, 288, 320, 384)


@dataclass(frozen=True)
class TimmModel:
    """One timm architecture: its name, the module it comes from, its parameters, the image `[C, H, W]` it takes."""

    name: str
    module: str
    params: int
    image: tuple[int, int, int]


def load() -> list[TimmModel]:
    """The stored list, one model a timm module, in alphabetical order of modules."""
    return [TimmModel(**{**row, "image": tuple(row["image"])}) for row in json.loads(DATA.read_text())]


def build(name: str) -> nn.Module:
    """The architecture with random weights, in eval mode."""
    import timm

    return timm.create_model(name, pretrained=False).eval()


def count_params(name: str) -> int:
    """Number of parameters, counted on the meta device where the constructor allows it."""
    try:
        with torch.device("meta"):
            model = build(name)
    except (
        RuntimeError,
        NotImplementedError,
        TypeError,
        ValueError,
    ):  # it computes with tensors while it is built
        model = build(name)
    return sum(p.numel() for p in model.parameters())


def smallest_by_module() -> Iterator[tuple[str, str, int]]:
    """`(module, name, parameters)` of the smallest model of each module; the first by name where several are equal."""
    import timm

    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            params, name = min((count_params(name), name) for name in names)
            yield module, name, params


def smallest_image(name: str) -> tuple[int, int, int]:
    """The first of `IMAGE_SIZES`, or else the model's own size, that it runs on in a batch of `BATCH`.

    Raises:
        RuntimeError: where it runs on none of them.
    """
    model = build(name)
    channels, *native = model.pretrained_cfg.get("input_size", (3, 224, 224))
    for size in (*((s, s) for s in IMAGE_SIZES), tuple(native)):
        try:
            with torch.no_grad():
                model(torch.randn(BATCH, channels, *size))
        except Exception:  # models reject sizes in every way there is
            continue
        return (channels, size[0], size[1])
    raise RuntimeError(
        f"timm model {name!r} runs on none of the image sizes {IMAGE_SIZES} nor on its own {native}"
    )


def regenerate() -> list[TimmModel]:
    """Go through timm's registry and write `timm.json`."""
    rows = []
    for module, name, params in smallest_by_module():
        row = TimmModel(name, module, params, smallest_image(name))
        print(row, flush=True)
        rows.append(row)
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    DATA.write_text(f"[\n{lines}\n]\n")
    return rows


CASES = Cases()
for _row in load():
    _inputs = partial(tensor_inputs, (BATCH, *_row.image))
    CASES.add(_row.name, partial(build, _row.name), _inputs, f"{_row.module}: logits")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    regenerate()
