"""Detectors asked by name: tiny random OWLv2 and Grounding DINO models, and classes of a fixed detector."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import (
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    PreTrainedTokenizerFast,
)

from bitflux_core.errors import UserError
from evaluators.base import Detection
from evaluators.open_vocabulary import GroundingDetector, NamedClasses, OwlDetector, load_named_detector


def noise(seed, height=64, width=64):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def tokenizer(words, length, **special):
    names = list(special.values())
    ids = {word: index for index, word in enumerate([*dict.fromkeys(names), *words])}
    model = Tokenizer(tokenizer_models.WordLevel(ids, unk_token=special["unk_token"]))
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    start, end = special.get("cls_token") or special["bos_token"], special.get("sep_token") or special["eos_token"]
    model.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, ids[start]), (end, ids[end])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, model_max_length=length, **special)


@pytest.fixture(scope="module")
def owl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owl")
    torch.manual_seed(0)
    words = tokenizer(
        ["a", "photo", "of", "cat", "dog", "pig"], 8, unk_token="?", pad_token="!", bos_token="<s>", eos_token="</s>"
    )
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Owlv2Config(
        text_config={
            **small,
            "vocab_size": len(words),
            "max_position_embeddings": 8,
            "eos_token_id": words.eos_token_id,
        },
        vision_config={**small, "image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 64, "width": 64}), words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def grounding(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grounding")
    torch.manual_seed(0)
    words = tokenizer(
        [".", "cat", "dog"], 8, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = GroundingDinoConfig(
        backbone_config={
            "model_type": "swin", "image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
            "window_size": 2, "out_indices": [2, 3, 4],
        },
        text_config={
            "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 16, "vocab_size": 200, "max_position_embeddings": 16,
        },
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=20,
        encoder_attention_heads=2, decoder_attention_heads=2, max_text_len=8, disable_custom_kernels=True,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    image_processor = GroundingDinoImageProcessor(size={"shortest_edge": 160, "longest_edge": 320})
    GroundingDinoProcessor(image_processor, words).save_pretrained(folder)
    return folder


@pytest.fixture(params=["owl", "grounding"])
def detector(request):
    """Random weights find everything everywhere, a little."""
    return load_named_detector(request.getfixturevalue(request.param), "cpu", min_score=0.01)


def rows(detections):
    return [(one.label, round(one.score, 5), tuple(round(edge, 2) for edge in one.box)) for one in detections]


def test_each_image_is_searched_for_its_own_names(detector):
    first, second, none = detector.detect_named([noise(0)] * 3, [["cat", "dog"], ["dog"], []])
    assert {one.label for one in first} <= {"cat", "dog"}
    assert {one.label for one in second} == {"dog"}
    assert none == []
    scores = [one.score for one in first]
    assert scores == sorted(scores, reverse=True)
    assert all(one.mask is None for one in first)


@pytest.mark.parametrize("kind", ["owl", "grounding"])
def test_faint_candidates_are_those_that_the_threshold_leaves_out(kind, request):
    strict = load_named_detector(request.getfixturevalue(kind), "cpu", min_score=1.0)
    assert strict.detect_named([noise(0)], [["cat", "dog"]]) == [[]]
    faint = strict.detect_faint(noise(0), ["dog", "cat"])
    assert len(faint) >= 16
    [everything] = load_named_detector(request.getfixturevalue(kind), "cpu", 0.0).detect_named(
        [noise(0)], [["cat", "dog"]]
    )
    assert rows(faint) == rows(everything)


def test_neighbours_and_the_order_of_names_change_nothing(detector):
    alone = rows(detector.detect_named([noise(1)], [["cat", "dog"]])[0])
    in_company = detector.detect_named([noise(0), noise(1)], [["dog"], ["dog", "cat"]])
    assert rows(in_company[1]) == alone


def test_a_batch_finds_in_each_image_what_is_found_in_it_alone(detector):
    """More images than a batch takes, of two sizes, asked for different numbers of names of different lengths."""
    images = [
        noise(seed, *size) for seed, size in enumerate([(64, 64), (40, 80), (64, 64), (64, 64), (40, 80), (64, 64)])
    ]
    names = [["cat"], ["dog", "cat"], ["dog dog dog"], [], ["cat"], ["cat", "dog", "pig"]]
    together = detector.detect_named(images, names)
    for image, some, found in zip(images, names, together, strict=True):
        [alone] = detector.detect_named([image], [some])
        assert [one.label for one in found] == [one.label for one in alone]
        assert [one.score for one in found] == pytest.approx([one.score for one in alone], abs=1e-5)
        for one, other in zip(found, alone, strict=True):
            assert one.box == pytest.approx(other.box, abs=1e-2)
    assert together[3] == []
    assert sum(map(len, together)) > 20


def test_owls_parts_give_what_its_forward_gives(owl):
    detector = load_named_detector(owl, "cpu", 0.01)
    names, image = ["cat", "dog"], noise(1)
    texts = [[f"a photo of a {name}" for name in names]]
    inputs = detector.processor(text=texts, images=Image.fromarray(image), return_tensors="pt")
    with torch.no_grad():
        output = detector.model(**inputs)
    scores, best = output.logits[0].sigmoid().max(-1)
    [found] = detector.detect_named([image], [names])
    assert len(found) > 5
    for one in found:  # not every patch is among them: a box outside the image is none
        same = (scores - one.score).abs() < 1e-5
        assert one.label in {names[index] for index in best[same]}


@pytest.mark.parametrize("size", [(64, 64), (40, 80)])
def test_boxes_lie_in_the_image(detector, size):
    height, width = size
    [found] = detector.detect_named([noise(2, height, width)], [["cat"]])
    assert found
    for x1, y1, x2, y2 in (one.box for one in found):
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height


def test_owl_squares_an_image_below_and_boxes_are_the_images_own(owl):
    detector = load_named_detector(owl, "cpu", 0.01)
    image = noise(2, 64, 96)
    square = np.zeros((96, 96, 3), np.uint8)
    square[:64] = image
    [wide], [whole] = (detector.detect_named([one], [["cat"]]) for one in (image, square))
    inside = [row for row in rows(whole) if row[2][3] < 64]
    assert inside
    assert [row for row in rows(wide) if row[2][3] < 64] == inside


def test_a_name_with_more_tokens_than_owl_takes_is_cut(owl):
    """OWL takes 16 tokens, and a word in another script can have as many."""
    name = "cat " * 20
    [found] = load_named_detector(owl, "cpu", 0.01).detect_named([noise(2)], [[name]])
    assert {one.label for one in found} == {name}


def test_only_what_scores_more_than_the_least_is_found(owl, grounding):
    for folder in (owl, grounding):
        everything = load_named_detector(folder, "cpu", 0.01).detect_named([noise(3)], [["cat"]])[0]
        least = everything[len(everything) // 2].score
        found = load_named_detector(folder, "cpu", least).detect_named([noise(3)], [["cat"]])[0]
        assert rows(found) == [row for row in rows(everything) if row[1] > round(least, 5)]


def test_the_model_type_decides(owl, grounding, tmp_path):
    assert isinstance(load_named_detector(owl, "cpu", 0.1), OwlDetector)
    assert isinstance(load_named_detector(grounding, "cpu", 0.1), GroundingDetector)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="type 'bert': name one of owlv2, grounding-dino or mask2former"):
        load_named_detector(tmp_path, "cpu", 0.1)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_named_detector(tmp_path, "cpu", 0.1)


def test_what_is_no_image_is_named(detector):
    with pytest.raises(ValueError, match="image 0: an image must be a numpy array"):
        detector.detect_named([None], [["cat"]])


class Fixed:
    """A detector of three classes that has found one of each."""

    labels = ("cow", "cattle, cow", "traffic light, stoplight")
    fingerprint = "fixed"

    def detect(self, images):
        found = [Detection(label, 0.9 - index / 10, (0, 0, 1, 1)) for index, label in enumerate(self.labels)]
        return [found for _ in images]


def test_a_fixed_detector_answers_to_its_labels_and_their_parts():
    detector = NamedClasses(Fixed())
    [cow, light, stop, nothing] = detector.detect_named(
        [noise(0)] * 4, [["cow"], ["traffic light"], ["stoplight", "cow"], ["light"]]
    )
    assert rows(cow) == [("cow", 0.9, (0, 0, 1, 1))]  # the class itself goes before compounds
    assert rows(light) == [("traffic light", 0.7, (0, 0, 1, 1))]
    assert [one.label for one in stop] == ["cow", "stoplight"]
    assert nothing == []
