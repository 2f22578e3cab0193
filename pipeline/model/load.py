"""Loading a model that was described: its base or the whole, placed on devices, in silence, and nothing made up."""

import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import nn

from pipeline.checkpoints.fitting import check_fit, unlike_its_kind
from pipeline.checkpoints.hub import find_file, local_folder, may_have
from pipeline.checkpoints.tensors_in_files import TensorEntry, tensor_entries
from pipeline.checkpoints.weights import ENTRIES, loaded_files
from pipeline.errors import InputError
from pipeline.model.describe import ModelInfo, describe_model, first_line, read_config, refuse_adapter
from pipeline.model.families import TEXT_PART_WEIGHTS, TEXT_PARTS
from pipeline.model.finite import check_layers
from pipeline.model.layers import decoder_layers
from pipeline.model.placement import Placement, check_dtype
from pipeline.model.quantised import check_not_disguised
from pipeline.model.silence import silence

ON_CPU = Placement()

NO_ADAPTER = {"subfolder": "no adapter is applied"}
"""Where transformers is to look for an adapter: in a folder that no checkpoint has. Where peft is installed it applies
one that lies beside the weights by itself, a second time to weights it was merged into, and on the machines that have
peft only."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base_model(
    info: ModelInfo, *, layers: int, dtype: str, attention: str = "sdpa", placement: Placement = ON_CPU
) -> nn.Module:
    """Load the first `layers` decoder layers of the base model (no lm_head), ready to run."""
    config = _first_layers(read_config(info.id, info.revision), layers)
    model = _load(transformers.AutoModel, info, config, dtype, attention, placement)
    check_layers(info.id, model, decoder_layers(model))
    return model


def check_weights(info: ModelInfo, layers: int, *, loaded_here: bool = False, with_head: bool = False) -> None:
    """Raise InputError if a checkpoint that is here lacks tensors of the first `layers` layers or has them in other
    shapes, as loading them would. `loaded_here`: on this machine and no other, so that one on the hub must be here or
    be downloaded. `with_head`: the language model is loaded too, for its loss.

    transformers itself loads tensors without content, of the names and shapes that the files' headers give: it alone
    knows how names of checkpoints become those of a model. Takes up to some seconds, and no memory to speak of.
    """
    folder = local_folder(info.id) or _snapshot(info, loaded_here)
    config = _first_layers(read_config(info.id, info.revision), layers)
    tensors = tensor_entries(folder) if folder is not None else None
    if tensors is None:
        return
    check_not_disguised(info, config, tensors)
    if getattr(config, "quantization_config", None):  # whose tensors are of other shapes
        return
    kinds = transformers.MODEL_FOR_CAUSAL_LM_MAPPING if with_head else transformers.MODEL_MAPPING
    try:
        with silence():
            _, loaded = kinds[type(config)].from_pretrained(
                None,
                config=config,
                state_dict={
                    name: torch.empty(entry.shape, dtype=torch.bfloat16, device="meta")
                    for name, entry in tensors.items()
                },
                device_map={"": "meta"},
                dtype=torch.bfloat16,
                ignore_mismatched_sizes=True,  # which transformers refuses without saying what it is
                output_loading_info=True,
                **_renamed(config),
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot_load(info, tensors, error) from None
    check_fit(info.id, loaded["missing_keys"], loaded["mismatched_keys"], tensors)


def _snapshot(info: ModelInfo, loaded_here: bool) -> Path | None:
    """The folder of a commit in the hub's cache, if its weights are there. Raises InputError where they have to be and
    cannot be downloaded."""
    config = find_file(info.id, info.revision, "config.json")
    if config is None:
        return None
    if not may_have(info.id, info.revision, ENTRIES, is_here=loaded_here):
        refuse_adapter(info.id, info.revision)
    try:
        loaded_files(config.parent)
    except InputError:
        if loaded_here and constants.HF_HUB_OFFLINE:
            raise InputError(
                f"model.id: the weights of {info.id} at the commit {info.revision} are not in this machine's cache "
                "(HF_HUB_CACHE, HF_HOME), and HF_HUB_OFFLINE keeps them from being downloaded; download them first "
                f"(hf download {info.id} --revision {info.revision}), or unset it"
            ) from None
        return None  # the workers download them
    return config.parent


def linear_shapes(info: ModelInfo) -> list[tuple[int, int]]:
    """The linear maps of a decoder layer, (in, out) each, from the config alone."""
    config = _first_layers(read_config(info.id, info.revision), 1)
    with silence(), torch.device("meta"):
        (layer,) = decoder_layers(transformers.AutoModel.from_config(config))
    return [(m.in_features, m.out_features) for m in layer.modules() if isinstance(m, nn.Linear)]


def load_causal_model(
    info: ModelInfo, *, dtype: str, attention: str = "sdpa", placement: Placement = ON_CPU
) -> nn.Module:
    """Load the whole language model, for measuring its loss."""
    config = read_config(info.id, info.revision)
    model = _load(transformers.AutoModelForCausalLM, info, config, dtype, attention, placement)
    check_layers(info.id, model, decoder_layers(model))
    return model


def _load(loader: Any, info: ModelInfo, config: Any, dtype: str, attention: str, placement: Placement) -> nn.Module:
    check_dtype(DTYPES[dtype], placement.input_device)
    try:
        with silence():
            model, loaded = placement.load(
                loader,
                info.id,
                revision=info.revision,
                config=config,
                dtype=DTYPES[dtype],
                attn_implementation=attention,
                adapter_kwargs=NO_ADAPTER,
                ignore_mismatched_sizes=True,  # refused below, with the tensor's name
                **_renamed(config),
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _cannot_load(info, _entries_here(info), error) from None
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        check_fit(info.id, loaded["missing_keys"], loaded["mismatched_keys"], _entries_here(info))
    if (now := describe_model(info.id, info.revision).fingerprint) != info.fingerprint:  # changed since, or elsewhere
        raise InputError(
            f"model.id: {info.id} on {platform.node()} has the fingerprint {now}, and this run began with "
            f"{info.fingerprint}: the weights were replaced, or this machine has others; put the same ones everywhere"
        )
    ready: nn.Module = model.eval().requires_grad_(False)
    return ready


def _first_layers(config: Any, layers: int) -> Any:
    """Return the config of the same model with `layers` layers."""
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def _renamed(config: Any) -> dict[str, Any]:
    """How transformers is told the names that a checkpoint of text and images gives the weights of its text part."""
    return {"key_mapping": TEXT_PART_WEIGHTS} if config.model_type in TEXT_PARTS.values() else {}


def _entries_here(info: ModelInfo) -> dict[str, TensorEntry] | None:
    """What the files say that a model was loaded from. Raises InputError for files that cannot have been."""
    config = find_file(info.id, info.revision, "config.json")
    return None if config is None else tensor_entries(config.parent)


def _cannot_load(info: ModelInfo, tensors: dict[str, TensorEntry] | None, error: Exception) -> InputError:
    """What transformers raised, in words that name the tensor where that is the reason."""
    odd = unlike_its_kind(info.id, tensors) if tensors and "conversion" in str(error) else None
    return odd or InputError(f"model.id: the weights of {info.id} cannot be loaded: {first_line(error)}")
