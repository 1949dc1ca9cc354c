"""End-to-end training in little memory: it improves the student, goes on to the same bits, and knows when to stop."""

import copy
import json
from dataclasses import replace
from functools import partial
from typing import ClassVar

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from bitflux_core.convert import quantize_transformer
from bitflux_core.distill import Conditions, LatentTernaryLinear
from bitflux_core.distill_checkpoint import latest_checkpoint
from bitflux_core.distill_features import state_errors
from bitflux_core.distill_recipe import EndToEndSettings
from bitflux_core.distill_training import RESULT, EndToEnd, finished, load_result, velocities_before
from bitflux_core.errors import UserError
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear
from bitflux_core.low_rank import best_low_rank

CPU = torch.device("cpu")
SIDE, TEXT, PROMPTS = 2, 4, 24
SETTINGS = EndToEndSettings(
    steps=6, int8_steps=2, batch=2, sampler_steps=4, guidance=2.0, slots=4, interval=2, features=1, latent_lr=2e-2
)


@pytest.fixture
def teacher(transformer):
    # Fresh adaLN weights leave the velocity almost zero; larger ones give the student something to learn.
    torch.manual_seed(1)
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return transformer


@pytest.fixture
def train(teacher, tmp_path):
    """Makes the training of SETTINGS with changes, its folder under this name."""
    torch.manual_seed(2)
    config = teacher.config
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    conditions = Conditions(
        torch.randn(PROMPTS, TEXT, config.joint_attention_dim),
        torch.randn(PROMPTS, config.pooled_projection_dim),
        torch.stack([torch.zeros(SIDE**2), rows.flatten(), columns.flatten()], dim=-1).float(),
    )
    plain = copy.deepcopy(teacher)
    quantize_transformer(plain)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=3.0)

    def make(folder: str, held_out=(22, 23), rank=0, **changes) -> EndToEnd:
        start = copy.deepcopy(plain)
        for name, layer in block_linears(start).items() if rank else ():
            layer.up, layer.down = best_low_rank(teacher.get_parameter(f"{name}.weight") - layer.dequantize(), rank)
        settings = replace(SETTINGS, **changes)
        trained = [place for place in range(PROMPTS) if place not in held_out]
        parts = (copy.deepcopy(teacher), start, scheduler, conditions, trained, held_out, settings, CPU)
        return EndToEnd(*parts, tmp_path / folder)

    return make


def test_training_lowers_the_held_out_error_and_flips_codes(train, tmp_path, teacher):
    rates = {"latent_lr": 1e-2, "scale_lr": 1e-3, "other_lr": 1e-3}
    run = train("a", steps=160, int8_steps=40, interval=40, batch=8, slots=8, **rates)
    records = run.run()
    assert [record.step for record in records] == [0, 40, 80, 120, 120, 160]
    assert [record.phase for record in records] == ["native"] * 4 + ["int8"] * 2
    assert [record.loss is None for record in records] == [True, False, False, False, True, False]
    assert records[-1].held_out < 0.8 * records[0].held_out
    assert records[-1].loss < 0.8 * records[1].loss
    assert 0 == records[0].codes_flipped < records[1].codes_flipped < records[-1].codes_flipped < 0.5
    assert finished(tmp_path / "a", 160) == records


