"""SQL that would read or write outside a store, or never end: refused or ended in a sentence, by Python and by command.

The statements are made of families: every way of reading with every place, every statement that changes something in
every guise, every setting, and what takes time or memory without bound.
"""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import duckdb
import pytest
from conftest import write_store

from jobs.cli.main import main
from storage.errors import StorageError
from storage.sql.answer import Answer
from storage.sql.bounded import Bounds
from storage.sql.conditions import Conditions
from storage.store import Store

SECRET = "kumquat"
ROOT = Path(__file__).parents[3]

READERS = [
    *("read_text", "read_blob", "read_csv", "read_csv_auto", "sniff_csv", "read_json", "read_json_auto", "glob"),
    *("read_json_objects", "read_ndjson", "read_ndjson_auto", "read_ndjson_objects", "read_parquet", "parquet_scan"),
    *("parquet_metadata", "parquet_schema", "parquet_file_metadata", "parquet_kv_metadata", "read_duckdb"),
]
PLACES = ["{home}/secret.csv", "secret.parquet", "../home/secret.json", "file://{home}/secret.csv", "{url}/secret.csv"]
"""The last is a server that counts who comes; two more schemes are tried with fewer functions."""

BARE = [
    "'secret.csv'",
    "'secret.parquet'",
    "'secret.json'",
    "'{home}/*.csv'",
    "'{url}/a.parquet'",
    "'s3://b/a.parquet'",
]
ASKED = [
    "select * from {}",
    "from {} limit 1",
    "with a as (select * from {}) select * from a",
    "select (select count(*) from {})",
    "explain analyze select * from {}",
    "describe select * from {}",
    "summarize select * from {}",
    "select * from (pivot (select * from {}) on 1 using count(*))",
]
INDIRECT = [
    "from query('select * from read_text(''secret.csv'')')",
    "from query_table('secret.csv')",
    "from json_execute_serialized_sql(json_serialize_sql('select * from read_text(''secret.csv'')'))",
    "select * from documents where source in (select content from read_text('secret.csv'))",
    "select * from rows join 'secret.parquet' on true",
    "from duckdb_secrets()",
    "select getenv('HOME')",
    "from which_secret('s3://b/a', 's3')",
    "from sqlite_scan('secret.db', 'a')",
    "from postgres_scan('host=127.0.0.1', 'a', 'b')",
    "from enable_logging(storage = 'file', storage_path = 'new')",
    "from enable_profiling()",
    "from force_checkpoint()",
]

CHANGES = [
    "copy (select 1) to 'new.csv'",
    "copy documents to '{store}/corpus/documents/part-00000.parquet' (format parquet)",
    "copy (select * from rows) to 'new' (format parquet, partition_by (document))",
    "copy (pivot documents on source using count(*)) to 'new.csv'",
    "create table a as select * from read_text('secret.csv')",
    "create view a as select 1",
    "insert into documents select * from documents",
    "delete from documents",
    "update documents set document = 1",
]
GUISES = [
    "{}",
    "{};",
    "explain {}",
    "explain analyze {}",
    "explain (analyze) {}",
    "explain (analyze, format json) {}",
    "explain analyze\n/* a /* b */ c */ {}",
    "explain /* /* */ select 1 -- */ analyze\n{}",
    "select 1; {}",
    "{}; select 1",
    "prepare a as {}",
    "-- select 1\n{}",
]
STATEMENTS = [
    *("attach 'new.db'", "attach ':memory:' as a", "attach '{store}/zarr.json' as a", "attach '{url}/a.db'"),
    *("detach memory", "use memory", "export database 'new'", "import database '{home}'", "checkpoint", "vacuum"),
    *("install httpfs", "load httpfs", "force install json from '{url}'", "load '{home}/secret.duckdb_extension'"),
    *("create secret (type s3, key_id 'a', secret 'b')", "create macro a(b) as b", "create type a as int"),
    *("create temp table a as select 1", "create sequence a", "create schema a", "drop view documents"),
    *("begin", "commit", "rollback", "execute a", "deallocate a", "call pragma_version()", "call enable_logging()"),
    *("pragma version", "pragma database_list", "pragma table_info('rows')", "pragma enable_profiling"),
    *("pragma profiling_output = 'new'", "alter table documents rename to a", "comment on table rows is 'a'"),
    *(
        "analyze",
        "copy documents from 'secret.csv'",
        "copy from database memory to a",
        "",
        ";",
        "-- nothing",
        "selec 1",
    ),
    *(
        "",
        ";",
        "selec 1",
        "select 1; select 2",
        "select $1",
        "select ?",
        "select * from documents where source = $a",
        "truncate rows",
    ),
    "merge into documents using rows on true when matched then delete",
]
SETTINGS = {
    "enable_external_access": "true",
    "allowed_directories": "['/']",
    "allowed_paths": "['secret.csv']",
    "lock_configuration": "false",
    "memory_limit": "'100GB'",
    "max_memory": "'100GB'",
    "threads": "64",
    "temp_directory": "'new'",
    "max_temp_directory_size": "'1TB'",
    "autoload_known_extensions": "true",
    "allow_unsigned_extensions": "true",
    "extension_directory": "'new'",
    "home_directory": "'{home}'",
    "python_enable_replacements": "true",
    "log_query_path": "'new'",
    "profiling_output": "'new'",
    "custom_extension_repository": "'{url}'",
    "max_expression_depth": "1000000",
}
SETS = ["set {} = {}", "set global {} = {}", "pragma {} = {}", "explain analyze set {} = {}", "select 1; set {} = {}"]

