"""Dictionaries against formulas in float64, every loss term's gradient, and training that resumes to the bit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from pipeline.errors import InputError
from pipeline.sdl.activations import TopK
from pipeline.sdl.config import DictionaryConfig
from pipeline.sdl.dictionary import Dictionary, Normalisation
from pipeline.sdl.files import load_dictionary, save_dictionary
from pipeline.sdl.losses import auxiliary_loss, reconstruction_loss, squared_anchoring, unit_rows
from pipeline.sdl.metrics import auroc, measure_code
from pipeline.sdl.objective import Anchors, Objective
from pipeline.sdl.selection import dense_top_k as top_k
from pipeline.sdl.training import DictionaryTrainer, StepMetrics, TrainingConfig, default_learning_rate

D_IN, D_OUT, LATENTS, K, ROWS = 7, 5, 24, 4, 40


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def norm(d: int, mean: float, scale: float) -> Normalisation:
    return Normalisation(torch.full((d,), mean), torch.full((d,), scale))


def config(autoencoder: bool = False) -> DictionaryConfig:
    if autoencoder:
        return DictionaryConfig(("resid_post.1",), ("resid_post.1",), (D_IN,), (D_IN,), LATENTS, TopK(K))
    return DictionaryConfig(("mlp_in.1",), ("mlp_out.1",), (D_IN,), (D_OUT,), LATENTS, TopK(K))


@pytest.fixture
def transcoder() -> Dictionary:
    """Every weight is random, biases too."""
    dictionary = Dictionary(config())
    with torch.no_grad():
        for seed, parameter in enumerate(dictionary.parameters()):
            parameter.normal_(generator=generator(seed))
    return dictionary.requires_grad_(False)


def encode64(dictionary: Dictionary, x: np.ndarray) -> np.ndarray:
    W, b = dictionary.W_enc.double().numpy(), dictionary.b_enc.double().numpy()
    z = np.zeros((len(x), LATENTS))
    for row, acts in enumerate(x):
        preactivations = W @ acts + b
        for latent in sorted(range(LATENTS), key=lambda i: -preactivations[i])[:K]:
            z[row, latent] = max(0.0, preactivations[latent])
    return z


def decode64(dictionary: Dictionary, z: np.ndarray) -> np.ndarray:
    return z @ dictionary.W_dec.double().numpy() + dictionary.b_dec.double().numpy()


# ---- encode and decode


def test_encode_and_decode_are_the_formulas(transcoder: Dictionary) -> None:
    x = randn(ROWS, D_IN)
    z = encode64(transcoder, x.double().numpy())
    np.testing.assert_allclose(transcoder.encode(x).numpy(), z, atol=1e-5)
    np.testing.assert_allclose(transcoder(x).numpy(), decode64(transcoder, z), atol=1e-4)


def test_negative_preactivations_are_never_active(transcoder: Dictionary) -> None:
    transcoder.b_enc.fill_(-2.0)
    z = transcoder.encode(randn(ROWS, D_IN))
    assert (z >= 0).all()
    assert (z > 0).sum(1).min() < K  # rows with fewer than k positive ones keep only those
    np.testing.assert_allclose(z.numpy(), encode64(transcoder, randn(ROWS, D_IN).double().numpy()), atol=1e-5)


def test_stored_activations_are_encoded_as_they_are(transcoder: Dictionary) -> None:
    x = randn(ROWS, D_IN).to(torch.bfloat16)
    torch.testing.assert_close(transcoder.encode(x), transcoder.encode(x.float()), rtol=0, atol=0)


def test_gradients_of_top_k_flow_to_the_kept_entries_alone() -> None:
    preactivations = randn(ROWS, LATENTS).requires_grad_()
    z = top_k(preactivations, K)
    z.sum().backward()
    torch.testing.assert_close(preactivations.grad, (z > 0).float(), rtol=0, atol=0)


@pytest.mark.parametrize("k", [0, -1, LATENTS + 1])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(InputError, match=r"activation\.k"):
        replace(config(), activation=TopK(k))


def test_folded_equals_the_normalised_path(transcoder: Dictionary) -> None:
    x = 3 + 10 * randn(ROWS, D_IN)
    x_norm, y_norm = norm(D_IN, 3.0, 0.1), norm(D_OUT, 0.5, 0.25)
    z = transcoder.encode(x_norm(x))
    y = transcoder.decode(z) / y_norm.scale + y_norm.mean
    folded = transcoder.folded(x_norm, y_norm)
    torch.testing.assert_close(folded.encode(x), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded(x), y, rtol=1e-4, atol=1e-4)


def test_normalisation_is_the_formula() -> None:
    x = randn(ROWS, D_IN).to(torch.bfloat16)
    norm = Normalisation(randn(D_IN, seed=1), torch.full((D_IN,), 0.5))
    torch.testing.assert_close(norm(x), (x.float() - norm.mean) * 0.5)
    assert norm(x).dtype == torch.float32


def test_initial_weights_follow_the_seed_and_are_unit_rows() -> None:
    one, two, other = (Dictionary(config(autoencoder=True)) for _ in range(3))
    for dictionary, seed in ((one, 0), (two, 0), (other, 1)):
        dictionary.initialise(seed)
    assert torch.equal(one.W_dec, two.W_dec)
    assert not torch.equal(one.W_dec, other.W_dec)
    assert torch.equal(one.W_enc, one.W_dec)
    torch.testing.assert_close(one.W_dec.norm(dim=1), torch.ones(LATENTS))


# ---- on disk


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def test_save_and_load_round_trip(tmp_path: Path, transcoder: Dictionary) -> None:
    write_files(tmp_path, save_dictionary(transcoder, {"harvest": "abc"}))
    loaded = load_dictionary(tmp_path)
    assert loaded.config == transcoder.config
    assert json.loads((tmp_path / "dictionary.json").read_text())["harvest"] == "abc"
    for name, parameter in transcoder.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
        assert not loaded.get_parameter(name).requires_grad


def test_no_dictionary_there(tmp_path: Path, transcoder: Dictionary) -> None:
    with pytest.raises(InputError, match="no dictionary in"):
        load_dictionary(tmp_path)
    write_files(tmp_path, save_dictionary(transcoder, {}))
    (tmp_path / "dictionary.safetensors").unlink()
    with pytest.raises(InputError, match="no dictionary in"):
        load_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("dictionary.json", b"{"),
        ("dictionary.json", b'{"format": 3}'),
        ("dictionary.json", b'{"format": 2}'),
        ("dictionary.safetensors", b"cut"),
        ("dictionary.safetensors", save({"blocks.0.W_enc": torch.zeros(1, 1)})),
    ],
    ids=["not JSON", "another format", "no config", "cut weights", "other weights"],
)
def test_a_damaged_dictionary_is_an_input_error(
    tmp_path: Path, transcoder: Dictionary, file: str, content: bytes
) -> None:
    write_files(tmp_path, {**save_dictionary(transcoder, {}), file: content})
    with pytest.raises(InputError, match=str(tmp_path)):
        load_dictionary(tmp_path)


# ---- loss terms


def test_reconstruction_loss_is_the_formula() -> None:
    y, y_hat = randn(ROWS, D_OUT), randn(ROWS, D_OUT, seed=1)
    expected = ((y.double() - y_hat.double()) ** 2).sum(1).mean() / 3.5
    assert reconstruction_loss(y - y_hat, 3.5).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.fixture
def auxiliary_gradients() -> tuple[Dictionary, Tensor, Tensor]:
    """A transcoder after the backward pass of AuxK alone, which of its latents are dead, and the loss."""
    dictionary = Dictionary(config())
    dictionary.initialise(0)
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    dead[[2, 3, 11, 19]] = True
    x, y = randn(ROWS, D_IN), randn(ROWS, D_OUT, seed=1)
    preactivations = dictionary.only.preactivations(x)
    y_hat = dictionary.decode(top_k(preactivations, K))
    loss = auxiliary_loss(y - y_hat, x, dictionary.only, dead, k=2)
    loss.backward()
    return dictionary, dead, loss.detach()


def test_auxiliary_loss_reaches_dead_latents_alone(auxiliary_gradients: tuple[Dictionary, Tensor, Tensor]) -> None:
    dictionary, dead, _ = auxiliary_gradients
    for name in ("W_enc", "W_dec", "b_enc"):
        gradient = dictionary.only.get_parameter(name).grad
        assert gradient is not None
        assert gradient[dead].reshape(int(dead.sum()), -1).abs().sum(1).min() > 0
        assert not gradient[~dead].any()
    assert dictionary.b_dec.grad is None or not dictionary.b_dec.grad.any()


def test_auxiliary_loss_is_the_formula(auxiliary_gradients: tuple[Dictionary, Tensor, Tensor]) -> None:
    dictionary, dead, loss = auxiliary_gradients
    x, y = randn(ROWS, D_IN).double().numpy(), randn(ROWS, D_OUT, seed=1).double().numpy()
    W_enc, W_dec = (w.detach().double().numpy() for w in (dictionary.W_enc, dictionary.W_dec))
    residual = y - encode64(dictionary.requires_grad_(False), x) @ W_dec
    errors = []
    for row, e in zip(x, residual, strict=True):
        strongest = sorted(dead.nonzero().flatten().tolist(), key=lambda i: -(W_enc[i] @ row))[:2]
        errors.append(np.square(e - sum(max(0, W_enc[i] @ row) * W_dec[i] for i in strongest)).sum())
    variance = np.square(residual - residual.mean(0)).sum(1).mean()
    assert loss.item() == pytest.approx(np.mean(errors) / variance, rel=1e-5)


def test_auxiliary_loss_of_a_residual_without_variance_spoils_no_weight() -> None:
    """One row, or a perfect reconstruction: there is nothing to divide by."""
    dictionary = Dictionary(config())
    dictionary.initialise(0)
    dead = torch.ones(LATENTS, dtype=torch.bool)
    auxiliary_loss(randn(1, D_OUT), randn(1, D_IN), dictionary.only, dead, k=2).backward()
    for parameter in (dictionary.W_enc, dictionary.b_enc, dictionary.W_dec):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_anchoring_gradient_is_twice_the_difference_on_the_first_rows() -> None:
    W_enc, W_dec = randn(LATENTS, D_IN).requires_grad_(), randn(LATENTS, D_OUT, seed=1).requires_grad_()
    anchors_in, anchors_out = unit_rows(randn(3, D_IN, seed=2)), unit_rows(randn(3, D_OUT, seed=3))
    loss = squared_anchoring(W_enc, anchors_in) + squared_anchoring(W_dec, anchors_out)
    loss.backward()
    with torch.no_grad():
        for W, anchors in ((W_enc, anchors_in), (W_dec, anchors_out)):
            expected = torch.zeros_like(W)
            expected[:3] = 2 * (W[:3] - anchors)
            assert torch.equal(W.grad, expected)
        direct = (W_enc[:3] - anchors_in).double().square().sum() + (W_dec[:3] - anchors_out).double().square().sum()
    assert loss.item() == pytest.approx(direct.item(), rel=1e-6)


def test_unit_rows_keep_a_zero_row() -> None:
    rows = unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


# ---- training

STEPS = 10
SETTINGS = TrainingConfig(steps=STEPS, batch_rows=ROWS, learning_rate=3e-3, dead_after_rows=2 * ROWS, seed=3)


def make_trainer(settings: TrainingConfig = SETTINGS, *, autoencoder: bool = False) -> DictionaryTrainer:
    """An anchored trainer whose latents die soon, so that every term of the loss takes part."""
    shape = config(autoencoder)
    anchors = (randn(2, shape.d_in, seed=8), 5 * randn(2, shape.d_out, seed=9))
    norms = (norm(shape.d_in, 0.2, 0.9), norm(shape.d_out, 0.1, 1.1))
    if autoencoder:
        anchors, norms = (anchors[0], anchors[0]), (norms[0], norms[0])
    return DictionaryTrainer(Dictionary(shape), settings, *norms, Anchors(*anchors))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Rows of rank 3 and a function of them, so that most latents are silent and there is something to learn."""
    x = randn(ROWS, 3, seed=100 + step) @ randn(3, D_IN, seed=50)
    return x, torch.tanh(x @ randn(D_IN, D_OUT, seed=51))


