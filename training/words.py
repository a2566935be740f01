"""Captions to words, as pycocoevalcap splits them."""

import re
from functools import cache
from typing import Any

# The tokens that pycocoevalcap's PTBTokenizer drops, and brackets and double quotes as they are typed.
PUNCTUATION = frozenset("'' ' `` ` . ? ! , : - -- ... ; \" ( ) [ ] { }".split())

_TYPEWRITER = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": " - ", "—": " - ", "…": " ... "})
# A full stop ends a sentence inside a caption too, except after initials ("d.c.") and titles ("mr.").
_LAST_WORD = re.compile(r"(?<!\S)(?!(?:mr|mrs|ms|dr|st|jr|sr|vs)\.)([^\s.]{2,})\.(?=[\"')]*(?:\s|$))")


@cache
def _tokenizer() -> Any:
    # Importing NLTK takes more than a second, so it is imported at the first use.
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer()


def tokenize(caption: str) -> list[str]:
    """Lower-cased words of a caption, without punctuation.

    NLTK's Penn Treebank rules, which need no data download: "The man's t-shirt." gives
    `["the", "man", "'s", "t-shirt"]`. On all but about ten of Flickr8k's 35,000 captions this agrees with the
    Stanford tokenizer that pycocoevalcap runs; on most of the others it drops a bracket that Stanford's spells out.

    Args:
        caption: any text; an empty text has no words.
    """
    text = _LAST_WORD.sub(r"\1 .", caption.lower().translate(_TYPEWRITER))
    words = _tokenizer().tokenize(text + " .")  # otherwise NLTK removes the last full stop of "Washington D.C."
    return [word for word in words if word not in PUNCTUATION]
