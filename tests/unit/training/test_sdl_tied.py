"""Tied weights: one matrix is encoder and decoder, with the gradients of both; saved as any other dictionary."""

from dataclasses import replace

import pytest
import torch
from formulas import ACTIVATIONS, VARIANTS, Formulas, config_of, randn
from safetensors.torch import load, save
from small_training import ROWS, SETTINGS, SPARSE, STEPS, batch, make_trainer, train
from torch import Tensor

from pipeline.errors import InputError
from pipeline.sdl.dictionary.activations import Gated, Products, ReLU
from pipeline.sdl.dictionary.dictionary import Dictionary, Initialisation
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.config import Resampling, TrainingConfig
from pipeline.sdl.train.objective import Objective, evaluate
from pipeline.sdl.train.trainer import DictionaryTrainer

AUTOENCODERS = ("sae", "crosscoder", "shared")
TIED = replace(SETTINGS, tied=True)


def gradient_of_both(variant: str, activation: str, products: Products) -> tuple[Tensor, Tensor]:
    """The gradient of the one matrix, and the formulas' for encoder and decoder apart, added up."""
    config = config_of(variant, activation)
    settings = replace(TIED, products=products, objective=SPARSE[activation])
    trainer = make_trainer(settings, config, plain=True)
    dictionary, (x, _) = trainer.dictionary.double(), batch(0, config)
    x = x.double()
    codes = dictionary.codes(x, products)
    evaluate(settings.objective, dictionary, x, x, codes, None, None, 1.0).loss.backward()
    apart = {n: p.detach().clone().requires_grad_() for n, p in dictionary.named_parameters(remove_duplicate=False)}
    formulas = Formulas(config, apart, x, x)
    formulas.loss(settings.objective, torch.zeros(config.total_latents, dtype=torch.bool)).backward()
    assert dictionary.W_enc.grad is not None
    return dictionary.W_enc.grad, apart["blocks.0.W_enc"].grad + apart["blocks.0.W_dec"].grad


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", AUTOENCODERS)
def test_its_gradient_is_that_of_both_sides(variant: str, activation: str, sparse: bool) -> None:
    found, expected = gradient_of_both(variant, activation, Products(sparse=sparse, selection="float32"))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norms", ["unit", "free"])
@pytest.mark.parametrize("variant", AUTOENCODERS)
def test_the_encoder_stays_the_decoder(variant: str, norms: str) -> None:
    """Through anchoring, clipping and resampling; and what results is a dictionary with two matrices."""
    settings = replace(TIED, decoder_norm=norms, clip=1.0, dead_after_rows=ROWS, steps=30)
    trainer = make_trainer(replace(settings, resampling=Resampling((0.3,), 3 * ROWS)), VARIANTS[variant])
    with torch.no_grad():
        trainer.dictionary.b_enc[6:9] = -9  # silent, so that they are resampled
    first, revived = trainer.dictionary.W_enc.detach().clone(), 0
    for step in range(30):
        revived += train(trainer, range(step, step + 1))[0].resampled
        assert torch.equal(trainer.dictionary.W_enc, trainer.dictionary.W_dec)
    assert revived > 0
    assert not torch.equal(trainer.dictionary.W_enc, first)
    result = trainer.result()
    assert result.W_enc.data_ptr() != result.W_dec.data_ptr()
    torch.testing.assert_close(result.W_enc, trainer.dictionary.W_dec * trainer.x_norm.scale)
    torch.testing.assert_close(result.W_dec, trainer.dictionary.W_dec / trainer.y_norm.scale)
    names = [name for name, _ in result.named_parameters()]
    assert names == [name for name, _ in Dictionary(VARIANTS[variant]).named_parameters()]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_resume_is_bit_identical_at_every_step(activation: str) -> None:
    config, settings = config_of("sae", activation), replace(TIED, objective=SPARSE[activation], clip=3.0)
    straight = make_trainer(settings, config)
    states, metrics = [save(straight.state())], []
    for step in range(STEPS):
        metrics += train(straight, range(step, step + 1))
        states.append(save(straight.state()))
    for step, state in enumerate(states):
        resumed = make_trainer(replace(settings, seed=9), config)
        resumed.load_state(load(state))
        assert train(resumed, range(step, STEPS)) == metrics[step:]
        assert save(resumed.state()) == states[-1]
        assert save(dict(resumed.result().state_dict())) == save(dict(straight.result().state_dict()))


