"""Models on the hub: a commit each, whoever asks and whenever; offline, from a cache that the test lays out."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import harvest, start_harvest, write_corpus
from corpora import ensure_rows
from hub import FakeHub
from lab import SITE, SITES, Lab, RayStarted
from transformers import AutoTokenizer

from jobs.cli.main import main
from pipeline.errors import InputError
from pipeline.model.describe import ModelInfo, describe_model
from pipeline.model.load import check_weights, load_base_model
from pipeline.tokens.tokenizer import load_tokenizer
from storage.errors import StoreMismatch
from storage.harvest.identity import HarvestIdentity
from storage.store import open_store
from workers.check.recompute import find_model
from workers.harvest.harvester import Harvester
from workers.harvest.stage import prepare_harvests
from workers.plan.source import open_source
from workers.settings.corpus import CorpusSettings
from workers.settings.experiment import HarvestSettings, ModelSettings


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("small") / "corpus.parquet", ["the grain was carried", "over a river"])


@pytest.fixture
def two(hub: FakeHub, make_model: Callable[..., Path]) -> dict[str, str]:
    """Two repositories with the same last name, config and files, but for the weights. Repository -> commit."""
    return {f"{owner}/tiny": hub.add(f"{owner}/tiny", make_model(seed=seed)) for seed, owner in enumerate(("a", "b"))}


def harvest_of(store: Path, model: str, corpus: Path, revision: str = "main") -> list[Any]:
    """What a harvest of one site would be, with the store that it needs."""
    corpus_settings = CorpusSettings(path=str(corpus), context=64)
    settings = ModelSettings(id=model, revision=revision, dtype="float32")
    made, _ = ensure_rows(store, corpus_settings, settings)
    return prepare_harvests(made, settings, describe_model(model, revision), HarvestSettings(sites=(SITE,)))


def test_two_repositories_of_one_config_are_two_models(two: dict[str, str], small: Path, tmp_path: Path) -> None:
    """Both at `main`: the second must not be given the first's activations as its own."""
    infos = [describe_model(repository) for repository in two]
    assert [info.revision for info in infos] == list(two.values())
    assert [info.ref for info in infos] == ["main", "main"]
    assert len({info.fingerprint for info in infos}) == len({info.name for info in infos}) == 2
    assert [info.name.rpartition("-")[0] for info in infos] == ["a--tiny", "b--tiny"]
    (first,), (second,) = (harvest_of(tmp_path / "store", repository, small) for repository in two)
    assert first.harvest.digest != second.harvest.digest
    assert [job.harvest.made_with["revision"] for job in (first, second)] == list(two.values())


@pytest.mark.slow  # imports everything anew
def test_a_process_of_its_own_finds_the_commit(two: dict[str, str]) -> None:
    """With nothing but the environment to tell it of the cache."""
    code = (
        "from pipeline.model.describe import describe_model\n"
        "print(*(describe_model(n).revision for n in ('a/tiny', 'b/tiny')))"
    )
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert found.stdout.split() == list(two.values())


