"""Training in small: anchored dictionaries of every variant whose latents die soon, so that every term takes part."""

import torch
from formulas import VARIANTS, randn
from torch import Tensor

from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.config import TrainingConfig
from pipeline.sdl.train.objective import Anchors, Objective
from pipeline.sdl.train.trainer import DictionaryTrainer, StepMetrics

ROWS, STEPS = 40, 10
SPARSE = {
    "topk": Objective(auxk=0.3, auxk_k=2),
    "batch_topk": Objective(auxk=0.3, auxk_k=2),
    "relu": Objective(l1=1.0),
    "jumprelu": Objective(l0=0.05, preactivation=0.1),
    "gated": Objective(l1=1.0),
}
SETTINGS = TrainingConfig(steps=STEPS, batch_rows=ROWS, learning_rate=3e-3, dead_after_rows=2 * ROWS, seed=3)


def make_trainer(
    settings: TrainingConfig = SETTINGS, config: DictionaryConfig = VARIANTS["transcoder"], *, plain: bool = False
) -> DictionaryTrainer:
    """Anchored, with latents that die soon, so that every term takes part. `plain`: no normalisation."""
    shift, scale = (0.0, 1.0) if plain else (0.2, 0.9)
    norms = [Normalisation(torch.full((d,), shift), torch.full((d,), scale)) for d in (config.d_in, config.d_out)]
    anchors = randn(2, config.d_in, seed=8), 5 * randn(2, config.d_out, seed=9)
    if config.is_autoencoder:
        norms[1], anchors = norms[0], (anchors[0], anchors[0])
    return DictionaryTrainer(Dictionary(config), settings, *norms, Anchors(*anchors))


def batch(step: int, config: DictionaryConfig = VARIANTS["transcoder"]) -> tuple[Tensor, Tensor]:
    """Rows of rank 3 and a function of them, so that most latents are silent and there is something to learn."""
    x = randn(ROWS, 3, seed=100 + step) @ randn(3, config.d_in, seed=50)
    return x, x if config.is_autoencoder else torch.tanh(x @ randn(config.d_in, config.d_out, seed=51))


def train(trainer: DictionaryTrainer, steps: range) -> list[StepMetrics]:
    return [trainer.step(*batch(step, trainer.dictionary.config)) for step in steps]
