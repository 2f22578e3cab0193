"""Queries that cannot be answered are refused in words, and leave no file."""

import pytest
from lab import SITE, Lab

pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("selec 1", "syntax error at or near"),
        ("select * from grain", "Table with name grain does not exist!"),
        ("select * from store", "Table with name store does not exist!"),  # a variable of ours, no table
        ("select grain from rows", 'Referenced column "grain" not found'),
        ("select cast(language as int) from documents", "Could not convert string 'fr' to INT32"),
    ],
)
@pytest.mark.parametrize("options", [(), ("--json",), ("--site", SITE, "--out", "x.npy")])
def test_bad_sql(
    stored: Lab, query: str, expected: str, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stored.folder)
    err = stored.refused("query", stored.store, query, *options, lines=None)
    assert err.startswith("granary: the query failed: ")
    assert expected in err
    assert err.endswith("\nTables: documents, rows, tokens, units, sites\n")
    assert "Did you mean" not in err


def test_sql_that_is_no_select(stored: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "granary: a store is read-only: ask it with one SELECT\n"
    monkeypatch.chdir(stored.folder)
    for query in (
        "",
        "-- nothing",
        "create table mine (a int)",
        "drop table documents",
        "insert into documents select * from documents",
        "copy (select 1) to 'mine.csv'",
        "attach 'mine.db'",
        "select 1; select 2",
    ):
        assert stored.refused("query", stored.store, query) == expected


def test_what_duckdb_says_of_tables_is_a_select_too(stored: Lab) -> None:
    assert "language" in stored.run("query", stored.store, "describe documents")
    assert "physical_plan" in stored.run("query", stored.store, "explain select count(*) from documents")
    assert "fr" in stored.run("query", stored.store, "pivot documents on language using count(*) group by year")


@pytest.mark.parametrize(
    ("query", "out", "site", "expected"),
    [
        ("select row from rows", "x.csv", SITE, "--out ends in one of .npy, .safetensors, .parquet, not 'x.csv'"),
        ("select row from rows", "x", SITE, "--out ends in one of .npy, .safetensors, .parquet, not 'x'"),
        ("select row from rows", "no/x.npy", SITE, "the folder no does not exist: make it, or give --out another"),
        ("select row from rows", "x.npy", "resid_post.2", "resid_post.2 is not in the store; it has resid_post.1, "),
        ("select token from rows", "x.npy", SITE, "the query needs one column `row`; it has token"),
        ("select row, row from rows", "x.npy", SITE, "the query needs one column `row`; it has row, row"),
        ("select 99999 as row", "x.npy", SITE, "rows run from 0 to 3732; asked for 99999 to 99999"),
        ("select -1 as row", "x.npy", SITE, "rows run from 0 to 3732; asked for -1 to -1"),
        ("select 'a' as row", "x.npy", SITE, "column `row` must hold row numbers (integers); found string"),
        ("select row > 5 as row from rows", "x.npy", SITE, "`row` must hold row numbers (integers); found bool"),
        ("select unnest([1, null]) as row", "x.npy", SITE, "(integers); found 1 of 2 values missing"),
        ("select 1 as row, 2 as activation", "x.parquet", SITE, "column `activation` has the name that the activati"),
    ],
)
def test_activations_that_cannot_be_fetched(
    stored: Lab, query: str, out: str, site: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stored.folder)
    assert expected in stored.refused("query", stored.store, query, "--site", site, "--out", out)


@pytest.mark.parametrize("options", [("--site", SITE), ("--out", "x.npy")])
def test_a_site_without_a_file_or_a_file_without_a_site(stored: Lab, options: tuple[str, ...]) -> None:
    err = stored.refused("query", stored.store, "select row from rows", *options)
    assert "--site and --out go together: the site whose activations to fetch, and the file for them" in err


def test_a_home_that_there_is_not(stored: Lab) -> None:
    sql = "select row from rows limit 1"
    assert "~nobody-here" in stored.refused("query", stored.store, sql, "--site", SITE, "--out", "~nobody-here/x.npy")
