"""Dictionaries trained by other libraries, in their own environment: benchmarks.frontier starts this file there.

One JSON line in gives the settings of the run; each further line is a cell, trained with the library's own trainer on
the same batches in the same order, then used as its users would: the reconstruction of the held-out rows goes into a
file, in the answer are each latent's firings, the settings and the seconds. None of our packages is needed.

Rows come normalised, E||x||^2 = d, mean zero, which is what SAELens' expected_average_only_in aims at.
dictionary_learning is given them divided by sqrt(d), as its own normalize_activations does.
"""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

READ_ROWS = 8192
DEAD_SHARE = 50
"""Latents that were silent for a fiftieth of the run count as dead, as with ours: what the libraries take by themselves
(1,000 steps, 10 M rows) is longer than the run, and would leave out their auxiliary losses."""
Encode = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rows -> code, reconstruction."""


def main() -> None:
    warnings.simplefilter("ignore")
    run = json.loads(sys.stdin.readline())
    torch.set_num_threads(run["threads"])
    rows = np.load(run["train"], mmap_mode="r")
    held_out = np.load(run["held_out"], mmap_mode="r")[run["measured_from"] :]
    train = {"saelens": train_saelens, "dictionary_learning": train_dictionary_learning}[run["library"]]
    for line in sys.stdin:
        cell = json.loads(line)
        torch.manual_seed(run["seed"])
        started = time.perf_counter()
        encode, used = train(run, cell, lambda: batches(rows, run))
        seconds = time.perf_counter() - started
        firings = measure(encode, held_out, run["reconstruction"])
        print(json.dumps({"settings": used, "seconds": seconds, "firings": firings}), flush=True)


def batches(rows: Any, run: dict[str, Any]) -> Iterator[Tensor]:
    """The batches of the run, float32 [batch_rows, d]: whole ones, one after another, again from the first."""
    size = run["batch_rows"]
    whole = len(rows) // size
    for step in range(run["steps"]):
        first = step % whole * size
        yield torch.from_numpy(np.array(rows[first : first + size]))


@torch.no_grad()
def measure(encode: Encode, held_out: Any, path: str) -> list[int]:
    found, firings = [], torch.zeros(0)
    for first in range(0, len(held_out), READ_ROWS):
        code, y = encode(torch.from_numpy(np.array(held_out[first : first + READ_ROWS])))
        fired = (code != 0).sum(0)
        firings = fired if first == 0 else firings + fired
        found.append(y.numpy())
    np.save(path, np.concatenate(found))
    return firings.tolist()


def train_saelens(
    run: dict[str, Any], cell: dict[str, Any], rows: Callable[[], Iterator[Tensor]]
) -> tuple[Encode, dict[str, Any]]:
    """SAETrainer.fit, saved for inference and loaded again; shares of its tutorial: the penalty rises over the first
    5 % of the steps, the rate falls to zero over the last 20 %. Its other defaults."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    steps, settings = run["steps"], dict(cell["settings"])
    rate = cell["rate"] or SAETrainerConfig.lr
    if "l1_coefficient" in settings:
        settings["l1_warm_up_steps"] = steps // 20
    if "jumprelu_sparsity_loss_mode" in settings:
        settings["l0_warm_up_steps"] = steps // 20
    if cell["kind"] == "MatryoshkaBatchTopK":
        settings["matryoshka_widths"] = [*run["prefixes"], run["latents"]]
    kind = getattr(sae_lens, f"{cell['kind']}TrainingSAE")
    config = getattr(sae_lens, f"{cell['kind']}TrainingSAEConfig")(d_in=run["d"], d_sae=run["latents"], **settings)
    dictionary = kind(config)
    training = SAETrainerConfig(
        total_training_samples=steps * run["batch_rows"],
        train_batch_size_samples=run["batch_rows"],
        lr=rate,
        lr_end=rate / 10,
        lr_decay_steps=steps // 5,
        dead_feature_window=max(1, steps // DEAD_SHARE),
    )
    SAETrainer(training, dictionary, rows()).fit()
    with tempfile.TemporaryDirectory() as folder:
        dictionary.save_inference_model(folder)
        finished = sae_lens.SAE.load_from_disk(folder)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        code = finished.encode(x)
        return code, finished.decode(code)

    return encode, {"lr": rate, "lr_decay_steps": steps // 5, **settings}


def train_dictionary_learning(
    run: dict[str, Any], cell: dict[str, Any], rows: Callable[[], Iterator[Tensor]]
) -> tuple[Encode, dict[str, Any]]:
    """The trainer's update for each batch, as trainSAE does. Its warm-ups are of runs of 10^5 steps (1000 and 2000 of
    them): here 5 % of the steps each; the rate falls over the last 20 %."""
    from dictionary_learning import trainers
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    steps, settings = run["steps"], dict(cell["settings"])
    if cell["rate"] is not None:
        settings["lr"] = cell["rate"]
    if cell["kind"] in ("Standard", "JumpRelu", "GatedSAE"):
        settings["sparsity_warmup_steps"] = steps // 20
    else:
        settings["threshold_start_step"] = min(1000, steps // 2)
    if cell["kind"] == "MatryoshkaBatchTopK":
        bounds = [0, *run["prefixes"], run["latents"]]
        settings["group_fractions"] = [(b - a) / run["latents"] for a, b in pairwise(bounds)]
        kind = MatryoshkaBatchTopKTrainer
    else:
        kind = getattr(trainers, f"{cell['kind']}Trainer")
    settings |= {"warmup_steps": steps // 20, "decay_start": steps * 4 // 5}
    trainer = kind(
        steps=steps,
        activation_dim=run["d"],
        dict_size=run["latents"],
        layer=0,
        lm_name="none",
        seed=run["seed"],
        device="cpu",
        **settings,
    )
    if hasattr(trainer, "dead_feature_threshold"):
        trainer.dead_feature_threshold = max(1, steps * run["batch_rows"] // DEAD_SHARE)
    norm = run["d"] ** 0.5
    for step, x in enumerate(rows()):
        trainer.update(step, x / norm)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        code = trainer.ae.encode(x / norm)
        return code, trainer.ae.decode(code) * norm

    return encode, {"lr": trainer.lr, **settings}


if __name__ == "__main__":
    main()
