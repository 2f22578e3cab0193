"""The weight files of a model's folder: which there are, whether they are whole, and a fingerprint of what they hold.

Reads headers and samples, never the whole: 16 GB are fingerprinted in about a second once they are in memory.
What the headers say of the tensors: `pipeline.checkpoints.tensors_in_files`.
"""

import json
import re
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.checkpoints.downloads import stand_in
from pipeline.errors import InputError

SAMPLED_BLOCKS = 256
BLOCK_BYTES = 64 * 1024
WHOLE_TENSOR_BYTES = 64 * 1024
"""Tensors up to this size (norms, biases, routers of small models) are hashed whole."""
END_BYTES = 4 * 1024
PART_NAME = re.compile(r"(.+-)(\d+)-of-(\d+)(\.safetensors|\.bin)")


ENTRIES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers looks for in a folder, in its order: the weights, or an index of the files that they are in."""


OTHER_FORMATS = ("*.gguf", "*.pth", "*.pt", "*.bin", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.npz")
"""Patterns of other libraries' weights, and of the originals that repositories have beside those of transformers."""


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, sorted. Raises InputError if there are none, or not all that loading takes."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not files:
        other = next((file.name for kind in OTHER_FORMATS for file in sorted(folder.glob(kind))), None)
        also = "" if other is None else f"; {other} is of a format that is not read: download the safetensors instead"
        raise InputError(f"model.id: no weights (*.safetensors) in {folder}{also}")
    loaded_files(folder)
    return files


def loaded_files(folder: Path) -> list[Path]:
    """The files that a model is loaded from: a folder may have others. Raises InputError if some are missing."""
    entry = next((folder / name for name in ENTRIES if (folder / name).is_file()), None)
    if entry is None:
        raise InputError(
            f"model.id: the weights of {folder} cannot be loaded: it has neither model.safetensors nor "
            f"model.safetensors.index.json, which says what is in which of several files{_parts_missing(folder)}; "
            "download the rest of the checkpoint"
        )
    if entry.suffix != ".json":
        return [entry]
    try:
        index = json.loads(entry.read_text())
        named = sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        why = stand_in(entry) or f"is not an index of weight files: {error}"
        raise InputError(f"model.id: {entry} {why}") from None
    missing = [name for name in named if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"model.id: the weights of {folder} cannot be loaded: {len(missing)} of the {len(named)} files that "
            f"{entry.name} names are missing, the first is {missing[0]}; download the rest of the checkpoint"
        )
    if "metadata" not in index:
        raise InputError(
            f"model.id: {entry} has no `metadata`, without which transformers does not read it; add an empty one "
            '("metadata": {}), or download it again'
        )
    return [folder / name for name in named]


def _parts_missing(folder: Path) -> str:
    """What a folder without an index lacks besides, as the names of the files say that are there."""
    parts = [match for file in sorted(folder.iterdir()) if (match := PART_NAME.fullmatch(file.name))]
    if not parts:
        return ""
    stem, total, ending = parts[0][1], parts[0][3], parts[0][4]
    names = [f"{stem}{number:0{len(total)}}-of-{total}{ending}" for number in range(1, int(total) + 1)]
    missing = [name for name in names if not (folder / name).is_file()]
    return f", and {len(missing)} of {len(names)} files are missing, the first is {missing[0]}" if missing else ""


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
    header, tensors = read_header(file, size, handle)
    first = 8 + len(header)
    sha.update(header)
    for start, stop in sorted(entry["data_offsets"] for entry in tensors.values()):
        if stop - start <= WHOLE_TENSOR_BYTES:
            _hash_range(handle, first + start, stop - start, sha)
        else:
            _hash_range(handle, first + start, END_BYTES, sha)
            _hash_range(handle, first + stop - END_BYTES, END_BYTES, sha)


def read_header(file: Path, size: int, handle: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    """The header of a safetensors file, and what it says of each tensor. Raises InputError for a file that is cut."""
    length = int.from_bytes(handle.read(8), "little")
    header = handle.read(length) if length < size else b""
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        why = stand_in(file) or "has no safetensors header; download it again"
        raise InputError(f"model.id: the weights of {file.parent} cannot be loaded: {file.name} {why}") from None
    if end != size:
        raise InputError(
            f"model.id: the weights of {file.parent} cannot be loaded: {file.name} is damaged: its header describes "
            f"{end:,} bytes and it has {size:,}; download it again"
        )
    return header, tensors


def _hash_range(handle: BinaryIO, start: int, length: int, sha: Any) -> None:
    handle.seek(start)
    sha.update(handle.read(length))
