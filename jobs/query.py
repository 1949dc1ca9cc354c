"""Asks the results with SQL: `python jobs/query.py "SELECT tag, avg(score) FROM results GROUP BY tag"`.

DuckDB over the Parquet files of the runs under --output, as the views `results` and `fidelity` (images against their
full-precision twins). Only complete runs (those with a manifest) are in them, unless --partial asks for the shards of
unfinished ones too.
"""

import csv
import json
import sys
from argparse import Namespace

import duckdb
import fsspec
from fsspec.implementations.local import LocalFileSystem
from rich.table import Table
from rich.text import Text

from bitflux_core.errors import UserError
from cluster.store import ResultStore
from jobs._cli import COMPLETE, DEFAULT_OUTPUT, Parser, console_on, exit_code_of, output_of, run_id

READS = {duckdb.StatementType.SELECT, duckdb.StatementType.MULTI}  # several in one: PIVOT


def parse(argv: list[str] | None) -> Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("sql", help="a statement over the view `results`")
    parser.add_argument("--output", default=DEFAULT_OUTPUT, help="where the runs lie: a folder or URI (%(default)s)")
    parser.add_argument("--run-id", type=run_id, help="only this run")
    parser.add_argument("--partial", action="store_true", help="unfinished runs as well")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON array of objects")
    form.add_argument("--csv", action="store_true", help="print CSV with a header")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    return exit_code_of(lambda: _query(parse(argv)))


def _query(args: Namespace) -> int:
    with duckdb.connect() as connection:
        create_view(connection, output_of(args), args.run_id, args.partial)
        try:
            _check_reads_only(connection, args.sql)
            cursor = connection.execute(args.sql)
            columns = [column[0] for column in cursor.description or ()]
            rows = cursor.fetchall()
        except (duckdb.Error, OSError) as error:
            raise UserError(f"SQL: {error}") from error
    if args.json:
        print(json.dumps([dict(zip(columns, row, strict=True)) for row in rows], indent=2, default=str))
    elif args.csv:
        csv.writer(sys.stdout).writerows([columns, *rows])
    else:
        _print_table(columns, rows)
    return COMPLETE


def create_view(connection: duckdb.DuckDBPyConnection, output: str, run: str | None, partial: bool) -> None:
    """Makes the views over the chosen runs' Parquet files, and closes the connection to all other files.

    UserError where there are none.
    """
    stores = [ResultStore(output, name) for name in ([run] if run else run_ids(output))]
    chosen = [store for store in stores if partial or store.manifest()]
    files = [f"{store.run_uri}/{name}" for store in chosen for name in store.files(partial)]
    if not files:
        what = f"run {run}" if run else "run"
        remedy = "ask for --partial, or draw one with jobs/eval_all.py"
        raise UserError(f"--output {output}: no complete {what} there; {remedy}")
    filesystem, _ = fsspec.url_to_fs(output)
    if not isinstance(filesystem, LocalFileSystem):
        connection.register_filesystem(filesystem)
    compared = [f"{store.run_uri}/{name}" for store in chosen for name in store.names_under("fidelity")]
    try:
        for view, some in (("results", files), ("fidelity", compared)):
            if some:
                connection.read_parquet(some, union_by_name=True, hive_partitioning=False).create_view(view)
    except (duckdb.Error, OSError) as error:
        raise UserError(f"--output {output}: {error}") from error
    connection.execute("SET allowed_paths = $1", [files + compared])
    connection.execute("SET enable_external_access = false")


def _check_reads_only(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """UserError for a statement that could write, even into the files of the results."""
    kinds = {statement.type for statement in connection.extract_statements(sql)}
    if not kinds:
        raise UserError("SQL: no statement; give one over the view `results`")
    if not kinds <= READS:
        raise UserError("SQL: only a query is answered; SELECT from the view `results`, and print with --csv or --json")


def run_ids(output: str) -> list[str]:
    """The runs that lie at `output`, complete or not; none where nothing is there."""
    try:
        filesystem, root = fsspec.url_to_fs(output)
        folders = [path.rstrip("/").rpartition("/")[2] for path in filesystem.ls(root, detail=False)]
    except FileNotFoundError:
        return []
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"--output {output}: cannot be read ({error})") from error
    return sorted(folder.removeprefix("run_id=") for folder in folders if folder.startswith("run_id="))


def _print_table(columns: list[str], rows: list[tuple]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*(Text("" if value is None else str(value)) for value in row))
    console_on(sys.stdout).print(table)


if __name__ == "__main__":
    sys.exit(main())
