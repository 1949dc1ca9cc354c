"""States under way: whose velocity carries a slot, and what a slot takes after its lap."""

import pytest
import torch

from bitflux_core.distill import Conditions
from bitflux_core.distill_states import Rollouts

TRAINED = tuple(range(1, 24, 2))
SIGMAS = torch.tensor([1.0, 0.75, 0.25, 0.0])


@pytest.fixture
def rollouts():
    generator = torch.Generator().manual_seed(0)
    conditions = Conditions(
        torch.randn(24, 3, 8, generator=generator), torch.randn(24, 6, generator=generator), torch.zeros(4, 3)
    )
    return Rollouts(conditions, TRAINED, SIGMAS, 2.0, slots=8, batch=8, channels=16, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_own_states_walks_by_the_students_velocity(rollouts, share):
    before, everyone = rollouts.latents_SLC.clone(), torch.arange(8)
    theirs, mine = torch.full_like(before, 1.0), torch.full_like(before, 3.0)
    rollouts.advance(everyone, theirs, mine, share)
    walked_S = ((before - rollouts.latents_SLC) / 0.25).mean((1, 2))  # the first stride, as sigmas fall
    own_S = walked_S > 2
    torch.testing.assert_close(walked_S, torch.where(own_S, 3.0, 1.0))
    assert own_S.sum() == share * 8
    assert rollouts.step_S.tolist() == [1] * 8


def test_slots_that_are_own_stay_so_as_the_share_grows(rollouts):
    own = []
    for share in (0.25, 0.5, 1.0):
        rollouts.step_S.zero_()
        before = rollouts.latents_SLC.clone()
        rollouts.advance(torch.arange(8), torch.zeros_like(before), torch.ones_like(before), share)
        own.append(set((rollouts.latents_SLC != before).any(2).any(1).nonzero()[:, 0].tolist()))
    assert own[0] < own[1] < own[2]


def test_a_slot_takes_a_new_prompt_after_each_lap(rollouts):
    still, everyone, seen = torch.zeros_like(rollouts.latents_SLC), torch.arange(8), []
    for _ in range(12):
        seen.append(rollouts.prompt_S.clone())
        for _ in range(len(SIGMAS) - 1):
            assert torch.equal(rollouts.prompt_S, seen[-1])  # none in the middle of a lap
            rollouts.advance(everyone, still, still, 0.0)
    laps = torch.stack(seen)
    assert set(laps.flatten().tolist()) == set(TRAINED)
    assert all(len(set(lap.tolist())) > 4 for lap in laps.T)  # of every slot, through its laps
    assert all(len(set(lap.tolist())) > 2 for lap in laps)  # of every lap, over the slots
    given = rollouts.inputs(everyone)
    assert torch.equal(given["encoder_hidden_states"], rollouts.conditions.prompt_embeds_PTD[rollouts.prompt_S])
    assert torch.equal(given["pooled_projections"], rollouts.conditions.pooled_PD[rollouts.prompt_S])