COMMON_TABLES = [
    "with a as (copy (select 1) to 'new.csv') select * from a",
    "select (with a as (copy (select 1) to 'new.csv') select count(*) from a)",
    "explain analyze with a as (copy (select 1) to 'new.csv') select * from a",
    "with a as (insert into documents select * from documents returning *) select * from a",
    "with a as (delete from documents returning *) select * from a",
    "from query('with a as (copy (select 1) to ''new.csv'') select * from a')",
    "with a as (copy (select 1) to 'new.csv') select * from (pivot a on 1 using count(*))",
]

ENDLESS = [
    "with recursive a(n) as (select 1 union all select n + 1 from a) select max(n) from a",
    "with recursive a(n) as (select 1 union all select 1 from a) select count(*) from a",
    "explain analyze with recursive a(n) as (select 1 union all select 1 from a) select count(*) from a",
    "select count(*) from range(10000000) a, range(10000000) b where a.range * b.range = 7",
    "select max(sin(a.document + b.range)) from documents a, range(100000000000) b",
    "select sleep_ms(100000)",
    "select sum(sqrt(range)) from range(1000000000000)",
    "select levenshtein(repeat('x', 40000), repeat('y', 40000))",  # one step, which no interrupt ends
]
TOO_LARGE = [
    "select repeat('x', 4000000000)",
    "select range(1000000000)",
    "select list_sum(range(1000000000))",
    "select * from range(10000000000)",
    "select range, uuid() from range(1000000000)",
    "select string_agg(repeat('x', 1000), '') from range(10000000)",
    "select list(range) from range(1000000000)",
    "select len(repeat('x', 3000000) || range) from range(100000)",
    "select replace(repeat('x', 100000), 'x', repeat('y', 100000))",
    "with recursive a(s) as (select 'x' union all select s || s from a) select max(len(s)) from a",
]


def families() -> Iterator[str]:
    """What must be refused at once."""
    for reader, place in product(READERS, PLACES):
        yield f"select * from {reader}('{place}')"
    for asked, name in product(ASKED, BARE):
        yield asked.format(name)
    for guise, change in product(GUISES, CHANGES):
        yield guise.replace("{}", change)
    for number, (name, value) in enumerate(SETTINGS.items()):
        yield SETS[number % len(SETS)].replace("{}", name, 1).replace("{}", value, 1)
        yield f"reset {name}"
    yield from (*INDIRECT, *STATEMENTS, *COMMON_TABLES)


REFUSED = list(families())
FETCHES = ["fetchall", "to_arrow_table", "fetchnumpy", "show", "__repr__"]
OPTIONS = [(), ("--json",), ("--site", "resid_post.1", "--out", "x.npy")]


@dataclass(frozen=True)
class Scene:
    """A store, a folder with secrets, in which statements run, and a server that counts connections."""

    store: Store
    home: Path
    url: str
    visitors: list[object]

    def statement(self, template: str) -> str:
        named = {"home": self.home, "store": self.store.path, "url": self.url}
        for name, value in named.items():
            template = template.replace(f"{{{name}}}", str(value))
        return template

    def files(self) -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in self.home.parent.rglob("*") if p.is_file()}


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    home, store = tmp_path / "home", write_store(tmp_path / "store", sites=["resid_post.1"])
    home.mkdir()
    monkeypatch.chdir(home)
    (home / "secret.csv").write_text(f"a\n{SECRET}\n")
    (home / "secret.json").write_text(f'{{"a": "{SECRET}"}}\n')
    duckdb.connect().execute(f"copy (select '{SECRET}' as a) to '{home}/secret.parquet'")
    visitors: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def count() -> None:
            while True:
                try:
                    connection, peer = server.accept()
                except OSError:
                    return
                visitors.append(peer)
                connection.close()

        thread = threading.Thread(target=count, daemon=True)
        thread.start()
        yield Scene(store, home, f"http://127.0.0.1:{server.getsockname()[1]}", visitors)
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def is_sentence(words: str) -> bool:
    return len(words) > 10 and SECRET not in words and "Traceback" not in words


