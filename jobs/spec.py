"""The spec: one YAML file that describes an experiment. Every mistake in it is reported at once."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from workers.settings import (
    AnchorSettings,
    ClusterSettings,
    CorpusSettings,
    EvaluateSettings,
    HarvestSettings,
    ModelSettings,
    Settings,
    TrainSettings,
)


class SpecError(ValueError):
    """The spec cannot be used. The message lists everything that is wrong with it."""


class Spec(Settings):
    """A whole spec. The shortest useful one gives store, model.id, corpus.path and harvest.sites."""

    store: str
    """Where the store is or will be: a path that all workers see."""
    model: ModelSettings
    corpus: CorpusSettings
    harvest: HarvestSettings
    anchors: AnchorSettings | None = None
    train: TrainSettings | None = None
    evaluate: EvaluateSettings = EvaluateSettings()
    cluster: ClusterSettings = ClusterSettings()

    def check(self) -> None:
        """What spans sections. Raises SpecError with every problem."""
        problems = []
        labels = set(self.corpus.labels)
        if self.anchors is not None:
            problems += [
                f"anchors.by: {label!r} is not one of corpus.labels ({', '.join(sorted(labels)) or 'there are none'})"
                for label in self.anchors.by
                if label not in labels
            ]
        for i, dictionary in enumerate(self.train.dictionaries if self.train else ()):
            for site in {*dictionary.input, *dictionary.output} - set(self.harvest.sites):
                problems.append(
                    f"train.dictionaries[{i}]: {site} is not one of harvest.sites ({', '.join(self.harvest.sites)})"
                )
            if dictionary.anchors and (self.anchors is None or dictionary.anchors != self.anchors.name):
                given = "there is none" if self.anchors is None else repr(self.anchors.name)
                problems.append(f"train.dictionaries[{i}].anchors: no anchor set {dictionary.anchors!r} ({given})")
            if dictionary.activation.k > dictionary.latents:
                problems.append(
                    f"train.dictionaries[{i}]: activation.k {dictionary.activation.k} is more than its "
                    f"{dictionary.latents} latents"
                )
        if problems:
            raise SpecError("\n".join(problems))


def load_spec(path: str | Path) -> Spec:
    """Read and check a spec file. Relative paths in it are taken from its own folder. Raises SpecError."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"no spec file at {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"the spec {file} cannot be read: {error}") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise SpecError(f"{file} is not a spec: expected sections like store, model, corpus and harvest")
    return parse_spec(raw, file.absolute().parent, str(file))


def parse_spec(raw: dict[str, Any], folder: Path, name: str = "spec") -> Spec:
    """Validate a spec's content; `folder` is what its relative paths are relative to. Raises SpecError."""
    try:
        spec = Spec.model_validate(raw)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(problem) for problem in error.errors()))
        raise SpecError(f"{name}:\n  " + "\n  ".join(lines) if len(lines) > 1 else f"{name}: {lines[0]}") from None
    try:
        spec.check()
    except SpecError as error:
        raise SpecError(f"{name}: {error}") from None
    return _resolve_paths(spec, folder)


def _resolve_paths(spec: Spec, folder: Path) -> Spec:
    """Relative paths become absolute, as Ray's workers run elsewhere. A model id is a path if such a folder exists."""

    def resolve(value: str) -> str:
        return value if "://" in value else str((folder / Path(value).expanduser()).absolute())

    model = spec.model
    changed = {
        key: resolve(value)
        for key, value in (("id", model.id), ("tokenizer", model.tokenizer))
        if value is not None and (value.startswith((".", "~", "/")) or (folder / value).is_dir())
    }
    return spec.model_copy(
        update={
            "store": resolve(spec.store),
            "corpus": spec.corpus.model_copy(update={"path": resolve(spec.corpus.path)}),
            "model": model.model_copy(update=changed),
        }
    )


def _explain(problem: Any) -> str:
    location, known = _locate(problem["loc"])
    where = _dotted(location)
    kind = problem["type"]
    if kind == "extra_forbidden":
        near = get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
        return f"unknown key {where}: {hint}"
    if kind == "missing":
        return f"{where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if kind == "value_error" or isinstance(problem["input"], dict) else f", not {problem['input']!r}"
    return f"{where}: {message[0].lower()}{message[1:]}{shown}"


def _locate(location: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[str]]:
    """The location without pydantic's names for the members of a union, and the keys known in its section."""
    model: type[BaseModel] | None = Spec
    kept: list[Any] = []
    known: list[str] = []
    for part in location:
        if isinstance(part, int):
            kept.append(part)
        elif model is not None:
            kept.append(part)
            known = list(model.model_fields)
            field = model.model_fields.get(part)
            model = next(iter(_models_in(field.annotation)), None) if field is not None else None
    return tuple(kept), known


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in getattr(annotation, "__args__", ()) for m in _models_in(inner)]


def _dotted(location: tuple[Any, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "spec"
