"""A condition reads the columns that it names, and finds the rows that it finds among all columns."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from conftest import corpus_info, plan_table, save_no_tokenizer

from storage.errors import StorageError
from storage.format.arrays import Array
from storage.make.create import create_store
from storage.sql.conditions import Conditions
from storage.store import Store

ROWS = {"token", "position", "document", "context"}
DOCUMENTS = {"row_start", "row_stop", "source", "language", "Kind", "meta.source", "about", "url"}


class Recording(Store):
    """A store that notes the columns which are asked of it; None stands for all."""

    asked: list[Sequence[str] | None]

    def columns(self, start: int, stop: int, names: Sequence[str] | None = None) -> dict[str, Array]:
        self.asked.append(names)
        return super().columns(start, stop, names)

    def documents_between(self, first: int, last: int, names: Sequence[str] | None = None) -> pa.Table:
        self.asked.append(names)
        return super().documents_between(first, last, names)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    table = plan_table(num_rows=400, num_documents=40)
    documents = table.documents
    for name, values in {
        "Kind": [f"kind {i % 4}" for i in range(40)],
        "meta.source": [("book", "web")[i % 2] for i in range(40)],
        "about": [{"year": 1980 + i % 5, "url": f"u{i}"} for i in range(40)],
        "url": [f"https://example.org/{i}" for i in range(40)],
    }.items():
        documents = documents.append_column(name, pa.array(values))
    table = replace(table, documents=documents)
    made = create_store(
        tmp_path_factory.mktemp("columns") / "store", table, corpus_info(table, rows_per_unit=32), save_no_tokenizer
    )
    return Recording(made.root, made.info)


@pytest.mark.parametrize(
    ("conditions", "of_rows", "of_documents"),
    [
        (["language = 'de'"], {"document"}, {"language"}),
        (["LANGUAGE = 'de' and rows.Token > 100"], {"document", "token"}, {"language"}),
        (["documents.kind = 'kind 1'"], {"document"}, {"Kind"}),
        (["token in (5, 6, 7, 8)"], {"document", "token"}, set()),
        (["row % 3 = 0", "position < 4"], {"document", "position"}, set()),
        (["document = 3"], {"document"}, set()),
        (["\"meta.source\" = 'book'"], {"document"}, {"meta.source"}),
        (["about.year = 1981"], {"document"}, {"about"}),
        (["struct_extract(documents.about, 'url') = 'u3'"], {"document"}, {"about"}),
        (["list_contains(list_transform([1, 2], lambda x: x + position), 5)"], {"document", "position"}, set()),
        (["case when source = 'made up:3' then true end"], {"document"}, {"source"}),
        (["row_stop - row_start > 9"], {"document"}, {"row_start", "row_stop"}),
        (["true"], {"document"}, set()),
        (["documents::varchar like '%u3%'"], ROWS, DOCUMENTS),
        (["to_json(rows)::varchar like '%7%'"], ROWS, DOCUMENTS),
        (["coalesce(*COLUMNS('^ur.')) = 'https://example.org/3'"], ROWS, DOCUMENTS),
    ],
)
def test_what_is_read(store: Recording, conditions: list[str], of_rows: set[str], of_documents: set[str]) -> None:
    store.asked = []
    checked = Conditions(store, conditions)
    store.asked = []
    found = checked.rows(10, 390)
    rows, documents = store.asked
    assert (ROWS if rows is None else {*rows}) == of_rows
    assert (DOCUMENTS if documents is None else {*documents}) - {"document"} == of_documents
    for condition, numbers in zip(conditions, found, strict=True):
        query = f"select row from rows join documents using (document) where row between 10 and 389 and ({condition})"
        expected = np.sort(store.sql(query).fetchnumpy()["row"])
        assert len(expected)
        np.testing.assert_array_equal(numbers, expected)


def test_a_failure_at_some_row_still_tells_every_column(store: Recording) -> None:
    store.asked = []
    checked = Conditions(store, ["case when row > 200 then language::int end = 3"])
    with pytest.raises(StorageError, match=r"Conversion Error.*Columns: row, token, .*language, Kind, \"meta.source\""):
        checked.rows(200, 300)
