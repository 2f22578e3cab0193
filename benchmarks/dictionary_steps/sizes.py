"""Sizes of a training step, and dictionaries of such sizes with their trainers."""

from dataclasses import dataclass

import torch

from pipeline.sdl.dictionary.activations import BatchTopK, Products, TopK
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.config import TrainingConfig, default_learning_rate
from pipeline.sdl.train.trainer import DictionaryTrainer


@dataclass(frozen=True)
class Size:
    batch_rows: int = 4096
    d: int = 512
    latents: int = 16384
    k: int = 32


def autoencoder(size: Size, activation: TopK | BatchTopK | None = None) -> DictionaryConfig:
    return DictionaryConfig(("x",), ("x",), (size.d,), (size.d,), size.latents, activation or TopK(size.k))


def make_trainer(
    config: DictionaryConfig, products: Products | None = None, seed: int = 0, steps: int = 10**9
) -> DictionaryTrainer:
    """A trainer with our defaults, on rows that are normalised already; a schedule only where `steps` is given."""
    training = TrainingConfig(
        steps=steps,
        batch_rows=4096,
        learning_rate=default_learning_rate(config.latents, steps),
        products=products or Products(),
        warmup_share=0.05 if steps < 10**9 else 0.0,
        seed=seed,
    )
    x_norm, y_norm = (Normalisation(torch.zeros(d), torch.ones(d)) for d in (config.d_in, config.d_out))
    return DictionaryTrainer(Dictionary(config), training, x_norm, y_norm)
