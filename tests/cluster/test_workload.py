"""Workloads: the embedded ones are whole, hashes hold, and faults in a user's own file are named by line."""

import functools
import hashlib
import http.server
import json
import os
import sys
import threading
import types
from collections import Counter
from pathlib import Path

import pytest
import yaml

from bitflux_core.errors import UserError
from bitflux_core.mini import compositions
from bitflux_core.mini.world import benchmark_prompts
from cluster.manifests import MANIFESTS, REPOSITORY
from cluster.prompt_parsers import CATEGORIES
from cluster.workload import load_prompts, load_workload, load_workloads

UPSTREAM = REPOSITORY.parent / "shared" / "benchmarks"
GENEVAL_TAGS = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}
LINE = {"tag": "counting", "include": [{"class": "circle", "count": 2}], "prompt": "a photo of two circles"}


@pytest.fixture
def upstream() -> Path:
    if not UPSTREAM.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{UPSTREAM} is missing")
        pytest.skip(f"{UPSTREAM} is absent")
    return UPSTREAM


def write_workload(folder: Path, lines: list[str], **changes) -> str:
    (folder / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines))
    manifest = {
        "evaluator": "geneval",
        "parser": "geneval",
        "files": [{"path": "prompts.jsonl"}],
        "images_per_prompt": 2,
        "seed": 1,
    }
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({**manifest, **changes}))
    return str(path)


def line(**changes) -> str:
    return json.dumps({**LINE, **changes})


