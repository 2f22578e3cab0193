"""Copies between the host's memory and the card's: what moving rows costs at least."""

import statistics
from typing import Any

import torch

from benchmarks.gpu.plan import CopyCase
from benchmarks.gpu.rounds import in_turn, repeated


class NotHere(Exception):
    """This machine cannot do what was to be measured; the message is the reason."""


def measure_copy(case: CopyCase, device: torch.device, round_s: float) -> dict[str, Any]:
    """Return GB/s. Without a card ordinary memory is copied to ordinary memory, and pinned memory is not to be had."""
    if case.pinned and device.type != "cuda":
        raise NotHere("there is no card here, and so no pinned memory")
    size = case.mib * 2**20
    on_host = torch.ones(size, dtype=torch.uint8, pin_memory=case.pinned)
    on_card = torch.ones(size, dtype=torch.uint8, device=device)
    source, target = (on_host, on_card) if case.to_card else (on_card, on_host)
    target.copy_(source)
    seconds = in_turn({"copy": repeated(lambda: target.copy_(source, non_blocking=True), device)}, round_s)["copy"]
    return {"gb_per_s": size / statistics.median(seconds) / 1e9, "rounds": len(seconds)}
