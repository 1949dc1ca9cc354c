"""Batches that do not fit are halved, those after them too; what ends a process, and what only fails a call."""

import numpy as np
import pytest
import torch
from cluster_fakes import SAMPLING

from cluster.faults import is_out_of_memory, is_poisoned
from cluster.memory import draw_batches
from cluster.pieces import DrawBatch, Piece, padded_batches
from cluster.replica import ModelLoadError, ReplicaActor
from cluster.rows import ModelUse

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


class Generator:
    """Draws images of one pixel, the seed, as many at a time as fit."""

    def __init__(self, fit, error=OUT_OF_MEMORY):
        self.fit, self.error = fit, error
        self.sizes = []

    def draw(self, embeddings, noise_seeds, sampling=None):
        assert len(embeddings) == len(noise_seeds)
        self.sizes.append(len(noise_seeds))
        if len(noise_seeds) > self.fit:
            raise self.error
        return np.array([seed % 256 for seed in noise_seeds], np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)

    def peak_memory_bytes(self):
        return 0


def batches(*kept):
    """Batches of four slots; seeds are 10 times the batch plus the slot."""
    return tuple(
        DrawBatch((0, 1, 2, 3), tuple(10 * number + slot for slot in range(4)), each)
        for number, each in enumerate(kept)
    )


@pytest.mark.parametrize(
    ("fit", "sizes", "flags"),
    [
        (4, [4, 4], [None] * 5),
        (3, [4, 2, 2, 2], [2] * 5),
        (1, [4, 2, 1, 1, 1, 1, 1], [1] * 5),
    ],
)
def test_what_does_not_fit_is_halved_from_there_on(fit, sizes, flags):
    generator, freed = Generator(fit), []
    drawing = draw_batches(generator.draw, batches((0, 1, 2, 3), (3,)), lambda: freed.append(1))
    assert drawing.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 13]
    assert generator.sizes == sizes
    assert list(drawing.batch_sizes) == flags
    assert len(drawing.seconds) == 5
    assert len(freed) == sum(size > fit for size in sizes)


def test_a_batch_that_was_drawn_before_the_memory_ran_out_is_not_flagged():
    generator = Generator(4)

    def draw(prompts, seeds):
        generator.fit = 4 if seeds[0] < 10 else 2
        return generator.draw(prompts, seeds)

    drawing = draw_batches(draw, batches((0, 1, 2, 3), (0, 1, 2, 3)), lambda: None)
    assert list(drawing.batch_sizes) == [None] * 4 + [2] * 4


def test_a_single_image_that_does_not_fit_raises():
    with pytest.raises(torch.OutOfMemoryError):
        draw_batches(Generator(0).draw, batches((2,)), lambda: None)


def test_other_errors_are_not_halved():
    generator = Generator(3, ValueError("out of memory"))
    with pytest.raises(ValueError, match="out of memory"):
        draw_batches(generator.draw, batches((0,)), lambda: None)
    assert generator.sizes == [4]


@pytest.mark.parametrize(
    ("error", "memory", "poisoned"),
    [
        (OUT_OF_MEMORY, True, False),
        (MemoryError(), True, False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True, False),
        (torch.AcceleratorError("CUDA error: out of memory"), True, False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False, True),
        (RuntimeError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("CUDA error: unspecified launch failure"), False, True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), False, True),
        (RuntimeError("shapes do not match"), False, False),
        (ValueError("an illegal memory access"), False, False),
    ],
)
def test_what_an_error_means(error, memory, poisoned):
    assert (is_out_of_memory(error), is_poisoned(error)) == (memory, poisoned)


@pytest.fixture
def replica(monkeypatch):
    """A replica with its variant loaded, whose process tells of its end."""
    actor = ReplicaActor(None, None, "float32", SAMPLING)
    actor._device, actor._variant = "cpu", "bf16"
    monkeypatch.setattr(ReplicaActor, "_use", lambda self, generator: ModelUse(0, 0, "cpu-resident", "cpu"))
    ended = []
    monkeypatch.setattr("cluster.faults.end_process", lambda: ended.append(1))
    actor.ended = ended
    return actor


def test_a_replica_draws_in_the_memory_that_there_is(plan, replica):
    replica._generator = Generator(2)
    prompts, cut = padded_batches(Piece(plan.shards[0], (0, 1, 5)), 4)
    report, images = replica.draw("bf16", cut, *prompts)
    assert report.batch_sizes == (2, 2, 2)
    assert images.shape == (3, 1, 1, 3)
    assert not replica.ended


@pytest.mark.parametrize("error", [torch.AcceleratorError("CUDA error: misaligned address"), ValueError("bad")])
def test_a_replica_whose_device_is_lost_ends_its_process(plan, replica, error):
    replica._generator = Generator(0, error)
    prompts, cut = padded_batches(Piece(plan.shards[0], (0,)), 4)
    with pytest.raises(type(error)):
        replica.draw("bf16", cut, *prompts)
    assert bool(replica.ended) == isinstance(error, torch.AcceleratorError)


def test_a_variant_that_cannot_be_loaded_is_the_replicas_fault(plan, replica, monkeypatch):
    def refuse(self, variant):
        raise OSError("no such file")

    monkeypatch.setattr(ReplicaActor, "_built", refuse)
    with pytest.raises(ModelLoadError, match="ternary: OSError: no such file"):
        replica.draw("ternary", ())
