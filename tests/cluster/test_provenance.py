"""What a run's manifest says of the code, the packages and the sessions that its results come from."""

import logging
import subprocess
from pathlib import Path

import pytest
import ray
from cluster_fakes import PROFILE, Faults, fake_workers, finished_run

from bitflux_core import environment
from bitflux_core.environment import git_revision
from cluster import provenance
from cluster.provenance import begin_session, code_digest, sessions
from cluster.run import run

NAME = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A repository with one package, committed."""
    folder = tmp_path / "checkout"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "__init__.py").write_text("ANSWER = 42\n")
    for command in (["init", "-q"], ["add", "."], [*NAME, "commit", "-qm", "begun"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_the_revision_is_the_checkouts_and_says_what_was_changed(checkout, monkeypatch):
    monkeypatch.setenv(environment.REVISION_VARIABLE, "of the image")
    commit = git_revision(checkout)
    assert commit
    assert len(commit) == 40
    before = code_digest(checkout)
    (checkout / "untracked.txt").touch()
    assert git_revision(checkout) == commit
    (checkout / "package" / "__init__.py").write_text("ANSWER = 41\n")
    assert git_revision(checkout) == f"{commit}-dirty"
    assert code_digest(checkout) != before


def test_without_a_checkout_the_image_says_the_revision(checkout, monkeypatch):
    monkeypatch.setenv(environment.REVISION_VARIABLE, "of the image")
    assert git_revision(checkout / "package") == "of the image"  # below another project's checkout is no checkout
    monkeypatch.delenv(environment.REVISION_VARIABLE)
    assert git_revision(checkout.parent) is None


def test_the_manifest_says_where_the_results_come_from(plan, store, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())
    monkeypatch.setattr("sys.argv", ["jobs/eval_all.py", "--output", "a folder"])
    provenance.provenance.cache_clear()
    finished_run(plan, store, workers=fake_workers(Faults(tmp_path), store), replicas=1)
    manifest = store.manifest()
    (session,) = manifest["sessions"]
    assert manifest["code"] == [{key: session[key] for key in ("revision", "dirty", "code_digest")}]
    assert session["command"] == "jobs/eval_all.py --output 'a folder'"
    assert session["packages"]["ray"] == ray.__version__
    assert set(session["packages"]) >= {"torch", "triton", "diffusers", "transformers", "pyarrow"}
    assert manifest["devices"] == ["cpu"]
    assert manifest["drivers"] == []
    assert manifest["plan"]["fingerprints"] == plan.fingerprints
    assert [b["prompts_digest"] for b in manifest["plan"]["benchmarks"]] == [plan.workloads["toy"].prompts_digest]
    provenance.provenance.cache_clear()


def test_a_run_resumed_with_other_code_warns_and_names_both(plan, store, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("cluster.actor_slot.ray.kill", lambda actor: actor.kill())
    first = {**provenance.provenance(), "revision": "a" * 40, "dirty": False, "code_digest": "0" * 16}
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "provenance", lambda: first)
        broken = fake_workers(Faults(tmp_path, start={"replica": "raise"}), store)
        assert not run(plan, PROFILE, None, store, workers=broken, replicas=1).complete
    with caplog.at_level(logging.WARNING):
        finished_run(plan, store, workers=fake_workers(Faults(tmp_path), store), replicas=1)
    assert "begun with other code" in caplog.text
    manifest = store.manifest()
    assert manifest["sessions"][0]["revision"] == "a" * 40
    assert [code["code_digest"] for code in manifest["code"]] == ["0" * 16, provenance.provenance()["code_digest"]]


def test_the_same_code_again_is_named_once(plan, store, caplog):
    store.open(plan)
    for _ in range(2):
        begin_session(store)
    assert "other code" not in caplog.text
    assert len(sessions(store)) == 2
    assert len(provenance.distinct_codes(sessions(store))) == 1
