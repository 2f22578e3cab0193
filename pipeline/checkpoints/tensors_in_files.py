"""The tensors of a checkpoint as its files describe them: names, shapes and types, without reading any weights.

safetensors files say so in a header. Files of torch.save hold a description in which the weights are only named (those
of torch 1.6 and later); older ones mix the two, and are looked at only where they are small.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipeline.checkpoints.downloads import stand_in
from pipeline.checkpoints.weights import loaded_files, read_header
from pipeline.errors import InputError

READ_WHOLE_BYTES = 64 * 2**20
"""Older files of torch.save up to this size are read."""
ZIP = b"PK"
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class TensorEntry:
    """What a file says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it."""


def tensor_entries(folder: Path) -> dict[str, TensorEntry] | None:
    """Name -> entry of every tensor that a model is loaded from; None where a file does not say without being read.

    Raises InputError for files that are cut, damaged, or something else than weights."""
    entries: dict[str, TensorEntry] = {}
    is_whole = True
    for file in loaded_files(folder):
        found = _in_safetensors(file) if file.suffix == ".safetensors" else _in_torch_file(file)
        is_whole &= found is not None
        entries |= found or {}
    return entries if is_whole else None


def _in_safetensors(file: Path) -> dict[str, TensorEntry]:
    with file.open("rb") as handle:
        _, tensors = read_header(file, file.stat().st_size, handle)
    try:
        with safe_open(file, framework="pt"):  # compares shapes, types and places, and reads no weights
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from None
    return {name: TensorEntry(file, tuple(entry["shape"]), entry["dtype"]) for name, entry in tensors.items()}


def _in_torch_file(file: Path) -> dict[str, TensorEntry] | None:
    with file.open("rb") as handle:
        is_zip = handle.read(len(ZIP)) == ZIP
    if not is_zip:
        if (why := stand_in(file)) is not None:
            raise InputError(f"model.id: the weights of {file.parent} cannot be loaded: {file.name} {why}")
        if file.stat().st_size > READ_WHOLE_BYTES:
            return None
    try:
        # Mapped, as some versions of torch read the weights even when these have no place to be.
        found: Any = torch.load(str(file), map_location="meta", weights_only=True, **({"mmap": True} if is_zip else {}))
    except pickle.UnpicklingError:
        raise _damaged(file, "torch.save did not write it, or it holds objects other than tensors") from None
    except Exception as error:  # noqa: BLE001 what is unpickled of a damaged file raises anything
        raise _damaged(file, error) from None
    if not isinstance(found, Mapping):
        raise InputError(
            f"model.id: the weights of {file.parent} cannot be loaded: {file.name} holds a {type(found).__name__}, and "
            "should hold tensors by their names (torch.save of a model's state_dict()); download it again"
        )
    return {
        str(name): TensorEntry(file, tuple(tensor.shape), TYPES.get(tensor.dtype, str(tensor.dtype)))
        for name, tensor in found.items()
        if isinstance(tensor, torch.Tensor)
    }


def _damaged(file: Path, error: BaseException | str) -> InputError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return InputError(
        f"model.id: the weights of {file.parent} cannot be loaded: {file.name} is damaged, or no file of weights "
        f"({said[:160]}); download it again"
    )
