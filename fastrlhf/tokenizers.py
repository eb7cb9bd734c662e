"""Tokenizers from a local folder; the network is never touched.

A folder holds one of
  - tokenizer.json (and what Hugging Face saves beside it), or another tokenizer that transformers
    knows, a model's own folder included;
  - encoder.json and vocab.bpe: GPT-2's byte-level BPE as OpenAI published it.

The tokenizer has an end token, and a padding token, which is the end token where none is named.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastrlhf.errors import UserError

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(path: str | PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder.

    Args:
        path: the folder.

    Returns:
        A transformers tokenizer whose `eos_token_id` and `pad_token_id` are set. For GPT-2's BPE,
        begin, end, unknown and padding are all `<|endoftext|>`, and decode(encode(text)) == text.

    Raises:
        UserError: no such folder, no tokenizer in it, a broken file, or no end token.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise UserError.at(path, None, None, "is a file; the folder of a tokenizer is wanted")
        raise UserError.at(path, None, None, "no such folder (tokenizers are never downloaded)")
    pair = (folder / "encoder.json", folder / "vocab.bpe")
    if not (folder / "tokenizer.json").exists() and any(file.exists() for file in pair):
        tokenizer: PreTrainedTokenizerBase = _gpt2_bpe(*pair)
    else:
        tokenizer = _huggingface(folder)
    if tokenizer.eos_token_id is None:
        raise UserError.at(path, None, "eos_token", "the tokenizer names no end token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _huggingface(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers and the Rust tokenizers raise bare Exceptions too
        held = ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :")
        message = f"no tokenizer that transformers can load ({reason}); the folder holds: {held}"
        raise UserError.at(folder, None, None, message) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError.at(folder, None, None, f"not a tokenizer: {type(tokenizer).__name__}")
    return tokenizer


def _gpt2_bpe(encoder: Path, merges: Path) -> PreTrainedTokenizerFast:
    """Build GPT-2's BPE from OpenAI's two files."""
    for file, other in ((encoder, merges), (merges, encoder)):
        if not file.exists():
            raise UserError.at(file, None, None, f"missing, though {other.name} is there")
    vocabulary = _read_vocabulary(encoder)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_read_merges(merges, vocabulary)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _read_vocabulary(path: Path) -> dict[str, int]:
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError.at(path, error.lineno, None, f"not valid JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError.at(path, None, None, "not UTF-8 text") from None
    if not isinstance(vocabulary, dict):
        raise UserError.at(path, None, None, "wanted an object of token to id")
    for token, index in vocabulary.items():
        if not isinstance(index, int) or isinstance(index, bool):
            raise UserError.at(path, None, None, f"token {token!r}: its id is not an integer")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        message = f"the ids of {len(vocabulary)} tokens are not 0 to {len(vocabulary) - 1}"
        raise UserError.at(path, None, None, message)
    missing = [token for token in pre_tokenizers.ByteLevel.alphabet() if token not in vocabulary]
    if missing:
        message = f"no token for {len(missing)} of the 256 bytes: not a byte-level BPE"
        raise UserError.at(path, None, None, message)
    if END_OF_TEXT not in vocabulary:
        raise UserError.at(path, None, None, f"no token {END_OF_TEXT!r}")
    return vocabulary


def _read_merges(path: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Read one merge a line, best first, after the line `#version`."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise UserError.at(path, None, None, "not UTF-8 text") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            message = f"wanted two tokens and a space between them, got {line!r}"
            raise UserError.at(path, number, None, message)
        for token in (*parts, "".join(parts)):
            if token not in vocabulary:
                message = f"token {token!r} is not in the vocabulary"
                raise UserError.at(path, number, None, message)
        merges.append((parts[0], parts[1]))
    return merges
