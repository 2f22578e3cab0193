"""One training step beside the peers' and the encoder's product: python -m benchmarks.step

A TopK autoencoder, batch 4096, d = 512, F = 16384, k = 32, float32 parameters, two threads. In one run, in turn: our
step (`DictionaryTrainer.step`), one pass of the training loop of sparsify, dictionary_learning and SAELens, each as it
comes and with the options that suit it here, and the encoder's product alone in the faster type of the machine, with
both factors in it already.

Then our variants: BatchTopK, a transcoder, a crosscoder of three sites, each per unit of encoder and decoder
arithmetic (d_in + d_out, in units of the autoencoder's). Peers run in processes of their own that wait while others
are timed. Figures are medians over rounds of a round's median; ratios are medians of the rounds' ratios.

`--curve` compares losses instead of times: see benchmarks.dictionary_steps.curve.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.dictionary_steps.curve import compare_curves
from benchmarks.dictionary_steps.sizes import Size, autoencoder, make_trainer
from benchmarks.dictionary_steps.synthetic_rows import sparse_rows
from benchmarks.peer_libraries.environments import DICTIONARIES, PeerProcess, environment_python, peer_process
from pipeline.precision import TYPES, faster_type
from pipeline.sdl.dictionary.activations import BatchTopK, Products, TopK
from pipeline.sdl.dictionary.selection import select_top_k
from pipeline.sdl.dictionary.shape import DictionaryConfig
from pipeline.sdl.train.losses import reconstruction_loss
from pipeline.sdl.train.trainer import DictionaryTrainer
from workers.machine import machine

BATCHES = 4
"""Batches that are given again and again."""
OURS = "ours"
PRODUCT = f"encoder's product alone, {faster_type()}"
CASTS = "the same, with casting both factors"
VARIANTS = {
    "ours, BatchTopK": 1.0,
    "ours, transcoder": 1.0,
    "ours, crosscoder of 3 sites, BatchTopK": 3.0,
}
"""Name -> d_in + d_out, in units of the autoencoder's."""
OF_SPARSE, OF_DENSE = (3.3, 10.0) if faster_type() == "bfloat16" else (3.0, 8.0)
"""How many steps of a peer ours is asked to be worth: of one with a sparse decoder, of a dense one."""
PEERS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "sparsify, its defaults (signum)": ("sparsify", {}, OF_SPARSE),
    "sparsify, Adam": ("sparsify", {"optimizer": "adam"}, OF_SPARSE),
    "dictionary_learning": ("dictionary_learning", {}, OF_DENSE),
    "SAELens, its defaults": ("saelens", {}, OF_DENSE),
    "SAELens, sparse activations, no rescaling": (
        "saelens",
        {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False},  # together with it, backward fails
        None,
    ),
}
"""Name -> library, its options, and how many of its steps ours is asked to be worth."""
if faster_type() == "bfloat16":  # where it is emulated, one such step takes minutes
    PEERS["SAELens, autocast to bfloat16"] = ("saelens", {"autocast": True}, None)
PRODUCT_LIMIT, VARIANT_LIMIT = 3.3, 1.3


Steps = Callable[[int], list[float]]
"""Takes a number of steps and returns the seconds of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a sixteenth of the arithmetic, to check the benchmark")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--curve", action="store_true", help="compare loss curves instead of times")
    parser.add_argument("--seeds", type=int, default=3, help="with --curve: first weights of so many seeds")
    parser.add_argument("--curve-steps", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.curve:
        result = compare_curves(arguments.curve_steps, arguments.seeds)
    else:
        size = Size(1024, 256, 8192, 32) if arguments.small else Size()
        peers = {} if arguments.no_peers else PEERS
        result = compare_times(size, peers, arguments.rounds, arguments.steps, arguments.threads)
    print(
        json.dumps(
            {
                "machine": machine(),
                "faster_type": faster_type(),
                "packages": DICTIONARIES,
                "threads": arguments.threads,
                **result,
            }
        )
    )


def compare_times(size: Size, peers: dict[str, Any], rounds: int, steps: int, threads: int) -> dict[str, Any]:
    batches = sparse_rows(BATCHES * size.batch_rows, size.d, 0).view(BATCHES, size.batch_rows, size.d)
    taken: dict[str, list[float]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        np.save(folder / "rows.npy", batches.numpy())
        trainer = make_trainer(autoencoder(size))
        all_steps: dict[str, Steps] = {
            OURS: our_steps(trainer, batches),
            PRODUCT: product_steps(batches, trainer.dictionary.W_enc.detach(), cast=False),
            CASTS: product_steps(batches, trainer.dictionary.W_enc.detach(), cast=True),
        }
        python = environment_python("dictionaries", DICTIONARIES) if peers else Path()
        for name, (library, options, _) in peers.items():
            settings = {"library": library, "options": options, "rows": str(folder / "rows.npy"), "threads": threads}
            peer = stack.enter_context(peer_process(python, "peer_steps.py", {**settings, **vars(size)}, threads))
            all_steps[name] = peer_steps(peer)
        for name in VARIANTS:
            all_steps[name] = variant_steps(name, size, batches)
        for take in all_steps.values():
            take(2)  # the first allocates, and sets the peers' biases
        for number in range(rounds):
            for name, take in all_steps.items():
                taken.setdefault(name, []).append(statistics.median(take(steps)))
            print(f"round {number}: " + ", ".join(f"{n} {1000 * s[-1]:.0f} ms" for n, s in taken.items()), flush=True)
        pieces = pieces_of(trainer, batches)
    print(table(taken, peers))
    print(f"\nPieces of ours, alone: {', '.join(f'{name} {1000 * s:.1f} ms' for name, s in pieces.items())}")
    return {
        "size": vars(size),
        "seconds": {name: statistics.median(s) for name, s in taken.items()},
        "ratios": {name: ratio(s, taken[OURS]) for name, s in taken.items()},
        "pieces": pieces,
    }


def ratio(seconds: list[float], to: list[float]) -> float:
    """The median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(seconds, to, strict=True))


