"""BLIP's answers: the tokens that it is given, and that images and questions do not see each other."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipConfig, BlipForQuestionAnswering

from bitflux_core.errors import UserError
from bitflux_core.mini.train_vqa import normalise
from bitflux_core.mini.vqa import DECODE, ENCODE, answer_logits, build_tokenizer, build_vqa, question_tokens, save_vqa
from evaluators.blip_vqa import BlipQuestionAnswerer
from evaluators.inference import fingerprint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqa")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    save_vqa(build_vqa(tokenizer), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def answerer(folder):
    return BlipQuestionAnswerer(folder, batch_size=3)


def noise(seed, side=128):
    return np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)


def test_questions_begin_with_enc_and_lose_their_marks(answerer):
    names = answerer.tokenizer.convert_ids_to_tokens
    ids, mask = answerer._encode_questions(["A red *Star*!?", 'the "ring"'])
    first = [token for token, kept in zip(names(ids[0].tolist()), mask[0].tolist(), strict=True) if kept]
    assert first == [ENCODE, "a", "red", "star", "?", "[SEP]"]
    assert names(ids[1].tolist())[1:3] == ["the", "ring"]
    assert names([answerer.decode_id]) == [DECODE]
    # All that the protocol deletes; the tokenizer would make a token of each.
    assert answerer._encode_questions(['a red~ star.!"()*#:;?'])[0].equal(
        answerer._encode_questions(["a red star?"])[0]
    )


def test_a_question_has_35_tokens_at_most(folder, tmp_path):
    """[ENC] and [SEP] are two of them."""
    longer = shutil.copytree(folder, tmp_path / "longer")
    config = BlipConfig.from_pretrained(longer)
    config.text_config.max_position_embeddings = 40
    BlipForQuestionAnswering(config).save_pretrained(longer)
    ids, mask = BlipQuestionAnswerer(longer)._encode_questions(["? " * 50, "? " * 30])
    assert ids.shape == (2, 35)
    assert mask.sum(1).tolist() == [35, 32]


def test_images_are_resized_bicubically_to_the_models_square(answerer):
    image = noise(8, 50)
    expected = np.array(Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC))
    shown = answerer._pixels(image).permute(1, 2, 0) * answerer.std + answerer.mean
    assert (shown * 255).round().byte().numpy().tolist() == expected.tolist()


@pytest.mark.parametrize(("own", "shown"), [(384, 480), (480, 480), (96, 96)])
def test_the_published_port_is_shown_the_protocols_480_pixels(folder, tmp_path, own, shown):
    """transformers' port says 384. Its 24 x 24 position embeddings become 30 x 30, as they would by hand."""
    port = shutil.copytree(folder, tmp_path / "port")
    config = BlipConfig.from_pretrained(port)
    config.vision_config.image_size, config.vision_config.num_hidden_layers = own, 1
    torch.manual_seed(1)
    BlipForQuestionAnswering(config).save_pretrained(port)
    answerer = BlipQuestionAnswerer(port, batch_size=1)
    image = noise(9, 64)
    features = answerer._encode_images([image])
    assert features.shape == (1, (shown // 16) ** 2 + 1, 128)
    assert answerer.fingerprint == fingerprint(port, shown, 1)
    [answer] = answerer.probability_of_yes([image], ["a red star?"])
    assert 0 < answer < 1

    embeddings = answerer.model.vision_model.embeddings
    places = embeddings.position_embedding.detach()
    grid = places[:, 1:].unflatten(1, (own // 16, own // 16)).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(shown // 16, shown // 16), mode="bicubic", align_corners=False)
    places = torch.cat([places[:, :1], grid.flatten(2).mT], 1)
    with torch.no_grad():
        patches = embeddings.patch_embedding(answerer._pixels(image)[None]).flatten(2).mT
        hidden = torch.cat([embeddings.class_embedding.expand(1, 1, -1), patches], 1) + places
        vision_model = answerer.model.vision_model
        expected = vision_model.post_layernorm(vision_model.encoder(inputs_embeds=hidden).last_hidden_state)
    assert torch.allclose(features, expected, atol=1e-5)


def test_probabilities_are_those_of_the_models_own_parts(answerer):
    """The training code builds the same answer from the model directly: yes over yes and no."""
    images, questions = [noise(0), noise(1)], ["a red star?", "a blue ring?"]
    found = answerer.probability_of_yes(images, questions)
    ids, mask = question_tokens(answerer.tokenizer, questions)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        probabilities = answer_logits(answerer.model, normalise(pixels), ids, mask).softmax(-1)
    yes, no = (probabilities[:, answerer.tokenizer.convert_tokens_to_ids(word)] for word in ("yes", "no"))
    assert found == pytest.approx((yes / (yes + no)).tolist(), abs=1e-5)


def test_company_changes_no_answer(answerer):
    [alone] = answerer.probability_of_yes([noise(2)], ["a striped heart?"])
    images = [noise(i) for i in (0, 1, 2, 3)]
    found = answerer.probability_of_yes([*images, images[2]], ["a ring?"] * 2 + ["a striped heart?"] * 3)
    assert found[2] == found[4] == alone


def test_an_image_is_encoded_once_for_all_its_questions(answerer, monkeypatch):
    seen = []
    encode = answerer._encode_images
    monkeypatch.setattr(answerer, "_encode_images", lambda images: seen.extend(images) or encode(images))
    image = noise(5)
    answerer.probability_of_yes([image, image, noise(6)], ["a ring?", "a star?", "a ring?"])
    assert len(seen) == 2


def test_any_size_any_letters_and_nothing_at_all(answerer):
    [p] = answerer.probability_of_yes([noise(7, 40)], ["ein Café " * 40])
    assert 0 < p < 1
    assert answerer.probability_of_yes([], []) == []
    with pytest.raises(ValueError, match="image 0: an image must be"):
        answerer.probability_of_yes([None], ["a?"])


def test_a_folder_that_is_no_vqa_model_is_named(tmp_path, folder):
    for file in folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_text(file.read_text())
    with pytest.raises(UserError, match=f"VQA model folder {tmp_path} cannot be loaded"):
        BlipQuestionAnswerer(tmp_path)
    with pytest.raises(UserError, match=r"has no config\.json"):
        BlipQuestionAnswerer(tmp_path / "nowhere")
