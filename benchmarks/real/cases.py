"""The cases: four nets on Fashion-MNIST at half and a quarter of their MACs, and five pretrained models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.real import digits, fashion, nets, news, photos, proteins, tones
from benchmarks.real.case import Batches, Budget, Case, Hints, last_linears, shuffled

CALIBRATION_IMAGES = 1024
CALIBRATION_TEXTS = 64
CALIBRATION_WINDOWS = 16
HELD_OUT_TEXTS = 50
HELD_OUT_WINDOWS = 8
HELD_OUT_IMAGES = 5_000
CALIBRATION_FRAMES = 512
EVALUATED_FRAMES = 2_000
CALIBRATION_CHAINS = 12
HELD_OUT_CHAINS = 12


def names() -> list[str]:
    """All cases, in the order of the table."""
    return list(_table())


def case(name: str) -> Case:
    """The named case; nothing is fetched or trained before it is used."""
    return _table()[name]()


def small() -> Case:
    """A case of seconds, on data that scikit-learn has in its wheel."""
    return Case(
        name="digits",
        title="digits, a convolutional net, half the MACs",
        budget=Budget("macs", 0.5),
        build=digits.trained,
        example=lambda: torch.zeros(1, 1, 8, 8),
        calibration=lambda seed: digits.training().sample(256, seed).batches(64),
        loss=F.cross_entropy,
        score=lambda model: {"accuracy": fashion.accuracy(model, digits.held_out())},
        higher=True,
        hints=_classifier_hints(10),
        tune=digits.tune,
    )


def _table() -> dict[str, Callable[[], Case]]:
    found: dict[str, Callable[[], Case]] = {}
    for net in ("resnet20", "mobilenet", "vgg", "vit"):
        for share in (0.5, 0.25):
            found[f"{net}-{share:g}"] = partial(_fashion, net, share)
    pretrained = {"efficientnet": _efficientnet, "minilm": _minilm, "smollm": _smollm}
    return {**found, **pretrained, "crepe": _crepe, "proteinmpnn": _proteinmpnn}


# Fashion-MNIST


@cache
def _images() -> tuple[fashion.Images, fashion.Images, fashion.Images]:
    """For calibration and training afterwards; for choosing methods; for evaluation."""
    training, evaluated = fashion.load()
    first = len(training) - HELD_OUT_IMAGES
    return training.part(0, first), training.part(first, len(training)), evaluated


@lru_cache(maxsize=3)
def _answered(net: str, seed: int) -> Batches:
    """What a net is trained on afterwards, made once for all methods and budgets."""
    return fashion.answered(fashion.trained(net), _images()[0], seed)


def _fashion(net: str, share: float) -> Case:
    return Case(
        name=f"{net}-{share:g}",
        title=f"Fashion-MNIST, {net}, {share:g} of the MACs",
        budget=Budget("macs", share),
        build=lambda: fashion.trained(net),
        example=lambda: torch.zeros(1, 1, 28, 28),
        calibration=lambda seed: _images()[0].sample(CALIBRATION_IMAGES, seed).batches(128),
        loss=F.cross_entropy,
        score=lambda model: {"accuracy": fashion.accuracy(model, _images()[2])},
        higher=True,
        hints=_vit_hints() if net == "vit" else _classifier_hints(10),
        tune=lambda model, seed: fashion.distil(model, _answered(net, seed), seed),
        held_out=lambda model, seed: fashion.accuracy(model, _images()[1]),
        image=None if net == "vit" else (1, 28, 28),
    )


def _classifier_hints(classes: int) -> Hints:
    return Hints(lambda model: {"ignored_layers": last_linears(model, classes)})


def _vit_hints() -> Hints:
    """Whole heads go, and the count of heads is set by hand."""

    def blocks(model: nn.Module) -> list[nets.Attention]:
        return [m for m in model.modules() if isinstance(m, nets.Attention)]

    def arguments(model: nn.Module) -> dict[str, Any]:
        whole = {"prune_num_heads": True, "prune_head_dims": False}
        heads = {block.qkv: block.num_heads for block in blocks(model)}
        bare = {"unwrapped_parameters": [(model.get_parameter("positions"), 2)]}
        return {"num_heads": heads, **whole, **bare, "ignored_layers": last_linears(model, nets.CLASSES)}

    def repair(model: nn.Module, pruner: Any) -> None:
        for block in blocks(model):
            block.num_heads = pruner.num_heads[block.qkv]
            block.head_dim = block.qkv.out_features // (3 * block.num_heads)

    return Hints(arguments, repair)


# EfficientNet-Lite0


def _efficientnet() -> Case:
    @cache
    def dense_answers() -> Tensor:
        return photos.logits(photos.model(), photos_of()[1].images).argmax(1)

    @cache
    def photos_of() -> tuple[photos.Photos, photos.Photos]:
        return photos.load()

    def calibration(seed: int) -> Batches:
        """Crops of photos that are not evaluated; the target is the class that the dense model gives."""
        images = photos.augmented(photos_of()[0].images, 256, seed)
        return list(
            zip(images.split(16), photos.logits(photos.model(), images).argmax(1).split(16), strict=True)
        )

    def score(model: nn.Module) -> dict[str, float]:
        evaluated = photos_of()[1]
        answers = photos.logits(model, evaluated.images).argmax(1)
        return {
            "agreement": (answers == dense_answers()).float().mean().item(),
            "top-1": (answers == evaluated.labels).float().mean().item(),
        }

    return Case(
        name="efficientnet",
        title="EfficientNet-Lite0, 20 % fewer MACs",
        budget=Budget("macs", 0.8),
        build=photos.model,
        example=lambda: torch.zeros(1, 3, photos.SIDE, photos.SIDE),
        calibration=calibration,
        loss=F.cross_entropy,
        score=score,
        higher=True,
        hints=_classifier_hints(1000),
        image=(3, photos.SIDE, photos.SIDE),
    )


# MiniLM


def _minilm() -> Case:
    @cache
    def rated() -> tuple[dict[str, Tensor], Tensor, Tensor]:
        tokens, ratings = news.rated()
        return tokens, ratings, news.similarities(news.minilm(), tokens)

    def score(model: nn.Module) -> dict[str, float]:
        tokens, ratings, dense = rated()
        found = news.similarities(model, tokens)
        return {"correlation": news.correlation(found, ratings), "with dense": news.correlation(found, dense)}

    def held_out(model: nn.Module, seed: int) -> float:
        tokens = news.undrawn_texts(CALIBRATION_TEXTS, HELD_OUT_TEXTS, seed)
        return news.correlation(news.similarities(model, tokens), news.similarities(news.minilm(), tokens))

    def heads(model: nn.Module) -> dict[str, Any]:
        layers = _attention(model)
        count = {
            getattr(layer, n): layer.num_attention_heads
            for layer in layers
            for n in ("query", "key", "value")
        }
        whole = {"prune_num_heads": True, "prune_head_dims": False}
        return {"num_heads": count, **whole, "ignored_layers": [model.get_submodule("encoder.embeddings")]}

    def repair(model: nn.Module, pruner: Any) -> None:
        for layer in _attention(model):
            layer.num_attention_heads = pruner.num_heads[layer.query]
            layer.attention_head_size = layer.query.out_features // layer.num_attention_heads
            layer.all_head_size = layer.query.out_features

    return Case(
        name="minilm",
        title="MiniLM-L6, 30 % fewer encoder parameters",
        budget=Budget("params", 0.7, ("encoder.embeddings",)),
        build=news.minilm,
        example=lambda: news.encoded(news.texts("lee_background")[:2]),
        calibration=lambda seed: news.text_halves(CALIBRATION_TEXTS, seed),
        loss=news.contrastive_loss,
        score=score,
        higher=True,
        hints=Hints(heads, repair),
        held_out=held_out,
    )


# SmolLM2


def _smollm() -> Case:
    @cache
    def windows() -> tuple[Tensor, Tensor]:
        return news.windows()

    @cache
    def dense_losses() -> Any:
        return news.losses(news.smollm(), windows()[1])

    def score(model: nn.Module) -> dict[str, float]:
        """On the few windows that most figures are of; and beside the dense model, on all."""
        found = news.losses(model, windows()[1])
        more = found - dense_losses()
        times = float(np.exp(more.mean()))
        return {
            "perplexity": float(np.exp(found[: news.FEW].mean())),
            f"on {len(found)} windows": float(np.exp(found.mean())),
            "times dense": times,
            "standard error": times * float(more.std(ddof=1)) / len(more) ** 0.5,
        }

    def calibration(seed: int) -> Batches:
        chosen = shuffled(len(windows()[0]), seed)[:CALIBRATION_WINDOWS]
        return [(row[None], row[None]) for row in windows()[0][chosen]]

    def held_out(model: nn.Module, seed: int) -> float:
        order = shuffled(len(windows()[0]), seed)
        return news.perplexity(model, windows()[0][order[-HELD_OUT_WINDOWS:]])

    def hidden_layers_alone(model: nn.Module) -> dict[str, Any]:
        """Torch-Pruning 1.6.1 fails on heads that share keys (9 to 3) and leaves them whole where it does not fail."""
        layers = _attention(model)
        projections = [getattr(layer, n) for layer in layers for n in ("q_proj", "k_proj", "v_proj")]
        return {"ignored_layers": [*projections, *(model.get_submodule(path) for path in EMBEDDINGS)]}

    return Case(
        name="smollm",
        title="SmolLM2-135M, 20 % fewer non-embedding parameters",
        budget=Budget("params", 0.8, EMBEDDINGS[:1]),
        build=news.smollm,
        example=lambda: windows()[0][:1, :64],
        calibration=calibration,
        loss=news.next_token_loss,
        score=score,
        higher=False,
        hints=Hints(hidden_layers_alone),
        tune=partial(_distil, windows),
        held_out=held_out,
    )


EMBEDDINGS = ("language_model.model.embed_tokens", "language_model.lm_head")


def _attention(model: nn.Module) -> list[Any]:
    """The modules that hold the projections of attention."""
    return [m for m in model.modules() if hasattr(m, "query") or hasattr(m, "q_proj")]


def _distil(windows: Callable[[], tuple[Tensor, Tensor]], model: nn.Module, seed: int) -> None:
    news.distil(model, windows()[0], seed)


# CREPE


def _crepe() -> Case:
    @cache
    def evaluated() -> tuple[Tensor, Tensor, Tensor]:
        frames, pitch = tones.tones(EVALUATED_FRAMES, seed=0)
        return frames, pitch, tones.heard(tones.model(), frames)

    def score(model: nn.Module) -> dict[str, float]:
        frames, pitch, dense = evaluated()
        found = tones.heard(model, frames)
        return {"right": tones.near(found, pitch), "with dense": tones.near(found, dense)}

    def held_out(model: nn.Module, seed: int) -> float:
        frames, pitch = tones.tones(EVALUATED_FRAMES, 2_000_000 + seed)
        return tones.near(tones.heard(model, frames), pitch)

    return Case(
        name="crepe",
        title="CREPE tiny, half the MACs",
        budget=Budget("macs", 0.5),
        build=tones.model,
        example=lambda: torch.zeros(1, tones.FRAME),
        calibration=lambda seed: tones.calibration(CALIBRATION_FRAMES, seed),
        loss=F.binary_cross_entropy,
        score=score,
        higher=True,
        hints=_classifier_hints(tones.BINS),
        held_out=held_out,
        image=(tones.FRAME,),
    )


# ProteinMPNN


def _proteinmpnn() -> Case:
    @cache
    def wanted() -> tuple[list[Tensor], list[Tensor]]:
        chains = proteins.evaluated()
        return [c.sequence for c in chains], proteins.designed(proteins.model(), chains)

    def score(model: nn.Module) -> dict[str, float]:
        sequences, dense = wanted()
        found = proteins.designed(model, proteins.evaluated())
        return {
            "recovery": proteins.agreement(found, sequences),
            "with dense": proteins.agreement(found, dense),
        }

    def held_out(model: nn.Module, seed: int) -> float:
        chains = proteins.undrawn(CALIBRATION_CHAINS, HELD_OUT_CHAINS, seed)
        return proteins.agreement(proteins.designed(model, chains), [c.sequence for c in chains])

    return Case(
        name="proteinmpnn",
        title="ProteinMPNN, 25 % fewer MACs",
        budget=Budget("macs", 0.75),
        build=proteins.model,
        example=lambda: proteins.ribosome()[0].inputs(0),
        calibration=lambda seed: proteins.calibration(CALIBRATION_CHAINS, seed),
        loss=proteins.loss,
        score=score,
        higher=True,
        hints=_classifier_hints(len(proteins.LETTERS)),
        held_out=held_out,
    )
