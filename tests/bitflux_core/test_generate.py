import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from bitflux_core.accounting import resident_bytes
from bitflux_core.errors import UserError
from bitflux_core.generate import ImageGenerator, TextEncoder
from bitflux_core.loading import load_transformer
from bitflux_core.prompts import check_prompt_lengths
from bitflux_core.samples import Sampling
from bitflux_core.variants import VARIANTS

SAMPLING = Sampling(width=64, height=32, steps=3, guidance=3.5, max_sequence_length=16)
PROMPTS = ["a photo of a red circle", "a photo of two squares"]
SEEDS = [11, 2**62 + 5]


@pytest.fixture(scope="module")
def embeddings(pipeline_dir):
    return TextEncoder(pipeline_dir, "cpu", torch.float32, 16).encode(PROMPTS)


@pytest.fixture
def generator(pipeline_dir, ternary_dir):
    def build(variant="bf16", folder=pipeline_dir):
        transformer = load_transformer(
            variant, pipeline_dir=folder, ternary_dir=ternary_dir, device="cpu", dtype=torch.float32
        )
        return ImageGenerator(transformer, folder, "cpu", torch.float32)

    return build


def plain_pipeline(folder) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_embeddings_are_those_of_flux_pipeline(pipeline_dir, embeddings):
    pipeline = plain_pipeline(pipeline_dir)
    for prompt, embedding in zip(PROMPTS, embeddings, strict=True):
        with torch.no_grad():
            embeds_1TD, pooled_1P, _ = pipeline.encode_prompt(prompt, max_sequence_length=16)
        assert torch.equal(embedding.prompt_embeds, embeds_1TD[0])
        assert torch.equal(embedding.pooled, pooled_1P[0])


def test_an_embedding_does_not_depend_on_its_neighbours(pipeline_dir, embeddings):
    alone = TextEncoder(pipeline_dir, "cpu", torch.float32, 16).encode(PROMPTS[1:])
    assert torch.equal(alone[0].prompt_embeds, embeddings[1].prompt_embeds)
    assert torch.equal(alone[0].pooled, embeddings[1].pooled)


def test_text_encoder_and_generator_load_their_own_parts_only(pipeline_dir, generator):
    text = TextEncoder(pipeline_dir, "cpu", torch.float32, 16).pipeline
    image = generator().pipeline
    assert (text.transformer, text.vae, image.text_encoder, image.text_encoder_2) == (None,) * 4


def test_prompt_lengths_count_the_end_token(pipeline_dir):
    check_prompt_lengths(pipeline_dir, ["red " * 15], 16)
    message = r"prompt 'red red .*' has 17 T5 tokens of 16: shorten it or raise max_sequence_length"
    with pytest.raises(UserError, match=message):
        check_prompt_lengths(pipeline_dir, ["red", "red " * 16], 16)
    with pytest.raises(UserError, match=message):
        TextEncoder(pipeline_dir, "cpu", torch.float32, 16).encode(["red " * 16])


@pytest.mark.parametrize("dynamic_shifting", [False, True], ids=["mini's scheduler", "FLUX.1-dev's scheduler"])
def test_images_are_those_of_flux_pipeline(pipeline_dir, tmp_path, generator, embeddings, dynamic_shifting):
    folder = shutil.copytree(pipeline_dir, tmp_path / "copy")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"use_dynamic_shifting": dynamic_shifting}))
    ours = generator(folder=folder)
    noise_BLC = torch.stack([ours.initial_noise(seed, SAMPLING) for seed in SEEDS])
    theirs = plain_pipeline(folder)(
        prompt_embeds=torch.stack([embedding.prompt_embeds for embedding in embeddings]),
        pooled_prompt_embeds=torch.stack([embedding.pooled for embedding in embeddings]),
        width=64,
        height=32,
        num_inference_steps=3,
        guidance_scale=3.5,
        latents=noise_BLC,
    ).images
    drawn_BHWC = ours.draw(embeddings, SEEDS, SAMPLING)
    assert drawn_BHWC.dtype == np.uint8
    assert drawn_BHWC.shape == (2, 32, 64, 3)
    assert np.array_equal(drawn_BHWC, np.stack([np.asarray(image) for image in theirs]))


def test_noise_is_flux_pipelines_own_from_the_samples_generator(generator):
    ours = generator()
    for seed in SEEDS:
        theirs_1LC, _ = ours.pipeline.prepare_latents(
            1, 16, 32, 64, torch.float32, "cpu", torch.Generator().manual_seed(seed)
        )
        assert torch.equal(ours.initial_noise(seed, SAMPLING), theirs_1LC[0])
    assert not torch.equal(ours.initial_noise(SEEDS[0], SAMPLING), ours.initial_noise(SEEDS[1], SAMPLING))