def train(trainer: DictionaryTrainer, steps: range) -> list[StepMetrics]:
    return [trainer.step(*batch(step)) for step in steps]


def weights(trainer: DictionaryTrainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.dictionary.named_parameters()}


def test_training_lowers_the_loss_and_every_term_takes_part() -> None:
    metrics = train(make_trainer(replace(SETTINGS, steps=200)), range(200))
    assert metrics[-1].fvu < 0.5 * metrics[0].fvu
    assert max(m.dead_share for m in metrics) > 0
    assert all(m.anchor_cosine is not None and m.anchor_cosine > 0.5 for m in metrics)
    assert all(0 < m.l0 <= K for m in metrics)


@pytest.mark.parametrize("autoencoder", [False, True])
def test_decoder_rows_stay_unit_norm(autoencoder: bool) -> None:
    trainer = make_trainer(autoencoder=autoencoder)
    for step in range(STEPS):
        x, y = batch(step)
        trainer.step(x, x if autoencoder else y)
        torch.testing.assert_close(trainer.dictionary.W_dec.norm(dim=1), torch.ones(LATENTS), rtol=0, atol=1e-6)


def test_the_step_is_what_a_plain_optimiser_does() -> None:
    """The first step against Adam's formula on the gradients of the loss, by finite arithmetic in float64."""
    settings = replace(SETTINGS, objective=Objective(auxk=0, anchoring=0), warmup_share=0.0, decay_share=0.0)
    trainer = make_trainer(settings)
    before = weights(trainer)
    copy = Dictionary(config()).double()
    copy.load_state_dict(before)
    x, y = batch(0)
    target = trainer.y_norm(y).double()
    y_hat = copy.decode(top_k(copy.only.preactivations(trainer.x_norm(x).double()), K))
    ((target - y_hat).square().sum(1).mean() / D_OUT).backward()
    trainer.step(x, y)
    for name, parameter in copy.named_parameters():
        gradient, old = parameter.grad, before[name].double()
        if name.endswith("W_dec"):
            gradient = gradient - (gradient * old).sum(1, keepdim=True) * old
        new = old - 3e-3 * gradient / (gradient.abs() + 1e-8)  # Adam's first step, moments corrected
        if name.endswith("W_dec"):
            new = new / new.norm(dim=1, keepdim=True)
        large = gradient.abs() > 1e-4  # below, 1e-8 and float32 rounding decide the sign
        assert large.any()
        torch.testing.assert_close(weights(trainer)[name].double()[large], new[large], rtol=1e-4, atol=1e-5)


