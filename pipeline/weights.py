"""The weight files of a model's folder: which there are, whether they are whole, and a fingerprint of what they hold.

Reads headers and samples, never the whole: 16 GB are fingerprinted in about a second once they are in memory.
"""

import json
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.errors import InputError

SAMPLED_BLOCKS = 256
BLOCK_BYTES = 64 * 1024
WHOLE_TENSOR_BYTES = 64 * 1024
"""Tensors up to this size (norms, biases, routers of small models) are hashed whole."""
END_BYTES = 4 * 1024


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, sorted. Raises InputError if there are none, or some that the index names are not
    there."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not files:
        raise InputError(f"model.id: no weights (*.safetensors) in {folder}")
    index = folder / "model.safetensors.index.json"
    # transformers takes model.safetensors first, and then has no use for the index
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"model.id: {index} is not an index of weight files: {error}") from None
        missing = [name for name in named if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"model.id: the weights of {folder} cannot be loaded: {len(missing)} of the {len(named)} files that "
                f"{index.name} names are missing, the first is {missing[0]}; download the rest of the checkpoint"
            )
    return files


def hash_weights(folder: Path, sha: Any) -> None:
    """Hash of every weight file its name and size, and
    - of safetensors: the header (names, shapes, types, places), every tensor of up to 64 KiB whole, and the first and
      the last 4 KiB of every larger one;
    - of any file: 256 evenly spaced blocks of 64 KiB (16 MiB; smaller files are hashed whole by them).

    What it misses: a change that is confined to the inside of tensors larger than 64 KiB and lies between the sampled
    blocks, e.g. single entries of one large matrix edited by hand. Training, merging, quantising, abliterating or
    swapping a tensor changes much more than that. Raises InputError for files that are cut.
    """
    for file in weight_files(folder):
        size = file.stat().st_size
        sha.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            if file.suffix == ".safetensors":
                _hash_tensors(file, size, handle, sha)
            for block in range(SAMPLED_BLOCKS):
                _hash_range(handle, size * block // SAMPLED_BLOCKS, BLOCK_BYTES, sha)


def _hash_tensors(file: Path, size: int, handle: BinaryIO, sha: Any) -> None:
    length = int.from_bytes(handle.read(8), "little")
    header = handle.read(length) if length < size else b""
    try:
        tensors = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = 8 + length + max((stop for _, stop in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"model.id: the weights of {file.parent} cannot be loaded: {file.name} has no safetensors header; "
            "download it again"
        ) from None
    if end != size:
        raise InputError(
            f"model.id: the weights of {file.parent} cannot be loaded: {file.name} is damaged: its header describes "
            f"{end:,} bytes and it has {size:,}; download it again"
        )
    sha.update(header)
    for start, stop in sorted(tensors.values()):
        if stop - start <= WHOLE_TENSOR_BYTES:
            _hash_range(handle, 8 + length + start, stop - start, sha)
        else:
            _hash_range(handle, 8 + length + start, END_BYTES, sha)
            _hash_range(handle, 8 + length + stop - END_BYTES, END_BYTES, sha)


def _hash_range(handle: BinaryIO, start: int, length: int, sha: Any) -> None:
    handle.seek(start)
    sha.update(handle.read(length))
