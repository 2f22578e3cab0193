"""Training: steps against Adam's formulas in float64, what keeps true from step to step, and resuming to the bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from formulas import ACTIVATIONS, LATENTS, VARIANTS, Formulas, K, config_of, leaves
from safetensors.torch import save
from small_training import ROWS, SETTINGS, SPARSE, STEPS, batch, make_trainer, train
from torch import Tensor

from pipeline.errors import InputError
from pipeline.sdl.dictionary.activations import JumpReLU, Products, TopK
from pipeline.sdl.dictionary.dictionary import Initialisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.config import Resampling, default_dead_after_rows, default_learning_rate
from pipeline.sdl.train.objective import Objective
from pipeline.sdl.train.trainer import DictionaryTrainer

# ---- the step


def plain_step(
    weights: dict[str, Tensor], moments: dict[str, list[Tensor]], trainer: DictionaryTrainer, x: Tensor, y: Tensor
) -> float:
    """Change `weights` (float64) as one step does: the loss, Adam, norms. Returns the loss."""
    config, settings, step = trainer.dictionary.config, trainer.config, trainer.step_number
    direct = Formulas(config, weights, x.double(), y.double())
    loss = direct.loss(settings.objective, trainer.dead(), trainer.anchors, step / settings.steps)
    found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    gradients = dict(zip(weights, found, strict=True))
    rate = settings.learning_rate * min(1.0, (step + 1) / 2, (settings.steps - step) / 2)  # 0.2 of ten steps each
    for name, gradient in gradients.items():
        if name.endswith("W_dec"):
            if config.shared_latents:
                a, b = gradient[: config.shared_latents].chunk(2, dim=1)
                gradient[: config.shared_latents] = torch.cat([a + b, a + b], dim=1)
            if settings.decoder_norm == "unit":
                row = weights[name].detach()
                gradient -= (gradient * row).sum(1, keepdim=True) * row / (row * row).sum(1, keepdim=True)
    if settings.clip is not None:
        squares = sum(float((g * g).sum()) for g in gradients.values())
        if config.shared_latents:  # one decoder, that stands there for both sites
            (decoders,) = (g for name, g in gradients.items() if name.endswith("W_dec"))
            squares -= float((decoders[: config.shared_latents, config.d_out // 2 :] ** 2).sum())
        size = squares**0.5
        gradients = {n: g * min(1.0, settings.clip / config.d_out / size) for n, g in gradients.items()}
    with torch.no_grad():
        for name, gradient in gradients.items():
            first, second = moments.setdefault(name, [torch.zeros_like(gradient), torch.zeros_like(gradient)])
            first.mul_(0.9).add_(0.1 * gradient)
            second.mul_(0.999).add_(0.001 * gradient**2)
            mean, square = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            weights[name] -= rate * mean / (square.sqrt() + 1e-8 / config.d_out)
            if name.endswith("threshold"):
                weights[name].clamp_(min=0)
            if name.endswith("W_dec") and settings.decoder_norm == "unit":
                weights[name] /= (weights[name] ** 2).sum(1, keepdim=True).sqrt()
    return loss.item()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("activation", "norms"),
    [(a, n) for a in ("topk", "batch_topk", "relu", "jumprelu") for n in ("unit", "free")] + [("gated", "unit")],
)
def test_steps_are_what_a_plain_optimiser_does(variant: str, activation: str, norms: str) -> None:
    """All terms, the schedule of the rate, clipping, and what becomes of decoder norms."""
    config = config_of(variant, activation)
    settings = replace(SETTINGS, objective=SPARSE[activation], warmup_share=0.2, clip=0.5, decoder_norm=norms)
    # At their anchors latents would have a gradient of rounding errors alone, and those decide an Adam step.
    settings = replace(settings, products=Products(selection="float32"), anchors_first=False)
    trainer = make_trainer(settings, config, plain=True)
    with torch.no_grad():
        trainer.dictionary.b_dec.add_(0.01)  # no gradient is zero by symmetry
    weights, moments = leaves(trainer.dictionary), {}
    for step in range(4):
        rows = batch(step, config)
        expected = plain_step(weights, moments, trainer, *rows)
        found = trainer.step(*rows)
        assert found.loss == pytest.approx(expected, rel=1e-3)
        for name, parameter in trainer.dictionary.named_parameters():
            difference = (parameter.detach() - weights[name]).abs()
            # Where a gradient is next to nothing, rounding decides the direction of an Adam step.
            assert difference.median() < 1e-6, (step, name)
            assert (difference > 1e-4).float().mean() < 0.02, (step, name)


def test_the_first_step_of_the_rate() -> None:
    """Each weight with a gradient moves by the rate, whatever the gradient's size."""
    trainer = make_trainer(replace(SETTINGS, objective=Objective(auxk=0), warmup_share=0.0))
    before = trainer.dictionary.W_enc.detach().clone()
    train(trainer, range(1))
    moved = (trainer.dictionary.W_enc - before).abs()
    torch.testing.assert_close(moved[moved > 1e-4], torch.full_like(moved[moved > 1e-4], 3e-3), rtol=1e-2, atol=0)
    assert (moved > 1e-4).any()


