"""Where a model's weights are while it runs, and whether the device can compute in the dtype that is asked for.

A model that fits its device is simply there. A larger one is placed by accelerate: over the worker's GPUs first, then
in CPU memory, then on disk, from where each layer is brought to the device that computes when its turn comes. Nothing
is computed elsewhere or otherwise because of that, so the activations are the same.
"""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import InputError

GPU_SHARE = 0.8
"""The share of a GPU's free memory that offloading fills with weights; the rest is for activations."""


@dataclass(frozen=True)
class Offload:
    """Leave to CPU memory, then to disk, what the devices have no room for."""

    folder: str
    """Where weights lie that no memory has room for. Only those that transformers must rewrite are written there
    (stacked experts, other formats than safetensors); the others are read from the checkpoint itself."""
    cpu_memory: int | None = None
    """Most bytes of weights in CPU memory; None: what is free."""


@dataclass(frozen=True)
class Placement:
    """Where a model runs. `device`: cpu, cuda, or auto for all GPUs that this process sees."""

    device: str = "cpu"
    offload: Offload | None = None

    @property
    def input_device(self) -> str:
        """Where tokens are to be."""
        return "cpu" if self.device == "cpu" else "cuda"

    @property
    def is_whole(self) -> bool:
        """Return whether all weights stay on one device. Layers whose weights come and go cannot be compiled."""
        return self.device != "auto" and self.offload is None

    def max_memory(self) -> dict[int | str, int] | None:
        """What accelerate may fill, in bytes by device; None: what it finds free."""
        if self.offload is None:
            return None
        limits: dict[int | str, int] = {}
        if self.device != "cpu":
            gpus = range(torch.cuda.device_count() if self.device == "auto" else 1)
            limits |= {gpu: int(GPU_SHARE * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}
        from accelerate.utils import get_max_memory  # not at the top: it costs a second, and most models fit

        limits["cpu"] = self.offload.cpu_memory or int(0.9 * get_max_memory()["cpu"])
        return limits

    def load(self, loader: Any, source: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
        """`loader.from_pretrained(source)` with the weights in their places, and what it tells of the loading."""
        if self.offload is None:
            if self.device != "cpu":
                options["device_map"] = "auto" if self.device == "auto" else {"": self.device}
            model, loaded = loader.from_pretrained(source, output_loading_info=True, **options)
            return model, loaded
        parent = Path(self.offload.folder)
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="weights-", dir=parent)  # workers of one machine share the parent
        try:
            model, loaded = loader.from_pretrained(
                source,
                output_loading_info=True,
                device_map="auto",
                max_memory=self.max_memory(),
                offload_folder=folder,
                **options,
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        if self.device != "cpu" and not {str(place) for place in model.hf_device_map.values()} - {"cpu", "disk"}:
            raise InputError(f"harvest.offload: the GPU has no room for a single layer of {source}; use one with more")
        for module in model.modules():  # accelerate's hooks, each with its view of one collection of weights
            weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
            if weights is not None:
                weights.dataset = _RewrittenInMemory(weights.dataset, folder)
        return model, loaded


class _RewrittenInMemory(Mapping[str, Tensor]):
    """Offloaded weights, of which those that were rewritten are copied out of their mapped files.

    A matrix library's last bits depend on where in memory the weights begin. Weights of the checkpoint are mapped from
    the same place of the same file, offloaded or not; stacked experts are in memory of their own in a whole model.
    """

    def __init__(self, weights: Any, folder: str):
        self.weights = weights
        self.folder = Path(folder)

    def __getitem__(self, name: str) -> Tensor:
        weight: Tensor = self.weights[name]
        file = self.weights.index.get(name, {}).get("safetensors_file")  # none for what is in CPU memory
        rewritten = file is not None and Path(file).parent == self.folder
        return weight.clone() if rewritten and weight.device.type == "cpu" else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@torch.inference_mode()
def check_dtype(dtype: torch.dtype, device: str) -> None:
    """Raise InputError unless `device` computes in `dtype`, by trying the operations of a decoder on a few numbers."""
    name = str(dtype).removeprefix("torch.")
    advice = "set model.dtype to one that it has, for instance float32"
    if device != "cpu" and not torch.cuda.is_available():
        raise InputError(
            f"this worker runs on a GPU and torch finds none (torch {torch.__version__}); check the driver"
        )
    if device != "cpu" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        gpu = torch.cuda.get_device_name()
        raise InputError(f"model.dtype: {gpu} has no bfloat16, only a slow emulation of it; {advice}, or float16")
    try:
        x = torch.ones(1, 1, 8, 8, device=device).to(dtype)
        heads = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        normed = heads * torch.rsqrt(heads.float().square().mean(-1, keepdim=True)).to(dtype)
        functional.silu(functional.linear(normed, x[0, 0])).sum().item()
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model.dtype: {device} cannot compute in {name} ({reason}); {advice}") from None
