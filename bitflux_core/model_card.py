"""The README.md of a ternary checkpoint, as model hubs show it."""

from pathlib import Path
from typing import Any

from diffusers import FluxTransformer2DModel
from huggingface_hub import ModelCard, ModelCardData

from bitflux_core.accounting import size_report

_TEXT = """
# Ternary FLUX transformer

The weights of all linear layers in the blocks are -1, 0 or +1 with one scale an output row, made by BitFlux without
image data ({method}) after "1.58-bit FLUX" (Yang et al., arXiv 2412.18653).{correction}

| | |
|---|---|
| parameters | {total:,}, of which {share:.2%} ternary |
| tensors in bf16 | {full:.3f} GB |
| tensors of this checkpoint ({codes}) | {stored:.3f} GB, {ratio:.2f} times smaller |
| made from | {provenance} |

```python
import bitflux_core  # teaches diffusers this format
import torch
from diffusers import FluxTransformer2DModel

transformer = FluxTransformer2DModel.from_pretrained("this folder or repository", torch_dtype=torch.bfloat16)
```

The license of the model that it was made from applies to it.
"""

_CORRECTION = """ Each of these layers has a correction of rank
{rank} beside it, two thin matrices in bf16: {size:.3f} GB, counted below."""


def write_card(transformer: FluxTransformer2DModel, directory: Path, header: dict[str, Any]) -> None:
    """Writes `README.md`; `header` is the checkpoint's `quantization_config`."""
    sizes = size_report(transformer, header["codes"])
    rank = header.get("low_rank", 0)
    provenance = ", ".join(f"{name} {value}" for name, value in header["provenance"].items()) or "not said"
    text = _TEXT.format(
        method=header["method"] or "method not said",
        correction=_CORRECTION.format(rank=rank, size=sizes.correction_bytes / 1e9) if rank else "",
        total=sizes.total_params,
        share=sizes.ternary_share,
        full=sizes.bf16_bytes / 1e9,
        codes=header["codes"],
        stored=sizes.storage_bytes / 1e9,
        ratio=sizes.ratio,
        provenance=provenance,
    )
    data = ModelCardData(library_name="diffusers", pipeline_tag="text-to-image", tags=["bitflux", "ternary", "flux"])
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(directory / "README.md")