def test_resume_is_bit_identical_at_every_step() -> None:
    straight = make_trainer()
    states, metrics = [save(straight.state())], []
    for step in range(STEPS):
        metrics += train(straight, range(step, step + 1))
        states.append(save(straight.state()))
    assert max(m.dead_share for m in metrics) > 0
    for step, state in enumerate(states):
        resumed = make_trainer(replace(SETTINGS, seed=99))  # other initial weights: all must come from the state
        resumed.load_state(load(state))
        assert resumed.step_number == step
        assert train(resumed, range(step, STEPS)) == metrics[step:]
        assert save(resumed.state()) == states[-1]


def test_loading_a_state_does_not_tie_the_trainer_to_it() -> None:
    trainer = make_trainer()
    train(trainer, range(3))
    state = load(save(trainer.state()))
    kept = save(state)
    resumed = make_trainer()
    resumed.load_state(state)
    train(resumed, range(3, 6))
    assert save(state) == kept


def test_result_equals_the_trained_dictionary_on_raw_activations() -> None:
    trainer = make_trainer()
    train(trainer, range(STEPS))
    x, _ = batch(0)
    raw = trainer.result()
    with torch.no_grad():
        z = trainer.dictionary.encode(trainer.x_norm(x))
        torch.testing.assert_close(raw.encode(x), z, rtol=1e-4, atol=1e-4)
        expected = trainer.dictionary.decode(z) / trainer.y_norm.scale + trainer.y_norm.mean
        torch.testing.assert_close(raw(x), expected, rtol=1e-4, atol=1e-4)


