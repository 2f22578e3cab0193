"""Which Llama-family models and tokenizers these are: read from their files, before any weights are loaded.

Everything that can be wrong with a model is found from its config, before weights are read or a store is touched.
"""

import hashlib
import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import transformers

from pipeline.checkpoints.absent import is_unreachable, why_absent
from pipeline.checkpoints.downloads import stand_in
from pipeline.checkpoints.hub import file_here, find_file, local_folder, resolve_commit
from pipeline.checkpoints.repository_names import check_name
from pipeline.checkpoints.weights import ENTRIES, hash_weights
from pipeline.errors import InputError
from pipeline.model.families import FAMILIES, TEXT_PARTS
from pipeline.sites import Site


@dataclass(frozen=True)
class ModelInfo:
    """A model's identity and shape, read from its config and (locally) a fingerprint of its weights."""

    id: str
    revision: str
    """The commit of a model on the hub, so that every worker, now and later, gets the same weights."""
    ref: str
    """What the spec calls that commit: a branch, a tag, or the commit itself."""
    name: str
    """The folder's name, or the repository's with its owner, and the start of the fingerprint: names the model inside a
    store."""
    fingerprint: str
    """For a folder a digest of config and weights: equal for a copy in another place, other for a model trained
    further. For a model on the hub a digest of repository and commit."""
    num_layers: int
    d_model: int
    vocabulary: int
    max_context: int | None
    """Positions the model was made for, if its config says."""
    max_context_key: str
    """The key of the config that says so."""
    caps_attention: bool
    """True if attention logits are capped (Gemma 2), which not every attention implementation does."""

    def check_context(self, context: int) -> None:
        """Raise InputError for contexts longer than the model's positions: beyond them its activations mean nothing."""
        if self.max_context is not None and context > self.max_context:
            raise InputError(
                f"corpus.context: {context} tokens are more than the {self.max_context} positions of {self.id} "
                f"({self.max_context_key}); give at most that"
            )

    def check_attention(self, attention: str) -> None:
        """Raise InputError for an attention implementation that would leave out a part of the model."""
        if self.caps_attention and attention == "sdpa":
            raise InputError(
                f"harvest.attention: {self.id} caps its attention logits, which sdpa cannot do; set harvest.attention: "
                "eager (or flash_attention_2 on a GPU)"
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
    """Read a model's config, local folder or hub id. Raises InputError when it cannot be used.

    On the hub, `revision` is resolved to a commit here, and nothing else is read than what that has: call it once in a
    run, and pass on what it gives.
    """
    commit = _resolve(model_id, revision)
    config = read_config(model_id, commit)
    sha = hashlib.sha256()
    folder = local_folder(model_id)
    if folder is not None:
        # The file itself, not the loaded config, which has the defaults of whatever transformers is installed.
        written = json.loads((folder / "config.json").read_text())
        sha.update(json.dumps({k: v for k, v in written.items() if k not in _CONFIG_NOISE}, sort_keys=True).encode())
        if not any((folder / name).is_file() for name in ENTRIES):
            refuse_adapter(model_id, commit)
        hash_weights(folder, sha)
    else:
        sha.update(f"{model_id}@{commit}".encode())
    fingerprint = sha.hexdigest()[:16]
    max_context, max_context_key = _max_context(config)
    return ModelInfo(
        id=model_id,
        revision=commit,
        ref=revision,
        # No name of an owner or a repository has "--" in it.
        name=f"{model_id.replace('/', '--') if folder is None else folder.resolve().name}-{fingerprint[:8]}",
        fingerprint=fingerprint,
        num_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocabulary=config.vocab_size,
        max_context=max_context,
        max_context_key=max_context_key,
        caps_attention=getattr(config, "attn_logit_softcapping", None) is not None,
    )


def _resolve(model_id: str, revision: str) -> str:
    """The commit of a model on the hub; a folder's revision as it is. Raises InputError for what is neither."""
    folder = Path(model_id).expanduser()
    if not folder.is_dir():
        near = get_close_matches(folder.name, _folders_in(folder.parent), n=1)
        if not _is_surely_path(model_id) and not near:
            check_name(model_id, "model.id", "model.revision")
        if _is_path(model_id):
            raise InputError(f"model.id: there is no folder {folder}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        return resolve_commit(model_id, revision, ["config.json"])
    except (OSError, ValueError) as error:
        raise _unusable(model_id, revision, error) from None


def _unusable(model_id: str, revision: str, error: Exception) -> InputError:
    """The error for a model whose config cannot be had or read. Raises InputError for an adapter without its model."""
    path = file_here(model_id, revision, "config.json")
    if path is not None and (why := stand_in(path)) is not None:
        return InputError(f"model.id: {model_id} cannot be loaded: its config.json {why}")
    if path is None and not is_unreachable(error):
        refuse_adapter(model_id, revision)
    why = why_absent(model_id, revision, ["config.json"], error) if path is None else None
    return InputError(f"model.id: {model_id} cannot be loaded: {why or first_line(error)}")


def _max_context(config: Any) -> tuple[int | None, str]:
    """The most positions of a context, and the config's key for it."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    rope: Any = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond this length of the longest context all angles of the batch are others (Phi-3): a row would depend on
        # the contexts that happen to run beside it.
        return rope["original_max_position_embeddings"], "original_max_position_embeddings of its longrope"
    return positions, "max_position_embeddings"


_CONFIG_NOISE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
"""Config fields that say where or how it was saved, not what the model computes."""


def read_config(model_id: str, revision: str) -> Any:
    """The config of a model's language part, at a commit. Raises InputError for a model that cannot be used."""
    folder = local_folder(model_id)
    if folder is not None and not (folder / "config.json").is_file():
        refuse_adapter(model_id, revision)
        raise InputError(f"model.id: the folder {folder} has no config.json: it is not a Hugging Face model")
    try:
        config = transformers.AutoConfig.from_pretrained(model_id, revision=revision)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _unusable(model_id, revision, error) from None
    kind = getattr(config, "model_type", "?")
    if kind in TEXT_PARTS:
        quantised = getattr(config, "quantization_config", None)
        config = config.text_config
        if quantised is not None:  # said of the whole, whose text part would else be loaded as if it were not
            config.quantization_config = quantised
    elif kind not in FAMILIES:
        raise InputError(
            f"model.id: {model_id} is a {kind!r} model; supported are the Llama-shaped families "
            f"{', '.join([*FAMILIES, *TEXT_PARTS])}"
        )
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        raise InputError(f"model.id: {model_id} attends to later tokens too: it is no causal language model")
    return config


ADAPTER = "adapter_config.json"
"""What peft saves beside an adapter's weights, and looks for."""


def refuse_adapter(model_id: str, revision: str) -> None:
    """Raise InputError for an adapter without its model, which would otherwise be told that files are missing."""
    if (path := find_file(model_id, revision, ADAPTER)) is None:
        return
    try:
        base = json.loads(path.read_text()).get("base_model_name_or_path") or "its model"
    except (ValueError, AttributeError):
        base = "its model"
    merged = f"AutoPeftModelForCausalLM.from_pretrained({model_id!r}).merge_and_unload().save_pretrained(FOLDER)"
    raise InputError(
        f"model.id: {model_id} is only an adapter ({ADAPTER}) of {base}, without that model's weights: merge it first "
        f"(with peft: {merged}), put the tokenizer beside it, and give model.id that folder"
    )


def adapter_notice(info: ModelInfo) -> str | None:
    """One sentence where an adapter lies beside a model's weights; else None."""
    if find_file(info.id, info.revision, ADAPTER) is None:
        return None
    return (
        f"{info.id} has an adapter ({ADAPTER}) beside its weights, which is not applied: the weights are taken as they "
        "are, with the adapter merged into them if it belongs to them"
    )


def _is_surely_path(model_id: str) -> bool:
    return Path(model_id).is_absolute() or model_id.startswith((".", "~"))


def _is_path(model_id: str) -> bool:
    """Whether an id means a folder, there or not: a hub id is a name, or an owner and a name."""
    return _is_surely_path(model_id) or len(Path(model_id).parts) > 2 or model_id.endswith("/")


def _folders_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
