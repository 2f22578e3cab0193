"""What a reconstruction costs the language model: cross-entropy with a site replaced, against ablations of it.

loss recovered = (CE_ablated - CE_spliced) / (CE_ablated - CE_clean): 1 for the identity, 0 for the ablation itself.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.batches import batches_of
from pipeline.capture import Replace, capture, model_inputs, splice
from pipeline.errors import InputError
from pipeline.rows import ContextRows
from pipeline.sites import Site


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
    input_site: Site,
    output_site: Site,
    mean: Tensor,
    contexts: Sequence[ContextRows],
    batch_tokens: int,
) -> LossRecovered:
    """Run `contexts` through the causal `model` four times: clean, with `output_site` set to
    reconstruct(activations of `input_site`), to zero, and to `mean` [d_model].

    `reconstruct` maps float32 [n, d_in] to [n, d_out]. Only rows are replaced: positions that are no rows (BOS) keep
    their activations, as no dictionary is trained on them. Raises InputError when nothing is predicted.
    """
    # Of a model that accelerate placed some weights are on "meta"; it moves what is put in to where it is needed.
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
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
        with capture(model, [input_site]) as taken:

            def spliced(acts: Tensor, taken: object = taken) -> Tensor:
                x = taken[input_site]  # type: ignore[index]
                y: Tensor = reconstruct(x.reshape(-1, x.shape[-1]).float())
                return y.to(acts.device).reshape(*acts.shape[:-1], -1)

            interventions: list[Replace | None] = [
                None,
                spliced,
                torch.zeros_like,
                lambda acts: mean.to(acts).expand_as(acts),
            ]
            for number, intervention in enumerate(interventions):
                totals[number] += _summed_loss(model, output_site, intervention, inputs, is_row, scored)
        predictions += int(scored.sum())
    if predictions == 0:
        raise InputError("no held-out context is long enough to predict a token from a row")
    clean, with_reconstruction, zero, at_mean = (totals / predictions).tolist()
    return LossRecovered(predictions, clean, with_reconstruction, zero, at_mean)


def _summed_loss(
    model: nn.Module,
    site: Site,
    intervention: Replace | None,
    inputs: Mapping[str, Tensor],
    is_row: Tensor,
    scored: Tensor,
) -> float:
    def on_rows(acts: Tensor) -> Tensor:
        assert intervention is not None
        return torch.where(is_row.to(acts.device).unsqueeze(-1), intervention(acts).to(acts.dtype), acts)

    with nullcontext() if intervention is None else splice(model, site, on_rows):
        logits = model(**inputs, use_cache=False).logits
    targets = inputs["input_ids"].roll(-1, dims=1)
    return float(nn.functional.cross_entropy(logits[scored].float(), targets[scored], reduction="sum"))