def test_metrics_are_of_the_weights_before_the_update() -> None:
    trainer = make_trainer(replace(SETTINGS, learning_rate=0.3, warmup_share=0.0))
    train(trainer, range(2))
    before = trainer.anchor_cosine()
    assert trainer.step(*batch(2)).anchor_cosine == before


def test_more_anchors_than_latents() -> None:
    many = randn(LATENTS + 1, D_IN), randn(LATENTS + 1, D_OUT)
    norms = norm(D_IN, 0.0, 1.0), norm(D_OUT, 0.0, 1.0)
    with pytest.raises(InputError, match="do not fit"):
        DictionaryTrainer(Dictionary(config()), SETTINGS, *norms, Anchors(*many))


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
    assert default_learning_rate(2**14) == pytest.approx(2e-4)
    assert default_learning_rate(2**16) == pytest.approx(1e-4)


# ---- metrics


def pairwise(scores: np.ndarray, member: np.ndarray) -> float:
    inside, outside = scores[member], scores[~member]
    return float(np.mean([1.0 if i > o else 0.5 if i == o else 0.0 for i in inside for o in outside]))


@pytest.mark.parametrize("seed", range(3))
def test_auroc_equals_counting_pairs_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = np.maximum(0, rng.integers(-4, 5, (30, 6))).astype(np.float32)  # most entries are tied at zero
    codes[:, 5] = 0
    member = rng.random((30, 3)) < [0.5, 0.1, 0.9]
    member[0], member[1] = True, False
    found = auroc(torch.from_numpy(codes), torch.from_numpy(member)).numpy()
    expected = [[pairwise(codes[:, i], member[:, g]) for g in range(3)] for i in range(6)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found[5] == 0.5).all()


