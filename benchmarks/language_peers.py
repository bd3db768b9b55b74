"""Published ways to make a language model smaller, beside depgraph's default call, at one share of the parameters that are no embedding.

    python -m benchmarks.language_peers                         # SmolLM2-135M at 20 % fewer parameters, minutes
    python -m benchmarks.language_peers --share 0.9 --method slicegpt
    python -m benchmarks.language_peers --small                 # a tiny Llama of random weights, nothing is downloaded

Small versions of our own, for decoders whose layers are named as in Llama; none trains, and none recovers but where its paper does. With
nothing removed each is the dense model (`benchmarks/tests/test_language_peers.py`).

* `flap`: An et al., AAAI 2024: variance of a hidden unit's values times the squares of its column, standardised in each layer, ranked
  over all; the removed units' mean goes into a bias. On hidden units of the MLPs alone.
* `wanda-sp`: Sun et al., ICLR 2024, by columns as in An et al.: sizes of weights times norm of values; each layer the same share.
* `llm-pruner`: Ma et al., NeurIPS 2023: sum of |gradient * weight| over a hidden unit's three rows; the first four and last two layers stay.
* `shortgpt`: Men et al., 2024: the layers whose input and output have the largest cosine similarity go, all at once.
* `greedy-depth`: layer by layer the one without which the loss on some of the calibration windows is least.
* `slicegpt`: Ashkboos et al., ICLR 2024: the residual stream in its principal components, of which the last are cut. Components are those
  of the dense model's activations.
* `svd`: Wang et al., SVD-LLM, ICLR 2025: each linear layer as two factors, by the singular values behind a Cholesky whitening of its inputs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import benchmarks.preload  # noqa: F401
from benchmarks.real import cases, news

Windows = list[Tensor]
ENDS = 4, 2  # layers that `llm-pruner` leaves whole, first and last


def decoder(model: Any) -> Any:
    """What holds `embed_tokens`, `layers` and `norm`."""
    return model.language_model.model


def counted(model: nn.Module) -> int:
    """Parameters but those of the embedding and the head."""
    kept = {"embed_tokens", "lm_head"}
    return sum(p.numel() for n, p in model.named_parameters() if not kept & {*n.split(".")})


@torch.no_grad()
def seen(
    model: nn.Module, windows: Windows, modules: Sequence[nn.Module], take: Callable[[int, Tensor, Any], None]
) -> None:
    """Run the windows; ``take(place, input, output)`` for each call of `modules`, as [tokens, width]."""

    def hook(place: int) -> Callable[..., None]:
        def see(_: Any, args: Any, kwargs: Any, out: Any) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            take(place, given.flatten(0, -2), out[0] if isinstance(out, tuple) else out)

        return see

    handles = [m.register_forward_hook(hook(i), with_kwargs=True) for i, m in enumerate(modules)]
    for window in windows:
        model(window)
    for handle in handles:
        handle.remove()


def moments(
    model: nn.Module, windows: Windows, modules: Sequence[nn.Module]
) -> tuple[list[Tensor], list[Tensor], int]:
    """For the inputs x of each module: the mean of x, of x x^T (float64), and how many there were."""
    first: list[Any] = [0.0] * len(modules)
    second: list[Any] = [0.0] * len(modules)
    count = sum(w.numel() for w in windows)

    def take(i: int, x: Tensor, _: Any) -> None:
        x = x.double()
        first[i] = first[i] + x.sum(0) / count
        second[i] = second[i] + x.mT @ x / count

    seen(model, windows, modules, take)
    return first, second, count


# Hidden units of the MLPs


def _cut_hidden(model: nn.Module, keep: list[Tensor], means: list[Tensor] | None = None) -> None:
    """Leave the hidden units `keep` (bool) of each MLP; with `means` what the others give on average goes into a bias."""
    for i, (layer, mine) in enumerate(zip(decoder(model).layers, keep, strict=True)):
        mlp = layer.mlp
        down = mlp.down_proj.weight.data
        if means is not None and not bool(mine.all()):
            lost = (down[:, ~mine].double() @ means[i][~mine]).to(down.dtype)
            mlp.down_proj.bias = nn.Parameter(lost)
        mlp.gate_proj.weight.data = mlp.gate_proj.weight.data[mine]
        mlp.up_proj.weight.data = mlp.up_proj.weight.data[mine]
        mlp.down_proj.weight.data = down[:, mine]


def _hidden_left(model: nn.Module, share: float, biases: bool = False) -> int:
    """How many hidden units of all layers stay, beside new biases of the MLPs where there are to be any."""
    layers = decoder(model).layers
    each = 3 * layers[0].mlp.gate_proj.in_features
    more = len(layers) * layers[0].mlp.gate_proj.in_features if biases and share < 1 else 0
    gone = -(-(int((1 - share) * counted(model)) + more) // each)
    return sum(layer.mlp.gate_proj.out_features for layer in layers) - gone


def _largest(scores: list[Tensor], count: int) -> list[Tensor]:
    """The `count` largest of all, as a mask for each."""
    every = torch.cat(scores)
    chosen = torch.zeros_like(every, dtype=torch.bool)
    chosen[every.topk(count).indices] = True
    return list(chosen.split([len(s) for s in scores]))


def _alike(scores: list[Tensor], count: int) -> list[Tensor]:
    """`count` in all, the same share of each layer."""
    firsts = [count * (i + 1) // len(scores) - count * i // len(scores) for i in range(len(scores))]
    return [_largest([s], n)[0] for s, n in zip(scores, firsts, strict=True)]


def flap(model: nn.Module, share: float, windows: Windows) -> None:
    downs = [layer.mlp.down_proj for layer in decoder(model).layers]
    means, squares, _ = moments(model, windows, downs)
    scores = []
    for down, mean, square in zip(downs, means, squares, strict=True):
        score = (square.diagonal() - mean.square()) * down.weight.double().square().sum(0)
        scores.append((score - score.mean()) / score.std())
    _cut_hidden(model, _largest(scores, _hidden_left(model, share, biases=True)), means)


def wanda_sp(model: nn.Module, share: float, windows: Windows) -> None:
    downs = [layer.mlp.down_proj for layer in decoder(model).layers]
    _, squares, count = moments(model, windows, downs)
    scores = [
        d.weight.double().abs().sum(0) * (s.diagonal() * count).sqrt()
        for d, s in zip(downs, squares, strict=True)
    ]
    _cut_hidden(model, _alike(scores, _hidden_left(model, share)))


def llm_pruner(model: nn.Module, share: float, windows: Windows) -> None:
    layers = list(decoder(model).layers)
    inner = layers[ENDS[0] : len(layers) - ENDS[1]] if len(layers) > 3 * sum(ENDS) else layers
    wanted = {
        layer: (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight)
        for layer in inner
    }
    model.requires_grad_(False)
    for weights in wanted.values():
        for w in weights:
            w.requires_grad_(True)
    for window in windows:
        news.next_token_loss(model(window), window).backward()
    scores = []
    for gate, up, down in wanted.values():
        rows = [(w.grad * w).abs() for w in (gate, up, down)]
        scores.append((rows[0].sum(1) + rows[1].sum(1) + rows[2].sum(0)).detach().double())
    whole = [torch.ones(layer.mlp.gate_proj.out_features, dtype=torch.bool) for layer in layers]
    outside = sum(len(w) for layer, w in zip(layers, whole, strict=True) if layer not in wanted)
    found = dict(zip(wanted, _alike(scores, _hidden_left(model, share) - outside), strict=True))
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    _cut_hidden(model, [found.get(layer, w) for layer, w in zip(layers, whole, strict=True)])


# Layers


def _layers_gone(model: nn.Module, share: float) -> int:
    """As many as come nearest to the budget: beside layers there is the last norm, which stays."""
    one = sum(p.numel() for p in decoder(model).layers[0].parameters())
    return round((1 - share) * counted(model) / one)


def short_gpt(model: nn.Module, share: float, windows: Windows) -> None:
    layers = list(decoder(model).layers)
    alike = [0.0] * len(layers)

    def take(i: int, x: Tensor, out: Tensor) -> None:
        alike[i] += float(F.cosine_similarity(x, out.flatten(0, -2), dim=-1).mean())

    seen(model, windows, layers, take)
    order = sorted(range(len(layers)), key=lambda i: -alike[i])
    gone = set(order[: _layers_gone(model, share)])
    decoder(model).layers = nn.ModuleList(layer for i, layer in enumerate(layers) if i not in gone)


@torch.no_grad()
def greedy_depth(model: nn.Module, share: float, windows: Windows) -> None:
    body, judges = decoder(model), windows[:2]
    for _ in range(_layers_gone(model, share)):
        layers = list(body.layers)
        losses = []
        for i in range(len(layers)):
            body.layers = nn.ModuleList(layers[:i] + layers[i + 1 :])
            losses.append(sum(float(news.next_token_loss(model(w), w)) for w in judges))
        least = losses.index(min(losses))
        body.layers = nn.ModuleList(layers[:least] + layers[least + 1 :])


# Ranks


class RootMeanSquare(nn.Module):
    """x over its root mean square, as of a vector of `width` entries, however many are left."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., anything] to the same."""
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / self.width + self.eps)


