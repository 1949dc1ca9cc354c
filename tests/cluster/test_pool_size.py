"""How many replicas a cluster holds beside the text encoder and the evaluators."""

import pytest

from bitflux_core.errors import UserError
from cluster.pool_size import PoolSize, uses_gpus
from cluster.profile import Resources


@pytest.fixture
def nodes(monkeypatch):
    """The cluster's nodes, as resources; a test may change the list."""
    found = []
    monkeypatch.setattr("cluster.pool_size.ray.nodes", lambda: [{"Alive": True, "Resources": each} for each in found])
    return found


def wanted(replica, encoder=0.0, evaluator=0.0, fixed=None, **others):
    resources = Resources(replica_gpus=replica, text_encoder_gpus=encoder, evaluator_gpus=evaluator, **others)
    return dict(PoolSize(resources, variants=2, fixed=fixed).wanted())


@pytest.mark.parametrize(
    ("cluster", "replica", "encoder", "evaluator", "expected"),
    [
        ([{"CPU": 2}], 1.0, 0.0, 0.0, 2),  # one a variant
        ([{"CPU": 1}], 1.0, 0.0, 0.0, 1),
        ([{"CPU": 64}], 1.0, 0.0, 0.0, 2),
        ([{"CPU": 2, "GPU": 0.0}], 1.0, 0.0, 0.0, 2),
        ([{}], 1.0, 0.0, 0.0, 1),  # a head without cores: an autoscaler is asked for a node
        ([{"CPU": 16, "GPU": 1}], 0.4, 0.1, 0.1, 2),  # all share one GPU
        ([{"CPU": 16, "GPU": 1}], 0.5, 0.1, 0.1, 1),  # the helpers take the second half
        ([{"CPU": 16, "GPU": 1}], 1.0, 0.0, 0.0, 1),
        ([{"CPU": 64, "GPU": 8}], 1.0, 0.3, 0.2, 7),  # the helpers share one GPU
        ([{"CPU": 64, "GPU": 8}], 2.0, 0.0, 0.0, 4),
        ([{"CPU": 64, "GPU": 1}] * 8, 2.0, 0.0, 0.0, 1),  # no node holds one: it is asked for all the same
        ([{"CPU": 64, "GPU": 4}], 0.45, 0.05, 0.05, 8),
        ([{"CPU": 64, "GPU": 2}, {"CPU": 0}, {"CPU": 64, "GPU": 2}], 0.8, 0.2, 0.2, 4),
        ([{"CPU": 64, "GPU": 2}], 0.3333, 0.0, 0.0, 6),
        ([{"CPU": 4, "GPU": 8}], 1.0, 0.0, 0.0, 5),  # a replica needs most of a core
        ([{"CPU": 8, "GPU": 4}], 0.0, 0.0, 0.0, 2),  # replicas that ask for no GPU
    ],
)
def test_replicas_fill_what_the_helpers_leave(nodes, cluster, replica, encoder, evaluator, expected):
    nodes += cluster
    assert wanted(replica, encoder, evaluator) == {None: expected}


def test_each_evaluator_takes_its_share(nodes):
    nodes += [{"CPU": 16, "GPU": 2}]
    assert wanted(0.5, evaluator=0.5, evaluators=1) == {None: 3}
    assert wanted(0.5, evaluator=0.5, evaluators=2) == {None: 2}


def test_replicas_run_on_the_named_types_only_and_the_slowest_make_room(nodes):
    nodes += [{"CPU": 16, "GPU": 2, f"accelerator_type:{name}": 1.0} for name in ("H100", "A100", "T4")]
    types = {"H100": 1.0, "A100": 0.5}
    assert wanted(1.0, gpu_types=types) == {"H100": 2, "A100": 2}
    assert wanted(1.0, 0.5, 0.5, gpu_types=types) == {"H100": 2, "A100": 2}  # the T4s take the helpers
    nodes.pop()
    assert wanted(1.0, 0.5, 0.5, gpu_types=types) == {"H100": 2, "A100": 1}
    assert wanted(1.0, gpu_types=types, fixed=3) == {"H100": 2, "A100": 1}
    assert wanted(1.0, gpu_types=types, fixed=6) == {"H100": 4, "A100": 2}  # two wait for nodes to come
    assert PoolSize(Resources(gpu_types=types), 2).speed("A100") == 0.5


def test_the_number_follows_the_nodes(nodes):
    nodes += [{"CPU": 4, "GPU": 1}]
    assert wanted(1.0) == {None: 1}
    nodes.append({"CPU": 4, "GPU": 1})
    assert wanted(1.0) == {None: 2}


def test_a_profile_that_needs_gpus_waits_for_them_to_come(nodes):
    """The GPU pool of an autoscaling cluster may be empty when a run starts: that makes it no CPU cluster."""
    nodes += [{"CPU": 8}]
    assert not uses_gpus(Resources())
    assert uses_gpus(Resources(needs_gpu=True))
    assert wanted(1.0, needs_gpu=True) == {None: 1}
    assert wanted(1.0, needs_gpu=True, gpu_types={"H100": 1.0}) == {"H100": 1}
    PoolSize(Resources(needs_gpu=True), 2).check()


@pytest.mark.parametrize(
    ("resources", "named"),
    [
        (Resources(replica_gpus=1.0, text_encoder_gpus=0.25, evaluator_gpus=0.25), "hold no replica of 1 on any"),
        (Resources(gpu_types={"H100": 1.0, "H200": 1.0}), "hold no replica of 1 on H100 or H200"),
    ],
)
def test_gpus_without_room_for_a_replica_are_named(nodes, resources, named):
    nodes += [{"CPU": 8, "GPU": 1}]
    with pytest.raises(UserError, match=named):
        PoolSize(resources, variants=2).check()
    PoolSize(resources, variants=2, fixed=1).check()  # the user knows better
