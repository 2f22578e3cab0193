"""Which harvests of a store are of a model, and whether the model behind a name is still the one it was.

A model is known by its fingerprint; its name, folder or branch is where it was found. Under one name there is one model
in a store: what is found there later and is another one is refused, never harvested as if it had been meant
(docs/decisions/0018-which-model.md). Another name, or a commit that the spec writes out, is another model.
"""

import hashlib

from pipeline.checkpoints.hub import is_commit, local_folder
from pipeline.model.describe import ModelInfo
from storage.errors import StoreMismatch
from storage.harvest.harvest import Harvest
from storage.store import Store

REF = "ref"
"""Key of a harvest's made_with: what the spec called the commit. Not there in harvests made before commits were
recorded, which may have a branch where newer ones have the commit."""


def made_from(info: ModelInfo) -> dict[str, str]:
    """What a harvest records of where its model was found."""
    of_hub = {REF: info.ref} if is_commit(info.revision) else {}
    return {"model": info.id, "revision": info.revision, **of_hub}


def is_of_model(harvest: Harvest, info: ModelInfo) -> bool:
    """Return whether a harvest is of a model. Those made when a fingerprint held the commit alone are, with that
    commit."""
    fingerprint = harvest.identity.fingerprint
    if fingerprint == info.fingerprint:
        return True
    of = harvest.made_with
    is_same_commit = is_commit(info.revision) and (of.get("model"), of.get("revision")) == (info.id, info.revision)
    return is_same_commit and fingerprint == _digest_of_revision(info.revision)


def fingerprint_in_store(store: Store, info: ModelInfo) -> str:
    """The fingerprint under which a store knows a model: its own, unless an earlier one is there."""
    known: list[str] = [h.identity.fingerprint for h in store.refresh().harvests if is_of_model(h, info)]
    return known[0] if known else info.fingerprint


def check_not_replaced(store: Store, info: ModelInfo) -> None:
    """Raise StoreMismatch where a store was harvested from the model's name, and has not this model: weights that were
    replaced, or a branch that moved."""
    harvests = store.refresh().harvests
    if any(is_of_model(harvest, info) for harvest in harvests):
        return
    of_name = [h for h in harvests if _place_of(str(h.made_with.get("model"))) == _place_of(info.id)]
    if local_folder(info.id) is not None:
        for harvest in of_name:
            raise StoreMismatch(
                f"model.id: {info.id} has the fingerprint {info.fingerprint}, and {harvest.model} in the store at "
                f"{store.url} was harvested from it with {harvest.identity.fingerprint}: its weights or "
                "config were replaced. Put those back, or give the new ones a folder of their own: then they are "
                "another model, with columns of their own; or name another store"
            )
    if is_commit(info.ref):
        return
    for harvest in of_name:
        then = str(harvest.made_with.get("revision"))
        if harvest.made_with.get(REF, info.ref) != info.ref:
            continue
        beside = f"model.revision: {info.revision} harvests the one of now beside it, as another model"
        if is_commit(then):
            raise StoreMismatch(
                f"model.revision: {info.ref} of {info.id} is the commit {info.revision} now, and {harvest.model} in "
                f"the store at {store.url} is of {then}. model.revision: {then} goes on with that one; {beside}"
            )
        raise StoreMismatch(
            f"model.revision: {harvest.model} in the store at {store.url} is of {info.id}, by a version of Granary "
            f"that did not record which commit {then} was, so nothing can be added to it. {beside}; or name another "
            "store"
        )


def _place_of(name: str) -> str:
    """A model's name such that two of one folder are equal. A link is a name of its own: it may be set anew."""
    folder = local_folder(name)
    return name if folder is None else str(folder.absolute())


def _digest_of_revision(revision: str) -> str:
    """The fingerprint that models on the hub had before it held the repository."""
    return hashlib.sha256(revision.encode()).hexdigest()[:16]
