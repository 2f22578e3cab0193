"""Causal attention on CPU in bfloat16, as matrix products over blocks of queries.

torch's own kernel for CPUs (`sdpa`) does its small products without the matrix library where there is no AMX: it took
29 % of a forward pass of which it has 8 % of the operations. Where the processor emulates bfloat16 its kernel is the
better one (`pipeline.precision`). Here each block of queries meets the keys up to its end
in one batched product of that library, and a compiler fuses everything between the two products. In float32 there is
nothing to gain, and in float16 that library is four to five times slower than `sdpa`
(docs/decisions/0008-forward-pass-on-cpu.md has the measurements).
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK = 128
"""Queries of a block: shorter ones make the products small, longer ones compute more above the diagonal."""

LONGEST = 2048
"""Positions up to which this is faster than `sdpa`, and its unrolled blocks quick to compile; beyond, `sdpa` runs."""

_NAME = "granary_blocks"


def attend_in_blocks(model: Any) -> None:
    """Let a bfloat16 model on CPU that attends with `sdpa` attend in blocks where it is compiled; leave any other."""
    if model.config._attn_implementation != "sdpa" or model.dtype != torch.bfloat16:
        return
    transformers.AttentionInterface.register(_NAME, _attend)
    transformers.AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers. Eagerly `sdpa` is better: what lies between the products is not fused."""
    plain = torch.compiler.is_compiling() and options.get("softcap") is None  # a cap is something that sdpa refuses
    if plain and query.shape[2] <= LONGEST:
        return block_attention(query, key, value, attention_mask, options.get("scaling")), None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    return output, None


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """[batch, head, position, width], keys and values with as many heads or a part of them -> [batch, position, head,
    width].

    `visible` says what each query may see of the keys up to its own (bool [batch or 1, 1, position, position]); all of
    them, if not given. `scale`: 1 / sqrt(width), if not given. The softmax is taken in float32.
    """
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    keys, values = repeat_kv(key, groups).transpose(2, 3), repeat_kv(value, groups)
    position = torch.arange(length, device=query.device)
    blocks = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        scores = (query[:, :, start:stop] @ keys[..., :stop]).float() * scale
        if visible is None:
            seen = position[start:stop, None] >= position[None, :stop]
        else:
            seen = visible[:, :, start:stop, :stop]
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        blocks.append(weights.to(query.dtype) @ values[:, :, :stop])
    return torch.cat(blocks, 2).transpose(1, 2).contiguous()
