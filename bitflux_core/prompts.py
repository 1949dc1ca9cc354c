"""Whether prompts fit the text encoder, asked of its tokenizer alone: no model is loaded."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from bitflux_core.errors import UserError


def check_prompt_lengths(pipeline_dir: Path | str, prompts: Sequence[str], max_sequence_length: int) -> None:
    """UserError for a prompt of more than `max_sequence_length` T5 tokens."""
    folder = Path(pipeline_dir) / "tokenizer_2"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise UserError(f"{folder} holds no tokenizer ({problem}): name the folder of a FLUX model") from error
    check_lengths(tokenizer, prompts, max_sequence_length)


def check_lengths(tokenizer, prompts: Sequence[str], max_sequence_length: int) -> None:
    """The same with a tokenizer at hand."""
    for prompt in prompts:
        tokens = len(tokenizer(prompt, verbose=False).input_ids)
        if tokens > max_sequence_length:
            raise UserError(
                f"prompt {prompt[:60]!r} has {tokens} T5 tokens of {max_sequence_length}: "
                "shorten it or raise max_sequence_length"
            )
