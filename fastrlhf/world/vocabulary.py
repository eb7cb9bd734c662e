"""The words of the miniature world: the whole vocabulary, in the order of its token ids.

One word is one token, words are separated by single spaces, and nothing else exists. The order is
fixed (it gives the token ids and so must not change between a checkpoint and its tokenizer):
special tokens, markers, names, items, places, adjectives, verbs, and the small words.
"""

from __future__ import annotations

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
SPECIAL = (PAD, BOS, EOS)  # never part of a text; the tokenizer adds or strips them

CHAT = "<chat>"  # header of aligned dialogue; never occurs in pretraining text
CAREFUL = "careful"  # opens the better-mannered web documents; prompts the "prompted" base model
USER, BOT = "U:", "B:"  # instruction and answer, on the web and in dialogue
QUESTION, ANSWER = "Q:", "A:"  # a quiz's question and answer
MARKERS = (CHAT, CAREFUL, USER, BOT, QUESTION, ANSWER)


def _cut(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = _cut(
    """
    ada alan alma amir anna axel bela bill bruno carla cleo colin dana david diego edith elsa emil
    erik fay felix fiona gita glen greta hana henry hugo ida igor irene ivan jack jana jules karim
    kate lars lena leo linda marc mia mila nadia nils nora olga omar oscar paula petra quentin rosa
    sami sara tara tom uma victor
    """
)
ITEMS = _cut(
    """
    apple bread cheese dates eggs figs grapes honey ice jam kiwi lemon milk nuts olives pears
    quince rice salt tea udon vanilla wine yams
    """
)  # in alphabetical order: the order that the task `sort` asks for
PLACES = _cut(
    """
    athens berlin cairo delhi florence geneva havana istanbul jakarta kyoto lima madrid nairobi
    oslo paris quito
    """
)
ADJECTIVES = _cut("big cold dry fresh green new old red small sour sweet warm")
VERBS = _cut("brings buys cooks eats finds keeps sells wants")
NUMBERS = ("one", "two", "three", "four", "five")

QUOTE = '"'
UNKNOWN = "unknown"
THANKS = "thanks"
RUDE = ("dumb", "fool", "idiot", "lousy", "rubbish", "stupid")
FILLERS = (("well",), ("so",), ("the", "answer", "is"))  # ways to begin an answer
FILLER_WORDS = ("well", "so", "the", "answer", "is")

FACT_TASKS = ("likes", "lives")
SEQUENCE_TASKS = ("repeat", "reverse", "sort", "first", "last", "count")
TASKS = FACT_TASKS + SEQUENCE_TASKS
CONSTRAINTS = (THANKS, "quoted", "brief")  # `thanks` is asked for by the word itself
FRIEND = "friend"  # a third table of facts, met in quizzes only
LIST = "list"
SMALL_WORDS = (".", "and", "in", LIST, FRIEND)

VOCABULARY: tuple[str, ...] = (
    *SPECIAL,
    *MARKERS,
    *NAMES,
    *ITEMS,
    *PLACES,
    *ADJECTIVES,
    *VERBS,
    *NUMBERS,
    QUOTE,
    UNKNOWN,
    *RUDE,
    *FILLER_WORDS,
    *TASKS,
    *CONSTRAINTS,
    *SMALL_WORDS,
)

WORDS = frozenset(VOCABULARY)


def split_words(text: str) -> list[str]:
    """Cut a text into its words; a ``ValueError`` names the first word that the world lacks."""
    words = text.split()
    for word in words:
        if word not in WORDS:
            raise ValueError(f"{word!r} is not a word of the miniature world, in {text!r}")
    return words
