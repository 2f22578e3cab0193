"""Names of repositories as people bring them: addresses copied from a browser, a clone command, another tool's syntax.

A model is a folder, or OWNER/NAME with a revision of its own. Everything else is refused with the name to write: what a
spec says stays what its readers see, and one model has one name.
"""

import re
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

from pipeline.errors import InputError

HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")
PART = r"[A-Za-z0-9][\w.-]*"
VIEWS = ("tree", "blob", "resolve", "raw", "commit", "commits")
"""What the hub's addresses have between a name and a revision."""
OTHER_KINDS = {"datasets": "a dataset", "spaces": "a space", "collections": "a collection", "papers": "a paper"}
NESTED = re.compile(r"refs/(?:pr/\d+|convert/[\w-]+)")
"""Revisions that have slashes themselves."""


def check_name(name: str, key: str, revision_key: str) -> None:
    """Raise InputError for what is neither a folder nor a repository's name, with what to write instead. `key`,
    `revision_key`: where a spec has the name, and its revision. To be asked of what is no folder here."""
    rest, has_host = _without_host(name.strip())
    if rest is None:
        if "://" in name:
            scheme = name.partition("://")[0]
            raise InputError(
                f"{key}: a {scheme}:// URL is no model that can be loaded; give a folder, or a name on the hub "
                "(OWNER/NAME): download it first"
            )
        return
    parts = [unquote(part) for part in rest.split("/") if part]
    if has_host and parts and parts[0] in OTHER_KINDS:
        raise InputError(f"{key}: {name} is {OTHER_KINDS[parts[0]]}, not a model; give a model's OWNER/NAME")
    if has_host and parts and parts[0] == "models":
        parts = parts[1:]
    repository, revision = _parted(parts, has_host)
    if repository is None:
        if has_host:
            raise InputError(f"{key}: {name} names no repository; write a model's OWNER/NAME")
        return
    if (repository, revision) == (name, None):
        return
    at = f", and {revision_key}: {revision}" if revision not in (None, "main") else ""
    raise InputError(f"{key}: {name} is no folder here and no name of a repository; write {key}: {repository}{at}")


def check_dataset_address(path: str, *, is_named: bool) -> None:
    """Raise InputError for a page of the hub about a dataset or a file, with what to write instead. `is_named`: the
    path is to be a dataset's name, not a place of files."""
    rest, has_host = _without_host(path)
    parts = [unquote(part) for part in (rest or "").split("/") if part]
    if not has_host or path.startswith("hf://") or parts[:1] != ["datasets"]:
        return
    named = next((i for i, part in enumerate(parts) if part in (*VIEWS, "viewer")), min(len(parts), 3))
    name, view = "/".join(parts[1:named]), parts[named] if named < len(parts) else ""
    if view in ("resolve", "raw") and not is_named:
        return
    if view == "blob" and not is_named:
        raise InputError(
            f"corpus.path: {path} is a page about the file; write {path.replace('/blob/', '/resolve/', 1)}"
        )
    raise InputError(
        f"corpus.path: {path} is a page about a dataset; write corpus.path: {name or 'OWNER/NAME'}, and corpus.format: "
        "datasets with corpus.rows"
    )


def _without_host(name: str) -> tuple[str | None, bool]:
    """What follows the hub's host in an address, and whether there was one; None for addresses of other places."""
    own = urlsplit(constants.ENDPOINT).netloc
    if match := re.match(r"(?:git@|ssh://git@)(?:hf\.co|huggingface\.co)[:/](.*)", name):
        return match[1], True
    scheme, there, after = name.partition("://")
    if there and scheme == "hf":
        return after, True
    host, _, path = (after if there else name).partition("/")
    if host.lower() in (*HOSTS, own) and (there or host.lower() in HOSTS):
        return re.split(r"[?#]", path)[0], True
    return (None, False) if there else (name, False)


def _parted(parts: list[str], has_host: bool) -> tuple[str | None, str | None]:
    """The name of a repository and its revision, of the parts of an address or a name; None where it is neither."""
    places = (1, 2) if has_host else (2,)  # without a host, NAME/tree/REVISION may as well be a path
    view = next((i for i in places if i < len(parts) and parts[i] in VIEWS), None)
    if view is None and len(parts) > 2 and not has_host:
        return None, None
    named, at, given = "/".join(parts[: view or 2]).partition("@")
    named = named.removesuffix(".git")
    if not re.fullmatch(rf"{PART}(/{PART})?", named):
        return None, None
    if at:
        return named, given or None
    after = "" if view is None else "/".join(parts[view + 1 :])
    nested = NESTED.match(after)
    return named, nested[0] if nested else after.partition("/")[0] or None