class Sliced(nn.Module):
    """A decoder layer in other coordinates, which the two shortcuts turn into those of the next part."""

    def __init__(self, layer: Any, norm: RootMeanSquare, shortcuts: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.norm = layer.self_attn, layer.mlp, norm
        self.turn, self.turn_again = (nn.Parameter(s) for s in shortcuts)

    def forward(self, hidden_states: Tensor, **how: Any) -> Tensor:
        """[batch, tokens, width] to the same."""
        out, _ = self.self_attn(hidden_states=self.norm(hidden_states), **how)
        h = hidden_states @ self.turn + out
        return h @ self.turn_again + self.mlp(self.norm(h))


def slice_gpt(model: Any, share: float, windows: Windows) -> None:
    body, head = decoder(model), model.language_model.lm_head
    layers, eps = list(body.layers), body.norm.variance_epsilon
    width = body.embed_tokens.embedding_dim
    norms = [n for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm)] + [
        body.norm
    ]
    readers = [
        linears
        for layer in layers
        for linears in (
            (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            (layer.mlp.gate_proj, layer.mlp.up_proj),
        )
    ] + [(head,)]
    head.weight = nn.Parameter(head.weight.data.clone())  # the embedding gets other coordinates than the head
    for norm, linears in zip(norms, readers, strict=True):
        for linear in linears:
            linear.weight.data *= norm.weight.data
        norm.weight.data.fill_(1.0)
    _, second, _ = moments(model, windows, [linears[0] for linears in readers])
    turns = [torch.linalg.eigh(s)[1].flip(1) for s in second]  # [width, width], the largest component first

    def entries(left: int) -> int:
        own = sum(p.numel() for layer in layers for m in (layer.self_attn, layer.mlp) for p in m.parameters())
        return own * left // width + 2 * len(layers) * left * left

    limit = share * counted(model)
    left = width if share >= 1 else max(k for k in range(1, width + 1) if entries(k) <= limit)
    norm = RootMeanSquare(width, eps)

    def cut(t: Tensor, *dims: int) -> Tensor:
        for d in dims:
            t = t.narrow(d, 0, left)
        return t.float().contiguous()

    writers = [linear for layer in layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    for turn, linears in zip(turns, readers, strict=True):
        for linear in linears:
            linear.weight = nn.Parameter(cut(linear.weight.double() @ turn, 1))
    for turn, linear in zip(turns[1:], writers, strict=True):
        linear.weight = nn.Parameter(cut(turn.mT @ linear.weight.double(), 0))
    made = [cut(a.mT @ b, 0, 1) for a, b in itertools.pairwise(turns)]
    body.layers = nn.ModuleList(
        Sliced(layer, norm, (made[2 * i], made[2 * i + 1])) for i, layer in enumerate(layers)
    )
    body.embed_tokens.weight = nn.Parameter(cut(body.embed_tokens.weight.double() @ turns[0], 1))
    body.norm = norm


def svd(model: Any, share: float, windows: Windows) -> None:
    owners = [(owner, name) for layer in decoder(model).layers for owner in (layer.self_attn, layer.mlp)
              for name, m in owner.named_children() if isinstance(m, nn.Linear)]  # fmt: skip
    for start in range(0, len(owners), 70):  # ten layers at a time, for the memory of their matrices
        some = owners[start : start + 70]
        linears: list[Any] = [getattr(owner, name) for owner, name in some]
        _, second, _ = moments(model, windows, linears)
        for (owner, name), linear, square in zip(some, linears, second, strict=True):
            rows, columns = linear.weight.shape
            rank = int(share * rows * columns / (rows + columns)) if share < 1 else min(rows, columns)
            damping = 1e-6 * square.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
            root = torch.linalg.cholesky(square + damping)
            u, s, v = torch.linalg.svd(linear.weight.double() @ root, full_matrices=False)
            second_factor = torch.linalg.solve_triangular(
                root, (s[:rank, None].sqrt() * v[:rank]), upper=False, left=False
            )
            down, up = nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows, bias=False)
            down.weight = nn.Parameter(second_factor.float())
            up.weight = nn.Parameter((u[:, :rank] * s[:rank].sqrt()).float())
            setattr(owner, name, nn.Sequential(down, up))


PEERS: dict[str, Callable[[Any, float, Windows], None]] = {
    "flap": flap, "wanda-sp": wanda_sp, "llm-pruner": llm_pruner, "shortgpt": short_gpt, "greedy-depth": greedy_depth,
    "slicegpt": slice_gpt, "svd": svd,
}  # fmt: skip


def tiny() -> tuple[nn.Module, Windows]:
    """A Llama of random weights, and windows of tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        model = news.NextToken(LlamaForCausalLM(config)).eval()
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                nn.init.uniform_(module.weight, 0.5, 1.5)
        return model, list(torch.randint(0, 97, (6, 1, 32)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--small", action="store_true", help="a tiny Llama of random weights, nothing is downloaded"
    )
    parser.add_argument("--share", type=float, action="append", help="what is left (default: 0.8)")
    parser.add_argument("--method", action="append", choices=list(PEERS))
    parser.add_argument("--windows", type=int, default=cases.CALIBRATION_WINDOWS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.small:
        dense, windows = tiny()
        evaluated = torch.cat(windows[4:])
        windows = windows[:4]
    else:
        cases.CALIBRATION_WINDOWS = options.windows
        case = cases.case("smollm")
        dense, windows = case.build(), [w for w, _ in case.calibration(options.seed)]
        evaluated = news.windows()[1][: news.FEW]
    whole, console = counted(dense), Console(width=100)
    plain = news.perplexity(dense, evaluated)
    table = Table("method", "left", "perplexity", "times dense", "seconds", title=f"dense: {plain:.2f}")
    for share in options.share or [0.8]:
        for name in options.method or PEERS:
            began = time.perf_counter()
            small = copy.deepcopy(dense)
            PEERS[name](small, share, windows)
            seconds = time.perf_counter() - began
            found = news.perplexity(small, evaluated)
            row = (
                name,
                f"{counted(small) / whole:.3f}",
                f"{found:.1f}",
                f"{found / plain:.2f}",
                f"{seconds:.0f}",
            )
            print(*row, file=sys.stderr, flush=True)
            table.add_row(*row)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
