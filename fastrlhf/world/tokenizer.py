"""A real Hugging Face tokenizer for the world: one word, one token.

``tokenizers`` WordLevel over words split at white space, wrapped as ``PreTrainedTokenizerFast``.
``tokenizer(text)`` puts ``<bos>`` first, as Llama's does; ``add_special_tokens=False`` leaves it
out (completions). Nothing appends ``<eos>``: whoever builds a training sequence does. Decoding
joins words with single spaces, so that every text of the world comes back as it was.

There is no unknown token: a word outside the vocabulary raises, since nothing in this world may be
lost in silence (``vocabulary.split_words`` names the word).
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fastrlhf.world.vocabulary import BOS, BOT, CHAT, EOS, PAD, USER, VOCABULARY

MAX_LENGTH = 64  # tokens; the longest document (a quiz of four pairs) takes fewer

_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    f"{{{{ ' {CHAT} {USER} ' + message['content'] + ' {BOT}' }}}}"
    "{% else %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the world; the same for every seed. ``save_pretrained`` stores it."""
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    core = Tokenizer(WordLevel(ids))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    # transformers leaves this constructor untyped, which strict mypy refuses to call as it is.
    make: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return make(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )
