"""Growing a store: it ends as the store that was planned larger from the beginning, and keeps what it had."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Harvesting, sentence, start_harvest, write_corpus
from corpora import ensure_rows
from lab import GONE, TRAIN, Lab, changed

from jobs.spec.spec import load_spec
from pipeline.corpus.table_columns import row_column
from storage.backends.place import open_place
from storage.errors import StoreMismatch
from storage.format.records import read_record
from storage.results.anchors import read_anchors
from storage.results.runs import open_run
from storage.store import Store, open_store
from workers.anchors.stage import make_anchors
from workers.cluster.tasks import Here
from workers.plan.calls import Cuts
from workers.plan.match import growth_of
from workers.plan.source import open_source
from workers.plan.stage import plan_rows
from workers.settings import experiment as settings
from workers.settings.anchors import AnchorSettings
from workers.settings.corpus import CorpusSettings
from workers.settings.dictionaries import DictionarySettings
from workers.settings.experiment import ModelSettings, TrainSettings
from workers.train.plan import plan_training

SITES = ("resid_post.0",)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three corpora of some 3,000 rows each."""
    folder = tmp_path_factory.mktemp("files")
    found = []
    for number in range(3):
        rng = random.Random(number)
        texts = [sentence(rng, rng.choice([1, 3, 20, 40, 100])) for _ in range(40)]
        found.append(write_corpus(folder / f"{number}.parquet", texts))
    return found


def contents(store: Store) -> dict[str, Any]:
    """Every file that the present table of a store has a use for, but records of who did what and when; the harvest's
    digest, which is that of the first table, is left out."""
    (digest,) = (harvest.digest for harvest in store.harvests)
    units = {store.info.units.name(unit) for unit in range(store.info.num_units)}
    found: dict[str, Any] = {}
    for path in (p for p in store.path.rglob("*") if p.is_file()):
        top, *rest = path.relative_to(store.path).parts
        if top not in (store.info.folder, "activations", "norms") and not (top == "moments" and path.stem in units):
            continue
        name = "/".join(["corpus" if top == store.info.folder else top, *rest]).replace(digest, "harvest")
        found[name] = path.read_bytes()
        if path.name == "zarr.json":
            found[name] = read_record(open_place(path.parent) / path.name)
            found[name]["attributes"].get("granary", {}).pop("harvest", None)
    return found


def told(store: Store) -> dict[str, Any]:
    """What the root record says of the table, but not where it is and what was before it."""
    return {k: v for k, v in asdict(store.info).items() if k not in ("folder", "grown_from")}


Table = tuple[Sequence[int], int | None]
"""Which of the files, and how many rows."""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, llama: Path, files: list[Path]) -> Callable[..., Harvesting]:
    def start(path: Path, table: Table, unit: int = 1024, **more: Any) -> Harvesting:
        entries, rows = table
        return start_harvest(path, llama, [files[i] for i in entries], SITES, rows=rows, rows_per_unit=unit, **more)

    return start


@pytest.fixture(scope="module")
def planned_larger(tmp_path_factory: pytest.TempPathFactory, start: Callable[..., Harvesting]) -> Callable[..., Store]:
    """The oracle: a store that had the larger table from the beginning, harvested."""
    made: dict[Any, Store] = {}

    def make(table: Table, unit: int) -> Store:
        key = (tuple(table[0]), table[1], unit)
        if key not in made:
            harvesting = start(tmp_path_factory.mktemp("fresh") / "store", table, unit)
            harvesting.run()
            made[key] = harvesting.store
        return made[key]

    return make


