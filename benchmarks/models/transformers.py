"""A tiny model of every type of transformers, and inputs that it runs on, kept in `transformers.json`.

    python -m benchmarks.models.transformers            # regenerate the file: tries every type, some tens of minutes
    python -m benchmarks.models.transformers bert t5    # only these, into the same file

A type is tried with the classes that the library's own tables name for it, those that generate text first, and with
inputs guessed from the names of the arguments of `forward`. What runs forward and backward is written down; a type
where nothing does is listed with the reason.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vision_ops  # noqa: F401  # transformers imports torchvision
from outputs import backward_works, tensors
from torch import Tensor, nn

from benchmarks.isolate import Row, isolated
from benchmarks.models.transformers_checks import check, generation
from benchmarks.models.transformers_exceptions import GIVEN, INPUTS
from benchmarks.models.transformers_shrunk import HIDDEN, IMAGE, shrunk
from benchmarks.suites.case import Cases

DATA = Path(__file__).with_suffix(".json")
LIMIT = 240.0  # seconds of processor time a type
MANY = 30_000_000  # parameters: what is larger was not shrunk
BATCH, TOKENS, TARGETS = 2, 7, 5

# The library's tables of classes by task, in the order in which they are tried.
TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM", "MASKED_LM",
    "SEQUENCE_CLASSIFICATION", "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION", "INSTANCE_SEGMENTATION", "DEPTH_ESTIMATION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION", "CTC", "AUDIO_CLASSIFICATION", "TIME_SERIES_PREDICTION", "PRETRAINING",
)  # fmt: skip

Spec = dict[str, Any]  # argument -> [kind, shape, ...], see `tensor`


@dataclass
class Tiny:
    """One type: the class it is built as and the arguments it runs on, or the reason why there is none."""

    type: str
    model: str = ""
    params: int = 0
    unreached: int = 0  # parameters that get no gradient on these inputs
    generates: bool = False  # the original generates the same tokens with the cache as without
    inputs: Spec = field(default_factory=dict)
    reason: str = ""


def load() -> list[Tiny]:
    """The stored list, in alphabetical order of types."""
    return [Tiny(**row) for row in json.loads(DATA.read_text())] if DATA.exists() else []


# ------------------------------------------------------------------------------------------------------ models


def config(model_type: str, model_class: str = "") -> Any:
    """The small configuration of a type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    small = kind.from_dict(shrunk(kind(**GIVEN.get(model_type, {})).to_dict()))
    if model_class.endswith(("ForCausalLM", "LMHeadModel")) and getattr(small, "is_decoder", None) is False:
        small.is_decoder = True
    return small


def build(model_type: str, model_class: str) -> nn.Module:
    """The tiny model, with random weights, in eval mode."""
    import transformers

    kind = getattr(transformers, model_class, None)
    if kind is None:  # a part of a larger model, which only the library's tables name
        from transformers.models.auto import modeling_auto as auto

        kind = auto.MODEL_MAPPING[type(config(model_type))]
    return kind(config(model_type, model_class)).eval()


def classes(model_type: str) -> list[str]:
    """Names of the classes that a type can be built as, best first."""
    from transformers.models.auto import modeling_auto as auto

    found: list[str] = []
    for table in (
        *(f"MODEL_FOR_{task}_MAPPING_NAMES" for task in TASKS),
        "MODEL_MAPPING_NAMES",
        *_other_tables(),
    ):
        name = getattr(auto, table).get(model_type, ())
        found += [name] if isinstance(name, str) else list(name)[:1]
    return list(dict.fromkeys(found))


def _other_tables() -> list[str]:
    from transformers.models.auto import modeling_auto as auto

    return sorted(n for n in dir(auto) if n.startswith("MODEL_FOR_") and n.endswith("_MAPPING_NAMES"))


def types() -> list[str]:
    """Every type that has a model."""
    from transformers.models.auto import modeling_auto as auto

    tables = ["MODEL_MAPPING_NAMES", *_other_tables()]
    return sorted({name for table in tables for name in getattr(auto, table)})


# ------------------------------------------------------------------------------------------------------ inputs


