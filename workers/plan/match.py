"""The comparison of a store's table with the one that a spec describes: the same, the beginning of it, or another."""

from typing import Any

from storage.errors import StoreMismatch
from storage.format.records import Record, differences
from storage.store import Store
from workers.settings.corpus import CorpusSettings

OPTIONAL: Record = {"columns": (), "markers": True, "tools": None, "template_arguments": {}}
"""Settings that a plan holds only where they are not their defaults: stores made before they were there go on."""
_OTHERWISE = "give the spec the stored values, or name another store"


def table_settings(corpus: CorpusSettings) -> Record:
    """What of the spec, besides sources and tokenizer, determines the table."""
    names = ("context", "rows", "seed", "skip_first", "rows_per_unit", "holdout")
    kind, column = corpus.content
    content = {name: column if name == kind else None for name in ("text", "tokens", "messages")}
    settings = {name: getattr(corpus, name) for name in names}
    optional = {name: getattr(corpus, name) for name, default in OPTIONAL.items()}
    return {
        **content,
        **settings,
        "labels": list(corpus.labels),
        "roles": list(corpus.roles),
        **{name: _listed(value) for name, value in optional.items() if value != OPTIONAL[name]},
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_settings(store: Store, corpus: CorpusSettings) -> None:
    """Raise StoreMismatch if the store's table was planned with other settings. Does not look at the corpus files."""
    defaults = {name: _listed(of) for name, of in OPTIONAL.items() if name in store.info.plan}
    expected = {**defaults, **table_settings(corpus)}
    if corpus.chat_date is not None and "chat_date" in store.info.plan:
        expected["chat_date"] = corpus.chat_date
    stored = {name: store.info.plan.get(name) for name in expected}
    for name, (of_spec, of_store) in _token_settings(store.info.plan, corpus).items():
        expected[name], stored[name] = of_spec, of_store
    entries, stored_entries = len(corpus.path), len(store.info.plan["source"])
    if entries != stored_entries:
        expected["path"], stored["path"] = f"{entries} entries", f"{stored_entries} entries"
    if stored != expected:
        may_grow = {name for name in expected if stored[name] != expected[name]} <= {"rows", "path"}
        hint = f"`granary harvest --grow` appends rows to it; or {_OTHERWISE}" if may_grow else ""
        raise mismatch(store.url, differences(stored, expected, "corpus."), hint)


def _token_settings(plan: Record, corpus: CorpusSettings) -> dict[str, tuple[Any, Any]]:
    """What tokens are by the spec and in a store, as far as it can be told without the tokenizer."""
    found: dict[str, tuple[Any, Any]] = {}
    if corpus.bos != "auto":
        found["bos"] = corpus.bos, plan["bos"] is not None
    if corpus.tokens is None:
        found["specials"] = corpus.specials, plan.get("specials", "tokens")
    if all(isinstance(token, int) for token in corpus.exclude_tokens):
        found["exclude_tokens"] = sorted(set(corpus.exclude_tokens)), plan.get("exclude_tokens", [])
    elif "exclude_tokens" not in plan:
        found["exclude_tokens"] = list(corpus.exclude_tokens), []
    if not isinstance(corpus.separator, str):
        found["separator"] = corpus.separator, plan.get("separator")
    return found


def growth_of(store: Store, identity: Record) -> str | None:
    """What a store lacks of the table with this identity, in words; None if it has that table. Raises StoreMismatch
    unless its table is the beginning of that one (docs/decisions/0012-growing.md), as far as the sources say."""
    stored = store.info.plan
    if stored == identity:
        return None
    had, wanted, rows = stored["source"], identity["source"], identity["rows"]
    may_differ = dict.fromkeys(("source", "rows"))
    if (
        {**stored, **may_differ} != {**identity, **may_differ}
        or wanted[: len(had)] != had
        or any("dataset" in source for source in had)
        or (rows is not None and rows < store.num_rows)
    ):
        raise mismatch(store.url, table_differences(store, identity), _hint(had, wanted))
    if rows is not None:
        return f"{rows - store.num_rows:,} rows"
    added = len(wanted) - len(had)
    return f"the rows of {added} more {'entry' if added == 1 else 'entries'}" if added else "the rest of the corpus"


def _hint(had: list[Record], wanted: list[Record]) -> str:
    """Files that were put beside those of an entry would be shuffled among them."""
    if len(had) == len(wanted) and any(
        now.get("files", 0) > was.get("files", 0) for was, now in zip(had, wanted, strict=True)
    ):
        return f"New files are an entry of their own, corpus.path: [the stored ones, the new ones]; or {_OTHERWISE}"
    return ""


def mismatch(place: str, found: list[str], hint: str = "") -> StoreMismatch:
    advice = hint or f"{_OTHERWISE[0].upper()}{_OTHERWISE[1:]}"
    return StoreMismatch(f"the spec contradicts the store at {place}: {'; '.join(found)}. {advice}")


def refuse_growth(store: Store, identity: Record, growth: str) -> StoreMismatch:
    """The refusal of a spec of more rows where it was not asked to append them."""
    return mismatch(
        store.url, table_differences(store, identity), f"`--grow` appends {growth} to the store; or {_OTHERWISE}"
    )


def table_differences(store: Store, identity: Record) -> list[str]:
    return differences(_told(store.info.plan), _told(identity), "corpus.")


def _told(identity: Record) -> Record:
    """An identity as a person would tell it: for the source files, what they amount to instead of their hashes."""
    shown = {k: v for k, v in identity.items() if k not in ("source", "chat_template")}
    if identity["tokens"] is None:
        shown.setdefault("specials", "tokens")  # what there was before there was a choice
    if isinstance(shown.get("bos"), int):  # as the spec says it, and which token that is
        shown |= {"bos": True, "bos_token": identity["bos"]}
    else:
        shown["bos"] = False
    return {**shown, "path": " + ".join(map(source_words, identity["source"]))}


def source_words(source: Record) -> str:
    """What an entry of corpus.path is, in words."""
    if "dataset" in source:
        return f"the dataset {source['dataset']}, {source['subset'] or 'default'}, split {source['split']}"
    told_by = source.get("versions") or source["sha256"]
    return f"{source['files']} file(s) of {source['bytes']:,} bytes, {told_by[:8]}"