def test_auroc_of_a_group_of_all_or_none_is_nan() -> None:
    member = torch.stack([torch.ones(10, dtype=torch.bool), torch.zeros(10, dtype=torch.bool)], dim=1)
    assert auroc(randn(10, 2), member).isnan().all()


@pytest.mark.parametrize("split", [ROWS, 7])
def test_code_metrics_are_the_formulas(transcoder: Dictionary, split: int) -> None:
    x, y = randn(ROWS, D_IN), 2 + randn(ROWS, D_OUT, seed=1)
    metrics, codes = measure_code(transcoder, zip(x.split(split), y.split(split), strict=True))
    z = encode64(transcoder, x.double().numpy())
    residual = y.double().numpy() - decode64(transcoder, z)
    assert metrics.rows == ROWS
    assert metrics.fvu == pytest.approx((residual**2).sum() / ((y - y.mean(0)) ** 2).sum().item(), rel=1e-4)
    assert metrics.l0 == pytest.approx((z > 0).sum(1).mean())
    np.testing.assert_allclose(metrics.density, (z > 0).mean(0), atol=1e-7)
    assert metrics.dead_share == pytest.approx((z.max(0) == 0).mean())
    np.testing.assert_allclose(codes.numpy(), z, atol=1e-5)


def test_code_metrics_keep_chosen_latents(transcoder: Dictionary) -> None:
    x, y = randn(ROWS, D_IN), randn(ROWS, D_OUT)
    measure: Callable = lambda keep: measure_code(transcoder, [(x, y)], keep)[1]  # noqa: E731
    assert torch.equal(measure([5, 2]), measure(None)[:, [5, 2]])
