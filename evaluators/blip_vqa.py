"""BLIP as T2I-CompBench asks it: how likely "yes" is as the answer to a question about an image.

transformers' BLIP (Li et al. 2022) does not mark a question as its authors' code does, and its own generation gives no
probabilities, so the parts are called here. The official weights are the port `blip-vqa-capfilt-large`; its
configuration says 384, but the protocol shows the model 480x480 pixels, as it was trained on questions.

Legend: N questions, B a batch, T tokens, V vocabulary.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BlipForQuestionAnswering

from evaluators.base import image_fault
from evaluators.inference import exact_inference, fingerprint, load_pretrained, model_folder, pad_batch, unloadable

ROLE = "VQA model"
QUESTION_TOKENS = 35
PROTOCOL_SIDE = 480  # pixels of the square that the model is shown ...
PORTED_SIDE = 384  # ... where the published port of it was configured for these
DELETED = str.maketrans("", "", '.!"()*#:;~')
YES, NO = "yes", "no"


class BlipQuestionAnswerer:
    """A BLIP model in transformers' folder format.

    Images are squeezed into a square, whose side is the protocol's 480 for the published port, and any other model's
    own. The port's position embeddings are resized to it, as BLIP's authors do.
    """

    def __init__(self, model_dir: str | Path, device: str | torch.device = "cpu", *, batch_size: int = 8) -> None:
        """Raises UserError where the folder is missing, incomplete or damaged."""
        folder = model_folder(model_dir, ROLE, ("config.json", "preprocessor_config.json"))
        self.model = load_pretrained(BlipForQuestionAnswering, folder, ROLE, device)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            preprocessing = json.loads((folder / "preprocessor_config.json").read_text())
            self.mean, self.std = (torch.tensor(preprocessing[key]) for key in ("image_mean", "image_std"))
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise unloadable(folder, ROLE, fault) from fault
        text = self.model.config.text_config
        # BLIP's vocabulary is BERT's and two more: [DEC], which begins an answer, and [ENC], which begins a question.
        self.decode_id, self.encode_id = text.bos_token_id, text.bos_token_id + 1
        self.yes_id, self.no_id = (self.tokenizer.convert_tokens_to_ids(word) for word in (YES, NO))
        if self.encode_id >= text.vocab_size or self.tokenizer.unk_token_id in (self.yes_id, self.no_id):
            raise unloadable(folder, ROLE, "its vocabulary lacks [ENC], 'yes' or 'no'")
        self.tokens = min(QUESTION_TOKENS, text.max_position_embeddings)
        self.own_side = int(self.model.config.vision_config.image_size)
        self.side = PROTOCOL_SIDE if self.own_side == PORTED_SIDE else self.own_side
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.fingerprint = fingerprint(folder, self.side, batch_size)

    def probability_of_yes(self, images: Sequence[np.ndarray], questions: Sequence[str]) -> list[float]:
        """P(yes) / (P(yes) + P(no)) for each image and its own question; an image may be given several times over.

        Raises ValueError for what is not an image.
        """
        distinct: dict[int, np.ndarray] = {}
        for index, image in enumerate(images):
            if fault := image_fault(image):
                raise ValueError(f"image {index}: {fault}")
            distinct.setdefault(id(image), image)
        if not distinct:
            return []
        places = {key: place for place, key in enumerate(distinct)}
        seen = self._encode_images(list(distinct.values()))
        features_NPD = seen[torch.tensor([places[id(image)] for image in images])]
        ids_NT, mask_NT = self._encode_questions(questions)
        parts = zip(*(rows.split(self.batch_size) for rows in (features_NPD, ids_NT, mask_NT)), strict=True)
        return [p for part in parts for p in self._answer(*part)]

    def _encode_questions(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and attention mask, int64 [N, T]; the first token is [ENC]."""
        texts = [question.lower().translate(DELETED) for question in questions]
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        )
        tokens.input_ids[:, 0] = self.encode_id
        return tokens.input_ids, tokens.attention_mask

    @exact_inference()
    def _encode_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """Features of each image's patches, on the CPU: float32 [images, P, D]."""
        pixels = torch.stack([self._pixels(image) for image in images])
        parts = []
        for part in pixels.split(self.batch_size):
            padded = pad_batch(part, self.batch_size).to(self.device)
            resized = self.side != self.own_side
            seen = self.model.vision_model(pixel_values=padded, interpolate_pos_encoding=resized)
            parts.append(seen.last_hidden_state[: len(part)].cpu())
        return torch.cat(parts)

    def _pixels(self, image: np.ndarray) -> Tensor:
        """Bicubic to the square, without a crop: float32 [3, side, side]."""
        square = Image.fromarray(image).resize((self.side, self.side), Image.Resampling.BICUBIC)
        pixels_HWC = torch.from_numpy(np.array(square)).float() / 255
        return ((pixels_HWC - self.mean) / self.std).permute(2, 0, 1)

    @exact_inference()
    def _answer(self, features_BPD: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> list[float]:
        asked = len(ids_BT)
        features_BPD, ids_BT = (pad_batch(rows, self.batch_size).to(self.device) for rows in (features_BPD, ids_BT))
        # A padding row must see something, or its softmax divides by zero.
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(self.batch_size - asked, mask_BT.shape[1])]).to(self.device)
        question = self.model.text_encoder(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            encoder_hidden_states=features_BPD,
            encoder_attention_mask=torch.ones(features_BPD.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        start_B1 = torch.full_like(ids_BT[:, :1], self.decode_id)
        logits_BV = self.model.text_decoder(
            input_ids=start_B1, encoder_hidden_states=question, encoder_attention_mask=mask_BT
        ).logits[:, -1]
        # The ratio of two softmax values is that of a softmax over the two.
        pair_B2 = logits_BV[:asked, [self.yes_id, self.no_id]].float().softmax(-1)
        return pair_B2[:, 0].tolist()
