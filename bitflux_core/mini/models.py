"""The mini FLUX's models: diffusers' and transformers' own classes, FLUX.1-dev's shape at small dimensions."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from bitflux_core.mini.compositions import vocabulary

WEIGHTS = Path(__file__).parent / "weights"

TOKENS = 16
T5_WIDTH = 128
CLIP_WIDTH = 96
BIAS = 4.0  # of attention to a neighbour, before training
LATENT_CHANNELS = 16
SPECIAL_TOKENS = ["<pad>", "<unk>", "<mask>", "</s>", "<s>"]  # id 2 stays unused: CLIP treats eos id 2 as a legacy case
PAD, UNKNOWN, END, START = "<pad>", "<unk>", "</s>", "<s>"


def build_tokenizer(*, start: bool, words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the world's vocabulary; `start` puts <s> in front, as CLIP wants it."""
    ids = {word: index for index, word in enumerate(SPECIAL_TOKENS + (words or vocabulary()))}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}" if start else f"$A {END}", special_tokens=[(START, ids[START]), (END, ids[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        bos_token=START,
        model_max_length=TOKENS,
        padding_side="right",
    )


def build_vae() -> AutoencoderKL:
    """f8, 16 latent channels: 128x128 pixels become 16x16 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=128,
        scaling_factor=1.0,  # both factors are measured after training
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer() -> FluxTransformer2DModel:
    """8 heads of 32, 2 double and 6 single blocks, 64 image + 16 text tokens, guidance embedding as in FLUX.1-dev."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def build_text_encoders(vocabulary_size: int, end_id: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=CLIP_WIDTH,
            intermediate_size=4 * CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            pad_token_id=0,
            bos_token_id=end_id + 1,
            eos_token_id=end_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocabulary_size,
            d_model=T5_WIDTH,
            d_kv=32,
            num_heads=4,
            d_ff=4 * T5_WIDTH,
            num_layers=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=end_id,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    point_heads_at_neighbours(t5)
    return clip, t5


def point_heads_at_neighbours(t5: T5EncoderModel) -> None:
    """Starts the four heads' relative bias at: the word before, the word after, all before, all after.

    Buckets of T5's bidirectional bias (32 of them): 0-15 the same place and before, 16-31 after, the nearest exact.
    """
    bias_RH = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    before, after = slice(1, 16), slice(17, 32)
    with torch.no_grad():
        bias_RH.zero_()
        bias_RH[1, 0] = bias_RH[17, 1] = BIAS
        bias_RH[before, 2] = bias_RH[after, 3] = BIAS / 2


def build_pipeline(seed: int = 0) -> FluxPipeline:
    """The whole mini FluxPipeline with random weights, reproducible from `seed`."""
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = build_tokenizer(start=True), build_tokenizer(start=False)
    end_id = SPECIAL_TOKENS.index(END)
    clip, t5 = build_text_encoders(len(t5_tokenizer), end_id)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False, shift=3.0),
        vae=build_vae(),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=build_transformer(),
    )


def widen_vocabulary(pipeline: FluxPipeline, words: list[str]) -> None:
    """Adds the words that the pipeline's tokenizers lack; the others keep their ids, and what was learnt of them."""
    known = pipeline.tokenizer_2.get_vocab()
    kept = [word for word in sorted(known, key=known.__getitem__) if word not in SPECIAL_TOKENS]
    everything = kept + [word for word in words if word not in known]
    pipeline.tokenizer = build_tokenizer(start=True, words=everything)
    pipeline.tokenizer_2 = build_tokenizer(start=False, words=everything)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
