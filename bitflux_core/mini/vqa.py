"""The mini VQA model: transformers' BLIP at small dimensions, with a word-level tokenizer in BERT's manner."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import BlipConfig, BlipForQuestionAnswering, PreTrainedTokenizerFast

from bitflux_core.mini.compositions import vocabulary
from bitflux_core.mini.render import SIZE

YES, NO = "yes", "no"
PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
DECODE, ENCODE = "[DEC]", "[ENC]"  # BLIP's own: the decoder's only input, and a question's first token
QUESTION_TOKENS = 10
WIDTH = 128
PATCH = 16
# As BLIP's weights expect their images: CLIP's mean and standard deviation.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
PREPROCESSOR = {
    "image_processor_type": "BlipImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(IMAGE_MEAN),
    "image_std": list(IMAGE_STD),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = [PAD, UNKNOWN, START, END, MASK, *vocabulary(), YES, NO, "?", DECODE, ENCODE]
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, ids[START]), (END, ids[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=START,
        sep_token=END,
        mask_token=MASK,
        additional_special_tokens=[DECODE, ENCODE],
        model_max_length=QUESTION_TOKENS,
        padding_side="right",
    )


def build_vqa(tokenizer: PreTrainedTokenizerFast) -> BlipForQuestionAnswering:
    """Random weights; seed torch before the call."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "encoder_hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": QUESTION_TOKENS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": tokenizer.convert_tokens_to_ids(PAD),
        "sep_token_id": tokenizer.convert_tokens_to_ids(END),
        "eos_token_id": tokenizer.convert_tokens_to_ids(END),
        "bos_token_id": tokenizer.convert_tokens_to_ids(DECODE),
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    return BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


@dataclass(frozen=True)
class Reading:
    """What the model makes of questions: logits_BV of the answers' first word, and on the way to it the question's
    words_BTD and each text layer's attention to the image, [B, heads, T, S]."""

    logits_BV: Tensor
    words_BTD: Tensor
    attention: tuple[Tensor, ...]


def answer_logits(model: BlipForQuestionAnswering, pixels_BCHW: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The decoder's logits for the first word of the answers, [B, vocabulary]: BLIP's forward gives them to no one."""
    image_BSD = model.vision_model(pixel_values=pixels_BCHW).last_hidden_state
    return read(model, image_BSD, ids_BT, mask_BT).logits_BV


def read(model: BlipForQuestionAnswering, image_BSD: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Reading:
    """The same from the vision model's last hidden state, and how it came about."""
    question = model.text_encoder(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        encoder_hidden_states=image_BSD,
        encoder_attention_mask=torch.ones(image_BSD.shape[:2], dtype=torch.long, device=image_BSD.device),
        output_attentions=True,
    )
    words_BTD = question.last_hidden_state
    start_B1 = torch.full_like(ids_BT[:, :1], model.decoder_start_token_id)
    answer = model.text_decoder(input_ids=start_B1, encoder_hidden_states=words_BTD, encoder_attention_mask=mask_BT)
    return Reading(answer.logits[:, -1], words_BTD, question.cross_attentions)


def question_tokens(tokenizer: PreTrainedTokenizerFast, questions: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, int64 [Q, T], as BLIP asks: the first token is [ENC]."""
    tokens = tokenizer(
        questions, padding="max_length", max_length=QUESTION_TOKENS, truncation=True, return_tensors="pt"
    )
    tokens.input_ids[:, 0] = tokenizer.convert_tokens_to_ids(ENCODE)
    return tokens.input_ids, tokens.attention_mask


def save_vqa(model: BlipForQuestionAnswering, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
