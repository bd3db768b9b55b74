"""Any configuration of transformers, shrunk by the names of its fields to one whose model has thousands of parameters.

Fields are numbers of layers, of heads, widths, sizes of images or of vocabularies, and so on, in nearly all of the
library by the same few names. Each kind has its own small number, the same wherever it stands, so that what must agree
across sub-configurations does; the numbers of different kinds differ from each other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from benchmarks.models.transformers_exceptions import CONFIGS

HEADS, KV_HEADS, HEAD = 4, 2, 16
HIDDEN = 64  # HEADS * HEAD
LAYERS = 2
VOCABULARY = 103
SMALL = 24  # widths up to this are left as they are
IMAGE, PATCH = 48, 8

KEEP = None
SECTIONED = re.compile(
    "vl|omni|ocr|ernie4_5|glm|colqwen"
)  # types whose rotary positions have several parts by default
WITHIN_LAYERS = (
    r".*(kernel|stride|padding|dilation|levels|scale|factor|interval|frequency|every_n|dropout|ratio).*"
)
# The first pattern that the whole name of a field matches says at most which number it may hold (None: any).
KINDS: tuple[tuple[str, int | None], ...] = (
    (r"attn_layer_offset|expert_layer_offset", 1),
    (r".*(_ids?|_index|_offset|bos|eos|pad|_size_limit|start_token|end_token)", KEEP),
    (WITHIN_LAYERS, KEEP),
    (r"mm_tokens_per_image", 4),
    (r".*attention_window", 8),
    (r".*(num_feat_extract_layers|xpath.*|max_depth)", KEEP),
    (r"qk_head_dim|mamba_(d_)?head(_dim)?|n_groups|mamba_d_head", 2 * HEAD),
    (r"upsample_groups", HIDDEN),
    (r".*(window_size|chunk_size|block_size|sampling_rate|sample_rate|hop_length|bins|mels|num_queries)", KEEP),
    (r"(.*_)?vocab_size(_.*)?|.*_vocab|num_embeds", VOCABULARY),
    (r"max_.*position.*|n_positions|n_ctx|max_seq_len|seq_len(gth)?|context_length", 128),
    (r"attn_layer_period|expert_layer_period", 2),
    (r"max_window_layers|first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"(num_|n_)?(.*_)?(layers?|blocks|depth)(_per_.*)?|depths?|block_sizes|num_block_repeats|stage_num.*", LAYERS),
    (r".*(kv_heads|key_value_heads|kv_n_heads|num_key_heads)", KV_HEADS),
    (r".*(attention_heads|n_heads?|num_heads|_heads|heads|num_groups)", HEADS),
    (r"(moe_)?(n|num)_(routed_|local_)?experts|.*num_experts|zero_expert_num", 6),
    (r".*(experts_per_tok(en)?|topk|top_k|moe_k)", 2),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"d_kv|.*head_dim|dim_head|.*head_size|kv_channels|rotary_dim", HEAD),
    (r".*(moe|expert|share).*(intermediate|ffn|ff|hidden|dim).*", 40),
    (r".*(intermediate|ffn|d_ff|dff|mlp_dim|d_inner|dim_ff|feedforward|mlp).*", 88),
    (r".*rank", 20),
    (r".*(image_size|img_size|resolution|spec_size)", IMAGE),
    (r".*patch_size", PATCH),
    (r".*(hidden|d_model|embed|dim|width|n_embd|size|units|channels|proj|filters|features).*", HIDDEN),
)  # fmt: skip
# What a field that holds nothing gets where the class insists on a number.
MISSING = {
    "head_dim": HEAD,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCABULARY,
    "num_experts_per_tok": 2,
    "n_routed_experts": 6,
}
SERIES = r".*(hidden|dim|width|size|channels|planes|features).*"  # lists of widths, one a stage
POSITIONS = r".*(indices|indexes|idxs|index|block_indices|hook_ids|layer_ids|_layers|vision_feature_layer)"


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration, given as a dict, with small numbers in it and in its sub-configurations."""
    return _Scope(config, {}).result()


