"""The spec: one YAML file that describes an experiment. Every mistake in it is reported at once."""

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from jobs.spec.variables import expanded
from jobs.spec.yaml_text import NotYaml, read_yaml
from storage.backends.place import check_url, home_expanded
from storage.errors import StorageError
from storage.format.site_refs import SiteRef
from workers.settings.anchors import FILE_ENDINGS, AnchorSets, AnchorSettings
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import (
    RANGE_PATTERN,
    ClusterSettings,
    EvaluateSettings,
    HarvestSettings,
    ModelSettings,
    TrainSettings,
)
from workers.settings.section import NAME_PATTERN, Settings


class SpecError(ValueError):
    """The spec cannot be used. The message lists everything that is wrong with it."""


class Spec(Settings):
    """A whole spec. The shortest useful one gives store, model.id, corpus.path and harvest.sites."""

    store: str
    """Where the store is or will be: a path that all workers see."""
    model: ModelSettings
    corpus: CorpusSettings
    harvest: HarvestSettings
    anchors: AnchorSets = ()
    train: TrainSettings | None = None
    evaluate: EvaluateSettings = EvaluateSettings()
    cluster: ClusterSettings = ClusterSettings()

    def problems(self) -> list[str]:
        """What is wrong between sections, each valid on its own."""
        problems = []
        paths = [("corpus.path", path) for path in self.corpus.path]
        for key, url in (("store", self.store), *paths, ("model.id", self.model.id)):
            try:
                check_url(url)
            except StorageError as error:
                problems.append(f"{key}: {error}")
        problems += self._problems_of_anchors()
        for i, dictionary in enumerate(self.train.dictionaries if self.train else ()):
            where = f"train.dictionaries[{i}]"
            here = [
                site
                for site in dict.fromkeys((*dictionary.input, *dictionary.output))
                if SiteRef.parse(site).model is None
            ]
            for site in here:  # those of a named model are of another spec's harvest
                if site not in self.harvest.sites:
                    problems.append(f"{where}: {site} is not one of harvest.sites ({', '.join(self.harvest.sites)})")
            wanted = None if dictionary.anchors is None else dictionary.anchors.name
            if wanted and wanted not in [anchors.name for anchors in self.anchors]:
                given = ", ".join(repr(anchors.name) for anchors in self.anchors) or "there is none"
                problems.append(f"{where}.anchors: no anchor set {wanted!r} ({given})")
            problems += [f"{where}: {problem}" for problem in dictionary.problems()]
        return problems

    def _problems_of_anchors(self) -> list[str]:
        problems = []
        labels = self.corpus.labels
        names = [anchors.name for anchors in self.anchors]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            problems.append(f"anchors: sets need different names; {', '.join(twice)} is used twice")
        for i, anchors in enumerate(self.anchors):
            where = "anchors" if len(self.anchors) == 1 else f"anchors[{i}]"
            problems += [
                f"{where}.by: {label!r} is not one of corpus.labels ({', '.join(sorted(labels)) or 'there are none'})"
                for label in anchors.by
                if label not in labels
            ]
            for name, condition in anchors.where.items():
                from storage.sql.conditions import check_condition  # loads DuckDB, which few specs need

                try:
                    check_condition(condition)
                except StorageError as error:
                    problems.append(f"{where}.where.{name}: {error}")
            top = anchors.top
            if top is not None and SiteRef.parse(top.site).model is None and top.site not in self.harvest.sites:
                sites = ", ".join(self.harvest.sites)
                problems.append(f"{where}.top.site: {top.site} is not one of harvest.sites ({sites})")
        return problems

    def with_env(self, names: Sequence[str]) -> "Spec":
        """The spec with more names in `cluster.env`."""
        together = tuple(dict.fromkeys((*self.cluster.env, *names)))
        return self.model_copy(update={"cluster": self.cluster.model_copy(update={"env": together})})

    @property
    def scored_anchors(self) -> tuple[AnchorSettings, ...]:
        """The sets whose subpopulations dictionaries are scored on: those that say of any row whether it belongs."""
        return tuple(anchors for anchors in self.anchors if anchors.source in ("by", "where"))


def load_spec(path: str | Path) -> Spec:
    """Read and check a spec file. Relative paths in it are taken from its own folder. Raises SpecError."""
    file = home_expanded(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"no spec file at {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"the spec {file} cannot be read: {error}") from None
    try:
        raw = read_yaml(text)
    except NotYaml as error:
        raise SpecError(f"{file} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise SpecError(f"{file} is not a spec: expected sections like store, model, corpus and harvest")
    return parse_spec(raw, file.absolute().parent, str(file))


def parse_spec(raw: dict[str, Any], folder: Path, name: str = "spec") -> Spec:
    """Validate a spec's content; `folder` is what its relative paths are relative to. Raises SpecError.

    Environment variables are replaced first: see `jobs.spec.variables`."""
    raw, unknown = expanded(raw)
    if unknown:
        raise SpecError(_listed(name, unknown))
    try:
        spec = Spec.model_validate(raw)
    except ValidationError as error:
        raise SpecError(_listed(name, _explain(error, raw))) from None
    if problems := spec.problems():
        raise SpecError(_listed(name, problems))
    try:
        return _resolve_paths(spec, folder)
    except StorageError as error:
        raise SpecError(_listed(name, [str(error)])) from None


def _listed(name: str, lines: list[str]) -> str:
    return f"{name}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{name}:", *lines])


