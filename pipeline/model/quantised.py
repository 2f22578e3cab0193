"""Checkpoints of quantised weights: whether transformers runs them here, found out before anything is written.

transformers alone knows what each method needs. What it would say in a worker, or in a warning that nobody sees, is
said here. How the weights are then computed with is its own business: the activations are those that it gives.
"""

import copy
from collections.abc import Mapping
from typing import Any

from transformers.quantizers import AutoHfQuantizer

from pipeline.checkpoints.tensors_in_files import TensorEntry
from pipeline.errors import InputError
from pipeline.model.describe import ModelInfo, first_line, read_config
from pipeline.model.silence import silence

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types, as safetensors names them, of weights that are numbers as they are."""
ADVICE = "give the model's unquantised weights"


def check_quantised(info: ModelInfo, device: str) -> None:
    """Raise InputError for a model whose weights are quantised by a method that transformers cannot run on `device`
    (cpu, cuda, or auto for all GPUs) of this machine."""
    settings = getattr(read_config(info.id, info.revision), "quantization_config", None)
    if settings is None:
        return
    method = method_of(settings)
    try:
        with silence():
            is_known = AutoHfQuantizer.supports_quant_method(settings)
            if is_known:
                quantizer = AutoHfQuantizer.from_config(copy.deepcopy(settings), pre_quantized=True)
                place = "auto" if device == "auto" else {"": device}
                quantizer.validate_environment(device_map=place, weights_only=True)
    # Whatever the methods' own packages raise, or transformers where they are not there.
    except (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, NameError) as error:
        raise InputError(
            f"model.id: the weights of {info.id} are quantised ({method}), which transformers cannot run on "
            f"{'cpu' if device == 'cpu' else 'cuda'} here: {first_line(error)}; install what is missing here and on "
            f"the workers, or {ADVICE}"
        ) from None
    if not is_known:
        # transformers would load the numbers as if they were weights.
        raise InputError(
            f"model.id: the weights of {info.id} are quantised by a method that transformers does not know "
            f"({method}); {ADVICE}"
        )


def check_not_disguised(info: ModelInfo, config: Any, tensors: Mapping[str, TensorEntry]) -> None:
    """Raise InputError for quantised weights whose config does not say so: transformers would take their numbers for
    weights, without their scales. `tensors`: name -> what the files' headers say."""
    if getattr(config, "quantization_config", None) is not None:
        return
    for name, entry in tensors.items():
        if entry.dtype not in FLOATS and name.endswith("weight"):
            raise InputError(
                f"model.id: the weights of {info.id} are quantised ({name} is {entry.dtype}) and its config.json "
                f"does not say how (quantization_config); download the config that belongs to them, or {ADVICE}"
            )


def method_of(settings: Any) -> str:
    """The name of a quantisation method, as a config has it."""
    found = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(found, "value", found) or "no method named")
