"""The ablation's variants: each differs from its neighbour in what it says, and each draws."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bitflux_core.accounting import size_report
from bitflux_core.errors import UserError
from bitflux_core.layers import block_linears
from bitflux_core.linear import TernaryLinear
from bitflux_core.quantizer import ablation as ablation_module
from bitflux_core.quantizer import quantize as quantize_module
from bitflux_core.quantizer.ablation import VARIANTS, Ablation, TrainingBudget

BUDGET = TrainingBudget(reconstruction_steps=2, distill_steps=4, batch=4, optimizer="factored")
DISTILLED = tuple(
    f"a photo of {count} {shape}"
    for count in ("a", "two", "three", "four", "five")
    for shape in ("circle", "star", "ring", "cross")
)
NAMED = {variant.name: variant for variant in VARIANTS}


@pytest.fixture(scope="module")
def ablation(lively_dir, settings, tmp_path_factory):
    directory = tmp_path_factory.mktemp("ablation")
    return Ablation(lively_dir, directory, settings(distill_prompts=DISTILLED), BUDGET, torch.device("cpu"))


def test_modulation_stays_full_precision_where_the_row_says_so(ablation):
    variant = NAMED["+ compensation with bf16 modulation"]
    layers = block_linears(ablation.transformer(variant))
    dense = {name for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    assert dense == {name for name in layers if "norm" in name}
    teacher = ablation.teacher()
    assert all(torch.equal(layers[name].weight, teacher.get_parameter(f"{name}.weight")) for name in dense)
    assert ablation.storage_bytes(variant) > ablation.storage_bytes(NAMED["+ compensation"])


def test_storage_is_that_of_the_accounting(ablation):
    assert ablation.storage_bytes(NAMED["+ compensation"]) == size_report(ablation.source.empty).storage_bytes


def test_corrections_are_in_the_transformer_and_in_its_storage(ablation):
    variant = NAMED["+ compensation with a correction of rank 16"]
    made = ablation.transformer(variant)
    assert {layer.down.shape[0] for layer in block_linears(made).values()} == {16}
    assert ablation.storage_bytes(variant) == size_report(made).storage_bytes


def test_group_scales_fit_the_weights_better_and_take_more_room(ablation):
    variant = replace(NAMED["least squares in groups of 64"], group=8)
    grouped, rows = ablation.transformer(variant), ablation.transformer(NAMED["least squares"])
    for name, linear in block_linears(ablation.teacher()).items():
        noise = (linear.weight - grouped.get_parameter(f"{name}.weight")).square().sum()
        row = rows.get_submodule(name)
        assert isinstance(row, TernaryLinear)
        assert noise < (linear.weight - row.dequantize()).square().sum()
    assert ablation.storage_bytes(variant) > ablation.storage_bytes(NAMED["least squares"])


def test_training_end_to_end_goes_on_from_the_blocks(ablation, monkeypatch):
    """With rates of zero the distilled transformer is the one that it started from, biases included."""
    start = ablation.transformer(NAMED["+ block-wise"])
    monkeypatch.setattr("bitflux_core.distill_training.warmup_then_cosine", lambda *_: 0.0)
    trained = ablation._distilled(replace(NAMED["+ end to end"], own_states=0.25), start)
    for name, layer in block_linears(trained).items():
        before = start.get_submodule(name)
        assert torch.equal(layer.packed, before.packed)
        torch.testing.assert_close(layer.scale, before.scale)
        torch.testing.assert_close(layer.bias, before.bias)


def test_rows_that_only_draw_otherwise_share_a_training(ablation):
    def codes(name):
        layers = block_linears(ablation.transformer(NAMED[name])).values()
        assert {layer.activations for layer in layers} == {NAMED[name].activations}
        return torch.cat([layer.packed.flatten() for layer in layers])

    def trainings():
        return set(ablation.directory.glob("end-to-end-*"))

    before = trainings()
    native = codes("+ own-state rollouts")
    assert torch.equal(codes("+ own-state rollouts drawn in int8"), native)
    assert len(trainings() - before) == 1
    codes("+ int8 in the loop drawn in int8")
    assert len(trainings() - before) == 2


def test_other_options_are_refused_in_the_same_folder(ablation, lively_dir, settings):
    with pytest.raises(UserError, match="another recipe"):
        Ablation(
            lively_dir, ablation.directory, settings(distill_prompts=DISTILLED, seed=5), BUDGET, torch.device("cpu")
        )


def test_blocks_of_other_arithmetic_are_not_mixed_into_one_table(ablation, lively_dir, settings, monkeypatch):
    monkeypatch.setattr(ablation_module, "arithmetic_of", lambda _source: "torch.bfloat16 on cuda")
    with pytest.raises(UserError, match=r"another recipe \(arithmetic: .* on cpu, .*, not .* on cuda"):
        Ablation(lively_dir, ablation.directory, settings(distill_prompts=DISTILLED), BUDGET, torch.device("cpu"))


def test_too_little_memory_is_refused_before_any_work(lively_dir, settings, tmp_path, monkeypatch):
    def check(required, _device):
        raise UserError(f"{required} bytes")

    monkeypatch.setattr(quantize_module, "check_memory", check)
    with pytest.raises(UserError, match="bytes"):
        Ablation(lively_dir, tmp_path / "work", settings(distill_prompts=DISTILLED), BUDGET, torch.device("cpu"))
    assert not (tmp_path / "work").exists()


def test_other_prompts_or_another_training_are_refused_in_the_same_folder(ablation, lively_dir, settings, monkeypatch):
    def again(prompts):
        Ablation(lively_dir, ablation.directory, settings(distill_prompts=prompts), BUDGET, torch.device("cpu"))

    again(DISTILLED)
    with pytest.raises(UserError, match=r"another recipe \(distill_prompts: \w+, not \w+\)"):
        again(("a photo of a moon", *DISTILLED[1:]))
    with monkeypatch.context() as patch:
        training = Ablation._training
        patch.setattr(Ablation, "_training", lambda self, row: replace(training(self, row), latent_lr=1e-3))
        with pytest.raises(
            UserError, match=r"another recipe \(end_to_end\.\+ end to end\.latent_lr: 0\.005, not 0\.001"
        ):
            again(DISTILLED)
