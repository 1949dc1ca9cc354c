"""A trained pipeline learns new words without losing the old ones."""

import torch

from bitflux_core.mini.models import build_pipeline, widen_vocabulary


def test_new_words_get_new_ids_and_old_ones_keep_their_embeddings(tmp_path):
    pipeline = build_pipeline()
    before = pipeline.tokenizer_2.get_vocab()
    rows = pipeline.text_encoder_2.shared.weight.detach().clone()
    widen_vocabulary(pipeline, [*before, "crystalline", "sonorous"])
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        after = tokenizer.get_vocab()
        assert before.items() <= after.items()
        assert after["crystalline"], after["sonorous"] == (len(before), len(before) + 1)
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        assert encoder.get_input_embeddings().num_embeddings == len(before) + 2
        assert encoder.config.vocab_size == len(before) + 2
    assert torch.equal(pipeline.text_encoder_2.get_input_embeddings().weight[: len(rows)], rows)
    pipeline.save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(tmp_path)
    embedding = again.text_encoder_2.encoder.embed_tokens.weight
    assert torch.equal(embedding[: len(rows)], rows)


def test_known_words_change_nothing():
    pipeline = build_pipeline()
    before = pipeline.tokenizer.get_vocab()
    widen_vocabulary(pipeline, sorted(before))
    assert pipeline.tokenizer.get_vocab() == before
