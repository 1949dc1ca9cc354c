"""The Grafana dashboard asks only for metrics that a run exports, with labels that they have."""

import json
import re
from itertools import combinations

import pytest

from cluster.manifests import MANIFESTS
from cluster.metrics import COUNTERS, GAUGES, HISTOGRAMS, NAMES

DASHBOARD = json.loads((MANIFESTS / "grafana" / "bitflux-run.json").read_text())
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
METRIC = re.compile(r"\bray_(\w+)")
# As Ray exports each kind: tests/cluster/test_metrics.py looks at a real endpoint.
SUFFIXES = [(COUNTERS, ("_total",)), (GAUGES, ("",)), (HISTOGRAMS, ("_bucket", "_sum", "_count"))]
EXPORTED = {name + suffix: kind[name][1] for kind, suffixes in SUFFIXES for name in kind for suffix in suffixes}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_panel_asks_for_what_is_exported(expression):
    names = METRIC.findall(expression)
    assert names
    assert set(names) <= EXPORTED.keys()
    labels = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
    assert labels - {"le"} <= set.intersection(*(set(EXPORTED[name]) for name in names))
    assert expression.count("(") == expression.count(")")
    assert expression.count('{run_id=~"$run"}') == len(names)


def test_every_metric_is_shown():
    shown = {name for expression in EXPRESSIONS for name in METRIC.findall(expression)}
    assert all(any(name in shown for name in (metric, f"{metric}_total", f"{metric}_bucket")) for metric in NAMES)


def test_the_legends_and_the_run_can_be_filled():
    for panel in PANELS:
        for target in panel["targets"]:
            (name, *_) = METRIC.findall(target["expr"])
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set(EXPORTED[name])
    (run,) = (variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "run")
    assert run["definition"] == run["query"]["query"] == "label_values(ray_bitflux_replicas, run_id)"


def test_panels_have_ids_and_places_of_their_own():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for one, other in combinations((panel["gridPos"] for panel in PANELS), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
