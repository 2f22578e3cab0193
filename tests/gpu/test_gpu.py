"""What must also hold on a GPU. Needs torch and transformers alone: `python -m pytest tests/gpu` (pytest.ini)."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.capture.contexts import ContextRows
from pipeline.capture.rounding import round_rows, square_error
from pipeline.capture.unit import UnitRunner
from pipeline.sdl.dictionary.activations import BatchTopK, Gated, JumpReLU, Products, ReLU, TopK
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.measure.loss_recovered import loss_recovered
from pipeline.sdl.train.config import TrainingConfig
from pipeline.sdl.train.objective import Anchors, Objective
from pipeline.sdl.train.trainer import DictionaryTrainer
from pipeline.sites import KINDS, STORED_TYPES, Site

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none")

D_MODEL, LAYERS, VOCABULARY = 64, 3, 200


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=D_MODEL, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def contexts() -> list[ContextRows]:
    rng = np.random.default_rng(0)
    found, row = [], 0
    for length in (33, 60, 64, 64, 12, 47):
        found.append(ContextRows(rng.integers(0, VOCABULARY, length).astype(np.int32), np.arange(1, length), row))
        row += length - 1
    return found


def activations(device: str, compile_layers: bool = False) -> dict[Site, torch.Tensor]:
    sites = [Site(layer, kind) for layer in range(LAYERS) for kind in KINDS]
    runner = UnitRunner(
        model().model.to(device), dict.fromkeys(sites, "float32"), d_model=D_MODEL, batch_tokens=128, device=device,
        context=64, compile_layers=compile_layers,
    )  # fmt: skip
    sites_of = runner.run(contexts(), sum(c.num_rows for c in contexts())).sites
    return {site: acts.values for site, acts in sites_of.items()}


@pytest.mark.parametrize("compile_layers", [False, True])
def test_every_site_equals_the_cpu(compile_layers: bool) -> None:
    expected, found = activations("cpu"), activations("cuda", compile_layers)
    for site in expected:
        assert found[site].device.type == "cpu"
        torch.testing.assert_close(found[site], expected[site], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stored", STORED_TYPES)
def test_rows_are_rounded_as_on_the_cpu(stored: str) -> None:
    rows = torch.randn(500, D_MODEL, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 15, 500)[:, None]
    rows[7] = 0
    on_cpu, on_gpu = (round_rows(rows.to(device), stored) for device in ("cpu", "cuda"))
    for expected, found in zip(on_cpu.tensors, on_gpu.tensors, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)


def test_int8_of_a_unit_is_that_of_its_rows() -> None:
    """Values and scales go to the host beside the next forward pass, each to its own rows."""
    site, rows = Site(1, "resid_post"), sum(c.num_rows for c in contexts())
    found = {}
    for stored in ("float32", "int8"):
        runner = UnitRunner(
            model().model.to("cuda"), {site: stored}, d_model=D_MODEL, batch_tokens=128, device="cuda", context=64
        )
        found[stored] = runner.run(contexts(), rows)
    exact = found["float32"].sites[site].values
    for expected, tensor in zip(round_rows(exact, "int8").tensors, found["int8"].sites[site].tensors, strict=True):
        torch.testing.assert_close(tensor, expected, rtol=0, atol=0)
    error = square_error(exact, round_rows(exact, "int8")).item()
    assert found["int8"].square_errors[site] == pytest.approx(error, rel=1e-5)
    assert found["float32"].square_errors[site] == 0


KINDS_OF_DICTIONARY = {
    "topk": (TopK(8), Objective()),
    "batch_topk": (BatchTopK(8), Objective(prefixes=(64, 128))),
    "relu": (ReLU(), Objective(l1=1.0)),
    "jumprelu": (JumpReLU(2.0, 1.0), Objective(l0=1e-2)),
    "gated": (Gated(), Objective(l1=1.0)),
}


@pytest.mark.parametrize("kind", KINDS_OF_DICTIONARY)
def test_training_follows_the_cpu(kind: str) -> None:
    activation, objective = KINDS_OF_DICTIONARY[kind]
    trained = {}
    for device in ("cpu", "cuda"):
        norm = Normalisation(torch.zeros(D_MODEL), torch.ones(D_MODEL))
        config = TrainingConfig(20, 256, 1e-3, objective, products=Products(selection="float32"))
        anchors = Anchors(torch.eye(D_MODEL)[:4], torch.eye(D_MODEL)[:4])
        dictionary = Dictionary(DictionaryConfig(("a",), ("a",), (D_MODEL,), (D_MODEL,), 256, activation))
        trainer = DictionaryTrainer(dictionary, config, norm, norm, anchors, device)
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            x = torch.randn(256, D_MODEL, generator=generator)
            last = trainer.step(x, x)
        trained[device] = (last, trainer.result())
    assert trained["cuda"][0].fvu == pytest.approx(trained["cpu"][0].fvu, rel=1e-2)
    assert trained["cuda"][1].W_dec.device.type == "cpu"


def test_the_identity_recovers_the_whole_loss() -> None:
    on_gpu = model().to("cuda")
    found = loss_recovered(
        on_gpu, lambda x: x, [Site(1, "resid_post")], {Site(1, "resid_post"): torch.zeros(D_MODEL)}, contexts(), 128
    )
    assert found.against_zero == pytest.approx(1, abs=1e-5)
