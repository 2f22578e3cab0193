"""The model families that can be harvested, and where in a decoder layer of each the six sites are.

In every family a layer adds what its attention branch gives to the residual stream, then what its MLP branch gives;
families differ in where they normalise and whether they scale. `attn_out` and `mlp_out` are what is added, after all of
that, so that resid_mid = resid_pre + attn_out and resid_post = resid_mid + mlp_out hold in each.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Names of a decoder layer's modules. resid_pre and resid_post are the layer's own input and output."""

    resid_mid: str = "post_attention_layernorm"
    """Receives the sum of resid_pre and attn_out."""
    mlp_in: str = "mlp"
    """Receives mlp_in: the MLP, or the sparse block of a mixture of experts."""
    mlp_out: str = "mlp"
    """Returns what the MLP branch adds."""
    attn_out: str = "self_attn"
    """Returns what the attention branch adds."""
    multiplier: str | None = None
    """The layer's attribute with the factor by which both are multiplied as they are added; None: as they are."""


_PRE_NORM = Family()
_NORMS_ON_BOTH_SIDES = Family(
    resid_mid="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
    attn_out="post_attention_layernorm",  # by name the norm after attention, and here it is
)
_POST_NORM = Family(resid_mid="mlp", mlp_out="post_feedforward_layernorm", attn_out="post_attention_layernorm")

FAMILIES: dict[str, Family] = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "mixtral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen2_moe": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "qwen3_moe": _PRE_NORM,
    "smollm3": _PRE_NORM,
    "phi3": _PRE_NORM,
    "olmoe": _PRE_NORM,
    "gemma": _PRE_NORM,
    "gemma2": _NORMS_ON_BOTH_SIDES,
    "gemma3_text": _NORMS_ON_BOTH_SIDES,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "granite": Family(multiplier="residual_multiplier"),
    "granitemoe": Family(mlp_in="block_sparse_moe", mlp_out="block_sparse_moe", multiplier="residual_multiplier"),
}
"""By the model_type of a config."""

TEXT_PARTS = {"gemma3": "gemma3_text"}
"""model_type of models of text and images whose text part (text_config) is of one of the families."""

TEXT_PART_WEIGHTS = {r"^language_model\.model\.": "model.", r"^model\.language_model\.": "model."}
"""Names of weights in such checkpoints (patterns) -> in the text model."""