@pytest.mark.parametrize(
    ("before", "after", "unit", "done"),
    [
        (([0], 1500), ([0], 2600), 1024, "all"),  # more rows of the same files
        (([0], 1500), ([0], 2600), 2048, [0]),
        (([0], 2048), ([0], None), 1024, [-1]),  # from the end of a unit, to all rows
        (([0], 1100), ([0], 1500), 1024, "all"),  # within a unit
        (([0], None), ([0, 1], None), 1024, "all"),  # another entry
        (([0], None), ([0, 1], None), 2048, []),
        (([0, 1], 3500), ([0, 1, 2], 7000), 1024, [0]),  # both
    ],
)
def test_a_grown_store_is_the_one_that_was_planned_larger(
    tmp_path: Path,
    start: Callable[..., Harvesting],
    planned_larger: Callable[..., Store],
    before: Table,
    after: Table,
    unit: int,
    done: Any,
) -> None:
    small = start(tmp_path / "store", before, unit)
    total = small.store.info.num_units
    old = {result.unit for result in small.run(None if done == "all" else [u % total for u in done])}
    digest, had = small.jobs[0].harvest.digest, small.store.num_rows
    commits = {path.stem: path.read_bytes() for path in (small.store.path / "commits").rglob("0*.json")}
    grown = start(tmp_path / "store", after, unit, grow=True)
    store = grown.store
    assert store.num_rows > had
    assert grown.jobs[0].harvest.digest == digest  # what it has stays its own
    kept = {u for u in old if small.store.info.units.name(u) == store.info.units.name(u)}
    assert {result.unit for result in grown.run()} == set(range(store.info.num_units)) - kept
    assert {
        path.stem: path.read_bytes() for path in (store.path / "commits").rglob("0*.json")
    }.items() >= commits.items()
    oracle = planned_larger(after, unit)
    assert contents(store) == contents(oracle)
    assert told(store) == told(oracle)
    np.testing.assert_array_equal(store.read(SITES[0]), oracle.read(SITES[0]))


def test_a_store_that_grows_twice_keeps_every_full_unit(
    tmp_path: Path, start: Callable[..., Harvesting], planned_larger: Callable[..., Store]
) -> None:
    did = []
    for table in (([0], 2500), ([0, 1], 3300), ([0, 1], None)):
        harvesting = start(tmp_path / "store", table, grow=True)
        did.append([result.unit for result in harvesting.run()])
    assert did == [[0, 1, 2], [2, 3], [3, 4, 5, 6, 7]]
    assert contents(harvesting.store) == contents(planned_larger(([0, 1], None), 1024))


def test_growing_does_not_change_what_is_compiled(start: Callable[..., Harvesting], tmp_path: Path) -> None:
    """`auto` looks at the rows of the first table: a harvest that is compiled or not stays so."""
    small = start(tmp_path / "store", ([0], 1100))
    limit = 2 * 12 * small.info.d_model**2 * small.info.num_layers * 1500
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(settings.COMPILE_FROM_FLOPS, "cpu", limit)
        assert not small.jobs[0].setup.compile
        grown = start(tmp_path / "store", ([0], 2600), grow=True)
        assert grown.jobs[0].harvest == small.jobs[0].harvest
        assert not grown.jobs[0].setup.compile


# ---- segments


def test_each_entry_is_shuffled_by_itself(start: Callable[..., Harvesting], tmp_path: Path) -> None:
    """The rows of an entry are those that it gives alone, whatever is before it; a cut goes through the last."""
    both = start(tmp_path / "both", ([0, 1], None)).store
    alone = [start(tmp_path / str(n), ([n], None)).store for n in (0, 1)]
    assert [s["rows"] for s in both.info.segments] == [store.num_rows for store in alone]
    assert [s["documents"] for s in both.info.segments] == [store.info.num_documents for store in alone]
    tokens = [store.columns(0, store.num_rows, ["token"])["token"] for store in alone]
    np.testing.assert_array_equal(both.columns(0, both.num_rows, ["token"])["token"], np.concatenate(tokens))
    assert both.documents.column("source").to_pylist()[-1].startswith("1.parquet:")
    cut = start(tmp_path / "cut", ([0, 1], alone[0].num_rows + 100)).store
    assert [s["rows"] for s in cut.info.segments] == [alone[0].num_rows, 100]


