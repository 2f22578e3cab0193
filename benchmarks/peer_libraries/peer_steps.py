"""Training loops of other libraries, in their own environment: benchmarks.step starts this file there.

One JSON line in gives the settings; each further line, {"steps": n}, lets the loop take n steps and is answered with
{"seconds": [n]}. The loop is the library's own, called once: it asks for its next batch, and what passes until it asks
again is one step. It needs the libraries alone, none of our packages.
"""

import json
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ENDLESS = 10**9


def main() -> None:
    warnings.simplefilter("ignore")
    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    loop = {"sparsify": sparsify, "dictionary_learning": dictionary_learning, "saelens": saelens}
    loop[settings["library"]](settings, timed_batches(torch.from_numpy(np.load(settings["rows"]))))


def timed_batches(batches: Tensor) -> Iterator[Tensor]:
    """The batches [n, rows, d] one after another, again and again, timed as they are asked for."""
    number = 0
    for line in sys.stdin:
        seconds = []
        for _ in range(json.loads(line)["steps"]):
            started = time.perf_counter()
            yield batches[number % len(batches)]
            seconds.append(time.perf_counter() - started)
            number += 1
        print(json.dumps({"seconds": seconds}), flush=True)
    sys.exit()


def sparsify(settings: dict[str, Any], batches: Iterator[Tensor]) -> None:
    """Trainer.fit with its own defaults, on a model whose only layer gives our rows."""
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    width, rows = settings["d"], settings["batch_rows"]

    class Rows(nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()
            self.current = torch.zeros(rows, width)
            self.dummy_inputs = {"input_ids": torch.zeros(1, rows, dtype=torch.int64)}

        @property
        def base_model(self) -> "Rows":
            return self

        def forward(self, input_ids: Tensor) -> Tensor:
            rows: Tensor = self.layer(self.current[None])
            return rows

    class Batches:
        """As a dataset of sequences as long as our batches; drawing one gives the model its rows."""

        def __len__(self) -> int:
            return ENDLESS

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            model.current = next(batches)
            return {"input_ids": torch.zeros(rows, dtype=torch.int64)}

    model: Any = Rows()
    dictionary = SparseCoderConfig(num_latents=settings["latents"], k=settings["k"])
    config = TrainConfig(
        dictionary, batch_size=1, hookpoints=["layer"], save_every=ENDLESS, log_to_wandb=False, **settings["options"]
    )
    Trainer(config, Batches(), model).fit()


def dictionary_learning(settings: dict[str, Any], batches: Iterator[Tensor]) -> None:
    """trainSAE with TopKTrainer's own defaults."""
    from dictionary_learning.trainers import TopKTrainer
    from dictionary_learning.training import trainSAE

    trainer = {
        "trainer": TopKTrainer,
        "steps": ENDLESS,
        "activation_dim": settings["d"],
        "dict_size": settings["latents"],
        "k": settings["k"],
        "layer": 0,
        "lm_name": "none",
        "seed": 0,
        "device": "cpu",
        **settings["options"],
    }
    trainSAE(batches, [trainer], ENDLESS, device="cpu")


def saelens(settings: dict[str, Any], batches: Iterator[Tensor]) -> None:
    """SAETrainer.fit with TopKTrainingSAEConfig's own defaults."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    options = dict(settings["options"])
    config = SAETrainerConfig(
        total_training_samples=ENDLESS * settings["batch_rows"],
        train_batch_size_samples=settings["batch_rows"],
        lr_end=3e-5,  # a tenth of the rate, which its runner fills in; a constant schedule does not use it
        autocast=options.pop("autocast", False),
    )
    dictionary = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=settings["d"], d_sae=settings["latents"], k=settings["k"], **options)
    )
    SAETrainer(config, dictionary, batches).fit()


if __name__ == "__main__":
    main()
