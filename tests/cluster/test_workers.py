"""How many replicas a cluster holds beside the text encoder and the evaluator."""

import pytest

from bitflux_core.errors import UserError
from cluster.profile import Resources
from cluster.workers import default_replicas


@pytest.mark.parametrize(
    ("cluster", "replica", "encoder", "evaluator", "expected"),
    [
        ({"CPU": 2}, 1.0, 0.0, 0.0, 2),  # one a variant
        ({"CPU": 1}, 1.0, 0.0, 0.0, 1),
        ({"CPU": 64}, 1.0, 0.0, 0.0, 2),
        ({"CPU": 16, "GPU": 1}, 0.4, 0.1, 0.1, 2),  # all share one GPU
        ({"CPU": 16, "GPU": 1}, 0.5, 0.1, 0.1, 1),  # the helpers take the second half
        ({"CPU": 16, "GPU": 1}, 1.0, 0.0, 0.0, 1),
        ({"CPU": 64, "GPU": 8}, 1.0, 0.3, 0.2, 7),  # the helpers share one GPU
        ({"CPU": 64, "GPU": 8}, 2.0, 0.0, 0.0, 4),
        ({"CPU": 64, "GPU": 4}, 0.45, 0.05, 0.05, 8),
    ],
)
def test_replicas_fill_what_the_helpers_leave(monkeypatch, cluster, replica, encoder, evaluator, expected):
    monkeypatch.setattr("cluster.workers.ray.cluster_resources", lambda: cluster)
    resources = Resources(replica_gpus=replica, text_encoder_gpus=encoder, evaluator_gpus=evaluator)
    assert default_replicas(resources, variants=2) == expected


def test_gpus_without_room_for_a_replica_are_named(monkeypatch):
    monkeypatch.setattr("cluster.workers.ray.cluster_resources", lambda: {"CPU": 8, "GPU": 1})
    with pytest.raises(UserError, match="hold no replica of 1 beside"):
        default_replicas(Resources(replica_gpus=1.0, text_encoder_gpus=0.25, evaluator_gpus=0.25), variants=2)
