"""Which type this machine multiplies matrices in faster: float32 or bfloat16.

A processor without instructions for bfloat16 emulates it, 5 to 200 times slower than float32, where one that has them
is two to four times as fast in it. So whatever may be computed in either type asks here, once a process, and what was
answered is recorded where it can change the last bits: in a training run, in a cell of the bench, in a harvest. What is
recorded decides when a run goes on. What a user sets (`model.dtype`, `precision`) is done as it is said.
"""

import os
import platform
import time
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

import torch

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AUTO = "auto"
"""In a setting: the faster type of the machine that computes."""
FASTER = 1.2
"""Where a measurement decides, bfloat16 must be 1.2 times as fast: less is within the noise of a busy machine."""
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables that keep the matrix library from instructions that the processor has."""
_TRIAL = (128, 256, 512)
"""Rows, width and latents of a trial: a tenth of a second where bfloat16 is emulated at its slowest."""


def faster_type(device: str = "cpu") -> Literal["float32", "bfloat16"]:
    """Return "float32" or "bfloat16", in whichever a `device` ("cpu", "cuda", ...) multiplies matrices faster.

    Decided from what the device is where that tells, else by a short measurement; the same throughout a process.
    """
    return _faster_type(torch.device(device).type)


@cache
def _faster_type(kind: str) -> Literal["float32", "bfloat16"]:
    """Decide for a kind of device, once: a second measurement might come out otherwise."""
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    known = _known_of_processor() if kind == "cpu" else None
    is_faster = _measured_ratio(kind) >= FASTER if known is None else known
    return "bfloat16" if is_faster else "float32"


def _known_of_processor() -> bool | None:
    """Return whether the processor is faster in bfloat16, from its instructions; None where they do not tell."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # the matrix library itself
    if asked is None:
        return None
    if not asked():
        return False
    if any(name in os.environ for name in _LIMITS):
        return None
    if _has("avx512_bf16") or _has("amx_tile"):
        return True
    # AVX-512 alone computes bfloat16 through float32. Other instructions (Arm's, AVX10, AVX-NE-CONVERT) are of use
    # only where torch was built for them.
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return False if x86 and not _has("avx_ne_convert") else None


def _has(instructions: str) -> bool:
    """Return whether torch finds these instructions; no where it is too old to look for them (torch 2.11 and
    before)."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    asked = getattr(torch.cpu, f"_is_{instructions}_supported", lambda: False)
    return bool(capabilities.get(instructions, False) or asked())


def _measured_ratio(device: str) -> float:
    """How many times as fast products in bfloat16 are, the worse of a plain and a transposed right factor."""
    rows, width, latents = _TRIAL
    ratios = []
    for transposed in (False, True):
        seconds = {
            dtype: _seconds(rows, width, latents, dtype, device, transposed=transposed) for dtype in TYPES.values()
        }
        ratios.append(seconds[torch.float32] / seconds[torch.bfloat16])
    return min(ratios)


def slowdown(shapes: Iterable[tuple[int, int]], dtype: str) -> float:
    """Return how many times as long linear maps of these shapes (in, out) take on this CPU in `dtype` as in float32.

    Timed with made-up weights, for 256 rows and at most 2,048 outputs: a second for the layer of an 8B model.
    """
    wanted: torch.dtype = getattr(torch, dtype)
    total = {torch.float32: 0.0, wanted: 0.0}
    for (width_in, width_out), times in Counter(shapes).items():
        timed = min(width_out, 2048)
        for kind in total:
            total[kind] += times * width_out / timed * _seconds(256, width_in, timed, kind, "cpu", transposed=True)
    return total[wanted] / total[torch.float32]


def _seconds(rows: int, width: int, columns: int, dtype: torch.dtype, device: str, *, transposed: bool) -> float:
    """Seconds of [rows, width] @ [width, columns], the fastest of up to three after a first one; fewer where slow."""
    left = torch.full((rows, width), 0.01, dtype=dtype, device=device)
    shape = (columns, width) if transposed else (width, columns)
    right = torch.full(shape, 0.01, dtype=dtype, device=device)
    right = right.T if transposed else right
    taken: list[float] = []
    for _ in range(4):
        started = time.perf_counter()
        (left @ right)[0, 0].item()  # which waits for a device
        taken.append(time.perf_counter() - started)
        if len(taken) > 1 and sum(taken) > 0.4:
            break
    return min(taken[1:])