def table(taken: dict[str, list[float]], peers: dict[str, Any]) -> str:
    lines = ["| | ms a step | of ours | asked | |", "|---|---|---|---|---|"]
    for name, seconds in taken.items():
        of_ours, asked, held = ratio(seconds, taken[OURS]), "", None
        if name == PRODUCT:
            asked = f"ours at most {PRODUCT_LIMIT} of it: {1 / of_ours:.2f}"
            held = 1 / of_ours <= PRODUCT_LIMIT
        elif name in VARIANTS:
            of_unit = of_ours / VARIANTS[name]
            asked, held = f"at most {VARIANT_LIMIT} a unit: {of_unit:.2f}", of_unit <= VARIANT_LIMIT
        elif name in peers and (limit := peers[name][2]) is not None:
            asked, held = f"at least {limit}", of_ours >= limit
        verdict = "" if held is None else "holds" if held else "fails"
        lines.append(f"| {name} | {1000 * statistics.median(seconds):.1f} | {of_ours:.2f} | {asked} | {verdict} |")
    return "\n".join(lines)


# ---- what is timed


def peer_steps(peer: PeerProcess) -> Steps:
    def take(steps: int) -> list[float]:
        seconds: list[float] = peer.ask({"steps": steps})["seconds"]
        return seconds

    return take


def our_steps(trainer: DictionaryTrainer, x: Tensor, y: Tensor | None = None) -> Steps:
    pairs = cycle(zip(x, x if y is None else y, strict=True))

    def take(steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            rows, target = next(pairs)
            started = time.perf_counter()
            trainer.step(rows, rows if y is None else target)
            seconds.append(time.perf_counter() - started)
        return seconds

    return take


def variant_steps(name: str, size: Size, x: Tensor) -> Steps:
    if "crosscoder" in name:
        sites, widths = ("a", "b", "c"), (size.d,) * 3
        config = DictionaryConfig(sites, sites, widths, widths, size.latents, BatchTopK(size.k))
        return our_steps(make_trainer(config), torch.cat([x, x.roll(1, 2), -x], dim=2))
    if "transcoder" in name:
        config = DictionaryConfig(("x",), ("y",), (size.d,), (size.d,), size.latents, TopK(size.k))
        return our_steps(make_trainer(config), x, x.roll(1, 2).contiguous())
    return our_steps(make_trainer(autoencoder(size, BatchTopK(size.k))), x)


def product_steps(batches: Tensor, W_enc: Tensor, cast: bool) -> Steps:
    x, W, faster = batches[0], W_enc, TYPES[faster_type()]
    if not cast:
        x, W = x.to(faster), W.to(faster)

    def take(steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            x.to(faster) @ W.to(faster).T
            seconds.append(time.perf_counter() - started)
        return seconds

    return take


@torch.no_grad()
def pieces_of(trainer: DictionaryTrainer, batches: Tensor) -> dict[str, float]:
    """Median seconds of the parts of our step: what autograd and the accounts of dead latents cost is in none."""
    dictionary, seconds = trainer.dictionary, dict[str, list[float]]()

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = work()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        return found

    W_enc, b_enc, W_dec = dictionary.W_enc, dictionary.b_enc, dictionary.W_dec
    activation, faster = dictionary.config.activation, TYPES[faster_type()]
    assert isinstance(activation, TopK)
    for x in batches:
        timed("select", lambda: select_top_k(x, W_enc, b_enc, activation.k, faster))  # noqa: B023
        (code,) = dictionary.codes(x, Products())
        places, values = code.places, code.values
        assert places is not None
        timed("encode", lambda: places.encode(x, W_enc, b_enc))  # noqa: B023
        timed("decode", lambda: places.decode(values, W_dec))  # noqa: B023
        with torch.enable_grad():
            codes = dictionary.codes(x, Products())
            (y,) = dictionary.reconstructions(codes, x)
            loss = reconstruction_loss(x - y, float(x.shape[1]))
        timed("backward", loss.backward)
        timed("update", trainer._update)
    return {name: statistics.median(of_piece) for name, of_piece in seconds.items()}


if __name__ == "__main__":
    main()
