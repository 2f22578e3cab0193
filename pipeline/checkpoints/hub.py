"""Repositories on the Hugging Face hub, and local folders in their stead: which commit a name means, and its files.

A branch or a tag moves; a commit does not. What is read of a repository is read at a commit that was found out once, so
that config, weights and tokenizer belong together, on every machine and whenever a run goes on.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, file_exists, try_to_load_from_cache
from transformers.utils import cached_file

COMMIT = re.compile(r"[0-9a-f]{40}")


def is_commit(revision: str) -> bool:
    """Return whether a revision is a whole commit hash, which always means the same files."""
    return COMMIT.fullmatch(revision) is not None


def local_folder(name: str) -> Path | None:
    """The folder that a model's or tokenizer's name is; None where it is a repository's."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None


def resolve_commit(name: str, revision: str, files: Sequence[str]) -> str:
    """Return the commit that a branch, tag or commit of a repository is now; offline, as the cache knows it.

    `files`: one of them must be there. A local folder's revision is returned as it is. Raises OSError or ValueError, in
    the words of transformers, where there is no such repository, revision or file.
    """
    if local_folder(name) is not None or is_commit(revision):
        return revision
    for file in files:
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=file == files[-1])
        if path is not None:
            parts = Path(path).parts
            commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""
            if is_commit(commit):
                return commit
    raise OSError(f"its repository has no {files[-1]} at {revision}")


def may_have(name: str, commit: str, files: Sequence[str], *, is_here: bool) -> bool:
    """Return whether a repository may have one of some files, without downloading them. Offline the cache is all there
    is where `is_here` says that it is the one that counts; else nobody knows."""
    if any(isinstance(try_to_load_from_cache(name, file, revision=commit), str) for file in files):
        return True
    if constants.HF_HUB_OFFLINE:
        return not is_here
    try:
        return any(file_exists(name, file, revision=commit) for file in files)
    except (OSError, ValueError):
        return True


def offline_folder(name: str, commit: str, file: str) -> str | None:
    """Offline, the cache's folder of a commit that has a file: transformers does without files that a folder lacks, and
    not without those that a cache lacks, as they might be on the hub."""
    if local_folder(name) is not None or not constants.HF_HUB_OFFLINE:
        return None
    path = find_file(name, commit, file)
    return None if path is None else str(path.parent)


def file_here(name: str, revision: str, file: str) -> Path | None:
    """Where a file of a folder or repository is on this machine; None where it is not, as nothing is downloaded."""
    if (folder := local_folder(name)) is not None:
        return folder / file if (folder / file).is_file() else None
    try:
        path = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:  # no name of a repository
        return None
    return Path(path) if isinstance(path, str) else None


def find_file(name: str, revision: str, file: str) -> Path | None:
    """Where a small file of a folder or repository is, after it was downloaded; None where it has none."""
    if (folder := local_folder(name)) is not None:
        return folder / file if (folder / file).is_file() else None
    try:
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return None if path is None else Path(path)