def _resolve_paths(spec: Spec, folder: Path) -> Spec:
    """Relative paths become absolute, as Ray's workers run elsewhere. A model id is a path if such a folder exists."""

    def resolve(value: str) -> str:
        return value if "://" in value else str((folder / home_expanded(value)).absolute())

    model = spec.model
    changed = {
        key: resolve(value)
        for key, value in (("id", model.id), ("tokenizer", model.tokenizer))
        if value is not None and (value.startswith((".", "~", "/")) or (folder / value).is_dir())
    }
    harvest = spec.harvest
    if harvest.offload is not None:
        there = harvest.offload.model_copy(update={"folder": resolve(harvest.offload.folder)})
        harvest = harvest.model_copy(update={"offload": there})
    return spec.model_copy(
        update={
            "harvest": harvest,
            "anchors": tuple(_resolve_anchors(anchors, resolve) for anchors in spec.anchors),
            "store": resolve(spec.store),
            "corpus": spec.corpus.model_copy(update={"path": _resolve_corpus(spec.corpus, resolve)}),
            "model": model.model_copy(update=changed),
        }
    )


def _resolve_anchors(anchors: AnchorSettings, resolve: Callable[[str], str]) -> AnchorSettings:
    """top.directions may also be the name of an anchor set, which has no such ending."""
    changed: dict[str, Any] = {}
    if anchors.vectors is not None:
        changed["vectors"] = resolve(anchors.vectors)
    if anchors.top is not None and anchors.top.directions.endswith(FILE_ENDINGS):
        changed["top"] = anchors.top.model_copy(update={"directions": resolve(anchors.top.directions)})
    return anchors.model_copy(update=changed)


def _resolve_corpus(corpus: CorpusSettings, resolve: Callable[[str], str]) -> tuple[str, ...]:
    """The name of a dataset is no path, unless there is such a folder."""
    resolved = [(path, resolve(path)) for path in corpus.path]
    return tuple(there if corpus.format != "datasets" or Path(there).exists() else path for path, there in resolved)


def _explain(error: ValidationError, raw: dict[str, Any]) -> list[str]:
    """A line for each mistake, in the order of the spec's keys."""
    found = error.errors()
    if isinstance(raw.get("anchors"), dict):  # a single set, which became a list of one
        for problem in found:
            if problem["loc"][:2] == ("anchors", 0):
                problem["loc"] = ("anchors", *problem["loc"][2:])
    parents = {problem["loc"][:depth] for problem in found for depth in range(len(problem["loc"]))}
    lines: dict[str, list[str]] = {}  # with what a value must be, of which a union says one thing for each member
    for problem in found:
        location, known, inside = _locate(problem["loc"])
        where, kind, limits = _dotted(location), problem["type"], problem.get("ctx", {})
        if kind == "extra_forbidden":
            near = get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
            lines[f"unknown key {where}: {hint}"] = []
        elif kind == "missing":
            lines[f"{where} is missing"] = []
        elif kind == "value_error":
            lines[f"{where}: {problem['msg'].removeprefix('Value error, ')}"] = []
        elif kind == "model_type":
            lines[f"{where} must be a section with keys like {', '.join(inside[:4])}"] = []
        elif kind == "too_short" and problem["loc"] in parents:
            pass  # pydantic leaves out items that are invalid, each of which is reported, and then counts the rest
        elif kind in ("too_short", "too_long"):
            limit = f"at least {limits['min_length']}" if kind == "too_short" else f"at most {limits['max_length']}"
            lines[f"{where} takes {limit}, not {limits['actual_length']}"] = []
        else:
            lines.setdefault(f"{where} must be {{}}, not {problem['input']!r}", []).append(_requirement(problem["msg"]))
    return [line.replace("{}", " or ".join(options), 1) if options else line for line, options in lines.items()]


def _requirement(message: str) -> str:
    """Pydantic's "Input should be greater than or equal to 1" as what follows "must be": "at least 1"."""
    message = re.sub(r"^(Input|String) should be |, (unable to|got a number) .*", "", message)
    for words, ours in _WORDS.items():
        message = message.replace(words, ours)
    return message


_WORDS = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid integer": "a whole number",
    "a valid tuple": "a list",
    "a valid string": "text",
    "a valid boolean": "true or false",
    f"String should match pattern '{NAME_PATTERN}'": "letters, digits and _ . - after a first letter or digit",
    f"String should match pattern '{RANGE_PATTERN}'": "a range like 2-16",
}
"""What pydantic says in Python's terms, in YAML's."""


def _locate(location: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[str], list[str]]:
    """The location without pydantic's names for the members of a union, the keys known beside it, and those below."""
    model: type[BaseModel] | None = Spec
    kept: list[Any] = []
    known: list[str] = []
    names_below = False  # what is below a mapping of any names, like anchors.where
    for part in location:
        if isinstance(part, int) or names_below:
            kept.append(part)
        elif model is not None:
            kept.append(part)
            known = list(model.model_fields)
            field = model.model_fields.get(part)
            model = next(iter(_models_in(field.annotation)), None) if field is not None else None
            names_below = field is not None and get_origin(field.annotation) is dict
    return tuple(kept), known, [] if model is None else list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for inner in getattr(annotation, "__args__", ()) for m in _models_in(inner)]


def _dotted(location: tuple[Any, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text or "spec"
