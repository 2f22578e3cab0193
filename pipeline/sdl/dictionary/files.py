"""A dictionary on disk: safetensors for the weights, JSON for what they are. Nothing is ever unpickled.

`dictionary.json` holds the format's number, the config, and whatever the writer knows: the model and the store they are
of, how they were trained, their metrics. `normalisation.safetensors` says what was folded into the weights: to encode
nobody needs it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from pipeline.errors import InputError
from pipeline.sdl.dictionary.dictionary import Dictionary
from pipeline.sdl.dictionary.normalisation import Normalisation
from pipeline.sdl.dictionary.shape import config_of

FORMAT = 2
JSON, WEIGHTS, NORMALISATION = "dictionary.json", "dictionary.safetensors", "normalisation.safetensors"


def save_dictionary(
    dictionary: Dictionary, about: dict[str, Any], folded: tuple[Normalisation, Normalisation] | None = None
) -> dict[str, bytes]:
    """Encode a dictionary as files: name -> content. `about` (model, store digests, metrics) goes into the JSON;
    `folded`: the normalisations of input and output that training used, for the record."""
    weights = {name: weight.detach().cpu().contiguous() for name, weight in dictionary.state_dict().items()}
    record = {"format": FORMAT, "config": dictionary.config.record(), **about}
    files = {WEIGHTS: save(weights), JSON: (json.dumps(record, indent=2) + "\n").encode()}
    if folded is not None:
        sides = {"input": folded[0].to("cpu"), "output": folded[1].to("cpu")}
        tensors = {f"{side}.{name}": v.clone() for side, norm in sides.items() for name, v in vars(norm).items()}
        files[NORMALISATION] = save(tensors)
    return files


def load_dictionary(
    folder: str | Path,
    *,
    model: str | None = None,
    input: str | Sequence[str] | None = None,
    output: str | Sequence[str] | None = None,
) -> Dictionary:
    """Load a dictionary from the folder or URL it was saved in (`<store>/runs/<name>`).

    `model` (its id or its name in the store), `input` and `output` (sites): what it is wanted for; one of another model
    or of other sites is refused. Raises InputError.
    """
    try:
        record = json.loads(_read(folder, JSON))
        if (found := record["format"]) == FORMAT:
            dictionary = Dictionary(config_of(record["config"]))
            dictionary.load_state_dict(load(_read(folder, WEIGHTS)))
            models = record.get("models", {})
            names = sorted({*models, *(str(m["id"]) for m in models.values() if "id" in m)})
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"no dictionary in {folder}: {error.filename or error} is not there; train it first") from None
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, RuntimeError) as error:
        raise InputError(f"the dictionary in {folder} is damaged: {error}") from None
    if found != FORMAT:
        raise InputError(f"the dictionary in {folder} has format {found}; this version reads {FORMAT}")
    if model is not None and model not in names:
        raise InputError(
            f"the dictionary in {folder} is of the model {' or '.join(names) or '(unknown)'}, and it is wanted for "
            f"{model}"
        )
    config = dictionary.config
    for verb, sites, wanted in (("reads", config.input, input), ("writes", config.output, output)):
        asked = (wanted,) if isinstance(wanted, str) else tuple(sites if wanted is None else wanted)
        if asked != sites:
            raise InputError(
                f"the dictionary in {folder} {verb} {', '.join(sites)}, and it is wanted for {', '.join(asked)}"
            )
    return dictionary.eval().requires_grad_(False)


def _read(folder: str | Path, name: str) -> bytes:
    if "://" not in str(folder):
        return (Path(folder).expanduser() / name).read_bytes()
    import fsspec  # not on every machine that only computes

    with fsspec.open(f"{folder}/{name}", "rb") as file:
        content: bytes = file.read()
    return content
