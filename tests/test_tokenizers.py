"""Tokenizers from local folders: GPT-2's published files, Hugging Face folders, bad folders."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from fastrlhf.errors import UserError
from fastrlhf.tokenizers import END_OF_TEXT, load_tokenizer

DATA = Path(
    os.environ.get("FASTRLHF_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)
needs_gpt2 = pytest.mark.skipif(
    not (DATA / "gpt2_bpe" / "encoder.json").exists(),
    reason="no gpt2_bpe in the data folder; FASTRLHF_TEST_DATA names it",
)
TEXT = "Hello  world\n\n it 's , don 't .\tünïcode 🎉 \u2028 \x00"


@pytest.fixture(scope="session")
def small_bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE in OpenAI's two files: 256 bytes, two merges, the end token."""
    folder = tmp_path_factory.mktemp("bpe")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "hel", END_OF_TEXT]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "encoder.json").write_text(json.dumps(vocabulary))
    (folder / "vocab.bpe").write_text("#version: 0.2\nh e\nhe l\n")
    return folder


@pytest.fixture(scope="session")
def small(small_bpe: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(small_bpe)


@pytest.fixture(scope="session")
def gpt2() -> PreTrainedTokenizerBase:
    return load_tokenizer(DATA / "gpt2_bpe")


def test_merges_apply_in_order(small: PreTrainedTokenizerBase) -> None:
    assert small.convert_ids_to_tokens(small.encode("hello he")) == ["hel", "l", "o", "Ġ", "he"]
    assert len(small) == 259
    assert small.eos_token_id == small.pad_token_id == small.bos_token_id == 258
    assert small.encode(END_OF_TEXT) == [258]
    assert small.decode([258, 257], skip_special_tokens=True) == "hel"


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_round_trip(text: str, small: PreTrainedTokenizerBase) -> None:
    assert small.decode(small.encode(text)) == text


@needs_gpt2
def test_gpt2_ids_are_those_of_gpt2(gpt2: PreTrainedTokenizerBase) -> None:
    assert len(gpt2) == 50257
    assert gpt2.eos_token_id == gpt2.pad_token_id == 50256
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("It's 2024") == [1026, 338, 48609]


@needs_gpt2
@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_gpt2_round_trip(text: str, gpt2: PreTrainedTokenizerBase) -> None:
    assert gpt2.decode(gpt2.encode(text)) == text


def test_a_saved_tokenizer_loads_again(small: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()
    assert again.encode(TEXT) == small.encode(TEXT)
    assert again.decode(again.encode(TEXT)) == TEXT
    assert again.pad_token_id == again.eos_token_id == 258


def test_a_padding_token_of_its_own_is_kept(small_bpe: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small_bpe)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.eos_token_id, again.pad_token_id) == (258, 259)


def test_a_tokenizer_without_an_end_token(small_bpe: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small_bpe)
    tokenizer.save_pretrained(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    kept = json.loads(settings_file.read_text())
    for name in ("eos_token", "pad_token", "bos_token", "unk_token"):
        kept.pop(name, None)
    settings_file.write_text(json.dumps(kept))
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == f"{tmp_path}: field 'eos_token': the tokenizer names no end token"


def vocabulary(**changes: object) -> str:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END_OF_TEXT]
    return json.dumps({token: i for i, token in enumerate(tokens)} | changes)


BAD_PAIRS = {
    "broken JSON": ('{"a": 0,\n}', "", "encoder.json:2: not valid JSON: "),
    "a list": ("[]", "", "encoder.json: wanted an object of token to id"),
    "id of a string": (vocabulary(x="1"), "", "encoder.json: token 'x': its id is not an integer"),
    "hole in ids": (vocabulary(zz=900), "", "encoder.json: the ids of 258 tokens are not 0 to 257"),
    "bytes missing": ('{"a": 0}', "", "encoder.json: no token for 255 of the 256 bytes: "),
    "no end token": (
        json.dumps({t: i for i, t in enumerate(pre_tokenizers.ByteLevel.alphabet())}),
        "",
        "encoder.json: no token '<|endoftext|>'",
    ),
    "three tokens": (vocabulary(), "#version: 0.2\na b c\n", "vocab.bpe:2: wanted two tokens and "),
    "unknown merge": (
        vocabulary(),
        "#version: 0.2\n\na b\n",
        "vocab.bpe:3: token 'ab' is not in the vocabulary",
    ),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_bpe_files(case: str, tmp_path: Path) -> None:
    encoder, merges, wanted = BAD_PAIRS[case]
    (tmp_path / "encoder.json").write_text(encoder)
    (tmp_path / "vocab.bpe").write_text(merges)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/{wanted}")


def test_half_of_the_pair(tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_text(vocabulary())
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value) == f"{tmp_path}/vocab.bpe: missing, though encoder.json is there"


def test_folders_that_hold_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tokenizer was looked for on the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^gpt2: no such folder \(tokenizers are never downloade"):
        load_tokenizer("gpt2")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^file: is a file; the folder of a tokenizer is wanted"):
        load_tokenizer("file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^empty: no tokenizer .*; the folder holds: nothing$"):
        load_tokenizer("empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"^broken: no tokenizer .* holds: tokenizer.json$"):
        load_tokenizer("broken")
