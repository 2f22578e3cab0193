"""From what a spec says of a corpus to its files and their format."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from pipeline.corpus.formats.aligned import OWN_COLUMNS
from pipeline.corpus.formats.json_lines import JsonLines, TextFiles
from pipeline.corpus.formats.parquet import Parquet, SavedDataset, saved_files
from pipeline.corpus.formats.records import Chunk, Columns, Format, Piece
from pipeline.corpus.sources.files import CorpusFile, distinguished, find_files
from pipeline.errors import InputError

ENDINGS = {
    "parquet": (".parquet",),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".ndjson"),
    "text": (".txt", ".txt.gz", ".txt.zst"),
    "saved": (".arrow",),
}
"""Format -> the endings of its files, in lower case; files may have them in upper case, too."""
TO_PARQUET = (
    "write it as Parquet first, as with `duckdb -c \"copy (from read_csv('{name}', all_varchar = true)) to "
    "'corpus.parquet'\"`"
)
UNPACK = "unpack it first, as with `{0} -d {{name}}`, or compress it as .gz or .zst"
ADVICE = {
    (".csv", ".tsv", ".csv.gz", ".tsv.gz"): f"a table without types: {TO_PARQUET}",
    (".xz",): UNPACK.format("xz"),
    (".bz2",): UNPACK.format("bzip2"),
    (".zip", ".tar", ".tgz", ".tar.gz"): "an archive: unpack it first",
    (".feather", ".orc", ".avro"): "a table of another kind: write it as Parquet first",
}
"""Endings that people have and no format: what to do."""
READERS: dict[str, Callable[[Columns], Format]] = {
    "parquet": Parquet,
    "jsonl": JsonLines,
    "text": TextFiles,
    "saved": SavedDataset,
}
RESERVED_COLUMNS = ("text", "document", "row_start", "row_stop", "source")
"""Names that labels cannot have: they are columns of the documents already."""


@dataclass(frozen=True)
class Corpus:
    """Files of one format, and the columns to take from them."""

    files: tuple[CorpusFile, ...]
    format: Format

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def summary(self) -> str:
        return f"{len(self.files)} file(s), the first is {self.files[0].url}"

    def pieces(self) -> list[Piece]:
        """Every part that can be read apart from the others, in order. Raises InputError."""
        return [piece for number, file in enumerate(self.files) for piece in self.format.pieces(number, file)]

    def chunks(self, piece: Piece) -> Iterator[Chunk]:
        return self.format.read(self.files[piece.file], piece)


def open_corpora(paths: Sequence[str], columns: Columns, format: str = "auto") -> list[Corpus]:
    """Open each of several corpora, whose rows come one after the other. Raises InputError as `open_corpus` does, and
    for a file that two of them have."""
    corpora = [open_corpus(path, columns, format) for path in paths]
    owner: dict[str, int] = {}
    for number, corpus in enumerate(corpora):
        for file in corpus.files:
            if (first := owner.setdefault(file.url, number)) != number:
                raise InputError(
                    f"corpus.path: {file.url} is named by {paths[first]!r} and by {paths[number]!r}: its rows would be "
                    "there twice; give patterns that do not overlap"
                )
    files = iter(distinguished([file for corpus in corpora for file in corpus.files]))
    return [replace(corpus, files=tuple(islice(files, len(corpus.files)))) for corpus in corpora]


def open_corpus(path: str, columns: Columns, format: str = "auto") -> Corpus:
    """Find the files of a corpus. `format`: one of ENDINGS, or auto to tell it from the files' endings.

    Raises InputError when there are no files, or files of no format or of several.
    """
    check_label_names(columns)
    if _is_saved(path) and format in ("auto", "saved"):
        return Corpus(tuple(saved_files(path)), SavedDataset(columns))
    endings = [e for of_format in ENDINGS.values() for e in of_format] if format == "auto" else ENDINGS[format]
    files = find_files(path, endings)
    found = format if format != "auto" else _format_of(files, path)
    return Corpus(tuple(files), READERS[found](columns))


def check_label_names(columns: Columns) -> None:
    """Raise InputError for labels with names that the documents' own columns have, or two that SQL takes for one. Those
    of the rows' columns: `check_new_names`."""
    if "" in columns.beside:
        raise InputError(f"{columns.key('')}: a column without a name; give each its name")
    known = {name: f"{name} is a column of Granary's own" for name in RESERVED_COLUMNS}
    for label in dict.fromkeys(columns.beside):
        if (same := label.casefold()) in known:
            rest = "" if label == same else f", and SQL does not tell {label} from it"
            raise InputError(f"{columns.key(label)}: {known[same]}{rest}; rename it")
        known[same] = f"{label} is kept already"


def check_new_names(columns: Columns) -> None:
    """Raise InputError for names that columns of the rows have, in the letters of either case: SQL would not tell them
    apart. Stores that were made with such labels are read as they are."""
    for name in columns.beside:
        if name.casefold() in OWN_COLUMNS:
            what = "the label" if name in columns.labels else "it"
            raise InputError(
                f"{columns.key(name)}: {name} is a column of Granary's own rows; rename {what}, so that queries and "
                "conditions can tell the two apart"
            )


def _is_saved(path: str) -> bool:
    return "://" not in path and any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _format_of(files: list[CorpusFile], path: str) -> str:
    examples: dict[str, str] = {}
    for file in files:
        known = [name for name, endings in ENDINGS.items() if file.name.lower().endswith(endings)]
        if advice := next((a for ends, a in ADVICE.items() if not known and file.name.lower().endswith(ends)), None):
            raise InputError(f"corpus.path: {file.url} cannot be read, {advice.format(name=file.name)}")
        if not known:
            raise InputError(
                f"corpus.path: the ending of {file.url} says nothing of its format; known are "
                f"{', '.join(e for endings in ENDINGS.values() for e in endings)}; or set corpus.format"
            )
        examples.setdefault(known[0], file.url)
    if len(examples) > 1:
        raise InputError(
            f"corpus.path: {path} has files of several formats ({', '.join(examples.values())}); give a pattern that "
            "names one kind, or set corpus.format"
        )
    return next(iter(examples))
