"""Attention as one op."""

from __future__ import annotations

from typing import Any

from ..axes.axes import product
from ..axes.op_call import Dims, OpCall
from .registry import rule

FLASH = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
KEYS = "ranges over the keys of an attention"


@rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu",
      "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
      "_scaled_dot_product_fused_attention_overrideable")  # fmt: skip
def attention(site: OpCall) -> list[Dims]:
    """q[... h l d], k[... h s d], v[... h s e], mask[... l s] -> [... h l e]; softmax over s.

    With ``enable_gqa`` a key head serves a run of query heads. Without a given scale the op uses 1 / sqrt(d), so d
    keeps its size. A causal mask tells queries apart by their numbers.
    """
    q, k, v = (site.dims(a) for a in site.args[:3])
    site.same(q[-1], k[-1])
    site.same(k[-2], v[-2])
    if site.name in FLASH:
        site.same(q[-1], v[-1])
    site.lock(k[-2], KEYS)
    if site.given("scale") is None:
        site.lock(q[-1], "sets the default scale of an attention, 1 / sqrt(width)")
    if site.given("is_causal"):
        site.lock(q[-2], "is masked by position (causal attention)")
    lead = _heads(site, q, k, v)
    mask: Any = site.given("attn_mask", site.given("attn_bias"))
    out = [*lead, q[-2], v[-1]]
    if hasattr(mask, "op"):
        scores = [*lead, q[-2], k[-2]]
        site.broadcast(site.dims(mask), scores, size=[1 if a is None else a.size for a in scores])
    site.contract(q[-1], k[-2])
    site.macs(*lead, q[-2], k[-2], q[-1])
    site.macs(*lead, q[-2], k[-2], v[-1])
    sums = [*lead, q[-2]]  # kernels return the logarithms of their sums, and numbers for the backward pass
    sizes = tuple(1 if a is None else a.size for a in sums)
    rest = [
        sums if shape == sizes else [site.fixed(n, "is state of an attention kernel") for n in shape]
        for shape in site.shapes[1:]
    ]
    return [out, *rest]


def _heads(site: OpCall, q: Dims, k: Dims, v: Dims) -> Dims:
    """The leading dims: the same axes, but for grouped heads, where q's is k's times the heads that share one."""
    heads_q, heads_k = q[-3] if len(q) > 3 else None, k[-3] if len(k) > 3 else None
    grouped = heads_q is not None and (heads_k is None or heads_k.size != heads_q.size)
    if not grouped:
        shape = site.shape[:-2]
        return site.broadcast(q[:-2], k[:-2], v[:-2], size=shape)
    lead = site.broadcast(q[:-3], k[:-3], v[:-3], size=site.shape[:-3])
    heads_v = v[-3]
    if heads_k is None or heads_v is None or heads_v.size != heads_k.size or heads_q is None:
        if heads_k is not None or heads_v is not None:
            raise ValueError("keys and values have different numbers of heads")
        return [*lead, heads_q]
    site.same(heads_k, heads_v)
    shared, copies = site.algebra.factor(heads_q, heads_k.size)
    site.same(shared, heads_k)
    return [*lead, product([shared, copies])]