def fetched(answer: Answer, method: str) -> object:
    return repr(answer) if method == "__repr__" else getattr(answer, method)()


# ---- what is refused


def test_there_are_300() -> None:
    assert len({*REFUSED, *ENDLESS, *TOO_LARGE}) >= 300


def test_nothing_is_read_or_written_outside(scene: Scene) -> None:
    before = scene.files()
    for number, template in enumerate(REFUSED):
        with pytest.raises(StorageError) as raised:
            pytest.fail(f"{template} gave {fetched(scene.store.sql(scene.statement(template)), FETCHES[number % 5])}")
        assert is_sentence(str(raised.value)), template
    assert scene.files() == before
    assert scene.visitors == []


def test_nor_by_the_command(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    before = scene.files()
    for number, template in enumerate(REFUSED[::4]):  # it hands them to `store.sql`, which has had them all
        status = main(["query", str(scene.store.path), *OPTIONS[number % 3], "--", scene.statement(template)])
        out, err = capsys.readouterr()
        assert (status, out) == (1, ""), template
        assert err.startswith("granary: "), template
        assert is_sentence(err), template
    assert scene.files() == before
    assert scene.visitors == []


def test_with_files_allowed_they_are_read_and_never_written(scene: Scene) -> None:
    before = scene.files()
    for name in ("'secret.csv'", "read_csv('../home/secret.csv')", f"read_parquet('{scene.home}/secret.parquet')"):
        assert scene.store.sql(f"select a from {name}", allow_files=True).fetchall() == [(SECRET,)]
    joined = f"select count(*) from documents join 'secret.parquet' on a = '{SECRET}'"
    assert scene.store.sql(joined, allow_files=True).fetchall() == [(scene.store.info.num_documents,)]
    assert scene.store.sql("pivot 'secret.csv' on a using count(*)", allow_files=True).fetchall() == [(1,)]
    for number, template in enumerate(t for t in REFUSED if "new" in t or "{store}" in t or "{url}" in t):
        with pytest.raises(StorageError) as raised:  # noqa: PT012 (either call may be the one that raises)
            answer = scene.store.sql(scene.statement(template), allow_files=True)
            fetched(answer, FETCHES[number % len(FETCHES)])
        assert is_sentence(str(raised.value)), template
    assert scene.files() == before
    assert scene.visitors == []


# ---- what is ended


@pytest.mark.parametrize("query", ENDLESS)
def test_the_endless_is_ended(scene: Scene, query: str) -> None:
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"did not end within 0\.3 s: ask for less, or give it more time"):
        scene.store.sql(query, timeout_s=0.3).fetchall()
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("query", TOO_LARGE)
def test_what_is_too_large_is_ended(scene: Scene, query: str) -> None:
    with pytest.raises(StorageError, match=r"the query needs more than 0\.125 GiB of memory: ask for less, or give"):
        scene.store.sql(query, memory_bytes=2**27).fetchall()