def tensor(kind: str, shape: list[int], *rest: Any) -> Tensor:
    """The tensor that a spec describes: noise, ones, ids (`below`, {id: [start, stop]}), values, boxes."""
    dice = torch.Generator().manual_seed(sum(shape))
    if kind == "noise":
        return torch.randn(shape, generator=dice)
    if kind == "uniform":
        return torch.rand(shape, generator=dice)
    if kind == "ones":
        return torch.ones(shape, dtype=torch.long)
    if kind == "zeros":
        return torch.zeros(shape, dtype=torch.long)
    if kind == "mask":
        return torch.ones(shape, dtype=torch.bool)
    if kind == "values":
        return torch.tensor(rest[0]).reshape(shape)
    if kind == "boxes":
        corners = torch.randint(0, rest[0] // 2, (*shape[:-1], 2), generator=dice)
        return torch.cat(
            [corners, corners + torch.randint(1, rest[0] // 2, corners.shape, generator=dice)], -1
        )
    low, high = (3, rest[0]) if rest[0] > 8 else (0, rest[0])
    ids = torch.randint(low, high, shape, generator=dice)
    for token, (start, stop) in (rest[1] if len(rest) > 1 else {}).items():
        ids[ids == int(token)] += 1
        ids[:, start:stop] = int(token)
    return ids


def inputs(spec: Spec) -> dict[str, Any]:
    """Keyword arguments from what the table says of them; plain values stand for themselves."""
    return {k: tensor(*v) if isinstance(v, list) else v for k, v in spec.items()}


def scopes(cfg: Any) -> Iterator[Any]:
    """A configuration and all in it."""
    yield cfg
    for value in vars(cfg).values():
        if hasattr(value, "to_dict"):
            yield from scopes(value)


def first(cfg: Any, *names: str, default: Any = None, among: str = "") -> Any:
    """The first of `names` that a configuration or a part of it has; `among`: in parts with such a name only."""
    parts = [
        c for c in scopes(cfg) if among in getattr(c, "model_type", "") or among in type(c).__name__.lower()
    ]
    for name in names:
        for part in parts or [cfg]:
            value = getattr(part, name, None)
            if value is not None and not isinstance(value, (str, bool)):
                return value
    return default


def guesses(model: nn.Module, cfg: Any) -> Iterator[Spec]:
    """Inputs by the names of the arguments of `forward`, likely ones first."""
    known = inspect.signature(model.forward).parameters
    if type(cfg).model_type in INPUTS:
        yield INPUTS[type(cfg).model_type]
    required = [
        n
        for n, p in known.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    texts = list(_texts(cfg, known, required))
    signals = list(_images(model, cfg, known)) + list(_sounds(cfg, known))
    for signal in signals:
        for text in texts:
            if "input_ids" in text:
                yield from _with_tokens(model, cfg, text, signal)
            else:
                yield {**text, **signal}
    for text in texts:
        for signal in signals:
            yield {**text, **signal}
    yield from (t for t in texts if t)
    hidden = first(cfg, "hidden_size", "d_model", "embed_dim", default=HIDDEN)
    yield {n: ["noise", [BATCH, TOKENS, hidden]] for n in required}
    yield {n: ["noise", [BATCH, hidden, TOKENS]] for n in required}


def _texts(cfg: Any, known: Any, required: list[str]) -> Iterator[Spec]:
    vocabulary = first(cfg, "vocab_size", default=99)
    below = max(min(vocabulary, 103) - 24, 3) if vocabulary > 40 else vocabulary
    for length in (TOKENS, 16, 32):
        spec: Spec = {}
        if "input_ids" in known:
            spec["input_ids"] = ["ids", [BATCH, length], below]
            if "attention_mask" in known:
                spec["attention_mask"] = ["ones", [BATCH, length]]
            for name in required:
                if name.endswith("input_ids"):
                    spec[name] = ["ids", [BATCH, length], below]
                elif name.endswith("attention_mask"):
                    spec[name] = ["ones", [BATCH, length]]
            if "bbox" in known:
                spec["bbox"] = ["boxes", [BATCH, length, 4], 100]
        if "decoder_input_ids" in known:
            spec["decoder_input_ids"] = ["ids", [BATCH, TARGETS], below]
        yield spec
        if not spec:
            return


def _images(model: nn.Module, cfg: Any, known: Any) -> Iterator[Spec]:
    names = ["pixel_values", "image_pixel_values", "images", "pixel_values_videos", "image_patches"]
    names += ["hidden_states"] if "grid_thw" in known else []
    name = next((n for n in names if n in known), "")
    if not name:
        return
    vision = [c for c in scopes(cfg) if hasattr(c, "patch_size") or hasattr(c, "image_size")] or [cfg]
    part = vision[-1]
    size = getattr(part, "image_size", None) or IMAGE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = first(part, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    patch = getattr(part, "patch_size", None) or 8
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    frames = first(cfg, "num_frames", default=2)
    if "image_grid_thw" in known or "grid_thw" in known:
        grid = "image_grid_thw" if "image_grid_thw" in known else "grid_thw"
        tall, wide = 4, 6
        for depth in dict.fromkeys((first(cfg, "temporal_patch_size", default=1), 1, 2)):
            yield {
                name: ["noise", [BATCH * tall * wide, channels * depth * patch * patch]],
                grid: ["values", [BATCH, 3], [1, tall, wide] * BATCH],
            }
    more: list[Spec] = [{}]
    if "image_sizes" in known:
        more.insert(0, {"image_sizes": ["values", [BATCH, 2], [height, width] * BATCH]})
    if "spatial_shapes" in known:
        tall, wide = 4, 6
        yield {
            name: ["noise", [BATCH, tall * wide, channels * patch * patch]],
            "pixel_attention_mask": ["ones", [BATCH, tall * wide]],
            "spatial_shapes": ["values", [BATCH, 2], [tall, wide] * BATCH],
        }
    for extra in more:
        for h, w in dict.fromkeys([(height, width), (64, 64), (64, 96), (128, 128), (224, 224)]):
            yield {name: ["noise", [BATCH, channels, h, w]], **extra}
            yield {name: ["noise", [BATCH, frames, channels, h, w]], **extra}
            yield {name: ["noise", [BATCH, 3, channels, h, w]], **extra}  # a picture and its two halves
            yield {name: ["noise", [BATCH, 1, channels, h, w]], **extra}
            yield {name: ["noise", [BATCH, channels, frames, h, w]], **extra}


def _sounds(cfg: Any, known: Any) -> Iterator[Spec]:
    bands = first(
        cfg,
        "num_mel_bins",
        "feature_size",
        "input_feat_per_channel",
        "input_feat_size",
        "n_mels",
        "input_dim",
        "feature_projection_input_dim",
        default=80,
    )
    longest = first(cfg, "max_source_positions", default=64) * 2
    for name in (
        "input_features",
        "input_audio_features",
        "audio_features",
        "input_values",
        "audio_values",
        "spectrogram",
    ):
        if name not in known:
            continue
        masks = [n for n in ("feature_attention_mask", "input_features_mask") if n in known]
        for length in dict.fromkeys([longest, 64, 128, 256, 1024, 3000]):
            for shape in ([BATCH, bands, length], [BATCH, length, bands]):
                if not name.endswith("values") or name == "spectrogram":
                    spec: Spec = {name: ["noise", shape]}
                    if (
                        "attention_mask" in known
                        and "input_ids" not in known
                        and "decoder_input_ids" not in known
                    ):
                        yield {**spec, "attention_mask": ["ones", [BATCH, length]]}
                    yield {**spec, **{m: ["ones", [BATCH, length]] for m in masks}}
        for length in (400, 1600, 3200, 8000):
            yield {name: ["noise", [BATCH, length]]}
            yield {name: ["noise", [BATCH, 1, length]]}
        yield {name: ["noise", [BATCH, first(cfg, "max_length", default=64), bands]]}


def _with_tokens(model: nn.Module, cfg: Any, text: Spec, signal: Spec) -> Iterator[Spec]:
    """Text with as many places for an image or a sound as the model makes of it."""
    names = (
        "image_token_id",
        "image_token_index",
        "audio_token_id",
        "audio_token_index",
        "media_token_id",
        "image_token",
        "video_token_id",
    )
    sound = any(k.startswith(("input_f", "audio", "input_v")) for k in signal)
    if sound:
        names = tuple(n for n in names if n.startswith("audio"))
    token = first(cfg, *names)
    count = _count(model, text, signal)
    if token is None or not count:
        return
    kind, (batch, length), below = text["input_ids"]
    each = count // batch
    spec = {**text, "input_ids": [kind, [batch, length + each], below, {str(token): [2, 2 + each]}], **signal}
    if "attention_mask" in text:
        spec["attention_mask"] = ["ones", [batch, length + each]]
    known = inspect.signature(model.forward).parameters
    if "mm_token_type_ids" in known:
        kinds = [1 if 2 <= i < 2 + each else 0 for i in range(length + each)]
        spec["mm_token_type_ids"] = ["values", [batch, length + each], kinds * batch]
    if "token_type_ids" in known:
        kinds = [1 if 2 <= i < 2 + each else 0 for i in range(length + each)]
        yield {**spec, "token_type_ids": ["values", [batch, length + each], kinds * batch]}
    yield spec


def _count(model: nn.Module, text: Spec, signal: Spec) -> int:
    """How many features the model makes of an image or a sound: asked of its own function, or of its complaint."""
    for name in ("get_image_features", "get_audio_features"):
        function = getattr(model, name, None) or getattr(getattr(model, "model", None), name, None)
        if function is None:
            continue
        known = inspect.signature(function).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
        try:
            with torch.no_grad():
                out = function(**{k: v for k, v in inputs(signal).items() if k in known or open_ended})
        except Exception:
            continue
        pooled = getattr(out, "pooler_output", None)
        found = tensors(out if pooled is None else pooled)
        if found:
            return sum(t.numel() // t.shape[-1] for t in (found if pooled is not None else found[:1]))
    try:
        with torch.no_grad():
            model(**inputs({**text, **signal}))
    except Exception as error:
        numbers = re.findall(r"features:? (\d+)", str(error))
        return int(numbers[-1]) if numbers else 0
    return 0


# ------------------------------------------------------------------------------------------------------- search


def _search(started: Callable[[], None], model_type: str) -> Row:
    """Body of `find`: the first class and inputs that run forward and backward, with the most parameters reached."""
    started()
    reasons: list[str] = []
    for name in classes(model_type):
        try:
            torch.manual_seed(0)
            model = build(model_type, name)
        except Exception as error:
            reasons.append(f"{name}: {_brief(error)}")
            continue
        params = sum(p.numel() for p in model.parameters())
        if params > MANY:
            reasons.append(f"{name}: {params:,} parameters")
            continue
        best = _best_inputs(model, reasons)
        if best is not None:
            missing, spec = best
            return asdict(Tiny(model_type, name, params, missing, _generates(model, spec), spec))
    return asdict(
        Tiny(model_type, reason="; ".join(dict.fromkeys(reasons))[:600] or "no class is named for it")
    )


def _best_inputs(model: nn.Module, reasons: list[str]) -> tuple[int, Spec] | None:
    best: tuple[int, Spec] | None = None
    error: Exception | None = None
    tries = 0
    for spec in guesses(model, model.config):
        tries += 1
        if best is not None and (best[0] == 0 or tries > 60):
            break
        try:
            if not backward_works(model, inputs(spec)):
                continue
        except Exception as problem:
            error = problem if error is None or ("input_ids" in spec and len(spec) > 2) else error
            continue
        missing = sum(p.numel() for p in model.parameters() if p.grad is None)
        if best is None or missing < best[0]:
            best = missing, spec
    if best is None:
        reasons.append(f"{type(model).__name__}: {_brief(error) if error else 'no gradient'}")
    return best


def _generates(model: Any, spec: Spec) -> bool:
    if "input_ids" not in spec and "input_features" not in spec:
        return False
    try:
        return bool(model.can_generate()) and generation(model, inputs(spec)) == ""
    except Exception:
        return False


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def find(model_type: str) -> Tiny:
    """A tiny model of one type and its inputs."""
    outcome = isolated(_search, model_type, limit=LIMIT)
    return Tiny(**outcome.row) if outcome.row else Tiny(model_type, reason=outcome.error[:600])


def regenerate(wanted: list[str]) -> None:
    """Try the types and write the file after each."""
    rows = {row.type: row for row in load()}
    for model_type in wanted or types():
        row = rows[model_type] = find(model_type)
        print(row.type, row.model, row.params, row.unreached, row.reason[:300], flush=True)
        lines = ",\n".join(json.dumps(asdict(rows[k])) for k in sorted(rows))
        DATA.write_text(f"[\n{lines}\n]\n")


def _check(row: Tiny, model: nn.Module) -> str:
    return check(inputs(row.inputs) if row.generates else None, model)


CASES = Cases()
for _row in load():
    if _row.model:
        _build, _inputs = partial(build, _row.type, _row.model), partial(inputs, _row.inputs)
        CASES.add(_row.type, _build, _inputs, _row.model, partial(_check, _row))


if __name__ == "__main__":
    regenerate(sys.argv[1:])
