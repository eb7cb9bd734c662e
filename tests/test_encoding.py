"""From records to token lists: where begin, end and the loss stand, and the recipe's order."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from fastrlhf.encoding import (
    Recipe,
    completion_ids,
    decode,
    demonstration_examples,
    document_examples,
    prompt_ids,
    text_prompt_ids,
)
from fastrlhf.errors import UserError
from fastrlhf.records import Comparison, Demonstration, Document, PromptRecord
from fastrlhf.world import VOCABULARY

FILE = Path("prompts.jsonl")
WORDS = [word for word in VOCABULARY if not word.startswith("<")]


def prompt(text: str, line: int = 1, user: str | None = None) -> PromptRecord:
    return PromptRecord(text, user, line, {})


def test_a_prompt_begins_with_the_begin_token(tokenizer: PreTrainedTokenizerBase) -> None:
    (ids,) = prompt_ids(tokenizer, [prompt("anna likes")])
    assert ids == [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(["anna", "likes"])]
    assert text_prompt_ids(tokenizer, ["anna likes"]) == [ids]
    assert text_prompt_ids(tokenizer, []) == []


def test_a_completion_closes_with_the_end_token_unless_it_is_cut(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    words = tokenizer.convert_tokens_to_ids(["anna", "likes", "anna"])
    end = tokenizer.eos_token_id
    for limit, wanted in ((9, [*words, end]), (4, [*words, end]), (3, words), (2, words[:2])):
        assert completion_ids(tokenizer, ["anna likes anna"], limit) == [wanted]
    assert completion_ids(tokenizer, [""], 5) == [[end]]


@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=8))
def test_decode_gives_the_completion_back(
    tokenizer: PreTrainedTokenizerBase, words: list[str]
) -> None:
    text = " ".join(words)
    (ids,) = completion_ids(tokenizer, [text], 20)
    assert decode(tokenizer, ids) == text
    assert decode(tokenizer, [*ids, *ids]) == text  # nothing after the end token


def test_a_demonstration_predicts_its_completion_alone(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    (example,) = demonstration_examples(
        tokenizer, [Demonstration("anna likes", "anna", None, 1, {})], 9
    )
    assert example.start == 3
    assert decode(tokenizer, example.tokens[example.start :]) == "anna"
    assert example.tokens[-1] == tokenizer.eos_token_id


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5), context=st.integers(2, 12))
def test_each_token_of_a_document_is_predicted_once(
    tokenizer: PreTrainedTokenizerBase, lengths: list[int], context: int
) -> None:
    texts = [" ".join(WORDS[(7 * i + k) % 40] for k in range(n)) for i, n in enumerate(lengths)]
    documents = [Document(text, None, 1, {}) for text in texts]
    examples = document_examples(tokenizer, documents, context)
    assert max(len(e.tokens) for e in examples) <= context
    predicted = [token for e in examples for token in e.tokens[1:]]
    wanted = []
    for text in texts:
        wanted += tokenizer(text, add_special_tokens=False)["input_ids"]
        wanted.append(tokenizer.eos_token_id)
    assert predicted == wanted


def test_the_recipe_refuses_a_long_prompt_by_line_or_drops_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    items = [prompt("anna", 1), prompt("anna likes anna likes", 7)]
    with pytest.raises(UserError, match=r"prompts.jsonl:7: field 'prompt': 5 tokens, over .* 4"):
        Recipe().apply(items, tokenizer, FILE, 4)
    assert Recipe(drop_long=True).apply(items, tokenizer, FILE, 4) == ([items[0]], [])
    assert Recipe(drop_long=True, max_prompt=1).apply(items, tokenizer, FILE, 4) == ([], [])
    assert Recipe().apply(items, tokenizer, FILE, 5)[0] == items


def test_the_recipe_drops_near_duplicates_caps_users_and_filters(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    items = [
        prompt("anna likes anna", 1, "u"),
        prompt("anna likes likes", 2, "u"),  # shares a prefix of two tokens with the first
        prompt("likes anna", 3, "u"),
        prompt("likes likes", 4, "u"),
        prompt("anna anna", 5, "v"),
    ]
    recipe = Recipe(prefix_tokens=2, per_user=2)
    assert [i.line for i in recipe.apply(items, tokenizer, FILE, 9)[0]] == [1, 3, 5]
    assert [i.line for i in Recipe(per_user=0).apply(items, tokenizer, FILE, 9)[0]] == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip


def test_held_out_prompts_are_the_same_in_every_kind_of_file(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    texts = [f"{a} {b}" for a in WORDS[:20] for b in WORDS[20:25]]
    recipe = Recipe(heldout=0.3, split_seed=5)
    prompts = [prompt(text, i) for i, text in enumerate(texts)]
    # The other files hold only some of the prompts, in another order.
    shown = [Demonstration(text, "anna", None, i, {}) for i, text in enumerate(texts[::-2])]
    ranked = [
        Comparison(text, ("a", "b"), (1, 2), None, None, i, {}) for i, text in enumerate(texts[:40])
    ]
    train, held = recipe.apply(prompts, tokenizer, FILE, 9)
    assert len(train) + len(held) == 100
    assert 10 <= len(held) <= 50
    out = {item.prompt for item in held}
    for others in (shown, ranked):
        theirs_train, theirs_held = recipe.apply(others, tokenizer, FILE, 9)
        assert {item.prompt for item in theirs_held} <= out
        assert not {item.prompt for item in theirs_train} & out
        assert theirs_held


def test_bad_recipes_name_the_field() -> None:
    with pytest.raises(UserError, match="field 'heldout'"):
        Recipe(heldout=1.0)
    with pytest.raises(UserError, match="field 'per_user'"):
        Recipe(per_user=-1)