def test_it_learns() -> None:
    settings = replace(TIED, steps=200, learning_rate=0.01, objective=Objective(auxk=0))
    metrics = train(make_trainer(settings, VARIANTS["sae"]), range(200))
    assert metrics[-1].fvu < 0.5 * metrics[0].fvu


@pytest.mark.parametrize("variant", ["transcoder", "skip", "cross_layer"])
def test_where_the_output_is_not_the_input_it_is_refused(variant: str) -> None:
    with pytest.raises(InputError, match=r"^tied: an encoder can only be its decoder's transpose where"):
        make_trainer(TIED, VARIANTS[variant])


@pytest.mark.parametrize("initialisation", [Initialisation("independent"), Initialisation(encoder_scale=0.5)])
def test_an_encoder_that_begins_otherwise_is_refused(initialisation: Initialisation) -> None:
    with pytest.raises(InputError, match=r"encoder and encoder_scale have no effect"):
        make_trainer(replace(TIED, initialisation=initialisation), VARIANTS["sae"])


@pytest.mark.parametrize(
    ("activation", "norms", "size"), [("relu", "unit", 1.0), ("relu", "free", 0.5), ("gated", "unit", 1.0)]
)
def test_codes_that_begin_dense_reconstruct_no_more_than_the_input(activation: str, norms: str, size: float) -> None:
    """Its encoder cannot be short, so its biases are below zero."""
    kind = {"relu": ReLU(), "gated": Gated()}[activation]
    d, how = 64, Initialisation(decoder_norm=size)
    config, norm = (
        DictionaryConfig(("x",), ("x",), (d,), (d,), 16 * d, kind),
        Normalisation(torch.zeros(d), torch.ones(d)),
    )
    settings = TrainingConfig(
        steps=200, batch_rows=512, learning_rate=1e-3, objective=SPARSE[activation], tied=True, decoder_norm=norms
    )
    trainer = DictionaryTrainer(Dictionary(config), replace(settings, initialisation=how), norm, norm)
    x = randn(512, d, seed=5)  # not the numbers that the weights are drawn from
    share = (trainer.dictionary(x) * x).sum() / x.square().sum()
    assert share.item() == pytest.approx(1, abs=0.1)
    # Beside what is asked for stands the noise of random directions; with biases of zero it is 55 times the variance.
    assert trainer.step(x, x).fvu < 3


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
def test_biases_of_other_codes_begin_at_zero(activation: str) -> None:
    trainer = make_trainer(replace(TIED, objective=SPARSE[activation]), config_of("sae", activation), plain=True)
    assert not trainer.dictionary.b_enc.any()


def test_norms_of_zero_are_refused() -> None:
    settings = replace(TIED, decoder_norm="free", initialisation=Initialisation(decoder_norm=0))
    with pytest.raises(InputError, match="tied: encoders and decoders of norm 0 have no gradient"):
        make_trainer(settings, VARIANTS["sae"])


def test_a_scale_of_resampled_encoders_is_refused() -> None:
    with pytest.raises(InputError, match=r"resampling\.encoder_scale has no effect"):
        make_trainer(replace(TIED, resampling=Resampling(encoder_scale=0.5)), VARIANTS["sae"])


def test_products_in_other_types_are_refused() -> None:
    for wrong in ({"dense": "bf16"}, {"selection": "float16"}):
        with pytest.raises(InputError, match=r"products are computed in auto, float32 or bfloat16, not (bf16|float16)"):
            Products(**wrong)


def test_without_anchors_it_begins_as_its_decoder_would() -> None:
    norm = Normalisation(torch.zeros(6), torch.ones(6))
    found = []
    for tied in (True, False):
        settings = TrainingConfig(steps=5, batch_rows=4, learning_rate=1e-3, tied=tied, seed=3)
        found.append(DictionaryTrainer(Dictionary(VARIANTS["sae"]), settings, norm, norm).dictionary)
    assert torch.equal(found[0].encode(randn(4, 6)), found[1].encode(randn(4, 6)))