def test_two_models_are_two_columns_with_their_own_rows(
    two: dict[str, str], make_model: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    for repository in two:
        store = harvest(tmp_path / "both", repository, corpus, [SITE])  # type: ignore[arg-type]
    for seed, (repository, made) in enumerate(zip(two, open_store(tmp_path / "both").harvests, strict=True)):
        assert made.made_with["model"] == repository
        assert made.made_with["revision"] == two[repository]
        alone = harvest(tmp_path / f"alone-{seed}", make_model(seed=seed), corpus, [SITE])
        np.testing.assert_array_equal(store.read(f"{made.model}/{SITE}"), alone.read(SITE))


def test_workers_load_the_commit_of_the_driver(
    hub: FakeHub, make_model: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    """Three of them, while the branch moves from one to the next."""
    first = hub.add("a/tiny", make_model(seed=0))
    harvesting = start_harvest(tmp_path / "store", "a/tiny", corpus, [SITE])  # type: ignore[arg-type]
    (job,) = harvesting.jobs
    workers = []
    for seed in (1, 2, 3):
        assert hub.add("a/tiny", make_model(seed=seed)) != first
        workers.append(Harvester(job.setup))
    for unit in job.units:
        workers[unit % 3].harvest_unit(unit)
    alone = harvest(tmp_path / "alone", make_model(seed=0), corpus, [SITE])
    np.testing.assert_array_equal(open_store(tmp_path / "store").read(SITE), alone.read(SITE))
    assert job.harvest.made_with["revision"] == first


@pytest.mark.parametrize("ref", ["main", "step2000", "refs/pr/1"])
def test_branches_tags_and_commits(hub: FakeHub, make_model: Callable[..., Path], ref: str) -> None:
    commit = hub.add("a/tiny", make_model(seed=0), ref=ref)
    by_ref, by_commit = describe_model("a/tiny", ref), describe_model("a/tiny", commit)
    assert by_ref.revision == by_commit.revision == commit
    assert (by_ref.ref, by_commit.ref) == (ref, commit)
    assert by_ref.fingerprint == by_commit.fingerprint


@pytest.mark.parametrize(
    ("model", "revision", "expected"),
    [
        ("a/tiny", "v9", "model.id: a/tiny cannot be loaded: "),
        ("nobody/nothing", "main", "model.id: nobody/nothing cannot be loaded: "),
        ("a/tiny", "0" * 40, "model.id: a/tiny cannot be loaded: "),
        ("a//b", "main", "model.id: a//b is no folder here and no name of a repository; write model.id: a/b"),
    ],
)
def test_what_is_not_in_the_cache(
    hub: FakeHub, make_model: Callable[..., Path], model: str, revision: str, expected: str
) -> None:
    hub.add("a/tiny", make_model())
    with pytest.raises(InputError, match=expected) as refused:
        describe_model(model, revision)
    assert "\n" not in str(refused.value)


def test_weights_that_are_not_in_the_cache(hub: FakeHub, make_model: Callable[..., Path]) -> None:
    """The driver needs config and tokenizer only; where the model is loaded here, offline, the weights must be too."""
    hub.add("a/tiny", make_model(), leaving_out=("model.safetensors",))
    info = describe_model("a/tiny")
    check_weights(info, 1)
    with pytest.raises(
        InputError, match=rf"the weights of a/tiny at the commit {info.revision} are not in this machine"
    ):
        check_weights(info, 1, loaded_here=True)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base_model(info, layers=1, dtype="float32")


def test_weights_of_a_snapshot_are_checked_before_the_work(
    hub: FakeHub, inputs: Path, make_model: Callable[..., Path]
) -> None:
    hub.add("a/whole", make_model())
    hub.add("a/cut", inputs / "weights-of-two-layers")
    check_weights(describe_model("a/whole"), 3)
    with pytest.raises(InputError, match=r"tensors that its config.json asks for are not there"):
        check_weights(describe_model("a/cut"), 2)


# ---- a branch that moves


@pytest.fixture
def moved(hub: FakeHub, lab: Lab, make_model: Callable[..., Path], corpus: Path) -> tuple[Lab, str, str]:
    """A store of what `main` was, its spec, and the commits that `main` was and is."""
    then = hub.add("a/tiny", make_model(seed=0))
    harvest(lab.store, "a/tiny", corpus, SITES)  # type: ignore[arg-type]
    return lab, then, hub.add("a/tiny", make_model(seed=1))


@pytest.mark.parametrize("verb", ["harvest", "plan", "run", "anchors"])
def test_a_branch_that_moved_is_refused(moved: tuple[Lab, str, str], no_ray: None, verb: str) -> None:
    lab, then, now = moved
    sections = {"anchors": {"name": "a", "by": "language", "min_rows": 10}} if verb == "anchors" else {}
    err = lab.refused(verb, lab.spec({"model.id": "a/tiny", **sections}))
    assert f"model.revision: main of a/tiny is the commit {now} now, and a--tiny-" in err
    assert f" in the store at {lab.store} is of {then}. " in err
    assert f"model.revision: {then} goes on with that one; model.revision: {now} harvests the one of now beside" in err


def test_both_ways_on_from_a_branch_that_moved(
    moved: tuple[Lab, str, str], no_ray: None, corpus: Path, make_model: Callable[..., Path]
) -> None:
    lab, then, now = moved
    assert "are there" in lab.run("harvest", lab.spec({"model.id": "a/tiny", "model.revision": then}))
    with pytest.raises(RayStarted):  # it has work to do
        main(["harvest", str(lab.spec({"model.id": "a/tiny", "model.revision": now}))])
    settings = ModelSettings(id="a/tiny", revision=now, dtype="float32")
    store = open_store(lab.store)
    assert find_model(store.harvests[0], [("a/tiny", "main")]).revision == then  # to audit it, and to repair it
    harvest_settings = HarvestSettings(sites=tuple(SITES), threads_per_worker=1)
    (job,) = prepare_harvests(store, settings, describe_model("a/tiny", now), harvest_settings)
    assert job.harvest.model not in {h.model for h in store.harvests}
    assert job.harvest.made_with == {**job.harvest.made_with, "model": "a/tiny", "revision": now, "ref": now}


def test_a_branch_that_moved_back_and_one_that_is_another(
    hub: FakeHub, moved: tuple[Lab, str, str], no_ray: None, make_model: Callable[..., Path]
) -> None:
    lab, then, _ = moved
    hub.point("a/tiny", "v2", then)
    assert "are there" in lab.run("harvest", lab.spec({"model.id": "a/tiny", "model.revision": "v2"}))
    hub.add("a/tiny", make_model(seed=2), ref="step2000")
    with pytest.raises(RayStarted):  # a tag that the store has not seen names another model
        main(["harvest", str(lab.spec({"model.id": "a/tiny", "model.revision": "step2000"}))])
    hub.point("a/tiny", "main", then)
    assert "are there" in lab.run("harvest", lab.spec({"model.id": "a/tiny"}))


def test_no_rows_are_appended_for_a_branch_that_moved(moved: tuple[Lab, str, str], no_ray: None, corpus: Path) -> None:
    lab, _, now = moved
    more = write_corpus(lab.folder / "more.parquet", ["the grain was carried over the river"])
    spec = lab.spec({"model.id": "a/tiny", "corpus.path": [str(corpus), str(more)]})
    assert f"is the commit {now} now" in lab.refused("harvest", spec, "--grow")


# ---- stores made before commits were recorded


def made_before(store: Path, revision: str, model: str = "a/tiny") -> str:
    """Turn the only harvest of a store into one as it was recorded before: its fingerprint a digest of the revision."""
    from storage.harvest.harvest import Harvest, declare_harvest, read_harvests

    opened = open_store(store)
    (harvest,) = read_harvests(opened.root)
    fingerprint = hashlib.sha256(revision.encode()).hexdigest()[:16]
    stored = harvest.identity.record
    identity = HarvestIdentity({**stored, "model": {**stored["model"], "fingerprint": fingerprint}})
    made_with = {**{k: v for k, v in harvest.made_with.items() if k != "ref"}, "model": model, "revision": revision}
    old = Harvest.of(identity, f"tiny-{fingerprint[:8]}", harvest.sites, made_with)
    for kind in ("commits", "activations", "norms"):
        for path in (store / kind).iterdir():
            if path.is_dir():
                shutil.rmtree(path)
    declare_harvest(opened.root, opened.num_rows, old)
    return old.digest


def test_an_old_harvest_of_a_known_commit_goes_on(
    hub: FakeHub, lab: Lab, make_model: Callable[..., Path], corpus: Path
) -> None:
    commit = hub.add("a/tiny", make_model())
    start_harvest(lab.store, "a/tiny", corpus, [SITE])  # type: ignore[arg-type]
    digest = made_before(lab.store, commit)
    store, info = open_store(lab.store), describe_model("a/tiny")
    settings = ModelSettings(id="a/tiny", dtype="float32")
    harvest_settings = HarvestSettings(sites=(SITE, "mlp_in.0"), threads_per_worker=1)
    old, new = prepare_harvests(store, settings, info, harvest_settings)
    assert old.harvest.digest == digest
    assert len(old.units) == store.info.num_units
    assert new.harvest.model == old.harvest.model
    assert find_model(old.harvest, []) == describe_model("a/tiny", commit)
    assert Harvester(old.setup).harvest_unit(0).committed  # its fingerprint is the new one: nothing was replaced
    hub.add("a/tiny", make_model(seed=1))
    with pytest.raises(StoreMismatch, match=f"is of {commit}. model.revision: {commit} goes on with that one"):
        prepare_harvests(store, settings, describe_model("a/tiny"), harvest_settings)


def test_an_old_harvest_of_nobody_knows_which_commit(
    hub: FakeHub, lab: Lab, make_model: Callable[..., Path], corpus: Path, no_ray: None
) -> None:
    commit = hub.add("a/tiny", make_model())
    hub.add("b/tiny", make_model(seed=1))
    harvest(lab.store, "a/tiny", corpus, [SITE])  # type: ignore[arg-type]
    made_before(lab.store, "main")
    err = lab.refused("harvest", lab.spec({"model.id": "a/tiny"}))
    assert "is of a/tiny, by a version of Granary that did not record which commit main was" in err
    assert f"model.revision: {commit} harvests the one of now beside it" in err
    for changes in ({"model.id": "b/tiny"}, {"model.id": "a/tiny", "model.revision": commit}):
        with pytest.raises(RayStarted):  # another model, as the spec says
            main(["harvest", str(lab.spec(changes))])
    (old,) = open_store(lab.store).harvests
    with pytest.raises(InputError, match="is not here"):
        find_model(old, [])


# ---- folders


@pytest.mark.parametrize("verb", ["harvest", "plan", "run"])
def test_weights_that_were_replaced_are_refused(
    lab: Lab, make_model: Callable[..., Path], corpus: Path, no_ray: None, verb: str
) -> None:
    model = lab.folder / "model"
    shutil.copytree(make_model(), model)
    harvest(lab.store, model, corpus, SITES)
    then = describe_model(str(model)).fingerprint
    (model / "model.safetensors").write_bytes((make_model(seed=1) / "model.safetensors").read_bytes())
    now = describe_model(str(model)).fingerprint
    err = lab.refused(verb, lab.spec({"model.id": "model"}))
    assert f"model.id: {model} has the fingerprint {now}, and model-" in err
    assert f"was harvested from it with {then}: its weights or config were replaced. Put those back, or give the" in err


def test_a_link_that_was_set_to_another_checkpoint_is_refused(
    tmp_path: Path, make_model: Callable[..., Path], corpus: Path
) -> None:
    latest, settings = tmp_path / "latest", HarvestSettings(sites=(SITE,), threads_per_worker=1)
    latest.symlink_to(make_model(seed=0))
    store = harvest(tmp_path / "store", latest, corpus, [SITE])
    latest.unlink()
    latest.symlink_to(make_model(seed=1))
    model = ModelSettings(id=str(latest), dtype="float32")
    with pytest.raises(StoreMismatch, match=f"model.id: {latest} has the fingerprint"):
        prepare_harvests(store, model, describe_model(model.id), settings)
    # The checkpoint under its own name is another model; once it is in the store, the link may be to either.
    harvest(tmp_path / "store", make_model(seed=1), corpus, [SITE])
    (job,) = prepare_harvests(store, model, describe_model(model.id), settings)
    assert not len(job.units)


def test_a_config_that_was_changed_is_refused(tmp_path: Path, make_model: Callable[..., Path], corpus: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_model(), model)
    store = harvest(tmp_path / "store", model, corpus, [SITE])
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    settings = HarvestSettings(sites=("mlp_in.0",), threads_per_worker=1)
    with pytest.raises(StoreMismatch, match="its weights or config were replaced"):
        prepare_harvests(store, ModelSettings(id=str(model), dtype="float32"), describe_model(str(model)), settings)


# ---- tokenizers


@pytest.fixture
def elsewhere(hub: FakeHub, make_model: Callable[..., Path], tmp_path: Path) -> dict[str, str]:
    """A model at `v1`, and a tokenizer in a repository of its own at `main` and at `v2`. Ref -> commit."""
    tokenizer = AutoTokenizer.from_pretrained(make_model())
    (tmp_path / "t1").mkdir()
    tokenizer.save_pretrained(tmp_path / "t1")
    tokenizer.add_tokens(["granary"])
    (tmp_path / "t2").mkdir()
    tokenizer.save_pretrained(tmp_path / "t2")
    return {
        "v1": hub.add("a/model", make_model(), ref="v1"),
        "main": hub.add("a/words", tmp_path / "t1"),
        "v2": hub.add("a/words", tmp_path / "t2", ref="v2"),
    }


@pytest.mark.parametrize(
    ("revision", "commit", "length"), [(None, "main", 320), ("main", "main", 320), ("v2", "v2", 321)]
)
def test_a_tokenizer_from_elsewhere_has_its_own_revision(
    elsewhere: dict[str, str], small: Path, tmp_path: Path, revision: str | None, commit: str, length: int
) -> None:
    """The model's revision is of the model: its tag need not be in the tokenizer's repository, nor mean the same."""
    corpus = CorpusSettings(path=str(small), context=64)
    model = ModelSettings(id="a/model", revision="v1", tokenizer="a/words", tokenizer_revision=revision)
    assert len(open_source(corpus, model, 328, "v1").tokenizer) == length
    store, _ = ensure_rows(tmp_path / "store", corpus, model)
    assert store.info.made_with["tokenizer"] == "a/words"
    assert store.info.made_with["tokenizer_revision"] == elsewhere[commit]


def test_the_models_own_tokenizer_is_of_the_models_commit(
    hub: FakeHub, make_model: Callable[..., Path], small: Path, tmp_path: Path
) -> None:
    """Also where the branch moves between the two."""
    commit = hub.add("a/tiny", make_model())
    info = describe_model("a/tiny")
    wide = tmp_path / "wide"
    shutil.copytree(make_model(), wide)
    tokenizer = AutoTokenizer.from_pretrained(wide)
    tokenizer.add_tokens(["granary"])
    tokenizer.save_pretrained(wide)
    hub.add("a/tiny", wide)
    corpus, model = CorpusSettings(path=str(small), context=64), ModelSettings(id="a/tiny")
    source = open_source(corpus, model, info.vocabulary, info.revision)
    assert (len(source.tokenizer), source.made_with["tokenizer_revision"]) == (320, commit)
    assert len(open_source(corpus, model, info.vocabulary, "main").tokenizer) == 321
    named = ModelSettings(id="a/tiny", tokenizer="a/tiny")
    assert len(open_source(corpus, named, info.vocabulary, info.revision).tokenizer) == 320


def test_a_tokenizer_that_is_not_there(elsewhere: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"no tokenizer at a/words: the cache .* has no revision v9 of a/words, but"):
        load_tokenizer("a/words", "v9")


def test_a_revision_of_no_tokenizer(lab: Lab) -> None:
    err = lab.refused("harvest", lab.spec({"model.tokenizer_revision": "v2"}), lines=None)
    assert "tokenizer_revision is that of a tokenizer from elsewhere: give its name as tokenizer" in err


def test_a_description_is_sent_to_workers(two: dict[str, str]) -> None:
    """Everything that it holds is plain: a worker of another machine needs no more to load the same commit."""
    info = describe_model("a/tiny")
    assert isinstance(info, ModelInfo)
    assert json.loads(json.dumps(dataclasses.asdict(info)))["revision"] == two["a/tiny"]
    assert os.environ["HF_HUB_OFFLINE"] == "1"
