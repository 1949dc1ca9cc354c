"""jobs/query.py over hand-made runs: which files are in the view, how answers print, and what is refused."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.rows import SCHEMA
from jobs import query


def write_run(output: Path, name: str, scores: list[float], *, complete: bool, schema: pa.Schema = SCHEMA) -> None:
    shard = "variant=bf16/benchmark=mini/shard-00000.parquet"
    rows = [{"run_id": name, "sample_id": f"{name}{i}", "score": score, "tag": "[x]"} for i, score in enumerate(scores)]
    path = output / f"run_id={name}" / shard
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    if complete:
        (output / f"run_id={name}" / "_manifest.json").write_text(
            json.dumps({"files": [{"name": shard, "sha256": ""}]})
        )


@pytest.fixture
def output(tmp_path) -> Path:
    write_run(tmp_path, "first", [1.0, 0.0], complete=True)
    write_run(tmp_path, "second", [1.0, 1.0, 1.0], complete=False)
    return tmp_path


@pytest.fixture
def ask(output, capsys):
    def run(sql: str, *options: str) -> str:
        assert query.main([sql, "--output", str(output), *options]) == 0
        return capsys.readouterr().out

    return run


COUNT = "SELECT run_id, count(*) AS n, avg(score) AS score FROM results GROUP BY run_id ORDER BY run_id"


def test_only_complete_runs_are_in_the_view(ask):
    assert json.loads(ask(COUNT, "--json")) == [{"run_id": "first", "n": 2, "score": 0.5}]


def test_partial_adds_the_unfinished(ask):
    assert ask(COUNT, "--csv", "--partial").splitlines() == ["run_id,n,score", "first,2,0.5", "second,3,1.0"]
    assert ask(COUNT, "--csv", "--partial", "--run-id", "second").splitlines() == ["run_id,n,score", "second,3,1.0"]


def test_what_a_manifest_does_not_name_is_not_read(output, ask):
    folder = output / "run_id=first" / "variant=bf16" / "benchmark=mini"
    (folder / "shard-00001.parquet").write_bytes((folder / "shard-00000.parquet").read_bytes())
    assert json.loads(ask(COUNT, "--json"))[0]["n"] == 2


def test_runs_of_an_older_schema_have_nulls_in_newer_columns(output, ask):
    write_run(output, "older", [1.0], complete=True, schema=pa.schema([f for f in SCHEMA if f.name != "error"]))
    assert json.loads(ask("SELECT count(*) AS n FROM results WHERE error IS NULL", "--json")) == [{"n": 3}]


def test_a_table_shows_text_as_it_is(ask):
    table = ask("SELECT tag, NULL AS nothing FROM results LIMIT 1")
    assert "[x]" in table
    assert "None" not in table


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["SELECT scor FROM results"], "scor"),
        (["SELEC 1"], "SELEC"),
        (["COPY results TO 'out.csv'"], "only a query is answered"),
        (["SELECT 1; COPY results TO 'out.csv'"], "only a query is answered"),
        (["EXPLAIN ANALYZE COPY results TO 'out.csv'"], "only a query is answered"),
        (["SET enable_external_access = true"], "only a query is answered"),
        (["SELECT * FROM read_csv('/etc/hostname')"], "/etc/hostname"),
        (["SELECT 1", "--run-id", "second"], "no complete run second there; ask for --partial"),
        (["SELECT 1", "--run-id", "absent", "--partial"], "absent"),
        (["SELECT 1", "--run-id", "a/b"], "--run-id"),
        (["SELECT 1", "--json", "--csv"], "--csv"),
        ([], "sql"),
    ],
)
def test_mistakes_are_one_line(output, capsys, arguments, named):
    assert query.main([*arguments, "--output", str(output)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert named in captured.err


def test_a_pivot_is_a_query(ask):
    assert ask("PIVOT results ON run_id USING count(*) GROUP BY tag", "--csv").splitlines() == ["tag,first", "[x],2"]


def test_no_statement(output, capsys):
    assert query.main(["", "--output", str(output)]) == 2
    assert capsys.readouterr().err.startswith("error: SQL: no statement")


def test_an_output_without_runs(tmp_path, capsys):
    assert query.main(["SELECT 1", "--output", str(tmp_path / "absent")]) == 2
    assert "absent: no complete run there" in capsys.readouterr().err


def test_an_empty_output_is_not_the_current_folder(output, capsys, monkeypatch):
    monkeypatch.chdir(output)
    assert query.main(["SELECT 1", "--output", ""]) == 2
    assert capsys.readouterr().err == "error: --output is empty: name a folder or URI, or leave it out\n"


def test_a_damaged_file_is_named(output, capsys):
    shard = output / "run_id=first" / "variant=bf16" / "benchmark=mini" / "shard-00000.parquet"
    shard.write_bytes(b"no parquet")
    assert query.main(["SELECT 1 FROM results", "--output", str(output)]) == 2
    assert "shard-00000.parquet" in capsys.readouterr().err
