"""Anchors of conditions, of top rows and contexts, and of given vectors: against means taken by hand, and refused."""

import shutil
from functools import reduce
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_store
from lab import snapshot
from safetensors.torch import save_file

from jobs.spec.spec import SpecError, parse_spec
from pipeline.errors import InputError
from storage.errors import StorageError, StoreMismatch
from storage.results.anchors import AnchorSet, anchor_names, read_anchors
from storage.sql.conditions import Conditions, check_condition
from storage.store import Store, open_store
from workers.anchors import means as row_means
from workers.anchors.means import BLOCK_UNITS, TrainingRows
from workers.anchors.stage import make_anchors
from workers.anchors.top_rows import Best
from workers.settings.anchors import AnchorSettings
from workers.stages import anchors

SITES = ("resid_post.0", "mlp_out.0")
SITE = SITES[0]
NUM_ROWS, TRAINING, WIDTH = 4000, 3616, 5
"""113 units of 32 rows are trained on: 8 blocks."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("written") / "store", num_rows=NUM_ROWS, held_out_start=TRAINING)


@pytest.fixture
def store(tmp_path: Path, written: Store) -> Store:
    return open_store(shutil.copytree(written.path, tmp_path / "store"))


def settings(**source: Any) -> AnchorSettings:
    return AnchorSettings.model_validate({"name": "set", **source})


def wide(store: Store, site: str) -> np.ndarray:
    """The training rows of a site in float64."""
    return store.read(site).astype(np.float64)[:TRAINING]


def column(store: Store, name: str) -> np.ndarray:
    return store.columns(0, TRAINING, [name])[name]


def language(store: Store) -> np.ndarray:
    values = np.array(store.documents.column("language").to_pylist())
    return values[column(store, "document")]


def assert_means(store: Store, made: AnchorSet, members: list[np.ndarray]) -> None:
    """`members`: a mask over the training rows for each anchor."""
    assert made.counts == [int(mask.sum()) for mask in members]
    assert made.vectors.keys() == set(SITES)
    for site in SITES:
        x = wide(store, site)
        expected = np.stack([x[mask].mean(axis=0) - x.mean(axis=0) for mask in members])
        assert made.vectors[site].dtype == np.float32
        np.testing.assert_allclose(made.vectors[site], expected, rtol=1e-6, atol=1e-9)


def files_of(store: Store) -> dict[str, str]:
    return snapshot(store.path / "anchors")


# ---- means by hand


def test_conditions(store: Store) -> None:
    where = {
        "german": "language = 'de'",
        "early English": "documents.language = 'en' and position < 10 -- a comment",
        "token": "token % 7 = 0 or token in (5, 6)",
    }
    made = anchors(store, settings(where=where, min_rows=10), SITES).anchors
    token, position = column(store, "token"), column(store, "position")
    masks = [
        language(store) == "de",
        (language(store) == "en") & (position < 10),
        (token % 7 == 0) | np.isin(token, (5, 6)),
    ]
    assert_means(store, made, masks)
    assert made.values == list(where)
    assert made.labels == ["where"] * 3


def test_a_condition_that_is_null_does_not_hold(store: Store) -> None:
    made = make_anchors(store, settings(where={"a": "nullif(language, 'de') = 'en'"}, min_rows=10), SITES)
    assert_means(store, made, [language(store) == "en"])


def test_an_empty_unit_and_a_row_each_in_several_subpopulations(store: Store) -> None:
    where = {"one": "row = 700", "two": "row in (700, 3000)", "held out": "row >= 3610"}
    made = make_anchors(store, settings(where=where, min_rows=1), SITES)
    rows = np.arange(TRAINING)
    assert_means(store, made, [rows == 700, np.isin(rows, (700, 3000)), rows >= 3610])


def directions(count: int = 4) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, WIDTH))


def test_top_rows(store: Store, tmp_path: Path) -> None:
    np.save(tmp_path / "directions.npy", directions())
    top = {"directions": str(tmp_path / "directions.npy"), "site": SITE, "rows": 37}
    made = make_anchors(store, settings(top=top), SITES)
    scores = (wide(store, SITE) - wide(store, SITE).mean(axis=0)) @ directions().T  # centred: the same rows
    masks = [np.isin(np.arange(TRAINING), np.argsort(-scores[:, i])[:37]) for i in range(4)]
    assert_means(store, made, masks)
    assert made.values == ["0", "1", "2", "3"]


def test_top_contexts(store: Store, tmp_path: Path) -> None:
    """A context belongs by its highest training row, and then with all its training rows."""
    np.save(tmp_path / "directions.npy", directions())
    top = {"directions": str(tmp_path / "directions.npy"), "site": SITES[1], "contexts": 9}
    made = make_anchors(store, settings(top=top), SITES)
    scores, context = wide(store, SITES[1]) @ directions().T, column(store, "context")
    masks = []
    for i in range(4):
        peaks = {int(c): scores[context == c, i].max() for c in np.unique(context)}
        masks.append(np.isin(context, sorted(peaks, key=lambda c: -peaks[c])[:9]))
    assert_means(store, made, masks)


def test_top_rows_of_another_set_of_anchors(store: Store) -> None:
    where = {"de": "language = 'de'", "fr": "language = 'fr'"}
    first = make_anchors(store, settings(where=where, min_rows=1), SITES)
    top = AnchorSettings.model_validate({"name": "top", "top": {"directions": "set", "site": SITE, "rows": 50}})
    made = make_anchors(store, top, SITES)
    assert made.values == ["de", "fr"]
    scores = wide(store, SITE) @ first.vectors[SITE].astype(np.float64).T
    assert_means(store, made, [np.isin(np.arange(TRAINING), np.argsort(-scores[:, i])[:50]) for i in range(2)])


def test_equal_scores_go_to_the_earlier_row() -> None:
    score = np.array([1, 3, 3, 2, 3], dtype=np.float32)
    numbers = np.array([9, 7, 5, 1, 8])
    parts = [Best(score[[i]], numbers[[i]]) for i in range(5)]
    for order in permutations(parts):
        best = reduce(lambda some, part: some.with_(part, 2), order, Best.none())
        assert best.number.tolist() == [5, 7]


def test_a_context_in_two_parts_counts_once_by_its_peak() -> None:
    one = Best(np.float32([5, 4]), np.array([1, 2]))
    other = Best(np.float32([7, 6]), np.array([2, 3]))
    assert one.with_(other, 3).number.tolist() == other.with_(one, 3).number.tolist() == [2, 3, 1]
    assert one.with_(other, 3).score.tolist() == [7, 6, 5]


@pytest.mark.parametrize("calls", [7, *(pytest.param(calls, marks=pytest.mark.slow) for calls in (3, 100))])
def test_the_bytes_do_not_depend_on_the_number_of_calls(
    store: Store, tmp_path: Path, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_means, "SLAB_BYTES", 8 * WIDTH * 16)  # two slabs a unit
    np.save(tmp_path / "directions.npy", directions())
    top = {"directions": str(tmp_path / "directions.npy"), "site": SITE}
    sets = [
        {"name": "where", "where": {"de": "language = 'de'", "few": "token < 9"}, "min_rows": 1},
        {"name": "rows", "top": {**top, "rows": 300}},
        {"name": "contexts", "top": {**top, "contexts": 20}},
    ]
    blocks = -(-TRAINING // (32 * BLOCK_UNITS))
    assert blocks == 8
    assert [len(TrainingRows.of(store).calls(n)) for n in (1, 3, 7, 100)] == [1, 3, 7, 8]
    written = []
    for number in (1, calls):
        for one in sets:
            make_anchors(store, AnchorSettings.model_validate(one), SITES, most_calls=number)
        written.append(files_of(store))
        for name in anchor_names(store):
            (store.path / "anchors" / name / "anchors.json").unlink()
    assert written[0] == written[1]
    assert len(written[0]) > 9


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_given_vectors(store: Store, tmp_path: Path, dtype: str) -> None:
    given = directions().astype(dtype)
    np.save(tmp_path / "vectors.npy", given)
    made = make_anchors(store, settings(vectors=str(tmp_path / "vectors.npy"), names=list("abcd")), SITES)
    for site in SITES:
        np.testing.assert_array_equal(made.vectors[site], given.astype(np.float32))
    assert (made.values, made.counts, made.labels) == (list("abcd"), [0] * 4, ["vectors"] * 4)
    assert read_anchors(store, "set").vectors.keys() == set(SITES)


def test_given_vectors_for_some_sites(store: Store, tmp_path: Path) -> None:
    given = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({SITE: given}, tmp_path / "vectors.safetensors")
    result = anchors(store, settings(vectors=str(tmp_path / "vectors.safetensors")), SITES)
    assert result.anchors.vectors.keys() == {SITE}
    np.testing.assert_array_equal(result.anchors.vectors[SITE], given.float().numpy())
    assert not anchors(store, settings(vectors=str(tmp_path / "vectors.safetensors")), SITES).made


# ---- the same and another


def test_a_set_is_made_once_and_another_of_its_name_is_refused(store: Store, tmp_path: Path) -> None:
    where = settings(where={"de": "language = 'de'"}, min_rows=1)
    np.save(tmp_path / "v.npy", directions())
    top = {"directions": str(tmp_path / "v.npy"), "site": SITE, "rows": 5}
    vectors = AnchorSettings.model_validate({"name": "given", "vectors": str(tmp_path / "v.npy")})
    strongest = AnchorSettings.model_validate({"name": "top", "top": top})
    for one in (where, vectors, strongest):
        assert anchors(store, one, SITES).made
        assert not anchors(open_store(store.path), one, SITES).made
    before = files_of(store)
    others: list[tuple[AnchorSettings, str]] = [
        (settings(where={"de": "language = 'fr'"}, min_rows=1), "where: "),
        (settings(where={"de": "language = 'de'"}, min_rows=2), "min_rows: 1 in the store, 2 in the spec"),
        (strongest.model_copy(update={"name": "set"}), "top: "),
        (vectors.model_copy(update={"name": "top"}), "vectors: "),
        (AnchorSettings.model_validate({"name": "top", "top": {**top, "rows": 6}}), r"top\.rows: 5"),
        (AnchorSettings.model_validate({"name": "top", "top": {**top, "site": SITES[1]}}), r"top\.site"),
    ]
    for other, words in others:
        with pytest.raises(StoreMismatch, match=f"anchors '{other.name}' are in the store, made otherwise: .*{words}"):
            anchors(store, other, SITES)
    (tmp_path / "moved").mkdir()
    np.save(tmp_path / "moved" / "v.npy", directions())  # the same numbers in another place
    assert not anchors(store, vectors.model_copy(update={"vectors": str(tmp_path / "moved" / "v.npy")}), SITES).made
    np.save(tmp_path / "v.npy", 2 * directions())
    for one in (vectors, strongest):
        with pytest.raises(StoreMismatch, match="made otherwise"):
            anchors(store, one, SITES)
    assert files_of(store) == before


def test_a_set_grows_by_sites(store: Store) -> None:
    where = settings(where={"de": "language = 'de'", "fr": "language = 'fr'"}, min_rows=1)
    assert anchors(store, where, SITES[:1]).made
    assert anchors(store, where, SITES).made
    masks = [language(store) == "de", language(store) == "fr"]
    assert_means(store, read_anchors(store, "set"), masks)
    other = settings(where={"fr": "language = 'fr'", "de": "language = 'de'"}, min_rows=1)
    with pytest.raises(StoreMismatch):  # the anchors would be in another order
        anchors(store, other, SITES)


# ---- refused


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("language = ", "is no condition in SQL"),
        ("", "cannot be asked of the rows"),
        ("true; drop table rows", "is no condition in SQL"),
        ("true); drop table rows; select (1", "is (no condition|more than)"),
        ("true) limit (3", "is more than a condition"),
        ("true) union select row from rows where (true", "is more than a condition"),
        ("true) group by (row", "is more than a condition"),
        ("document in (select document from documents)", "has a sub-select"),
        ("exists (select 1)", "has a sub-select"),
        ("token = ?", "has a parameter"),
        ("token = $most", "has a parameter"),
        ("random() < 0.5", "random is not the same at all times"),
        ("row < 5 and Now() > '2020-01-01'", "now is not the same at all times"),
        ("current_timestamp > '2020-01-01'", "current_timestamp is not the same at all times"),
        ("lang = 'de'", r'"lang" not found.*Columns: row, token, .*language'),
        ("token", "it gives INTEGER, not true or false"),
        ("'yes'", "it gives VARCHAR, not true or false"),
        ("(true, false)", "cannot be asked of the rows"),
        ("count(*) > 1", "cannot be asked of the rows"),
        ("row_number() over () = 1", "cannot be asked of the rows"),
        ("language = 'de' and token = 'x'", "cannot be asked of the rows: .*Could not convert"),
    ],
)
def test_conditions_that_are_refused(written: Store, condition: str, words: str) -> None:
    with pytest.raises(StorageError, match=words) as caught:
        Conditions(written, [condition])
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"anchors 'set': where\.odd: "):
        anchors(written, settings(where={"sound": "language = 'de'", "odd": condition}, min_rows=1), SITES)
    assert anchor_names(written) == []


def test_a_condition_that_fails_at_some_row(store: Store) -> None:
    with pytest.raises(StorageError, match=r"cannot be asked of the rows: Conversion Error"):
        make_anchors(store, settings(where={"a": "case when row > 2000 then language::int end = 3"}, min_rows=1), SITES)
    assert anchor_names(store) == []


@pytest.mark.parametrize("condition", ["language = 'de'", "(a or b) and c", "list_contains([1, 2], token)", "a\n-- b"])
def test_conditions_whose_columns_may_be_unknown(condition: str) -> None:
    check_condition(condition)


def test_subpopulations_that_are_too_small(store: Store) -> None:
    where = {"none": "language = 'nl'", "few": "row < 3", "fine": "language = 'de'", "all": "true"}
    with pytest.raises(InputError, match=r"of 3,616 training rows none has 0, few has 3, all has 3,616; .* least 10 "):
        anchors(store, settings(where=where, min_rows=10), SITES)
    with pytest.raises(InputError, match=r"fine has \d+.* at least 5,000"):
        anchors(store, settings(where=where, min_rows=5000), SITES)
    assert anchor_names(store) == []


def bad_files(folder: Path) -> dict[str, tuple[str, str]]:
    """Name -> the file, and what is said of it."""
    vectors = directions().astype(np.float32)
    arrays: dict[str, np.ndarray] = {
        "nan": np.where(np.arange(20).reshape(4, 5) == 7, np.nan, vectors),
        "infinite": np.where(np.arange(20).reshape(4, 5) == 7, np.inf, vectors),
        "large": np.where(np.arange(20).reshape(4, 5) == 7, 1e300, directions()),
        "zero": vectors * (np.arange(4) != 1)[:, None],
        "flat": vectors[0],
        "empty": vectors[:0],
        "narrow": vectors[:, :3],
        "words": np.array([["a"] * 5]),
        "complex": vectors * 1j,
        "objects": np.array([[{}] * 5]),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "cut.npy").write_bytes((folder / "nan.npy").read_bytes()[:-8])
    (folder / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    save_file({}, folder / "none.safetensors")
    expected = {
        "nan.npy": "first in row 1",
        "infinite.npy": "first in row 1",
        "large.npy": "first in row 1",
        "zero.npy": "row 1 is zero",
        "flat.npy": r"has shape \[5\]: expected \[vectors, d_model\]",
        "empty.npy": r"has shape \[0, 5\]",
        "narrow.npy": "are 3 wide and resid_post.0 is 5",
        "words.npy": "holds <U1: vectors are real numbers",
        "complex.npy": "holds complex",
        "objects.npy": "cannot be read",
        "cut.npy": "cannot be read",
        "cut.safetensors": "cannot be read",
        "none.safetensors": "has no tensors",
        "absent.npy": "no file .*absent.npy",
    }
    return {name: (str(folder / name), words) for name, words in expected.items()}


def test_files_that_are_refused(store: Store, tmp_path: Path) -> None:
    for file, words in bad_files(tmp_path).values():
        with pytest.raises(InputError, match=rf"anchors 'set': .*{words}"):
            anchors(store, settings(vectors=file), SITES)
        with pytest.raises(InputError, match=rf"anchors 'set': .*{words}"):
            anchors(store, settings(top={"directions": file, "site": SITE, "rows": 5}), SITES)
    assert anchor_names(store) == []


def test_directions_and_vectors_that_do_not_fit_the_store(store: Store, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", directions())
    file = str(tmp_path / "v.npy")
    save_file({"resid_post.9": torch.ones(2, WIDTH)}, tmp_path / "other.safetensors")
    save_file({SITE: torch.ones(2, WIDTH), SITES[1]: torch.ones(3, WIDTH)}, tmp_path / "uneven.safetensors")
    many = 100_000
    for source, words in (
        ({"vectors": str(tmp_path / "other.safetensors")}, "tensors for resid_post.9, which are none of .* sites"),
        ({"vectors": str(tmp_path / "uneven.safetensors")}, "as many vectors for every site"),
        ({"vectors": file, "names": ["a"]}, "1 names for the 4 vectors of"),
        ({"top": {"directions": file, "site": "resid_post.9"}}, r"top: resid_post\.9 is not in the store"),
        ({"top": {"directions": "absent", "site": SITE}}, "top: no anchors named 'absent'"),
        ({"top": {"directions": str(tmp_path / "other.safetensors"), "site": SITE}}, "no directions for top.site"),
        ({"top": {"directions": file, "site": SITE, "rows": many}}, "asks for 100,000 rows and the store has 3,616"),
        ({"top": {"directions": file, "site": SITE, "contexts": many}}, "asks for 100,000 contexts and the store has"),
    ):
        with pytest.raises(InputError, match=f"anchors 'set': .*{words}"):
            anchors(store, settings(**source), SITES)
    assert anchor_names(store) == []


def test_activations_that_are_nan(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", dtype="float32")
    array = store.array(SITE)
    rows = array.read(32, 40)
    rows[3, 2] = np.nan
    array.write(32, rows)
    np.save(tmp_path / "v.npy", directions())
    top = {"directions": str(tmp_path / "v.npy"), "site": SITE, "rows": 5}
    for source in ({"where": {"a": "row between 30 and 40"}, "min_rows": 1}, {"top": top}):
        with pytest.raises(InputError, match=r"resid_post\.0 holds nan or infinity, first in row 35"):
            make_anchors(open_store(store.path), settings(**source), SITES)
    assert anchor_names(store) == []


# ---- the spec

SPEC: dict[str, Any] = {
    "store": "store",
    "model": {"id": "gpt"},
    "corpus": {"path": "d.parquet", "labels": ["language"]},
    "harvest": {"sites": list(SITES)},
}
DICTIONARY = {"name": "sae", "input": SITE, "latents": 64}
WHERE = {"name": "w", "where": {"de": "language = 'de'"}}
TOP = {"name": "t", "top": {"directions": "w", "site": "resid_post.0", "rows": 5}}


def mistakes(**sections: Any) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(SPEC | sections, Path("/specs"))
    return str(caught.value)


def test_one_set_or_several() -> None:
    by = {"name": "b", "by": "language"}
    for given, names, scored in (
        (by, ["b"], ["b"]),
        (WHERE, ["w"], ["w"]),
        ([WHERE, by, TOP], ["w", "b", "t"], ["w", "b"]),
    ):
        spec = parse_spec(SPEC | {"anchors": given}, Path("/specs"))
        assert [anchors.name for anchors in spec.anchors] == names
        assert [anchors.name for anchors in spec.scored_anchors] == scored
        again = parse_spec(spec.model_dump(mode="json"), Path("/elsewhere"))  # as `granary submit` sends it
        assert again == spec
    parse_spec(SPEC | {"anchors": [WHERE, by], "train": {"dictionaries": [{**DICTIONARY, "anchors": "b"}]}}, Path("/"))


def test_files_are_found_beside_the_spec() -> None:
    sets = [
        {"name": "v", "vectors": "v.npy"},
        {"name": "t", "top": {"directions": "data/t.safetensors", "site": SITE}},
        {"name": "u", "top": {"directions": "v", "site": SITE, "contexts": 3}},
        {"name": "s", "vectors": "s3://bucket/v.npy"},
    ]
    spec = parse_spec(SPEC | {"anchors": sets}, Path("/specs"))
    assert [a.files for a in spec.anchors] == [
        ("/specs/v.npy",), ("/specs/data/t.safetensors",), (), ("s3://bucket/v.npy",),
    ]  # fmt: skip
    assert spec.anchors[2].top is not None
    assert (spec.anchors[2].top.directions, spec.anchors[2].top.count) == ("v", 3)


@pytest.mark.parametrize(
    ("anchors", "words"),
    [
        ({"name": "a"}, "anchors: anchors are made of one of by, where, top and vectors; none is given"),
        ({"name": "a", "by": []}, "none is given"),
        ({**WHERE, "by": "language"}, "by and where are given"),
        ([WHERE, {"name": "a"}], "anchors[1]: anchors are made of one of"),
        ([WHERE, WHERE], "anchors: sets need different names; w is used twice"),
        ([WHERE, {"name": "a", "by": "lang"}], "anchors[1].by: 'lang' is not one of corpus.labels (language)"),
        ({"name": "a", "where": {"b": "true; drop table rows"}}, "anchors.where.b: 'true; drop table rows' is no"),
        ([{"name": "a", "where": {"b": "random() > 0"}}], "anchors.where.b: 'random() > 0' depends on more"),
        ({"name": "a", "where": {"": "true"}}, "the subpopulation of 'true' has no name"),
        ({"name": "a", "where": {"b": 3}}, "anchors.where.b must be text, not 3"),
        ({"name": "a", "vectors": "v.pt"}, "a file ending in .npy or .safetensors, not 'v.pt'"),
        ({"name": "a", "vectors": "v.npy", "min_rows": 3}, "min_rows is about by and where"),
        ({"name": "a", "vectors": "v.npy", "names": ["x", "x"]}, "names must differ"),
        ({**WHERE, "names": ["x"]}, "names are those of vectors"),
        ({"name": "a", "top": {"directions": "v.npy"}}, "anchors.top.site is missing"),
        ({"name": "a", "top": {"directions": "v.npy", "site": SITE, "row": 3}}, "unknown key anchors.top.row: did you"),
        ({"name": "a", "top": {"directions": "v.npy", "site": "mlp_in.0"}}, "anchors.top.site: mlp_in.0 is not one of"),
        (
            {"name": "a", "top": {"directions": "v.npy", "site": SITE, "rows": 3, "contexts": 3}},
            "anchors.top: rows and contexts are both given",
        ),
    ],
)
def test_specs_that_are_refused(anchors: Any, words: str) -> None:
    assert words in mistakes(anchors=anchors)


def test_a_dictionary_anchored_to_no_set() -> None:
    err = mistakes(anchors=[WHERE], train={"dictionaries": [{**DICTIONARY, "anchors": "v"}]})
    assert "train.dictionaries[0].anchors: no anchor set 'v' ('w')" in err
