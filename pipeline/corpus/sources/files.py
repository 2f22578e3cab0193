"""The files of a corpus, on local disks or at any fsspec URL: which they are, reading them, telling them apart.

Local files are opened as such, never through fsspec, which costs a copy of every block; the others by
`pipeline.corpus.sources.remote`.
"""

import glob
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import IO, Any

from pipeline.corpus.sources.remote import find_remote, open_remote
from pipeline.corpus.sources.retry import Unread, why_unread
from pipeline.errors import InputError

HASHED_WHOLE_BYTES = 16 * 2**20
SAMPLED_BLOCKS, SAMPLED_BYTES = 64, 2**18
"""The evenly spaced blocks by which, with its tail, a larger file is told, and the bytes of each."""
READERS = 8
_CREDENTIALS = re.compile(r"(?<=://)[^/]*@")


@dataclass(frozen=True)
class CorpusFile:
    """One file. A small value, which may be sent to other processes."""

    url: str
    """A local path, or an fsspec URL."""
    num_bytes: int
    version: str = ""
    """Of a file at a URL: what its server calls the present content, as an ETag; empty where nothing does."""
    path: str = ""
    """Its path below the folder that all files of the corpus are in, where several have the same name."""

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def source(self) -> str:
        """What the documents of a store call it."""
        return self.path or self.name

    @property
    def folder(self) -> str:
        """The name of the folder it is in."""
        return self.url.rstrip("/").rpartition("/")[0].rpartition("/")[2]

    @property
    def is_local(self) -> bool:
        return "://" not in self.url

    @contextmanager
    def open(self, **how: Any) -> Iterator[IO[bytes]]:
        """Read its bytes within the block. Raises Unread when they cannot be read, now or later in the block. `how`:
        options of fsspec's `open` for a file at a URL."""
        with reading(self.url):
            if self.is_local:
                with Path(self.url).open("rb") as handle:
                    yield handle
            else:
                with open_remote(self.url, self.num_bytes, self.version, **how) as handle:
                    yield handle


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Within the block, failures to read become Unread errors that name `what`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # every file system raises kinds of its own (botocore's are no OSErrors)
        if not isinstance(error, OSError | EOFError | ImportError) and "://" not in what:
            raise
        raise Unread(f"corpus.path: {what} cannot be read: {why_unread(error)}") from error


def find_files(pattern: str, endings: Sequence[str]) -> list[CorpusFile]:
    """The files a path, folder or glob pattern names, by name; of a folder those with one of `endings`.

    Raises InputError when there are none.
    """
    found = _find_remote(pattern, endings) if "://" in pattern else _find_local(pattern, endings)
    if not found:
        raise InputError(
            f"corpus.path: no file matches {pattern!r}; give a file, a folder of files "
            f"({', '.join(endings)}), or a pattern"
        )
    return sorted(found, key=lambda file: file.url)


def distinguished(files: Sequence[CorpusFile]) -> list[CorpusFile]:
    """The files of a corpus, so that no two have the same `source`: if any have the same name, all are called by their
    paths below the folder that they share (`lang=en/0.parquet`). Where they share none, each by as much of
    the end of its path as no other has. Stores keep these, and credentials in a URL are no part of them."""
    if len({file.name for file in files}) == len(files):
        return list(files)
    parts = [_CREDENTIALS.sub("", file.url).split("/") for file in files]
    levels = zip(*(of[:-1] for of in parts), strict=False)
    shared = list(takewhile(lambda level: len({*level}) == 1, levels))
    if all(level[0] == "" or level[0].endswith(":") for level in shared):  # the root, or the protocol, is no folder
        return [replace(file, path=end) for file, end in zip(files, _shortest_ends(parts), strict=True)]
    return [replace(file, path="/".join(of[len(shared) :])) for file, of in zip(files, parts, strict=True)]


def _shortest_ends(paths: Sequence[Sequence[str]]) -> list[str]:
    ends = ["/".join(path) for path in paths]
    left = set(range(len(paths)))
    for length in range(1, max(map(len, paths))):
        times = Counter((*path[-length:],) for path in paths)
        found = {i for i in left if times[(*paths[i][-length:],)] == 1}
        left -= found
        for i in found:
            ends[i] = "/".join(paths[i][-length:])
    return ends


def _find_local(pattern: str, endings: Sequence[str]) -> list[CorpusFile]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        paths = [p for p in path.rglob("*") if p.name.lower().endswith(tuple(endings))]
    else:
        paths = [Path(name) for name in glob.glob(str(path), recursive=True)]  # noqa: PTH207 (may be absolute)
    hidden = len(path.parts)
    return [
        CorpusFile(str(p), p.stat().st_size)
        for p in paths
        if p.is_file() and not any(part.startswith(".") for part in p.parts[hidden:])
    ]


def _find_remote(pattern: str, endings: Sequence[str]) -> list[CorpusFile]:
    with reading(pattern):
        return [CorpusFile(*found) for found in find_remote(pattern, endings)]


def fingerprint(files: Sequence[CorpusFile], by_content: bool = False) -> dict[str, Any]:
    """Identify files by their sizes and contents, in their order: not by names, places or times.

    Of files at URLs the version that the server tells stands for the content, which would have to be fetched:
    `versions` in place of `sha256`. `by_content`: fetch it, as stores have it that were made before versions were."""
    told = [] if by_content else [file.version for file in files]
    with ThreadPoolExecutor(READERS) as readers:
        contents = told if told and all(told) else list(readers.map(_content_hash, files))
    sha = hashlib.sha256()
    for file, content in zip(files, contents, strict=True):
        sha.update(f"{file.num_bytes} {content}\n".encode())
    kind = "versions" if contents is told else "sha256"
    return {"files": len(files), "bytes": sum(f.num_bytes for f in files), kind: sha.hexdigest()[:16]}


def _content_hash(file: CorpusFile) -> str:
    sha = hashlib.sha256()
    with file.open(cache_type="none") as handle:  # reading ahead would fetch 5 MiB for every block
        if file.num_bytes <= HASHED_WHOLE_BYTES:
            sha.update(handle.read())
        else:
            for block in range(SAMPLED_BLOCKS):
                handle.seek(file.num_bytes * block // SAMPLED_BLOCKS)
                sha.update(handle.read(SAMPLED_BYTES))
            handle.seek(file.num_bytes - SAMPLED_BYTES)
            sha.update(handle.read())
    return sha.hexdigest()