def _changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A configuration with changes, which reach into its sub-configurations."""
    inner = {
        k: _changed(config[k], v)
        for k, v in changes.items()
        if k.endswith("_config") and isinstance(config.get(k), dict)
    }
    return {**config, **changes, **inner}


class _Scope:
    """One configuration on its way; `tokens` numbers the special tokens of the whole tree."""

    def __init__(self, config: dict[str, Any], tokens: dict[int, int]) -> None:
        self.config, self.tokens = config, tokens
        self.layers = next(
            (
                config[k]
                for k in ("num_hidden_layers", "n_layer", "num_layers", "depth")
                if type(config.get(k)) is int
            ),
            0,
        )
        self.chosen = self._layers()
        self.widths = {
            v: n
            for k, v in config.items()
            if type(v) is int and v > SMALL and (n := self._number(k, v)) in (HIDDEN, 48, 88, 40)
        }

    def result(self) -> dict[str, Any]:
        # Names that start with an underscore, and names of stages, are worked out by the constructor.
        dropped = {"per_layer_config"}
        dropped |= {"stage_names", "out_features"} if "out_indices" in self.config else set()
        small = {
            k: self._value(k, v) for k, v in self.config.items() if not k.startswith("_") and k not in dropped
        }
        return _changed(small, CONFIGS.get(self.config.get("model_type", ""), {}))

    def _layers(self) -> list[int]:
        """Which layers to keep: two, or one of each kind where lists say of each layer what it is."""
        if self.layers <= LAYERS:
            return list(range(self.layers))
        lists = [v for v in self.config.values() if isinstance(v, (list, tuple)) and len(v) == self.layers]
        kinds = list(zip(*(map(str, v) for v in lists), strict=True)) if lists else []
        found = sorted({kinds.index(kind) for kind in kinds})[:5]
        picked = [
            len(v)
            for k, v in self.config.items()
            if isinstance(v, (list, tuple)) and re.fullmatch(POSITIONS, k) and len(v) != self.layers
        ]
        wanted = max([LAYERS, *(n for n in picked if n <= 6)])
        return sorted(
            {*found, *[i for i in range(self.layers) if i not in found][: max(0, wanted - len(found))]}
        )

    def _value(self, key: str, value: Any) -> Any:
        if value is None:
            return MISSING.get(key)
        if isinstance(value, bool):
            return value
        if isinstance(value, dict):
            if "model_type" in value or key.endswith("_config"):
                return _Scope(value, self.tokens).result()
            return self._rope(value) if key.startswith("rope") else value
        if isinstance(value, (list, tuple)):
            return type(value)(self._list(key, value))
        return self._number(key, value) if isinstance(value, int) else value

    def _rope(self, table: dict[str, Any]) -> dict[str, Any]:
        """Rotary parameters, which may be a table a kind of layer."""
        out = {k: self._rope(v) if isinstance(v, dict) else v for k, v in table.items()}
        if "mrope_section" in out or (
            "rope_theta" in out and SECTIONED.search(self.config.get("model_type", ""))
        ):
            out.setdefault("mrope_section", [16, 24, 24])
            n, half = len(out["mrope_section"]), int(HEAD * out.get("partial_rotary_factor", 1)) // 2
            out["mrope_section"] = [half - (n - 1) * (half // n), *[half // n] * (n - 1)]
        return out

    def _number(self, key: str, value: int) -> int:
        if re.fullmatch(r".*(token_id|token_index|bos_id|eos_id|token_ids|_id)", key):
            return self._token(value)
        if (
            self.layers
            and value == self.layers
            and re.fullmatch(r"num_hidden_layers|n_layer|num_layers|depth", key)
        ):
            return len(self.chosen)
        for pattern, limit in KINDS:
            if re.fullmatch(pattern, key):
                if limit is KEEP:
                    return value
                if limit == KV_HEADS:
                    return min(value, HEADS if self._all_heads(value) else KV_HEADS)
                if limit == HIDDEN:
                    return value if value <= SMALL else 48 if self._heads_in_threes() else min(value, HIDDEN)
                return min(value, limit)
        return value

    def _heads_in_threes(self) -> bool:
        """Whether the stages have 3, 6, 12 ... heads, which no power of two is a multiple of."""
        lists = [v for k, v in self.config.items() if k.endswith("heads") and isinstance(v, (list, tuple))]
        return any(n % 3 == 0 for heads in lists for n in heads)

    def _all_heads(self, value: int) -> bool:
        """Whether every head has a key of its own in the original."""
        return value in (
            self.config.get(k) for k in ("num_attention_heads", "n_head", "num_heads", "n_heads")
        )

    def _token(self, value: int) -> int:
        """Special tokens that a small vocabulary lacks get the last places in it, each its own."""
        if value < 40:
            return value
        return self.tokens.setdefault(value, VOCABULARY - 1 - len(self.tokens))

    def _list(self, key: str, values: Sequence[Any]) -> list[Any]:
        if len(values) == self.layers and self.layers > LAYERS and not re.fullmatch(POSITIONS, key):
            values = [values[i] for i in self.chosen]
        if values and all(type(v) is int for v in values):
            if re.fullmatch(POSITIONS, key):
                return self._positions(values)
            if re.fullmatch(r".*(token_id|_ids)", key):
                return [self._token(v) for v in values]
            if re.fullmatch(SERIES, key) and not re.fullmatch(WITHIN_LAYERS, key):
                if re.fullmatch(r".*(image|patch|shape|pool).*", key):
                    return [self._number(key, v) for v in values]
                return [self._width(v) for v in values]
        return [self._list(key, v) if isinstance(v, (list, tuple)) else v for v in values]

    def _positions(self, values: Sequence[int]) -> list[int]:
        """Numbers of layers: the same relations among the layers that are kept."""
        count = len(self.chosen)
        if not self.layers or all(-count <= v < count for v in values):
            return list(values)
        last = count if max(values) >= self.layers else count - 1
        return [max(last - len(values) + 1 + i, 0) for i in range(len(values))]

    def _width(self, value: int) -> int:
        """The width of a stage: smaller by a factor that depends on nothing else, so that equal ones stay equal."""
        if value in self.widths:
            return self.widths[value]
        return (
            value // 8
            if value > 64 and value % 8 == 0
            else value // 4
            if value >= 32 and value % 4 == 0
            else value
        )
