"""Dead latents begin anew as Bricken et al. say: at which inputs, with which weights, when, and what that does."""

from dataclasses import replace

import pytest
import torch
from formulas import LATENTS, VARIANTS, config_of, randn
from small_training import ROWS, SETTINGS, SPARSE, batch, make_trainer, train
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pipeline.errors import InputError
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.config import Resampling
from pipeline.sdl.train.trainer import DictionaryTrainer

PLAN = Resampling(encoder_scale=0.2)
DEAD = [4, 7, 8, 11]
"""Dead latents of the first block; a second one has 1 more."""


def trainer_with_dead_latents(config: DictionaryConfig, **options: object) -> DictionaryTrainer:
    trainer = make_trainer(replace(SETTINGS, objective=SPARSE[config.activation.kind], **options), config)
    train(trainer, range(3))
    trainer.silent_rows.zero_()
    trainer.silent_rows[DEAD] = 10**9
    trainer.silent_rows[LATENTS + 5 :][:1] = 10**9
    return trainer


def inputs(trainer: DictionaryTrainer, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised inputs and some residual, that of row 7 by far the largest."""
    config = trainer.dictionary.config
    residual = randn(ROWS, config.d_out, seed=seed + 1)
    residual[7] *= 1000
    return randn(ROWS, config.d_in, seed=seed), residual


def cosines(some: Tensor, others: Tensor) -> Tensor:
    """[len(some), len(others)]"""
    return cosine_similarity(some[:, None], others[None], dim=2)


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "gated"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_becomes_of_dead_latents_and_of_the_others(variant: str, activation: str) -> None:
    config = config_of(variant, activation)
    trainer = trainer_with_dead_latents(config)
    dead = trainer.dead()
    before = {name: p.detach().clone() for name, p in trainer.dictionary.named_parameters()}
    x, residual = inputs(trainer)
    found = trainer.resample(x, residual, 1, PLAN.encoder_scale)
    assert found.tolist() == dead.nonzero().flatten().tolist()

    for number, block in enumerate(trainer.dictionary.each_block()):
        of_block = dead[number * LATENTS : (number + 1) * LATENTS]
        read = x[:, block.shape.reads]
        written = read if config.is_autoencoder else residual[:, block.shape.writes]
        best = cosines(block.W_enc[of_block], read).max(1)
        rows = best.indices.tolist()
        assert best.values.min() > 1 - 1e-6
        assert 7 in rows
        assert len(set(rows)) == len(rows)  # each one an input of its own
        if variant != "shared":  # see below
            assert cosines(block.W_dec[of_block], written[rows]).diagonal().min() > 1 - 1e-6
        alive_norm = before[f"blocks.{number}.W_enc"][~of_block].norm(dim=1).mean()
        torch.testing.assert_close(block.W_enc[of_block].norm(dim=1), (0.2 * alive_norm).expand(int(of_block.sum())))
        torch.testing.assert_close(block.W_dec[of_block].norm(dim=1), torch.ones(int(of_block.sum())))
        assert not block.b_enc[of_block].any()
        for name in block.activation.trained:
            initial = {"threshold": 0.3, "r_mag": 0.0, "b_mag": 0.0}[name]
            assert block.own(name)[of_block].tolist() == pytest.approx([initial] * int(of_block.sum()))
        for name, parameter in block.named_parameters():
            old = before[f"blocks.{number}.{name}"]
            assert torch.equal(parameter[~of_block], old[~of_block])
            moments = trainer.optimizer.state[parameter]
            assert not moments["exp_avg"][of_block].any()
            expected = moments["exp_avg_sq"][~of_block].mean()  # which are not among those that began anew
            torch.testing.assert_close(moments["exp_avg_sq"][of_block], expected.expand_as(parameter[of_block]))
            assert moments["exp_avg"][~of_block].any() or not moments["exp_avg_sq"].any()
    assert torch.equal(trainer.dictionary.b_dec, before["b_dec"])


def test_rows_without_any_loss_are_never_drawn() -> None:
    """Also where fewer rows have a loss than latents are dead: none begins at nothing."""
    trainer = trainer_with_dead_latents(VARIANTS["sae"])
    x, residual = inputs(trainer)
    residual[2:] = 0
    x[2:] = 0
    assert len(trainer.resample(x, residual, 1, PLAN.encoder_scale)) == len(DEAD) > 2
    best = cosines(trainer.dictionary.W_dec[DEAD], x[:2]).max(1).values
    assert best.min() > 1 - 1e-6


def test_shared_latents_begin_anew_with_one_decoder() -> None:
    trainer = trainer_with_dead_latents(VARIANTS["shared"])
    x, residual = inputs(trainer)
    trainer.resample(x, residual, 1, PLAN.encoder_scale)
    W_enc, W_dec = trainer.dictionary.W_enc, trainer.dictionary.W_dec
    a, b = W_dec[4].chunk(2)  # the last of the five shared ones
    assert torch.equal(a, b)
    first, second = W_enc[4].chunk(2)
    assert cosine_similarity(a, first + second, dim=0) > 1 - 1e-6
    assert cosines(W_enc[[7, 8]], W_dec[[7, 8]]).diagonal().min() > 1 - 1e-6


def test_decoders_of_free_norms_begin_with_the_mean_norm_of_the_others() -> None:
    trainer = trainer_with_dead_latents(VARIANTS["transcoder"], decoder_norm="free")
    with torch.no_grad():
        trainer.dictionary.W_dec.mul_(torch.linspace(0.5, 2, LATENTS)[:, None])
    alive = trainer.dictionary.W_dec[~trainer.dead()].norm(dim=1).mean()
    trainer.resample(*inputs(trainer), 1, PLAN.encoder_scale)
    torch.testing.assert_close(trainer.dictionary.W_dec[DEAD].norm(dim=1), alive.expand(len(DEAD)))


def test_inputs_are_drawn_in_proportion_to_their_squared_loss() -> None:
    """Over many draws: row i has loss i, and so the share i^2 / sum of squares."""
    trainer = trainer_with_dead_latents(VARIANTS["sae"])
    x = torch.eye(6)[torch.arange(5)]
    residual = torch.zeros(5, 6)
    residual[:, 0] = torch.arange(5).float().sqrt()  # the loss of a row is its squared norm
    counts = torch.zeros(5)
    for step in range(1000):
        trainer.step_number = step
        trainer.silent_rows[DEAD[0]] = 10**9
        trainer.silent_rows[DEAD[1:]] = 0
        trainer.resample(x, residual, 1, PLAN.encoder_scale)
        counts[trainer.dictionary.W_dec[DEAD[0]].argmax()] += 1
    expected = torch.arange(5.0) ** 2 / 30
    torch.testing.assert_close(counts / 1000, expected, atol=0.05, rtol=0)
    assert counts[0] == 0


def test_the_draw_follows_the_seed_and_the_step() -> None:
    drawn = []
    for seed, step in ((3, 5), (3, 5), (4, 5), (3, 6)):
        trainer = trainer_with_dead_latents(VARIANTS["sae"])
        trainer.config, trainer.step_number = replace(trainer.config, seed=seed), step
        trainer.resample(randn(ROWS, 6), randn(ROWS, 6, seed=1), 1, PLAN.encoder_scale)
        drawn.append(trainer.dictionary.W_dec[DEAD].detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


def test_anchored_latents_are_left_alone() -> None:
    trainer = trainer_with_dead_latents(VARIANTS["transcoder"])
    trainer.silent_rows[0] = 10**9
    before = trainer.dictionary.W_dec[0].detach().clone()
    found = trainer.resample(*inputs(trainer), 1, PLAN.encoder_scale)
    assert found.tolist() == DEAD
    assert torch.equal(trainer.dictionary.W_dec[0], before)


def test_nothing_is_dead_or_nothing_is_missing() -> None:
    trainer = trainer_with_dead_latents(VARIANTS["transcoder"])
    before = trainer.dictionary.W_dec.detach().clone()
    x, residual = inputs(trainer)
    assert trainer.resample(x, torch.zeros_like(residual), 1, PLAN.encoder_scale).tolist() == []
    trainer.silent_rows.zero_()
    assert trainer.resample(x, residual, 1, PLAN.encoder_scale).tolist() == []
    assert torch.equal(trainer.dictionary.W_dec, before)


def test_all_dead() -> None:
    trainer = trainer_with_dead_latents(VARIANTS["transcoder"])
    trainer.silent_rows.fill_(10**9)
    found = trainer.resample(*inputs(trainer), 1, PLAN.encoder_scale)
    assert found.tolist() == list(range(2, LATENTS))
    assert all(p.isfinite().all() for p in trainer.dictionary.parameters())


# ---- when


def test_events_begin_at_their_shares_and_last_for_their_rows() -> None:
    plan = Resampling((0.25, 0.5), rows=300)
    found = [plan.steps_left(step, 40, 100) for step in range(40)]
    assert found == [None] * 10 + [3, 2, 1] + [None] * 7 + [3, 2, 1] + [None] * 17


def test_an_event_gives_way_to_the_next_and_to_the_end() -> None:
    plan = Resampling((0.25, 0.5), rows=10**9)
    found = [plan.steps_left(step, 40, 100) for step in range(40)]
    assert found == [None] * 10 + [5, 4, 3, 2, 1] + [None] * 5 + [*range(10, 0, -1)] + [None] * 10
    assert [Resampling((0.5,), rows=1).steps_left(s, 4, 100) for s in range(4)] == [None, None, 1, None]


def test_an_event_revives_a_part_at_each_of_its_batches_and_none_is_left() -> None:
    trainer = trainer_with_dead_latents(VARIANTS["transcoder"])
    counts = []
    for left in (3, 2, 1):
        found = trainer.resample(*inputs(trainer, seed=left), left, PLAN.encoder_scale)
        trainer.silent_rows[found] = 0
        counts.append(len(found))
    assert counts == [2, 1, 1]
    assert not trainer.dead().any()


def test_the_step_counts_what_it_revived_and_gives_it_another_life() -> None:
    settings = replace(SETTINGS, resampling=Resampling((0.5,), ROWS), dead_after_rows=ROWS)
    trainer = make_trainer(settings)
    with torch.no_grad():
        trainer.dictionary.b_enc[DEAD] = -9.0
    metrics = train(trainer, range(10))
    assert [m.resampled > 0 for m in metrics] == [False] * 5 + [True] + [False] * 4
    assert metrics[5].resampled >= len(DEAD)
    assert metrics[5].dead_share > metrics[6].dead_share


# ---- what it is for


def test_resampling_lowers_the_loss_and_the_share_of_dead_latents() -> None:
    """A run whose latents are mostly dead: their biases begin far below zero."""
    config = config_of("sae", "relu")

    def run(resampling: Resampling | None) -> tuple[float, float]:
        settings = replace(SETTINGS, steps=300, learning_rate=0.01, objective=SPARSE["relu"], dead_after_rows=20 * ROWS)
        settings = replace(settings, objective=replace(settings.objective, auxk=0.0), resampling=resampling)
        trainer = make_trainer(settings, config)
        with torch.no_grad():
            trainer.dictionary.b_enc[2:] = -30.0
        metrics = [trainer.step(*(randn(ROWS, 6, seed=step),) * 2) for step in range(300)]
        return sum(m.fvu for m in metrics[-10:]) / 10, metrics[-1].dead_share

    fvu, dead = run(None)
    fvu_revived, dead_revived = run(Resampling((0.2, 0.4), 10 * ROWS))
    assert dead > 0.8
    assert dead_revived < 0.2
    assert fvu_revived < 0.6 * fvu


@pytest.mark.parametrize("at", [(0.5, 0.25), (0.5, 0.5), (-0.1,), (0.5, 1.0), (float("nan"),)])
def test_events_out_of_order(at: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"resampling\.at must be shares of the steps, at least 0 and below 1, in asc"):
        make_trainer(replace(SETTINGS, resampling=Resampling(at)))


def test_an_event_at_the_first_step() -> None:
    trainer = make_trainer(replace(SETTINGS, resampling=Resampling((0.0,), ROWS), dead_after_rows=1))
    assert trainer.step(*batch(0)).resampled > 0
