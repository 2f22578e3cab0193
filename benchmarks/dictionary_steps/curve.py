"""A comparison of what the fast step learns with what the plain one learns: `python -m benchmarks.step --curve`.

The sparse step (encoder's product and selection in bfloat16), the same with the selection in float32, and the dense
float32 formula (`Products(sparse=False)`) take the same steps on the same rows from the same first weights, for several
seeds of those. The relative difference of their losses is to be small beside what the seed alone changes.
"""

from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from benchmarks.dictionary_steps.sizes import Size, autoencoder, make_trainer
from benchmarks.dictionary_steps.synthetic_rows import sparse_rows
from pipeline.sdl.dictionary.activations import Products

SIZE = Size(batch_rows=1024, d=128, latents=4096, k=32)
WAYS = {
    "sparse, selected in bfloat16": Products(selection="bfloat16"),
    "sparse, selected in float32": Products(selection="float32"),
    "dense, float32": Products(sparse=False),
}
REFERENCE = "dense, float32"
Curves = dict[str, Tensor]
"""Way -> losses float64 [seeds, steps]."""


def compare_curves(steps: int, seeds: int) -> dict[str, Any]:
    curves = train(steps, seeds)
    reference = curves[REFERENCE]
    figures = {name: difference(losses, reference) for name, losses in curves.items() if name != REFERENCE}
    pairs = list(combinations(range(seeds), 2))
    first, second = (reference[[pair[i] for pair in pairs]] for i in (0, 1))
    figures["between seeds, dense"] = difference(first, second)
    print("| losses compared | mean | largest | mean, signed | last loss, mean of seeds |\n|---|---|---|---|---|")
    for name, found in figures.items():
        last = f"{curves[name][:, -1].mean():.5f}" if name in curves else f"{reference[:, -1].mean():.5f}"
        print(f"| {name} | {found['mean']:.2e} | {found['largest']:.2e} | {found['signed']:+.1e} | {last} |")
    within = all(figures[name]["mean"] <= figures["between seeds, dense"]["mean"] for name in curves if name in figures)
    print(f"\nThe mean difference from the dense step is {'' if within else 'NOT '}within that between seeds.")
    return {"size": vars(SIZE), "steps": steps, "seeds": seeds, "relative_differences": figures, "within": within}


def train(steps: int, seeds: int) -> Curves:
    curves = {name: torch.empty(seeds, steps, dtype=torch.float64) for name in WAYS}
    for seed in range(seeds):
        trainers = {
            name: make_trainer(autoencoder(SIZE), products, seed, steps=steps) for name, products in WAYS.items()
        }
        for step in range(steps):
            x = sparse_rows(SIZE.batch_rows, SIZE.d, step)  # the same for every seed, made again: memory stays small
            for name, trainer in trainers.items():
                curves[name][seed, step] = trainer.step(x, x).loss
        print(f"seed {seed}: " + ", ".join(f"{n} {c[seed, -1]:.5f}" for n, c in curves.items()), flush=True)
    return curves


def difference(losses: Tensor, reference: Tensor) -> dict[str, float]:
    """Return the mean, largest and signed mean of (loss - reference) / reference; both are [seeds, steps]."""
    relative = (losses - reference) / reference
    return {
        "mean": relative.abs().mean().item(),
        "largest": relative.abs().max().item(),
        "signed": relative.mean().item(),
    }


if __name__ == "__main__":
    raise SystemExit("python -m benchmarks.step --curve")
