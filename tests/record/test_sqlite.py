"""The store on disk: what a file is, who may open it, what is left when the disk refuses."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from shoal.errors import StoreError
from shoal.record import RoundLog, _sweep, migrations, open_store, schema, sqlite
from shoal.record.sqlite import DATABASE_NAME
from tests.record.builders import (
    commit_row,
    contents,
    group_row,
    metric_row,
    open_row,
    round_row,
    run_row,
    telemetry_row,
    usage_row,
    with_initial,
)


def execute(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / DATABASE_NAME)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def test_what_was_written_is_there_again__invariant_3(tmp_path: Path) -> None:
    with closing(open_store(tmp_path / "a" / "b")) as store:
        with_initial(store)
        store.open_round("run", open_row())
        before = contents(store)
    with closing(open_store(tmp_path / "a" / "b")) as store:
        assert contents(store) == before
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["blobs", DATABASE_NAME]


def test_settings_are_those_of_a_durable_store(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store, store._database.write() as connection:
        names = ("journal_mode", "synchronous", "foreign_keys")
        found = [connection.execute(text(f"PRAGMA {name}")).scalar() for name in names]
    assert found == ["wal", 2, 1]


def test_the_database_refuses_gaps_and_nonces_twice__invariants_1_2(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        with_initial(store)
        store.commit("run", commit_row(store, 1), round=round_row(), counted=[(b"a", 1.0)])
    columns = "run_id, version, follows, model_root, server_state_root, round, members, weight, created_s"
    for values in ("3, 2", "2, 0", "2, NULL", "1, 0", "-1, -2"):
        with pytest.raises(sqlite3.IntegrityError):
            statement = (
                f"SELECT run_id, {values}, model_root, server_state_root, 0, 0, 0, 0 FROM commits WHERE version = 1"
            )
            execute(tmp_path, "PRAGMA foreign_keys = ON", f"INSERT INTO commits ({columns}) {statement}")
    with pytest.raises(sqlite3.IntegrityError):
        execute(tmp_path, "INSERT INTO tokens SELECT * FROM tokens")


def test_a_reader_sees_commits_while_a_writer_writes(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store, closing(open_store(tmp_path, read_only=True)) as reader:
        assert reader.runs() == []
        with_initial(store)
        assert reader.last_version("run") == 0
        with store._database.write() as connection:
            connection.execute(text("UPDATE runs SET name = 'changed'"))
            assert reader.run("run").name == "digits"
        assert reader.run("run").name == "changed"


def test_a_reader_writes_nothing(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        with_initial(store)
    before = (tmp_path / DATABASE_NAME).read_bytes()
    with closing(open_store(tmp_path, read_only=True)) as reader:
        for call in (lambda: reader.log("run", [metric_row()]), lambda: reader.set_status("run", "failed", time_s=1.0)):
            with pytest.raises(StoreError, match="for reading only"):
                call()
        assert reader.get_commit("run", 0).version == 0
    assert (tmp_path / DATABASE_NAME).read_bytes() == before


def test_a_record_on_a_medium_that_cannot_be_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(open_store(tmp_path)) as store:
        with_initial(store)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with closing(open_store(tmp_path, read_only=True)) as reader:
        assert reader.last_version("run") == 0


def test_there_must_be_a_record_to_read(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"Expected a run folder with record\.sqlite"):
        open_store(tmp_path / "nothing", read_only=True)
    assert not (tmp_path / "nothing").exists()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / DATABASE_NAME).write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="is no database, or is damaged"):
        open_store(tmp_path)


def test_a_database_of_something_else_is_left_alone(tmp_path: Path) -> None:
    execute(tmp_path, "CREATE TABLE birds (name TEXT)")
    before = (tmp_path / DATABASE_NAME).read_bytes()
    with pytest.raises(StoreError, match="with tables birds and no schema number"):
        open_store(tmp_path)
    assert (tmp_path / DATABASE_NAME).read_bytes() == before


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="failed"):
        open_store(tmp_path / "file" / "run")


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.runs()


# Migrations


def test_an_empty_database_gets_the_newest_schema(tmp_path: Path) -> None:
    (tmp_path / DATABASE_NAME).touch()
    with closing(open_store(tmp_path)) as store, store._database.read() as connection:
        assert migrations.schema_version(connection) == schema.SCHEMA_VERSION == len(migrations.MIGRATIONS)
    assert not list(tmp_path.glob("*.schema-*"))


def test_a_newer_schema_is_left_untouched(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    execute(tmp_path, "UPDATE meta SET value = '7' WHERE key = 'schema'")
    before = (tmp_path / DATABASE_NAME).read_bytes()
    for read_only in (False, True):
        with pytest.raises(StoreError, match=r"has schema 7; .* up to 5\. Upgrade shoal"):
            open_store(tmp_path, read_only=read_only)
    assert (tmp_path / DATABASE_NAME).read_bytes() == before
    assert not list(tmp_path.glob("*.schema-*"))


def add_colour(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE runs ADD COLUMN colour TEXT NOT NULL DEFAULT 'grey'"))


def fail(connection: Connection) -> None:
    connection.execute(text("CREATE TABLE half (x TEXT)"))
    raise RuntimeError("no colour left")


def test_an_older_schema_is_copied_and_brought_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(open_store(tmp_path)) as store:
        with_initial(store)
        before = contents(store)
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, add_colour))
    with pytest.raises(StoreError, match="has schema 5, older than 6"):
        open_store(tmp_path, read_only=True)
    for _ in range(2):  # the second time there is nothing to do
        with closing(open_store(tmp_path)) as store, store._database.read() as connection:
            assert connection.execute(text("SELECT colour FROM runs")).scalar() == "grey"
            assert migrations.schema_version(connection) == 6
    monkeypatch.undo()
    (copy,) = tmp_path.glob("*.schema-*")
    assert copy.name == f"{DATABASE_NAME}.schema-5"
    (tmp_path / "old").mkdir()
    shutil.copytree(tmp_path / "blobs", tmp_path / "old" / "blobs")
    shutil.copy(copy, tmp_path / "old" / DATABASE_NAME)
    with closing(open_store(tmp_path / "old")) as store:
        assert contents(store) == before


def test_older_schemas_are_brought_forward(tmp_path: Path) -> None:
    """The tables as they were: what later numbers have added is left out."""
    newest = (Path(__file__).parents[1] / "golden" / "record.sql").read_text()
    fourth = re.sub(
        r"CREATE TABLE telemetry .*?\n\)\n(CREATE INDEX telemetry_by_run [^\n]*\n)?", "", newest, flags=re.DOTALL
    ).splitlines()
    third = [line for line in fourth if "commits_by_" not in line and "tokens_by_group" not in line]
    without_logs = re.sub(r"CREATE TABLE round_logs .*?\n\)\n", "", "\n".join(third), flags=re.DOTALL)
    second = [line for line in without_logs.splitlines() if "analytics" not in line]
    first = [line for line in second if "groups_with_sums" not in line and "final_" not in line]
    for number, lines in ((1, first), (2, second), (3, third), (4, fourth)):
        folder = tmp_path / str(number)
        folder.mkdir()
        statements = re.split(r"\n(?=CREATE )", re.sub(r",\n\)", "\n)", "\n".join(lines)))
        execute(folder, *statements, f"INSERT INTO meta VALUES ('schema', '{number}')")
        with closing(open_store(folder)) as store:
            with_initial(store)
            assert store.final("run", 0) is None
            store.open_round("run", open_row())
            store.close_round("run", round_row(state="abandoned"), log=RoundLog(round=1, data=b"log", kept=1))
            assert store.rounds("run") == [round_row(state="abandoned")] and store.round_log("run", 1) == b"log"
            store.add_telemetry("run", telemetry_row())
            assert store.telemetry("run") == [telemetry_row()]
            query = "SELECT sums_root FROM groups WHERE run_id = 'r' AND base_version < 3 AND sums_root != ''"
            with store._database.read() as connection:
                assert "groups_with_sums" in str(connection.execute(text(f"EXPLAIN QUERY PLAN {query}")).all())
                assert migrations.schema_version(connection) == 5


def test_a_step_that_fails_leaves_the_schema_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(tmp_path).close()
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, add_colour, fail))
    for copies in (1, 2):
        with pytest.raises(StoreError, match=r"from schema 6 to 7 failed: no colour left\. It still has schema 6"):
            open_store(tmp_path)
        assert len(list(tmp_path.glob("*.schema-*"))) == copies
    with closing(sqlite3.connect(tmp_path / DATABASE_NAME)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        assert "half" not in tables
        assert connection.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() == ("6",)


def test_the_schema_has_no_table_of_devices() -> None:
    columns = {column.name for table in schema.METADATA.tables.values() for column in table.columns}
    assert not {name for name in columns if "device" in name} - {"device_class"}
    assert {"ledger", "leases"} <= set(schema.METADATA.tables)


# The disk refuses


def test_a_full_disk_loses_nothing__invariant_5(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        with_initial(store)
        with store._database.write() as connection:
            pages = connection.execute(text("PRAGMA page_count")).scalar()
            connection.connection.cursor().execute(f"PRAGMA max_page_count = {pages}")
        before = contents(store)
        many = [metric_row("m" * 200, value=float(i)) for i in range(500)]
        groups = [group_row()]
        for _ in range(2):
            with pytest.raises(StoreError, match=r"disk is full.*Nothing was lost; free space"):
                store.commit(
                    "run", commit_row(store, 1), round=round_row(), groups=groups, counted=[(b"a", 1.0)], metrics=many
                )
            assert contents(store) == before and store.token("run", b"a") is None
        with store._database.write() as connection:
            connection.connection.cursor().execute("PRAGMA max_page_count = 100000")
        store.commit("run", commit_row(store, 1), round=round_row(), groups=groups, counted=[(b"a", 1.0)], metrics=many)
        assert store.last_version("run") == 1 and len(store.metrics("run")) == 500


_LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.record.builders import *
from shoal.errors import StoreError
from shoal.record import open_store
store = open_store(Path(sys.argv[1]))
with_initial(store)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
try:
    store.blobs.put(bytes(1 << 20))
except StoreError as error:
    assert "No space left" in str(error), error
else:
    raise SystemExit("a blob above the limit was written")
many = [metric_row("m" * 200, value=float(i)) for i in range(3000)]
before = contents(store)
try:
    store.commit("run", commit_row(store, 1), round=round_row(), metrics=many)
except StoreError as error:
    assert "Nothing was lost" in str(error), error
else:
    raise SystemExit("a commit above the limit was written")
assert contents(store) == before
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
store.blobs.put(bytes(1 << 20))
store.commit("run", commit_row(store, 1), round=round_row(), metrics=many)
assert len(store.metrics("run")) == 3000
store.close()
print("fine")
"""


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="limits on file sizes are POSIX")
def test_a_real_limit_on_files_loses_nothing__invariant_5(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _LIMITED, str(tmp_path), str(Path(__file__).parents[2])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert result.stdout.strip() == "fine", result.stderr
    assert not list(tmp_path.glob("blobs/incoming-*"))


def test_run_ids_order_the_runs(tmp_path: Path) -> None:
    with closing(sqlite.open_store(tmp_path)) as store:
        for name in ("c", "a", "b"):
            store.create_run(run_row(name))
        assert [row.id for row in store.runs()] == ["a", "b", "c"]


def test_a_version_that_took_very_many_rounds_can_be_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sweep, "MOST_NAMED", 7)
    store = with_initial(open_store(tmp_path))
    for number in range(1, 51):
        store.open_round("run", open_row(number, base_version=0))
        store.close_round("run", round_row(number, base_version=0, state="abandoned"))
        store.add_usage("run", [usage_row(round=number)])
    store.commit("run", commit_row(store, 1, round=51), round=round_row(51, base_version=0))
    store.commit("run", commit_row(store, 2, round=52), round=round_row(52, base_version=1))
    before = sum(row.seconds for row in store.usage("run"))
    with store._database.write() as connection:
        connection.connection.driver_connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 40)
    store.sweep("run", since_version=0, before_version=2, every=0, finals_before=0)
    assert [row.number for row in store.rounds("run")] == [52]
    assert [row.round for row in store.usage("run")] == [0] and store.usage("run")[0].seconds == pytest.approx(before)
    store.close()