def refusal(path: str, data_dir: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_workload(path, data_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mini_geneval_has_genevals_tags_and_counts():
    workload = load_workload("mini-geneval")
    assert Counter(prompt.tag for prompt in workload.prompts) == GENEVAL_TAGS
    assert [prompt.index for prompt in workload.prompts] == list(range(553))
    assert (workload.evaluator, workload.images_per_prompt) == ("mini-geneval", 4)


def test_mini_geneval_is_the_worlds_own_sample():
    recorded = [prompt.metadata for prompt in load_workload("mini-geneval").prompts]
    assert recorded == [spec.metadata() for spec in benchmark_prompts()]


def test_mini_compbench_is_the_worlds_own_sample():
    recorded = [prompt.metadata for prompt in load_workload("mini-t2i-compbench").prompts]
    assert recorded == [compositions.metadata(spec) for spec in compositions.benchmark_prompts()]


def test_official_geneval_from_a_data_dir(upstream):
    workload = load_workload("geneval", upstream)
    assert Counter(prompt.tag for prompt in workload.prompts) == GENEVAL_TAGS
    assert workload.prompts[0].text == "a photo of a bench"
    texts = (upstream / "geneval" / "generation_prompts.txt").read_text().splitlines()
    assert [prompt.text for prompt in workload.prompts] == texts


def test_an_altered_official_file_is_refused_with_both_hashes(tmp_path):
    altered = tmp_path / "geneval" / "evaluation_metadata.jsonl"
    altered.parent.mkdir()
    altered.write_text(line())
    expected = yaml.safe_load((MANIFESTS / "workloads" / "geneval.yaml").read_text())["files"][0]["sha256"]
    message = refusal("geneval", tmp_path)
    assert str(altered) in message
    assert expected in message
    assert hashlib.sha256(altered.read_bytes()).hexdigest() in message
    assert "copy it again from https://" in message


def test_a_data_dir_without_the_file_is_named(tmp_path):
    assert str(tmp_path / "geneval" / "evaluation_metadata.jsonl") in refusal("geneval", tmp_path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine, and a cache of our own to fetch into: (address, folder that it serves)."""
    served = tmp_path / "served"
    served.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", served
        listening.shutdown()


def test_upstreams_file_is_fetched_once_and_cached(tmp_path, server):
    address, served = server
    (served / "list.jsonl").write_text(f"{line()}\n")
    sha256 = hashlib.sha256((served / "list.jsonl").read_bytes()).hexdigest()
    source = {"path": "list/list.jsonl", "url": f"{address}/list.jsonl", "sha256": sha256}
    path = write_workload(tmp_path, [], files=[source])
    assert load_workload(path).prompts[0].text == LINE["prompt"]
    (served / "list.jsonl").unlink()
    assert load_workload(path).digest == hashlib.sha256(bytes.fromhex(sha256)).hexdigest()


def test_a_fetched_file_with_the_wrong_hash_is_refused_with_both_hashes(tmp_path, server):
    address, served = server
    (served / "list.jsonl").write_text(f"{line()}\n")
    source = {"path": "list.jsonl", "url": f"{address}/list.jsonl", "sha256": "0" * 64}
    message = refusal(write_workload(tmp_path, [], files=[source]))
    assert source["url"] in message
    assert "0" * 64 in message
    assert hashlib.sha256((served / "list.jsonl").read_bytes()).hexdigest() in message


def test_a_file_that_cannot_be_fetched_points_to_the_data_dir(tmp_path, server):
    source = {"path": "g/list.jsonl", "url": f"{server[0]}/absent.jsonl", "sha256": "0" * 64}
    assert "--data-dir DIR with DIR/g/list.jsonl" in refusal(write_workload(tmp_path, [], files=[source]))


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        ([line(), line(prompt=" ")], "line 2: empty prompt"),
        ([line(), line(prompt="other"), line()], "line 3: the prompt 'a photo of two circles' stands already in"),
        ([line(), ""], "line 2: not a JSON object"),
        ([line(), "not json"], "line 2: not a JSON object"),
        (['["a list"]'], "line 1"),
        ([line(tag="")], "line 1: tag"),
        ([line(include=[])], "line 1: include"),
        ([line(include=[{"class": "circle", "count": 0}])], "line 1: include.0.count"),
        ([], "line 1"),
        ([line(tag="overall")], "line 1: tag: the results call the mean"),
        ([line(prompt="half a pair \ud800")], "line 1: prompt"),
    ],
)
def test_a_fault_in_a_users_file_is_named_by_line(tmp_path, lines, named):
    assert named in refusal(write_workload(tmp_path, lines))


def test_repeats_are_allowed_where_the_manifest_says_so(tmp_path):
    workload = load_workload(write_workload(tmp_path, [line(), line()], repeated_prompts=True))
    assert [(prompt.index, prompt.text) for prompt in workload.prompts] == [(0, LINE["prompt"]), (1, LINE["prompt"])]


def test_text_that_is_not_utf8(tmp_path):
    path = write_workload(tmp_path, [])
    (tmp_path / "prompts.jsonl").write_bytes(b"\xff\n")
    assert "not UTF-8" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parser": "csv"}, "unknown parser 'csv'"),
        ({"files": []}, "files"),
        ({"files": [{"path": "absent.jsonl"}]}, "absent.jsonl"),
        ({"files": [{"path": "a", "url": "http://127.0.0.1/a"}]}, "needs its sha256"),
        ({"images_per_prompt": 0}, "images_per_prompt"),
        ({"seed": 2**63}, "seed"),
        ({"name": "../up"}, "name"),
    ],
)
def test_a_faulty_manifest(tmp_path, changes, named):
    assert named in refusal(write_workload(tmp_path, [line()], **changes))


def test_unknown_benchmarks_list_the_known_ones():
    assert "unknown benchmark 'genival': choose one of all, calibration, geneval, mini-geneval, mini-t2i" in refusal(
        "genival"
    )


@pytest.fixture
def numeracy(monkeypatch):
    """A stand-in for the parse of numbered objects: it hands back the prompt's length and the singular of `cups`."""
    module = types.ModuleType("evaluators.compbench.numeracy")
    module.parse_objects = lambda prompt, plurals: [(plurals["cups"], len(prompt))]
    monkeypatch.setitem(sys.modules, "evaluators.compbench", types.ModuleType("evaluators.compbench"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_all_is_both_published_benchmarks(upstream, numeracy):
    geneval, compbench = load_workloads(["all"], upstream)
    assert (geneval.name, len(geneval.prompts), compbench.name) == ("geneval", 553, "t2i-compbench")
    assert Counter(prompt.tag for prompt in compbench.prompts) == dict.fromkeys(CATEGORIES, 300)
    assert compbench.images_per_prompt == 10
    kinds = Counter(prompt.metadata.get("kind") for prompt in compbench.prompts if prompt.tag == "complex")
    assert kinds == {"action": 212, "spatial": 58, "spatialaction": 30}
    counted = [prompt for prompt in compbench.prompts if "objects" in prompt.metadata]
    assert {prompt.tag for prompt in counted} == {"numeracy"}
    assert all(prompt.metadata["objects"] == [["cup", len(prompt.text)]] for prompt in counted)
    assert not any(prompt.text != prompt.text.strip() for prompt in compbench.prompts)


def test_the_list_before_2025_09_differs_in_colours_alone(upstream, numeracy):
    now, then = load_workloads(["t2i-compbench", "t2i-compbench-paper"], upstream)
    assert len({prompt.text for prompt in then.prompts}) == len(then.prompts) - 5
    assert now.prompts[300:] == then.prompts[300:]
    assert now.prompts[:300] != then.prompts[:300]


def test_calibration_is_7232_prompts_of_which_7190_are_distinct(upstream):
    prompts = load_prompts("calibration", upstream)
    assert (len(prompts), len({prompt.text for prompt in prompts})) == (7232, 7190)
    assert [prompt.tag for prompt in prompts[:5600:700]] == list(CATEGORIES)
    assert prompts[5600].text == "bond"


def test_calibration_is_no_benchmark():
    assert "calibration.yaml: evaluator: Field required" in refusal("calibration")


def compbench(folder: Path, *files: dict, **texts: bytes) -> str:
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    return write_workload(folder, [], parser="t2i-compbench", files=list(files))


def test_lines_of_any_end_and_alphabet(tmp_path):
    content = '\ufeffa caf\u00e9\r\n\r\na "red" cup\na last one'.encode()
    prompts = load_workload(compbench(tmp_path, {"path": "list", "tag": "color"}, list=content)).prompts
    assert [prompt.text for prompt in prompts] == ["a caf\u00e9", 'a "red" cup', "a last one"]
    assert prompts[0].metadata == {"category": "color", "prompt": "a caf\u00e9"}


def test_a_complex_prompt_has_the_kind_of_its_first_sentence_in_any_case(tmp_path):
    lists = {"spatial": b"The cat is near the dog.\n", "action": b"A Hat hung. It was red.\n", "spatialaction": b"x\n"}
    files = [{"path": kind, "role": f"complex-{kind}"} for kind in lists]
    asked = b"the Cat is near the dog. Both are red.\na hat hung\n"
    workload = compbench(tmp_path, {"path": "list", "tag": "complex"}, *files, list=asked, **lists)
    assert [prompt.metadata["kind"] for prompt in load_workload(workload).prompts] == ["spatial", "action"]


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ({"path": "list", "tag": "colour"}, "unknown tag 'colour', choose one of color, shape"),
        ({"path": "list"}, "needs a tag"),
        ({"path": "list", "tag": "color", "role": "plurals"}, "role"),
        ({"path": "list", "role": "objects"}, "none has the role 'prompts'"),
        ({"path": "list", "tag": "numeracy"}, "need files of role objects"),
        ({"path": "list", "tag": "color", "parser": "csv"}, "unknown parser 'csv'"),
        ({"path": "list", "tag": "color", "parser": "geneval"}, "remove the tag 'color'"),
        ({"path": "list", "tag": "color", "parser": "parti"}, "remove the tag 'color'"),
        ({"path": "list", "parser": "parti"}, "list line 1: must be the columns Prompt, Category, Challenge, Note"),
    ],
)
def test_files_that_do_not_fit_the_parser(tmp_path, file, named):
    assert named in refusal(compbench(tmp_path, file, list=b"a cup"))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (b"a cup\tArtifacts\tBasic", "table line 2: 3 columns of 4"),
        (b" \tArtifacts\tBasic\t-", "table line 2: empty prompt"),
        (b"a cup\t\tBasic\t-", "table line 2: Category is empty"),
        (b"a cup\toverall\tBasic\t-", "table line 2: Category: the results call the mean"),
    ],
)
def test_a_fault_in_a_table_among_lists_is_named_by_file_and_line(tmp_path, row, named):
    table = b"Prompt\tCategory\tChallenge\tNote\n" + row + b"\n"
    files = ({"path": "list", "tag": "color"}, {"path": "table", "parser": "parti"})
    assert named in refusal(compbench(tmp_path, *files, list=b"a bowl\n", table=table))
