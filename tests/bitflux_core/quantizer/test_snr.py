"""Signal-to-noise ratios of a block whose outputs are known by hand."""

import math

import pytest
import torch
from torch import nn

from bitflux_core.quantizer.blocks import Stream
from bitflux_core.quantizer.snr import measure


class Block(nn.Module):
    """Image and text each by a linear of its own."""

    def __init__(self, image: float, text: float):
        super().__init__()
        self.image, self.text = (nn.Linear(4, 4, bias=False) for _ in range(2))
        for linear, factor in ((self.image, image), (self.text, text)):
            linear.weight.data = factor * torch.eye(4)

    def forward(self, hidden, encoder, _temb, _rotary):
        return self.text(encoder), self.image(hidden)


@pytest.mark.parametrize(("image", "text"), [(0.9, 1.0), (1.0, 0.5), (0.9, 0.5)])
def test_a_block_counts_image_and_text(image, text):
    rotary = torch.ones(5, 4), torch.zeros(5, 4)
    # Squares add up to 12 of the image and 32 of the text in each of two batches.
    streams = [Stream(torch.ones(1, 3, 4), 2 * torch.ones(1, 2, 4), torch.ones(1, 4), rotary) for _ in range(2)]
    rows = {row.name: row for row in measure("a", Block(1.0, 1.0), Block(image, text), streams, streams)}
    noise = 12 * (1 - image) ** 2 + 32 * (1 - text) ** 2
    assert rows["a"].level == "block"
    assert rows["a"].output_snr_db == pytest.approx(10 * math.log10(44 / noise), abs=1e-4)
    for name, factor in (("a.image", image), ("a.text", text)):
        expected = -20 * math.log10(1 - factor) if factor < 1 else math.inf
        assert rows[name].output_snr_db == pytest.approx(expected, abs=1e-4)
