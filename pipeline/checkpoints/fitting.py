"""Whether a checkpoint's tensors are those that its config asks for, by names and shapes, in words of our own.

transformers makes up what is missing or of another shape, with a warning that no one sees, or refuses it without saying
which tensor it is.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping

from pipeline.checkpoints.tensors_in_files import TensorEntry
from pipeline.errors import InputError

Mismatch = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A tensor's name in the model, the shape that was found, and the one that the config asks for."""
OWN_CONFIG = "download the checkpoint again, or give it the config.json that it was saved with"


def check_fit(
    model_id: str,
    missing: Collection[str],
    mismatched: Collection[Mismatch],
    entries: Mapping[str, TensorEntry] | None,
) -> None:
    """Raise InputError for tensors that are missing, or of other shapes. `entries`: what the files say, if known."""
    if mismatched:
        name, found, asked = min(mismatched)
        others = f" ({len(mismatched)} tensors do not fit, this is the first)" if len(mismatched) > 1 else ""
        raise _refused(
            model_id,
            f"{_in_its_file(name, entries)} has the shape {list(found)}, and config.json asks for "
            f"{list(asked)}{others}",
        )
    if missing:
        first = min(missing)
        raise _refused(
            model_id,
            f"a tensor that its config.json asks for is not there ({first})"
            if len(missing) == 1
            else f"{len(missing)} tensors that its config.json asks for are not there, the first is {first}",
        )


def unlike_its_kind(model_id: str, entries: Mapping[str, TensorEntry]) -> InputError | None:
    """The error for a tensor of another shape than its fellows in other layers and experts, which transformers cannot
    put together with them; None where there is none."""
    kinds: dict[str, list[str]] = {}
    for name in entries:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    for names in kinds.values():
        (usual, count), *others = Counter(entries[name].shape for name in names).most_common()
        if others:
            odd = min(name for name in names if entries[name].shape != usual)
            return _refused(
                model_id,
                f"{_in_its_file(odd, entries)} has the shape {list(entries[odd].shape)}, and {count} others of its "
                f"kind have {list(usual)}",
            )
    return None


def _in_its_file(name: str, entries: Mapping[str, TensorEntry] | None) -> str:
    """A tensor by its name in the files, which may have a prefix, and its file; as the model names it where several
    tensors of the files were put together."""
    stored = [key for key in entries or {} if key == name or key.endswith(f".{name}") or name.endswith(f".{key}")]
    if len(stored) != 1 or entries is None:
        return name
    return f"{stored[0]} in {entries[stored[0]].file.name}"


def _refused(model_id: str, why: str) -> InputError:
    return InputError(f"model.id: the weights of {model_id} cannot be loaded: {why}; {OWN_CONFIG}")