def test_what_is_nested_too_deeply_is_refused(scene: Scene) -> None:
    for opening, closing in (("[", "]"), ("(", ")"), ("abs(", ")"), ("not ", "")):
        for depth in (900, 20_000)[opening == "(" :]:  # 900 parentheses are one value
            with pytest.raises(StorageError, match=r"the query (is nested too deeply|failed: .*depth|did not end)"):
                scene.store.sql(f"select {opening * depth}1{closing * depth}", timeout_s=2).fetchall()


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ("len(repeat('x', 3000000000)) = row", "needs more than 1 GiB of memory. Write a simpler one"),
        ("sleep_ms(100000) is null", "depends on more than the row"),
        ("levenshtein(repeat('x', 40000), repeat('y', 40000)) > row", "did not end within 0.3 s. Write a simpler"),
        ("row in (select row from read_text('secret.csv'))", "has a sub-select"),
        ("row = getenv('HOME')", "cannot be asked of the rows"),
    ],
)
def test_conditions_are_held_too(scene: Scene, condition: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "0.3" in told:
        monkeypatch.setattr("storage.sql.conditions.Bounds", lambda: Bounds(timeout_s=0.3))
    with pytest.raises(StorageError, match=re.escape(told)):
        Conditions(scene.store, [condition])


def test_batches_share_the_time_of_a_query(scene: Scene) -> None:
    endless = "with recursive a(n) as (select 1 union all select 1 from a) select * from a"
    with pytest.raises(StorageError, match=r"did not end within 0\.5 s"):
        for _ in scene.store.sql(endless, timeout_s=0.5).to_arrow_reader():
            pass


def test_the_command_ends_too(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(scene.store.path)
    for query in ENDLESS[:2]:
        assert main(["query", store, query, "--timeout", "0.2"]) == 1
        assert "did not end within 0.2 s" in capsys.readouterr().err
    for query in TOO_LARGE[:3]:
        assert main(["query", store, query, "--memory", "0.1"]) == 1
        assert "needs more than 0.1 GiB of memory" in capsys.readouterr().err


WATCHED = """
import sys
from jobs.cli.main import main
def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
main(["query", sys.argv[1], "select 1", "--json"])
before = kib("VmRSS")
status = [main(["query", sys.argv[1], query, "--json"]) for query in sys.argv[2:]]
print(status, (kib("VmHWM") - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no limit on data, nor /proc")
def test_one_gib_by_default(scene: Scene) -> None:
    queries = [TOO_LARGE[n] for n in (0, 2, 3, 4, 7)]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(scene.store.path), *queries], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr.count("needs more than 1 GiB of memory") == len(queries), done.stderr
    *_, last = done.stdout.splitlines()
    statuses, _, grown_mib = last.rpartition(" ")
    assert statuses == str([1] * len(queries))
    assert int(grown_mib) < 1024 + 64


def test_a_process_with_a_step_that_never_ends_ends(scene: Scene) -> None:
    query = "select levenshtein(repeat('x', 1000000), repeat('y', 1000000))"
    command = [sys.executable, "-m", "jobs.cli", "query", str(scene.store.path), query, "--timeout", "0.2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("granary: the query did not end within 0.2 s: ask for less")
    assert done.stderr.count("\n") == 1


def test_limits_that_are_none(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StorageError, match=r"a query's timeout_s must be above 0, not 0"):
        scene.store.sql("select 1", timeout_s=0)
    for option, value in (("--timeout", "0"), ("--memory", "much"), ("--memory", "inf")):
        with pytest.raises(SystemExit):
            main(["query", str(scene.store.path), "select 1", option, value])
        assert f"'{value}' is not a number above 0" in capsys.readouterr().err


# ---- what goes on as before


def test_the_limit_of_the_process_is_put_back(scene: Scene) -> None:
    resource = pytest.importorskip("resource")
    before, within = resource.getrlimit(resource.RLIMIT_DATA), []
    two = [threading.Event(), threading.Event()]

    def call(mine: int) -> None:
        two[mine].set()
        assert two[1 - mine].wait(10)
        within.append(resource.getrlimit(resource.RLIMIT_DATA)[0])

    threads = [threading.Thread(target=Bounds().run, args=(lambda n=n: call(n), lambda: None)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(within) == 2
    assert sys.platform != "linux" or before[0] not in within
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_an_answer_is_a_relation(scene: Scene) -> None:
    answer = scene.store.sql("select document, row from rows order by row")
    assert answer.columns == ["document", "row"]
    assert len(answer) == scene.store.num_rows
    assert answer.filter("row < 3").project("row").fetchall() == [(0,), (1,), (2,)]
    assert answer.limit(2).union(answer.limit(1)).fetchall() == answer.limit(2).fetchall() + answer.limit(1).fetchall()
    assert answer["row"].limit(2).fetchall() == [(0,), (1,)]
    assert sum(batch.num_rows for batch in answer.to_arrow_reader(64)) == scene.store.num_rows
    assert "document" in repr(answer)
    assert {"df", "fetchall", "show"} <= set(dir(answer))
    with pytest.raises(AttributeError):
        answer.no_such_method  # noqa: B018
    with pytest.raises(StorageError, match=r"the query failed: .*grain"):
        answer.filter("grain = 1").fetchall()


@pytest.mark.parametrize(
    "query",
    [
        "explain select count(*) from documents",
        "explain analyze select count(*) from documents",
        "explain (analyze, format json) select 1",
        "explain (select 1)",
        "explain pivot documents on document using count(*)",
        "describe documents",
        "summarize documents",
        "-- all of them\nfrom documents",
        "-- by document\npivot rows on document % 2 using count(*)",
        "with a as materialized (select 1 as query, 'copy' as copy) select count(copy), query from a group by all;",
        "values (1)",
        "unpivot (select 1 as a, 2 as b) on a, b",
        "from query('select 1')",
        "select 'read_text(''/etc/hostname'')' as text",
    ],
)
def test_what_only_reads_the_store_is_answered(scene: Scene, query: str) -> None:
    assert scene.store.sql(query).fetchall()
