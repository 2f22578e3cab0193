"""Directions that somebody made: .npy and .safetensors files, checked before anything is made of them."""

import hashlib
import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.torch import load

from pipeline.errors import InputError
from storage.backends.place import open_place

Vectors = npt.NDArray[np.float64]
ANY_SITE = ""
"""The key of vectors whose file says no site."""


def read_vectors(file: str) -> dict[str, Vectors]:
    """Read a file as float64 [k, d] by site; of .npy, which has no names, under ANY_SITE. Raises InputError.

    Every vector is finite, also in float32, and none is zero, as a zero has no direction.
    """
    folder, slash, name = file.rpartition("/")
    try:
        content = (open_place(folder + slash or ".") / name).read()
    except FileNotFoundError:
        raise InputError(f"no file {file}: anchors are made of vectors in it") from None
    except OSError as error:
        raise InputError(f"the vectors in {file} cannot be read: {error.strerror or error}") from None
    try:
        if file.endswith(".npy"):
            found = {ANY_SITE: np.load(io.BytesIO(content), allow_pickle=False)}
        else:
            found = {site: tensor.double().numpy() for site, tensor in load(content).items()}
    except (ValueError, EOFError, SafetensorError, TypeError, RuntimeError) as error:
        raise InputError(f"the vectors in {file} cannot be read: {error}") from None
    if not found:
        raise InputError(f"{file} has no tensors: expected one for a site, named as the site")
    return {site: _checked(f"{file}{f': {site}' if site else ''}", vectors) for site, vectors in found.items()}


def _checked(where: str, vectors: npt.NDArray[np.generic]) -> Vectors:
    if not (np.issubdtype(vectors.dtype, np.floating) or np.issubdtype(vectors.dtype, np.integer)):
        raise InputError(f"{where} holds {vectors.dtype}: vectors are real numbers")
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise InputError(f"{where} has shape {list(vectors.shape)}: expected [vectors, d_model], a vector a row")
    wide = np.ascontiguousarray(vectors, dtype=np.float64)
    largest = np.abs(wide).max(axis=1)
    if len(wrong := np.flatnonzero(~(largest <= np.finfo(np.float32).max))):
        raise InputError(f"{where} holds nan, infinity or numbers too large for float32, first in row {wrong[0]}")
    if len(wrong := np.flatnonzero(~wide.astype(np.float32).any(axis=1))):
        raise InputError(f"{where}: row {wrong[0]} is zero, which is no direction")
    return wide


def digest_of(vectors: Mapping[str, Vectors]) -> str:
    """The sha256 of vectors by site: their numbers, shapes and sites, and not how a file holds them."""
    found = hashlib.sha256()
    for site in sorted(vectors):
        found.update(f"{site} {vectors[site].shape}\n".encode())
        found.update(vectors[site].astype("<f8").tobytes())
    return found.hexdigest()
