"""Why files of a repository on the hub cannot be had, as one clause: what is known of it here, and what to do.

What transformers says of it speaks of other things (a connection that nobody wanted, its own documentation), and names
neither the revision nor what the cache has instead.
"""

import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub import constants
from transformers.utils import cached_file

from pipeline.checkpoints.hub import file_here, is_commit

MOST_NAMED = 5
SHORTEST, SHORT = 5, 12
"""Digits of a commit hash that people write, and that a message shows of those that are not to be copied."""
TOLD = {
    *("HFValidationError", "GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError"),
    "LocalEntryNotFoundError",
}
"""Errors of huggingface_hub that say why by themselves."""


def why_absent(name: str, revision: str, files: Sequence[str], error: Exception) -> str | None:
    """Why none of a repository's files can be had at a revision; None if one can. `error`: what asking for them raised.

    Where that does not tell, they are asked for again: without a network each time takes half a minute."""
    if any(file_here(name, revision, file) is not None for file in files):
        return None
    failed: Exception | None = error
    if constants.HF_HUB_OFFLINE or not _kinds(error) & TOLD:
        for file in files:
            try:
                if cached_file(name, file, revision=revision) is not None:
                    return None
                failed = None
            except (OSError, ValueError) as found:
                failed = found
    kinds = _kinds(failed)
    status = next(_statuses(failed), None)
    hub = constants.ENDPOINT
    has_token = "the token that is set may not see" if _has_token() else "without a token (HF_TOKEN) nobody may see"
    if "HFValidationError" in kinds:
        return "that is no name of a repository, which is OWNER/NAME"
    if "GatedRepoError" in kinds:
        return (
            f"{hub} gives it to those only who asked for access: ask at {hub}/{name}, and set HF_TOKEN to a token of "
            "yours, here and on the workers (cluster.env)"
        )
    if "RepositoryNotFoundError" in kinds or status == 401:
        return f"no folder is here, and {hub} has no {name}, or one that {has_token}; mend the name, or set HF_TOKEN"
    if "RevisionNotFoundError" in kinds:
        return f"{hub}/{name} has no branch, tag or commit {revision}; mend the revision"
    if constants.HF_HUB_OFFLINE:
        return _not_in_cache(name, revision, files, "HF_HUB_OFFLINE is set, so that nothing is downloaded")
    if status is not None and "RemoteEntryNotFoundError" not in kinds:
        return _not_in_cache(name, revision, files, f"{hub} answered HTTP {status}")
    if is_unreachable(failed):
        return _not_in_cache(name, revision, files, f"{hub} cannot be reached")
    return f"{hub}/{name} has no {' and no '.join(files)} at {revision}; give a repository with a model of transformers"


def is_unreachable(error: Exception | None) -> bool:
    """Whether what was raised says that the hub cannot be asked: asking it for more would take long, too."""
    unreachable = {"LocalEntryNotFoundError", "ConnectError", "ConnectionError", "TimeoutException"}
    return bool(_kinds(error) & unreachable) and not constants.HF_HUB_OFFLINE


def _not_in_cache(name: str, revision: str, files: Sequence[str], why: str) -> str:
    """What the cache has instead. `why`: why nothing is downloaded now."""
    cache = Path(constants.HF_HUB_CACHE)
    home = cache / f"models--{name.replace('/', '--')}"
    refs = dict(_refs(home))
    here = [path.name for path in sorted(home.glob("snapshots/*")) if is_commit(path.name)]
    at = f"hf download {name}" + ("" if revision == "main" else f" --revision {revision}")
    ways = f"download it ({at}), or unset it" if constants.HF_HUB_OFFLINE else f"try again, or download it ({at})"
    commit = refs.get(revision, revision)
    if not here:
        near = get_close_matches(name, _repositories(cache), n=1)
        like = f", though of {near[0]}" if near else ""
        return f"no folder is here, the cache of this machine ({cache}) has nothing of {name}{like}, and {why}; {ways}"
    if commit in here:
        return (
            f"the cache of this machine ({cache}) has the revision {revision} of {name} without {' or '.join(files)}, "
            f"and {why}; {ways}"
        )
    if whole := [each for each in here if len(revision) >= SHORTEST and each.startswith(revision.lower())]:
        return f"a commit is named by all of its {len(whole[0])} digits; write {whole[0]} as the revision"
    names: dict[str, list[str]] = {each: [] for each in here}
    for ref, target in refs.items():
        names.setdefault(target, []).append(ref)
    known = [f"{', '.join(names[each])} ({each[:SHORT]})" if names[each] else each for each in here]
    more = f" and {len(known) - MOST_NAMED} more" if len(known) > MOST_NAMED else ""
    return (
        f"the cache of this machine ({cache}) has no revision {revision} of {name}, but {'; '.join(known[:MOST_NAMED])}"
        f"{more}, and {why}; give one that is there, or {ways}"
    )


def _refs(home: Path) -> Iterator[tuple[str, str]]:
    """The branches and tags that a cache knows of a repository, with their commits."""
    folder = home / "refs"
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_text(errors="replace").strip()


def _repositories(cache: Path) -> list[str]:
    return [path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*") if path.is_dir()]


def _has_token() -> bool:
    return bool(os.environ.get("HF_TOKEN") or Path(constants.HF_TOKEN_PATH).is_file())


def _kinds(error: BaseException | None) -> set[str]:
    """The names of the classes of what was raised, and of what that came from."""
    return {kind.__name__ for each in _chain(error) for kind in type(each).__mro__}


def _statuses(error: BaseException | None) -> Iterator[int]:
    """The HTTP statuses in what was raised."""
    for each in _chain(error):
        status = getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(status, int) and status >= 400:
            yield status


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