def test_the_result_draws_what_the_student_drew_at_its_best(train, tmp_path, teacher, monkeypatch):
    run = train("a", steps=4, int8_steps=0)
    monkeypatch.setattr(run, "held_out_error", iter([0.9, 0.5, 0.7]).__next__)
    best = []
    save = run._save_best
    monkeypatch.setattr(run, "_save_best", lambda: save() or best.append(run._predict(inputs)))
    inputs = next(iter(run.held_out))
    run.run()
    made = load_result(dict(teacher.config), tmp_path / "a")
    assert all(isinstance(layer, TernaryLinear) for layer in block_linears(made).values())
    velocity = made(**inputs, return_dict=False)[0]
    torch.testing.assert_close(velocity, best[-1].detach(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(velocity, run._predict(inputs), rtol=1e-4, atol=1e-4)  # it went on


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_bfloat16_arithmetic_as_on_a_gpu_learns_too(train, monkeypatch):
    run = train("a", steps=60, int8_steps=20, interval=20, batch=8, slots=8, latent_lr=1e-2, other_lr=1e-3)
    run.teacher.bfloat16()
    monkeypatch.setattr(run, "_autocast", lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
    records = run.run()
    assert [record.step for record in records] == [0, 20, 40, 40, 60]
    assert records[-1].held_out < 0.9 * records[0].held_out


def test_latents_are_bfloat16_and_their_gradients_never_stay(train):
    run = train("a")
    assert {p.dtype for p in run.latents.values()} == {torch.bfloat16}
    assert {p.dtype for p in run.others.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in run.latents.items()}
    run.train_step()
    assert all(p.grad is None for p in run.latents.values())
    assert all(not torch.equal(before[name], p) for name, p in run.latents.items())


@pytest.mark.parametrize(("optimizer", "dtype"), [("factored", torch.bfloat16), ("adam", torch.float32)])
def test_an_interrupted_training_goes_on_to_the_same_bits(train, tmp_path, monkeypatch, optimizer, dtype):
    train = partial(train, optimizer=optimizer)
    whole = train("whole")
    before = {name: p.detach().clone() for name, p in whole.latents.items()}
    whole.run()
    assert {p.dtype for p in whole.latents.values()} == {dtype}
    assert all(not torch.equal(before[name], p) for name, p in whole.latents.items())

    broken = train("broken")
    monkeypatch.setattr(broken, "held_out_error", iter([0.6, 0.5]).__next__)  # killed in its second interval
    with pytest.raises(StopIteration):
        broken.run()
    assert latest_checkpoint(tmp_path / "broken").progress.step == 2
    resumed = train("broken")
    assert resumed.step == 2
    resumed.run()
    for kind in ("latents", "others"):
        for name, parameter in getattr(whole, kind).items():
            assert torch.equal(parameter, getattr(resumed, kind)[name]), name
    assert (tmp_path / "whole" / RESULT).read_bytes() == (tmp_path / "broken" / RESULT).read_bytes()
    assert [r.step for r in resumed.records] == [0, 2, 4, 4, 6]
    assert [(r.loss, r.codes_flipped) for r in whole.records] == [(r.loss, r.codes_flipped) for r in resumed.records]


def test_corrections_start_train_and_end_with_the_student(train, tmp_path, teacher):
    run = train("a", rank=4, steps=40, int8_steps=10, interval=10, batch=8, slots=8, other_lr=2e-3)
    thin = {name: p for name, p in run.others.items() if name.endswith((".up", ".down"))}
    assert len(thin) == 2 * len(run.latents)
    assert {p.dtype for p in thin.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in thin.items()}
    for name, layer in block_linears(run.start).items():
        assert torch.equal(before[f"{name}.up"], layer.up)
    start_error = run.held_out_error()
    assert start_error < 0.9 * train("b").held_out_error()
    run.run()
    assert all(not torch.equal(before[name], p) for name, p in thin.items())
    run._save_best()
    made = load_result(dict(teacher.config), tmp_path / "a")
    assert all(torch.equal(p, made.get_buffer(name)) for name, p in thin.items())
    for layer in block_linears(made).values():
        layer.activations = "int8"
    inputs = next(iter(run.held_out))
    torch.testing.assert_close(made(**inputs, return_dict=False)[0], run._predict(inputs), rtol=1e-3, atol=1e-3)


def test_an_interrupted_training_with_corrections_goes_on_to_the_same_bits(train, tmp_path, monkeypatch):
    train("whole", rank=4).run()
    broken = train("broken", rank=4)
    monkeypatch.setattr(broken, "held_out_error", iter([0.6, 0.5]).__next__)
    with pytest.raises(StopIteration):
        broken.run()
    train("broken", rank=4).run()
    assert (tmp_path / "whole" / RESULT).read_bytes() == (tmp_path / "broken" / RESULT).read_bytes()


def test_a_checkpoint_killed_while_written_does_not_count(train, tmp_path, monkeypatch):
    run = train("a", steps=4, int8_steps=0)
    monkeypatch.setattr("bitflux_core.distill_checkpoint.write_json", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        run.run()
    assert latest_checkpoint(tmp_path / "a") is None
    monkeypatch.undo()
    assert train("a", steps=4, int8_steps=0).run()[-1].step == 4
    assert [path.name for path in (tmp_path / "a").glob("step-*")] == ["step-00000004"]


def test_a_damaged_checkpoint_is_refused(train, tmp_path):
    train("a").run()
    (tmp_path / "a" / "step-00000006" / "rest.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        train("a")


@pytest.mark.parametrize("damage", [{"step": "six"}, {"step": 7}, {"records": [{}]}, {"records": 3}, {"other": 1}])
def test_a_checkpoint_that_says_something_else_is_refused(train, tmp_path, damage):
    train("a").run()
    state = tmp_path / "a" / "step-00000006" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | damage))
    with pytest.raises(UserError, match=r"state.json is damaged .*train from the start"):
        finished(tmp_path / "a", 6)


def test_a_result_of_another_model_is_refused(train, tmp_path, teacher):
    train("a").run()
    file = tmp_path / "a" / RESULT
    tensors = load_file(file)
    del tensors["x_embedder.bias"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"of another model .*train from the start"):
        load_result(dict(teacher.config), tmp_path / "a")


def test_a_phase_that_gains_nothing_ends_early_and_the_best_weights_stay(train, tmp_path, monkeypatch):
    run = train("a", steps=40, int8_steps=10, patience=2)
    monkeypatch.setattr(run, "_rate_factor", lambda: 0.5)
    kept = []
    monkeypatch.setattr(run, "_save_best", lambda: kept.append(run.step))
    errors = iter([0.9, 0.5, 0.4, 0.6, 0.4, 0.7, 0.65, 0.8, 0.9])
    monkeypatch.setattr(run, "held_out_error", errors.__next__)
    records = run.run()
    assert [record.step for record in records] == [0, 2, 4, 6, 8, 30, 32, 34, 36]
    assert [record.phase for record in records] == ["native"] * 5 + ["int8"] * 4
    assert kept == [0, 2, 4, 30, 32]
    assert finished(tmp_path / "a", 40) is not None


def test_the_int8_phase_comes_also_where_patience_ends_with_the_native_one(train, monkeypatch):
    run = train("a", steps=8, int8_steps=2, patience=2)
    monkeypatch.setattr(run, "_rate_factor", lambda: 0.5)
    monkeypatch.setattr(run, "held_out_error", iter([0.5, 0.4, 0.6, 0.6, 0.7, 0.6]).__next__)
    records = run.run()
    assert [(record.step, record.phase) for record in records] == [
        (0, "native"), (2, "native"), (4, "native"), (6, "native"), (6, "int8"), (8, "int8")
    ]  # fmt: skip


def test_nothing_is_given_up_while_rates_are_high(train, monkeypatch):
    run = train("a", steps=16, int8_steps=0, patience=2)
    monkeypatch.setattr(run, "held_out_error", iter([0.5] + [0.6] * 8).__next__)
    records = run.run()
    assert [record.step for record in records] == [0, 2, 4, 6, 8, 10, 12]  # the rate is at half after the ninth
    assert run.step == 16


@pytest.mark.parametrize("changes", [{}, {"batch": 8, "slots": 12}, {"weighted": False}])
def test_velocities_before_the_first_step_are_told(train, monkeypatch, capsys, changes):
    computed = []
    for method in ("_teach", "_predict"):
        plain = getattr(EndToEnd, method)

        def counted(self, inputs, plain=plain):
            computed.append(len(inputs["timestep"]))
            return plain(self, inputs)

        monkeypatch.setattr(EndToEnd, method, counted)
    run = train("a", held_out=(20, 21, 22, 23), **changes)
    assert sum(computed) == velocities_before(replace(run.settings, held_out=4))
    assert "before the first step" in capsys.readouterr().out


def test_int8_is_simulated_in_the_last_phase_only(train):
    run = train("a")
    seen = []
    for step in range(6):
        run.train_step()
        layers = [layer for layer in run.student.modules() if isinstance(layer, LatentTernaryLinear)]
        assert len({layer.int8_activations for layer in layers}) == 1
        seen.append((step, layers[0].int8_activations))
    assert seen == [(step, step >= 4) for step in range(6)]


def test_a_captured_step_is_forgotten_where_the_phase_changes(train):
    run = train("a")

    class Captured:
        """Does what the capturing call did, as a CUDA graph would."""

        captured: bool | None = None
        used: ClassVar[list[tuple[int, bool]]] = []

        def forget(self):
            self.captured = None

        def __call__(self, inputs):
            if self.captured is None:
                self.captured = run._layers[0].int8_activations
            self.used.append((run.step, self.captured))
            return run._forward_backward(inputs)

    run._replayed = Captured()
    run.run()
    assert Captured.used == [(step, step >= 4) for step in range(6)]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["factored", "adam"])
def test_dampening_grows_until_latents_settle(train, optimizer):
    how = {"steps": 80, "int8_steps": 0, "interval": 40, "batch": 4, "optimizer": optimizer, "latent_lr": 2e-2}
    free, dampened = train("a", dampening=0.0, **how), train("b", dampening=8.0, **how)
    first = []
    for run in (free, dampened):
        run.train_step()
        first.append(torch.cat([p.detach().flatten() for p in run.latents.values()]))
        run.run()
    assert torch.equal(*first)  # at the start there is none of it

    def settled(run) -> float:
        latent = torch.cat([p.detach().flatten().float() for p in run.latents.values()])
        return ((latent - latent.round().clamp(-1, 1)).abs() < 0.2).float().mean().item()

    assert settled(dampened) > 1.3 * settled(free)


def test_errors_count_by_the_step_at_which_a_state_stands(train):
    run, alike = train("a", features=0, own_states=0.0), train("b", features=0, own_states=0.0, weighted=False)
    assert alike.weights_K.tolist() == [1] * 4
    assert run.weights_K.mean().item() == pytest.approx(1)
    assert run.weights_K.max() > 1.2 * run.weights_K.min()
    inputs = run.rollouts.inputs(run.rollouts.part_of(0))
    error_B = state_errors(run._predict(inputs), run._teach(inputs)).detach()
    weight_B = run.weights_K[run.rollouts.step_S[run.rollouts.part_of(0)]]
    run.train_step()
    assert run._losses.item() == pytest.approx((weight_B * error_B).mean().item(), rel=1e-5)
    alike.train_step()
    assert alike._losses.item() == pytest.approx(error_B.mean().item(), rel=1e-5)


def test_held_out_errors_count_by_the_step_as_well(train):
    run = train("a", held_out=(20, 21, 22, 23), features=0)
    run.weights_K.copy_(torch.tensor([0.1, 0.2, 0.7, 3.0]))
    weighted, levels = [], []
    for inputs in run.held_out:
        error_B = state_errors(run._predict(inputs), run._teach(inputs)).detach()
        step_B = [run._sigmas_K.tolist().index(level) for level in inputs["timestep"].tolist()]
        weighted += [(run.weights_K[step] * error).item() for step, error in zip(step_B, error_B, strict=True)]
        levels += step_B
    assert sorted(levels) == [0, 1, 2, 3]
    assert run.held_out_error() == pytest.approx(sum(weighted) / 4, rel=1e-5)


def test_teacher_and_student_are_given_the_settings_guidance(train, monkeypatch):
    forward, seen = FluxTransformer2DModel.forward, {}

    def look(self, *, guidance, **inputs):
        seen.setdefault(self, []).extend(guidance.tolist())
        return forward(self, guidance=guidance, **inputs)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", look)
    run = train("a", guidance=3.25, weighted=True)  # weights and held-out states are made by both at once
    run.train_step()
    run.held_out_error()
    assert seen.keys() == {run.teacher, run.student}
    assert {value for values in seen.values() for value in values} == {3.25}


@pytest.mark.parametrize("weighted", [False, True])
def test_features_compare_image_and_text(train, weighted):
    run = train("a", feature_weight=0.5, own_states=0.0, weighted=weighted)
    behind = []
    for model in (run.teacher, run.student):
        model.transformer_blocks[0].register_forward_hook(lambda _module, _arguments, output: behind.append(output))
    inputs = run.rollouts.inputs(run.rollouts.part_of(0))
    error_B = state_errors(run._predict(inputs), run._teach(inputs)).detach()
    (my_text, my_image), (their_text, their_image) = behind
    error_B += 0.5 * (state_errors(my_text, their_text) + state_errors(my_image, their_image)).detach() / 2
    expected = (run._weights_of(inputs) * error_B).mean().item()
    run.train_step()
    assert run._losses.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["factored", "adam"])
def test_gradients_are_scaled_down_to_a_norm_of_one_all_together(train, optimizer):
    made = []
    for folder, weight in (("small", 1e-4), ("twice", 2e-4), ("large", 1e5)):
        run = train(folder, optimizer=optimizer)
        run.weights_K.fill_(weight)
        run.train_step()
        trained = [*run.others.values(), *(run.latents.values() if optimizer == "adam" else ())]
        made.append(torch.cat([parameter.grad.flatten() for parameter in trained]))
    small, twice, large = made
    assert 0 < small.norm() < 0.5
    torch.testing.assert_close(twice, 2 * small, rtol=1e-3, atol=1e-9)  # below the norm nothing is scaled
    assert large.norm().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(large, small / small.norm(), rtol=1e-2, atol=1e-5)


def test_the_share_of_own_states_grows_from_none_through_the_first_third(train, monkeypatch):
    run, shares = train("a", steps=12, own_states=0.6), []
    advance = run.rollouts.advance

    def look(slots, theirs, mine, own_states):
        shares.append(own_states)
        advance(slots, theirs, mine, own_states)

    monkeypatch.setattr(run.rollouts, "advance", look)
    for _ in range(12):
        run.train_step()
    assert shares == pytest.approx([0, 0.15, 0.3, 0.45] + [0.6] * 8)


@pytest.mark.parametrize(("step", "whose"), [(0, "teacher"), (3, "student")])
def test_states_begin_on_the_teachers_way_and_go_over_to_the_students(train, step, whose):
    run = train("a", batch=4, int8_steps=0, own_states=1.0)
    run.step = step
    everyone = run.rollouts.part_of(step)
    inputs = run.rollouts.inputs(everyone)
    velocity = {"teacher": run._teach(inputs), "student": run._predict(inputs).detach()}
    step_S = run.rollouts.step_S.clone()
    stride_S = run.rollouts.sigmas[step_S + 1] - run.rollouts.sigmas[step_S]
    run.train_step()
    going = step_S < 3  # one ends its lap
    moved = {name: inputs["hidden_states"] + stride_S[:, None, None] * walk for name, walk in velocity.items()}
    walked = run.rollouts.latents_SLC[going]
    torch.testing.assert_close(walked, moved.pop(whose)[going], rtol=1e-4, atol=1e-4)
    [other] = moved.values()
    assert not torch.allclose(walked, other[going], rtol=1e-2, atol=1e-2)


def test_features_pull_on_the_blocks(train):
    with_features, without = train("a", feature_weight=1.0), train("b", feature_weight=0.0)
    for run in (with_features, without):
        run.train_step()
    assert with_features._losses > without._losses
    assert any(not torch.equal(p, without.latents[name]) for name, p in with_features.latents.items())


def test_prompts_held_out_are_never_trained_on(train):
    run = train("a", held_out=(0, 5))
    for _ in range(30):
        slots = run.rollouts.part_of(run.step)
        velocity = torch.zeros_like(run.rollouts.latents_SLC[slots])
        run.rollouts.advance(slots, velocity, velocity, 0.0)
        run.step += 1
        assert not {0, 5} & set(run.rollouts.prompt_S.tolist())


def test_states_start_spread_and_walk_by_teacher_or_student(train):
    rollouts = train("a").rollouts
    assert sorted(rollouts.step_S.tolist()) == [0, 1, 2, 3]
    rollouts.step_S.zero_()
    before = rollouts.latents_SLC.clone()
    everyone = torch.arange(4)
    ones = torch.ones_like(before)
    rollouts.advance(everyone, ones, -ones, 0.25)
    moved = (rollouts.latents_SLC - before).mean(dim=(1, 2)).sign()
    assert sorted(moved.tolist()) == [-1, -1, -1, 1]  # noise falls: the teacher's direction lowers x, one is own
    rollouts.step_S.fill_(3)
    rollouts.advance(everyone, ones, ones, 0.0)
    assert rollouts.step_S.tolist() == [0] * 4
    assert rollouts.lap_S.tolist() == [1] * 4
    assert rollouts.latents_SLC.std() == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(rollouts.latents_SLC, before)  # another lap, other noise