@pytest.mark.parametrize("cuts", [Cuts(), Cuts(task_bytes=2000, bucket_bytes=3000)])
def test_a_table_is_the_beginning_of_the_one_with_more_rows(llama: Path, files: list[Path], cuts: Cuts) -> None:
    """However the corpora and their keys are cut, and wherever the table ends."""

    def tokens(paths: Sequence[Path], rows: int | None) -> list[int]:
        corpus = CorpusSettings(path=tuple(map(str, paths)), context=64, rows=rows)
        source = open_source(corpus, ModelSettings(id=str(llama)), 400, "main")
        plan = plan_rows(source, lambda done, total: None, Here(), cuts)
        return [t for bucket in plan.buckets for t in row_column(bucket.documents, "token", plan.sizes).tolist()]

    whole = tokens(files, None)
    first = len(tokens(files[:1], None))
    for rows in (1, 5, 63, 64, first - 1, first, first + 1, len(whole) - 1, len(whole)):
        assert tokens(files, rows) == whole[:rows]
    assert tokens(files[:2], None) == whole[: len(tokens(files[:2], None))]


# ---- what is refused, and said


@pytest.fixture
def growing(lab: Lab, files: list[Path]) -> Lab:
    """A store of 1,500 rows of the first file, one site, all harvested; and its spec."""
    (lab.folder / "texts").mkdir()
    shutil.copy(files[0], lab.folder / "texts")
    changes = {"corpus.path": ["texts"], "corpus.rows": 1500, "harvest.sites": list(SITES)}
    base = Lab(lab.folder, changed(lab.base, changes), lab.capsys)
    options = {k: v for k, v in base.base["corpus"].items() if k not in ("path", "labels")}
    folder = lab.folder / "texts"
    start_harvest(lab.store, Path(base.base["model"]["id"]), folder, SITES, **options).run()
    return base


def test_more_rows_are_refused_unless_asked_for(growing: Lab, files: list[Path], no_ray: None) -> None:
    larger = growing.spec({"corpus.rows": 2000})
    err = growing.refused("harvest", larger)
    assert "corpus.rows: 1500 in the store, 2000 in the spec. `--grow` appends 500 rows to the store; or give" in err
    assert "`--grow` appends the rest of the corpus" in growing.refused("run", growing.spec({"corpus.rows": GONE}))
    two = {"corpus.path": ["texts", str(files[1])], "corpus.rows": GONE}
    assert "`--grow` appends the rows of 1 more entry" in growing.refused("harvest", growing.spec(two))
    for verb, section in (("anchors", "anchors"), ("train", "train")):
        train = {**TRAIN, "dictionaries": [{**TRAIN["dictionaries"][0], "input": list(SITES)}]}
        more = {"corpus.rows": 2000, "anchors": {"name": "a", "by": ["language"]}, "train": train}
        err = growing.refused(verb, growing.spec(more))
        assert "`granary harvest --grow` appends rows to it" in err, section


def test_what_is_no_continuation_is_refused_with_grow_too(growing: Lab, files: list[Path], no_ray: None) -> None:
    for changes, words in [
        ({"corpus.rows": 1400}, "corpus.rows: 1500 in the store, 1400 in the spec"),
        ({"corpus.rows": 2000, "corpus.seed": 1}, "corpus.seed: 0 in the store, 1 in the spec"),
        ({"corpus.path": [str(files[1]), "texts"], "corpus.rows": 2000}, "corpus.path: "),
        ({"corpus.path": str(files[1]), "corpus.rows": 2000}, "corpus.path: "),
        ({"corpus.rows": 10**6}, "corpus.rows asks for 1,000,000 rows and the corpus has"),
        ({"corpus.path": ["texts", "texts/0.parquet"], "corpus.rows": 2000}, "its rows would be there twice"),
    ]:
        err = growing.refused("harvest", growing.spec(changes), "--grow")
        assert words in err
        assert "--grow" not in err
    shutil.copy(files[1], growing.folder / "texts")
    spec = growing.spec({"corpus.rows": 2000})
    assert "New files are an entry of their own, corpus.path: [the stored ones, the new ones]" in growing.refused(
        "harvest", spec, "--grow"
    )