def test_adam_in_one_kernel_is_adam() -> None:
    settings = replace(SETTINGS, products=Products(selection="float32"))
    fused, plain = (make_trainer(replace(settings, fused=fused)) for fused in (True, False))
    assert not plain.optimizer.defaults["fused"]
    losses = [[metrics.loss for metrics in train(trainer, range(8))] for trainer in (fused, plain)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    for one, other in zip(fused.dictionary.parameters(), plain.dictionary.parameters(), strict=True):
        assert (one - other).abs().median() < 1e-6


def test_a_latent_is_dead_from_the_row_on_that_is_asked_for() -> None:
    trainer = make_trainer()
    trainer.silent_rows[:3] = torch.tensor([79, 80, 81])
    assert trainer.dead()[:3].tolist() == [False, True, True]  # dead_after_rows is 80


def test_adams_eps_is_as_small_as_the_gradients_are() -> None:
    """The loss is divided by d, and so is the eps of 1e-8 that a loss without the division would have."""
    for variant in ("sae", "crosscoder"):
        config = VARIANTS[variant]
        assert make_trainer(config=config).optimizer.defaults["eps"] == pytest.approx(1e-8 / config.d_out)


def test_learning_rate_rises_stays_and_falls_to_its_end() -> None:
    settings = replace(SETTINGS, steps=100, learning_rate=1.0, warmup_share=0.1, decay_share=0.2)
    rates = [make_trainer(settings).learning_rate(step) for step in range(101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:81], 1.0)
    np.testing.assert_allclose(rates[80:], np.arange(20, -1, -1) / 20, atol=1e-12)
    assert min(rates[:100]) > 0  # no step is taken in vain


def test_learning_rate_without_warmup_or_decay() -> None:
    settings = replace(SETTINGS, learning_rate=1.0, warmup_share=0.0, decay_share=0.0)
    assert [make_trainer(settings).learning_rate(step) for step in range(STEPS)] == [1.0] * STEPS


def test_default_learning_rate() -> None:
    assert default_learning_rate(2**14, 100_000) == default_learning_rate(2**14, 10**9) == pytest.approx(2e-4)
    assert default_learning_rate(2**16, 100_000) == pytest.approx(1e-4)
    assert default_learning_rate(2**14, 1000) == pytest.approx(2e-3)
    assert default_learning_rate(16, 8) == 0.02  # and not 0.7, which no run survives


def test_default_dead_after_rows() -> None:
    assert [default_dead_after_rows(rows) for rows in (1, 5000, 10**10)] == [1, 100, 10_000_000]


def test_training_lowers_the_loss_and_every_term_takes_part() -> None:
    metrics = train(make_trainer(replace(SETTINGS, steps=200)), range(200))
    assert metrics[-1].fvu < 0.5 * metrics[0].fvu
    assert max(m.dead_share for m in metrics) > 0
    assert all(m.anchor_cosine is not None and m.anchor_cosine > 0.5 for m in metrics)
    assert all(0 < m.l0 <= K for m in metrics)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns(variant: str, activation: str) -> None:
    config = config_of(variant, activation)
    settings = replace(SETTINGS, steps=150, learning_rate=0.02, objective=SPARSE[activation], clip=10.0)
    metrics = train(make_trainer(settings, config), range(150))
    assert metrics[-1].fvu < 0.6 * metrics[0].fvu
    assert metrics[-1].l0 > 0


def test_metrics_are_of_the_weights_before_the_update() -> None:
    trainer = make_trainer(replace(SETTINGS, learning_rate=0.3, warmup_share=0.0))
    train(trainer, range(2))
    before = trainer.anchor_cosine()
    assert trainer.step(*batch(2)).anchor_cosine == before


# ---- what keeps true


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoder_rows_stay_unit_norm(variant: str) -> None:
    trainer = make_trainer(config=VARIANTS[variant])
    for step in range(STEPS):
        train(trainer, range(step, step + 1))
        for block in trainer.dictionary.each_block():
            torch.testing.assert_close(block.W_dec.norm(dim=1), torch.ones(LATENTS), rtol=0, atol=1e-6)


def test_free_decoder_rows_change_their_norm() -> None:
    trainer = make_trainer(replace(SETTINGS, decoder_norm="free", initialisation=Initialisation(decoder_norm=0.1)))
    norms = trainer.dictionary.W_dec.norm(dim=1)
    torch.testing.assert_close(norms[2:], torch.full((LATENTS - 2,), 0.1))
    train(trainer, range(STEPS))
    assert (trainer.dictionary.W_dec.norm(dim=1) - norms).abs().max() > 1e-3


@pytest.mark.parametrize("width", [3, 4, 21])
@pytest.mark.parametrize("shared", [5, 8])
@pytest.mark.parametrize("norms", ["unit", "free"])
def test_shared_latents_stay_tied_to_the_bit(width: int, shared: int, norms: str) -> None:
    """At three sites, through anchors that differ between them, clipping and resampling."""
    sites = ("a/x.1", "b/x.1", "c/x.1")
    config = DictionaryConfig(sites, sites, (width,) * 3, (width,) * 3, 8, TopK(1), shared_latents=shared)
    settings = replace(SETTINGS, steps=30, decoder_norm=norms, clip=1.0, dead_after_rows=ROWS)
    trainer = make_trainer(replace(settings, resampling=Resampling((0.3, 0.6), 3 * ROWS)), config)
    revived = 0
    for step in range(30):
        parts = trainer.dictionary.W_dec[:shared].chunk(3, dim=1)
        assert torch.equal(parts[0], parts[1])
        assert torch.equal(parts[0], parts[2])
        revived += train(trainer, range(step, step + 1))[0].resampled
    assert revived > 0
    if shared < 8:
        assert not torch.equal(*trainer.dictionary.W_dec[shared:].chunk(3, dim=1)[:2])


def test_thresholds_stay_at_least_zero() -> None:
    config = replace(VARIANTS["sae"], activation=JumpReLU(0.001, 2.0))
    trainer = make_trainer(replace(SETTINGS, objective=Objective(l0=1e-9), learning_rate=0.1), config)
    train(trainer, range(STEPS))
    assert trainer.dictionary.only.own("threshold").min() == 0


# ---- what is refused


def test_nan_in_a_batch_is_found_before_it_reaches_the_weights() -> None:
    for activation in ACTIVATIONS:
        trainer = make_trainer(replace(SETTINGS, objective=SPARSE[activation]), config_of("transcoder", activation))
        train(trainer, range(2))
        before = save(trainer.state())
        x, y = batch(2)
        x[3, 4] = torch.nan
        y[5, 1] = torch.inf
        message = r"step 2: .*nan or infinite in column 4 \(1 such\) of the input; column 1 \(1 such\) of the output"
        with pytest.raises(InputError, match=message):
            trainer.step(x, y)
        assert save(trainer.state()) == before
