"""Non-spatial relations: CLIPScore, the bare cosine of image and prompt (OpenAI's ViT-B/32, no factor, no clamp)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from evaluators.compbench.judgment import Judgment

if TYPE_CHECKING:
    from evaluators.clip import ClipModel


class ClipScoreJudge:
    """Scores each image by the cosine of its features and its text's."""

    def __init__(self, clip: "ClipModel") -> None:
        self.clip = clip

    def judge(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> list[Judgment]:
        """One judgment for each image and its text. A text without a word has features like any other."""
        if not images:
            return []
        distinct = list(dict.fromkeys(texts))
        features = dict(zip(distinct, self.clip.text_features(distinct), strict=True))
        images_ND = self.clip.image_features(images)
        return [Judgment(float(image_D @ features[text])) for image_D, text in zip(images_ND, texts, strict=True)]