def test_noise_is_the_same_for_every_variant(generator):
    torch.manual_seed(0)
    noises = [generator(variant).initial_noise(7, SAMPLING) for variant in VARIANTS]
    assert all(torch.equal(noise, noises[0]) for noise in noises)


def test_drawing_is_repeatable_and_follows_seed_and_prompt(generator, embeddings):
    drawer = generator()
    first_BHWC = drawer.draw(embeddings, SEEDS, SAMPLING)
    assert np.array_equal(drawer.draw(embeddings, SEEDS, SAMPLING), first_BHWC)
    assert np.array_equal(drawer.draw(embeddings[::-1], SEEDS[::-1], SAMPLING), first_BHWC[::-1])
    assert not np.array_equal(drawer.draw(embeddings, SEEDS[::-1], SAMPLING), first_BHWC)
    assert not np.array_equal(drawer.draw(embeddings[::-1], SEEDS, SAMPLING), first_BHWC)


@pytest.mark.parametrize("change", [{"guidance": 1.0}, {"steps": 2}])
def test_sampling_settings_reach_the_model(generator, embeddings, change):
    drawer = generator()
    changed = Sampling(**{**SAMPLING.__dict__, **change})
    different = drawer.draw(embeddings, SEEDS, changed) != drawer.draw(embeddings, SEEDS, SAMPLING)
    assert different.any()


def test_ternary_images_differ_from_full_precision_ones_and_reference_does_not(generator, embeddings):
    images = {variant: generator(variant).draw(embeddings, SEEDS, SAMPLING) for variant in VARIANTS}
    assert not np.array_equal(images["bf16"], images["ternary"])
    assert not np.array_equal(images["ternary"], images["ternary-int8"])
    assert np.array_equal(images["ternary"], images["ternary-reference"])


def test_an_image_that_is_not_finite_is_an_error(generator, embeddings):
    drawer = generator()
    broken = [embeddings[0], type(embeddings[1])(embeddings[1].prompt_embeds * float("nan"), embeddings[1].pooled)]
    with pytest.raises(FloatingPointError, match="image 1 of the batch"):
        drawer.draw(broken, SEEDS, SAMPLING)


def test_pixels_that_do_not_fit_the_latents_are_refused(generator):
    with pytest.raises(UserError, match="64x40 pixels: use multiples of 16"):
        generator().initial_noise(0, Sampling(64, 40, 3, 3.5, 16))


def test_memory_on_the_cpu_is_the_transformers_own(generator):
    bf16, ternary = generator("bf16"), generator("ternary")
    assert bf16.peak_memory_bytes() == resident_bytes(bf16.pipeline.transformer)
    assert ternary.peak_memory_bytes() < bf16.peak_memory_bytes()


def drop_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_text_encoder_without_a_tensor_is_refused(pipeline_dir, tmp_path):
    """transformers would fill the gap with random numbers, others at every start."""
    folder = shutil.copytree(pipeline_dir, tmp_path / "copy")
    drop_a_tensor(folder / "text_encoder_2" / "model.safetensors")
    with pytest.raises(UserError, match="text_encoder_2 has missing keys such as"):
        TextEncoder(folder, "cpu", torch.float32, 16)


def spoil_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors[sorted(tensors)[-1]].view(-1)[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_text_encoder_that_is_not_finite_is_refused(pipeline_dir, tmp_path, part):
    folder = shutil.copytree(pipeline_dir, tmp_path / "copy")
    spoil_a_tensor(folder / part / "model.safetensors")
    with pytest.raises(UserError, match=f"{part} holds values that are not finite in .*: copy the model again"):
        TextEncoder(folder, "cpu", torch.float32, 16)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "no model_index.json"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "cannot be loaded"),
        (lambda folder: shutil.rmtree(folder / "vae"), "cannot be loaded"),
        (
            lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no"),
            "cannot be loaded",
        ),
        (
            lambda folder: drop_a_tensor(folder / "vae" / "diffusion_pytorch_model.safetensors"),
            "vae has missing keys such as",
        ),
        (
            lambda folder: spoil_a_tensor(folder / "vae" / "diffusion_pytorch_model.safetensors"),
            "vae holds values that are not finite",
        ),
        (lambda folder: (folder / "model_index.json").write_text("{}"), "cannot be loaded"),
    ],
    ids=["no folder", "torn index", "no VAE", "damaged VAE", "VAE without a tensor", "VAE of NaN", "empty index"],
)
def test_a_damaged_pipeline_is_named_in_one_line(pipeline_dir, tmp_path, transformer, damage, words):
    folder = shutil.copytree(pipeline_dir, tmp_path / "copy")
    damage(folder)
    with pytest.raises(UserError) as caught:
        ImageGenerator(transformer, folder, "cpu", torch.float32)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