def test_sources_that_only_look_the_same_are_refused(growing: Lab, files: list[Path]) -> None:
    """The same fingerprint with other texts: found when the rows are compared, and nothing has changed."""
    spec = growing.spec({"corpus.rows": 2000})
    shutil.copy(files[1], growing.folder / "texts" / "0.parquet")
    stored = open_store(growing.store).info.plan["source"][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.plan.source.fingerprint", lambda files: stored)
        err = growing.refused("harvest", spec, "--grow")
    assert "are not the first of those that the spec gives: " in err
    for words in ("or this version of Granary reads a record otherwise", "nothing was appended"):
        assert words in err


def test_streamed_datasets_do_not_grow(growing: Lab) -> None:
    store = open_store(growing.store)
    streamed = {"dataset": "d", "subset": None, "split": "train"}
    store = Store(store.root, replace(store.info, plan={**store.info.plan, "source": [streamed]}))
    with pytest.raises(StoreMismatch, match="Give the spec the stored values"):
        growth_of(store, {**store.info.plan, "rows": 2000})


def test_plan_and_status_tell_of_growth(growing: Lab, files: list[Path], start: Callable[..., Harvesting]) -> None:
    two = {"corpus.path": ["texts", str(files[1])], "corpus.rows": 4000}
    spec = growing.spec(two)
    assert "2,500 of them would be appended by `granary harvest --grow`" in growing.run("plan", spec, "--grow")
    assert json.loads(growing.run("plan", spec, "--json"))["rows_to_append"] == 2500
    assert "would be appended" not in growing.run("plan", growing.spec())
    loaded = load_spec(growing.spec(two))
    ensure_rows(loaded.store, loaded.corpus, loaded.model, grow=True)
    out = growing.run("status", growing.store)
    assert "1 of 4 units" in out
    assert "grown     from 1,500 rows" in out
    assert out.count("segment ") == 2
    assert "would be appended" not in growing.run("plan", spec)
    units = json.loads(
        "["
        + ",".join(growing.run("query", growing.store, "select unit, committed from units", "--json").splitlines())
        + "]"
    )
    assert [u["committed"] for u in units] == [True, False, False, False]


def test_what_was_made_from_fewer_rows_is_not_taken_for_more(growing: Lab) -> None:
    store = open_store(growing.store)
    by_language = AnchorSettings(name="languages", by=("language",), min_rows=10)
    make_anchors(store, by_language, SITES)
    dictionary = DictionarySettings(name="sae", input=SITES, latents=64, anchors="languages")
    train = TrainSettings(rows=1024, batch_rows=512, threads=1, dictionaries=(dictionary,))
    open_run(store, "sae").begin(plan_training(store, train).dictionaries[0].identity, {})
    harvesting = start_harvest(
        growing.store, Path(growing.base["model"]["id"]), growing.folder / "texts", SITES, rows=2000, grow=True
    )
    harvesting.run()
    grown = "the 1,500 rows that the store had before it grew to 2,000"
    with pytest.raises(
        StoreMismatch, match=f"anchors 'languages' are in the store, made of {grown}. Give the new ones"
    ):
        make_anchors(harvesting.store, by_language, SITES)
    with pytest.raises(StoreMismatch, match=f"the anchors 'languages' were made of {grown}: make those of all rows"):
        plan_training(harvesting.store, train)
    unanchored = dictionary.model_copy(update={"anchors": None})
    with pytest.raises(StoreMismatch, match=f"the run 'sae' is in the store, begun on {grown}. Give the dictionary"):
        plan_training(harvesting.store, train.model_copy(update={"dictionaries": (unanchored,)}))
    assert len(read_anchors(harvesting.store, "languages").values) == 3
    other = train.model_copy(update={"dictionaries": (unanchored.model_copy(update={"name": "new"}),)})
    assert plan_training(harvesting.store, other).dictionaries
