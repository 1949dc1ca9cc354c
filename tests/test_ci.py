""".ci/run with every tool it calls replaced: what its end says where the extra mmdet could not be tested."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / ".ci" / "run"


@pytest.fixture
def run(tmp_path):
    """Runs it beside a .ci/mmdet that ends in a given way; its exit code and what it printed."""

    def write(path: Path, text: str) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def call(mmdet: str, **environment: str) -> tuple[int, str]:
        (tmp_path / ".ci").mkdir()
        shutil.copy(RUN, tmp_path / ".ci" / "run")
        write(tmp_path / ".ci" / "mmdet", mmdet)
        write(tmp_path / ".ci" / "submitted_job", "echo the job")
        write(tmp_path / "bin" / "uv", "echo all passed")
        inherited = {name: value for name, value in os.environ.items() if name != "CI"}
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            [tmp_path / ".ci" / "run"],
            env={**inherited, "PATH": path, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    return call


LACKING = "echo needs a compiler >&2; exit 77"


def test_without_a_compiler_the_end_says_what_was_not_tested(run):
    code, said = run(LACKING)
    assert code == 0
    assert said.index("the job") < said.index("NOT TESTED: needs a compiler")


def test_ci_fails_without_a_compiler(run):
    code, said = run(LACKING, CI="true")
    assert code == 1
    assert "needs a compiler" in said
    assert "the job" not in said


@pytest.mark.parametrize("environment", [{}, {"CI": "true"}])
def test_a_failed_test_of_the_extra_fails(run, environment):
    assert run("exit 3", **environment)[0] == 3


def test_what_is_tested_passes_in_ci(run):
    code, said = run("echo 9 passed", CI="true")
    assert code == 0
    assert "9 passed" in said.split("== passed")[1]
