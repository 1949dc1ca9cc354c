"""The image's recipe, which no test builds."""

import re
from importlib.metadata import version

from kuberay_objects import (
    DOCKERFILE,
    REPOSITORY,
    match,
    project,
)


def test_the_image_is_pinned_unprivileged_and_complete() -> None:
    text = DOCKERFILE.read_text()
    declared = project()["project"]
    assert f"-f {DOCKERFILE.relative_to(REPOSITORY)}" in text
    assert f"-t {declared['name']}:{declared['version']} ." in text
    version = match(r"^ARG PYTHON=3\.(\d+)\.\d+-", text)
    assert declared["requires-python"] == ">=3.11,<3.13"
    assert int(version) in (11, 12)
    assert set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) == {"python:${PYTHON}"}
    assert re.search(r"^ARG UV=\d+\.\d+\.\d+$", text, re.MULTILINE)
    assert re.search(r"^ARG RESOLVED_ON=\d{4}-\d{2}-\d{2}$", text, re.MULTILINE)
    last = text[text.rindex("FROM ") :]
    # Nothing after the user that root would have to do; started here, a job finds jobs/ and the packages.
    assert re.search(r"^USER 1000:1000$", last, re.MULTILINE)
    assert re.search(r"^WORKDIR /opt/bitflux$", last, re.MULTILINE)
    assert "PYTHONPATH=/opt/bitflux" in last
    for tool in ("procps", "kubernetes-client", "gcc"):  # pkill, kubectl, Triton's compiler
        assert tool in last


def test_the_image_holds_what_runs_and_nothing_else() -> None:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    packages = {name.split(".")[0] for name in project()["tool"]["setuptools"]["packages"]}
    assert allowed == packages | {"manifests", "pyproject.toml", "README.md"}


def test_the_image_has_what_results_in_object_storage_need() -> None:
    """From the declared dependencies: s3fs and fsspec are released together, under one number."""
    declared = {re.split(r"[<>=\[]", name)[0]: name for name in project()["project"]["dependencies"]}
    assert declared["s3fs"].removeprefix("s3fs") == declared["fsspec"].removeprefix("fsspec") != ""
    assert version("s3fs") == version("fsspec")
    assert "s3fs" not in DOCKERFILE.read_text()  # a second, unpinned source
