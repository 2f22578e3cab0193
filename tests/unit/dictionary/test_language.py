"""Recovered loss: its ends are exact, and its clean loss is transformers' own."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import KINDS
from tokenizers import Tokenizer

from pipeline.capture.contexts import ContextRows
from pipeline.errors import InputError
from pipeline.model.describe import describe_model
from pipeline.model.load import load_causal_model
from pipeline.sdl.measure.loss_recovered import LossRecovered, loss_recovered
from pipeline.sites import Site

SITES = [Site(layer, kind) for kind in KINDS for layer in (0, 2)]
MEAN = torch.full((32,), 0.5)


def context_rows(tokens: Sequence[int], first: int) -> ContextRows:
    """A context whose positions from `first` on are rows."""
    return ContextRows(np.asarray(tokens, np.int32), np.arange(first, len(tokens)), 0)


@pytest.fixture(scope="module")
def contexts(llama: Path, texts: list[str]) -> list[ContextRows]:
    """Twelve contexts of different lengths, BOS first; one of them too short to predict anything from a row."""
    bpe = Tokenizer.from_file(str(llama / "tokenizer.json"))
    tokens = [[0, *bpe.encode(text, add_special_tokens=False).ids][: 4 * n + 2] for n, text in enumerate(texts[:12])]
    return [context_rows(t, 1) for t in tokens]


@pytest.fixture(scope="module")
def measure(llama: Path, contexts: list[ContextRows]) -> Callable[..., LossRecovered]:
    model = load_causal_model(describe_model(str(llama)), dtype="float32")

    def run(reconstruct: Callable, site: Site, output: Site | None = None, batch_tokens: int = 200) -> LossRecovered:
        return loss_recovered(model, reconstruct, [site], {output or site: MEAN}, contexts, batch_tokens)

    return run


@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_identity_recovers_all(measure: Callable[..., LossRecovered], site: Site) -> None:
    found = measure(lambda x: x, site)
    assert abs(found.zero_ablated - found.clean) > 0.01  # or else the ratio would say nothing
    assert found.spliced == pytest.approx(found.clean, abs=1e-6)
    assert found.against_zero == pytest.approx(1, abs=1e-6)
    assert found.against_mean == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_zero_is_the_zero_ablation(measure: Callable[..., LossRecovered], site: Site) -> None:
    found = measure(torch.zeros_like, site)
    assert found.spliced == found.zero_ablated
    assert found.against_zero == 0


@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_mean_is_the_mean_ablation(measure: Callable[..., LossRecovered], site: Site) -> None:
    found = measure(lambda x: MEAN.expand_as(x), site)
    assert found.against_mean == 0
    assert found.mean_ablated != found.zero_ablated


@pytest.mark.parametrize("first_position", [0, 1, 3])
def test_clean_loss_is_transformers_own(llama: Path, contexts: list[ContextRows], first_position: int) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    contexts = [context_rows(c.tokens, first_position) for c in contexts if len(c.tokens) > first_position]
    total, count = 0.0, 0
    for context in contexts:
        tokens = torch.from_numpy(context.tokens).long()[None]
        labels = tokens.clone()
        labels[:, : first_position + 1] = -100  # what is predicted from a position that is no row is not counted
        predicted = int((labels[:, 1:] >= 0).sum())
        if predicted:
            with torch.no_grad():
                total += model(input_ids=tokens, labels=labels).loss.item() * predicted
            count += predicted
    causal = load_causal_model(describe_model(str(llama)), dtype="float32")
    site = Site(1, "resid_post")
    found = loss_recovered(causal, lambda x: x, [site], {site: MEAN}, contexts, 200)
    assert found.predictions == count
    assert found.clean == pytest.approx(total / count, abs=1e-5)


def test_batches_do_not_change_the_losses(measure: Callable[..., LossRecovered]) -> None:
    one, many = (measure(torch.relu, Site(1, "mlp_out"), batch_tokens=n) for n in (1, 10_000))
    assert one.predictions == many.predictions
    for name in ("clean", "spliced", "zero_ablated", "mean_ablated"):
        assert getattr(one, name) == pytest.approx(getattr(many, name), abs=1e-5)


def test_a_transcoder_reads_one_site_and_replaces_another(measure: Callable[..., LossRecovered], llama: Path) -> None:
    """The MLP itself, as a transcoder from mlp_in to mlp_out, is the identity of the pair."""
    mlp = load_causal_model(describe_model(str(llama)), dtype="float32").model.layers[1].mlp
    found = measure(mlp, Site(1, "mlp_in"), Site(1, "mlp_out"))
    assert found.against_zero == pytest.approx(1, abs=1e-5)
    assert measure(torch.zeros_like, Site(1, "mlp_in"), Site(1, "mlp_out")).against_zero == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_recovers_all_in_bfloat16(llama: Path, contexts: list[ContextRows], kind: str) -> None:
    model = load_causal_model(describe_model(str(llama)), dtype="bfloat16")
    site = Site(1, kind)
    found = loss_recovered(model, lambda x: x, [site], {site: MEAN}, contexts, 200)
    assert found.against_zero == pytest.approx(1, abs=1e-6)


def test_contexts_too_short_to_predict_from_a_row(llama: Path) -> None:
    model = load_causal_model(describe_model(str(llama)), dtype="float32")
    short = [context_rows([0, 5], 1)]
    with pytest.raises(InputError, match="long enough"):
        loss_recovered(model, lambda x: x, [Site(0, "resid_post")], {Site(0, "resid_post"): MEAN}, short, 100)
