"""Loading Llama-family models and tokenizers, and saying exactly which ones they are.

Everything that can be wrong with a model is found from its config, before weights are read or a store is touched.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from pipeline.errors import InputError
from pipeline.sites import Site

PLAIN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""model_type of the families whose decoder layer is residual + attention, then residual + MLP, and nothing else."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_SAMPLED_BLOCKS = 256
_BLOCK_BYTES = 64 * 1024
_HEAD_BYTES = 1024 * 1024


@dataclass(frozen=True)
class ModelInfo:
    """A model's identity and shape, read from its config and (locally) a fingerprint of its weights."""

    id: str
    revision: str
    name: str
    """Last part of the id and the start of the fingerprint: names the model inside a store."""
    fingerprint: str
    """Digest of config and weights: equal for a copy in another place, other for a model trained further."""
    num_layers: int
    d_model: int
    vocabulary: int
    max_context: int | None
    """Positions the model was made for, if its config says."""

    def check_context(self, context: int) -> None:
        """Raise InputError for contexts longer than the model's positions: beyond them its activations mean nothing."""
        if self.max_context is not None and context > self.max_context:
            raise InputError(
                f"corpus.context: {context} tokens are more than the {self.max_context} positions of {self.id} "
                "(max_position_embeddings); give at most that"
            )

    def check_sites(self, sites: list[Site]) -> None:
        """Raise InputError for a layer the model does not have."""
        for site in sites:
            if site.layer >= self.num_layers:
                raise InputError(
                    f"harvest.sites: {site} is not in {self.id}, which has {self.num_layers} layers "
                    f"(0 to {self.num_layers - 1})"
                )


def describe_model(model_id: str, revision: str = "main") -> ModelInfo:
    """Read a model's config, local folder or hub id. Raises InputError when it cannot be used."""
    config = _config(model_id, revision)
    kind = getattr(config, "model_type", "?")
    if kind not in PLAIN_FAMILIES:
        raise InputError(
            f"model.id: {model_id} is a {kind!r} model; supported are the Llama-shaped families "
            f"{', '.join(PLAIN_FAMILIES)}"
        )
    sha = hashlib.sha256()
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        # The file itself, not the loaded config, which has the defaults of whatever transformers is installed.
        written = json.loads((folder / "config.json").read_text())
        sha.update(json.dumps({k: v for k, v in written.items() if k not in _CONFIG_NOISE}, sort_keys=True).encode())
        _hash_weights(folder, sha)
    else:
        sha.update(str(getattr(config, "_commit_hash", None) or revision).encode())
    fingerprint = sha.hexdigest()[:16]
    return ModelInfo(
        id=model_id,
        revision=revision,
        name=f"{folder.resolve().name if folder.is_dir() else model_id.split('/')[-1]}-{fingerprint[:8]}",
        fingerprint=fingerprint,
        num_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocabulary=config.vocab_size,
        max_context=getattr(config, "max_position_embeddings", None),
    )


_CONFIG_NOISE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
"""Config fields that say where or how it was saved, not what the model computes."""


def load_base_model(
    info: ModelInfo, *, layers: int, dtype: str, attention: str = "sdpa", device: str = "cpu"
) -> nn.Module:
    """Load the first `layers` decoder layers of the base model (no lm_head), ready to run."""
    config = _config(info.id, info.revision)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return _load(transformers.AutoModel, info, config, dtype, attention, device)


def load_causal_model(info: ModelInfo, *, dtype: str, attention: str = "sdpa", device: str = "cpu") -> nn.Module:
    """Load the whole language model, for measuring its loss."""
    return _load(transformers.AutoModelForCausalLM, info, _config(info.id, info.revision), dtype, attention, device)


def load_tokenizer(model_id: str, revision: str = "main") -> Any:
    """Load a fast tokenizer, local folder or hub id. Raises InputError when there is none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_id, revision=revision, use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        folder = Path(model_id).expanduser()
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            reason = "the folder has no tokenizer.json"
        elif model_id.startswith((".", "~", "/")) and not folder.is_dir():
            reason = "there is no such folder"
        else:
            reason = f"it cannot be loaded ({type(error).__name__}: {_first_line(error)})"
        raise InputError(f"no tokenizer at {model_id}: {reason}; give model.tokenizer a folder that has one") from None
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"the tokenizer of {model_id} has no fast version (tokenizer.json); convert it first")
    # Saved with some tokenizers, and applied in silence: texts would be cut, and padding would become rows.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of what a tokenizer does: vocabulary, merges, rules, BOS."""
    return hashlib.sha256(f"{tokenizer.bos_token_id}|{tokenizer.backend_tokenizer.to_str()}".encode()).hexdigest()[:16]


def encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens, in parallel in the tokenizer's own threads."""
    # Straight to the Rust tokenizer: the wrapper warns of texts longer than a context, which we cut ourselves.
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _config(model_id: str, revision: str) -> Any:
    folder = Path(model_id).expanduser()
    if (folder.is_absolute() or model_id.startswith((".", "~"))) and not folder.is_dir():
        raise InputError(f"model.id: there is no folder {folder}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"model.id: the folder {folder} has no config.json: it is not a Hugging Face model")
    try:
        return transformers.AutoConfig.from_pretrained(model_id, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model.id: {model_id} cannot be loaded: {_first_line(error)}") from None


def _load(loader: Any, info: ModelInfo, config: Any, dtype: str, attention: str, device: str) -> nn.Module:
    placement: dict[str, Any] = {} if device == "cpu" else {"device_map": "auto" if device == "auto" else {"": device}}
    try:
        model, loaded = loader.from_pretrained(
            info.id,
            output_loading_info=True,
            revision=info.revision,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            **placement,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model.id: the weights of {info.id} cannot be loaded: {_first_line(error)}") from None
    if missing := sorted(loaded["missing_keys"]):  # which transformers makes up, with a warning that no one sees
        raise InputError(
            f"model.id: the weights of {info.id} cannot be loaded: {len(missing)} tensors that its config.json asks "
            f"for are not there, the first is {missing[0]}"
        )
    ready: nn.Module = model.eval().requires_grad_(False)
    return ready


def _hash_weights(folder: Path, sha: Any) -> None:
    """Hash each weight file's size, head and evenly spaced blocks: any further training changes all of them."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not files:
        raise InputError(f"model.id: no weights (*.safetensors) in {folder}")
    for file in files:
        size = file.stat().st_size
        sha.update(f"{file.name} {size}".encode())
        with file.open("rb") as handle:
            sha.update(handle.read(_HEAD_BYTES))
            for block in range(_SAMPLED_BLOCKS):
                handle.seek(size * block // _SAMPLED_BLOCKS)
                sha.update(handle.read(_BLOCK_BYTES))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
