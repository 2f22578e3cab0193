"""What a reconstruction costs the language model: cross-entropy with a site replaced, against ablations of it.

loss recovered = (CE_ablated - CE_spliced) / (CE_ablated - CE_clean): 1 for the identity, 0 for the ablation itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.capture.batches import batches_of
from pipeline.capture.contexts import ContextRows
from pipeline.capture.taps import Replace, capture, model_inputs, overwritten_sites, splice
from pipeline.errors import InputError
from pipeline.model.finite import tensors_not_finite
from pipeline.sites import Site

Interventions = Mapping[Site, Replace]


@dataclass(frozen=True)
class LossRecovered:
    """Cross-entropies in nats per predicted token, over predictions made from rows (BOS's own is left out)."""

    predictions: int
    clean: float
    spliced: float
    zero_ablated: float
    mean_ablated: float

    @property
    def against_zero(self) -> float:
        return (self.zero_ablated - self.spliced) / (self.zero_ablated - self.clean)

    @property
    def against_mean(self) -> float:
        return (self.mean_ablated - self.spliced) / (self.mean_ablated - self.clean)


@torch.inference_mode()
def loss_recovered(
    model: nn.Module,
    reconstruct: Callable[[Tensor], Tensor],
    input_sites: Sequence[Site],
    means: Mapping[Site, Tensor],
    contexts: Sequence[ContextRows],
    batch_tokens: int,
) -> LossRecovered:
    """Run `contexts` through the causal `model` four times: clean, with the sites of `means` set to what `reconstruct`
    makes of the clean activations of `input_sites`, to zero, and to their means [d_model].

    `reconstruct` maps float32 [n, d_in] to [n, d_out], sites side by side, those of `means` in order. Only rows are
    replaced: positions that are no rows (BOS) keep their activations, as no dictionary is trained on them. Raises
    InputError when nothing is predicted.
    """
    # Of a model that accelerate placed some weights are on "meta"; it moves what is put in to where it is needed.
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    copied = overwritten_sites(model, input_sites, device)
    totals = torch.zeros(4, dtype=torch.float64)
    predictions = 0
    longest = max((len(c.tokens) for c in contexts), default=1)
    for batch in batches_of(contexts, batch_tokens, longest):
        inputs = model_inputs(model, batch, device)
        is_row = torch.zeros(batch.positions, dtype=torch.bool)
        scored = torch.zeros(batch.positions, dtype=torch.bool)  # rows whose next token is in the context
        for place, context in batch.places():
            is_row[place + context.positions] = True
            scored[place + context.positions[context.positions < len(context.tokens) - 1]] = True
        is_row, scored = (mask.to(device).view_as(inputs["input_ids"]) for mask in (is_row, scored))
        with capture(model, input_sites, copied) as taken:
            interventions: list[Interventions] = [
                {},
                _spliced(reconstruct, input_sites, list(means), taken),
                dict.fromkeys(means, torch.zeros_like),
                {site: partial(_constant, mean) for site, mean in means.items()},
            ]
            for number, replaced in enumerate(interventions):
                totals[number] += _summed_loss(model, replaced, inputs, is_row, scored)
        predictions += int(scored.sum())
    if predictions == 0:
        raise InputError("no held-out context is long enough to predict a token from a row")
    clean, with_reconstruction, zero, at_mean = (totals / predictions).tolist()
    if not math.isfinite(clean):
        tokens = [torch.from_numpy(context.tokens.astype("int64")) for context in contexts]
        found = tensors_not_finite(model, tokens=torch.cat(tokens))
        why = f"its weights are nan or infinite in {', '.join(found[:3])}" if found else "it overflows in its dtype"
        raise InputError(
            f"model.id: the model's own loss on held-out contexts is {clean}, so nothing can be compared with it: "
            f"{why}; give it a whole checkpoint, and model.dtype: bfloat16 or float32"
        )
    return LossRecovered(predictions, clean, with_reconstruction, zero, at_mean)


def _spliced(
    reconstruct: Callable[[Tensor], Tensor],
    inputs: Sequence[Site],
    outputs: Sequence[Site],
    taken: Mapping[Site, Tensor],
) -> Interventions:
    """Each output site's part of the reconstruction of what was taken in the clean pass, computed once a batch."""
    parts: list[Tensor] = []

    def part(number: int, acts: Tensor) -> Tensor:
        if not parts:
            x = torch.cat([taken[site].reshape(-1, taken[site].shape[-1]).float().cpu() for site in inputs], dim=1)
            y = reconstruct(x)
            parts.extend(y.split(y.shape[1] // len(outputs), dim=1))
        return parts[number].to(acts.device).reshape(*acts.shape[:-1], -1)

    return {site: partial(part, number) for number, site in enumerate(outputs)}


def _constant(mean: Tensor, acts: Tensor) -> Tensor:
    return mean.to(acts).expand_as(acts)


def _summed_loss(
    model: nn.Module, replaced: Interventions, inputs: Mapping[str, Tensor], is_row: Tensor, scored: Tensor
) -> float:
    def on_rows(replace: Replace, acts: Tensor) -> Tensor:
        return torch.where(is_row.to(acts.device).unsqueeze(-1), replace(acts).to(acts.dtype), acts)

    with ExitStack() as stack:
        for site, replace in replaced.items():
            stack.enter_context(splice(model, site, partial(on_rows, replace)))
        logits = model(**inputs, use_cache=False).logits
    targets = inputs["input_ids"].roll(-1, dims=1)
    return float(nn.functional.cross_entropy(logits[scored].float(), targets[scored], reduction="sum"))
