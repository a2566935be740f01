"""Words and their ids."""

from collections import Counter
from collections.abc import Iterable, Sequence

PAD, START, END, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")


class Vocabulary:
    """The words of a model, each with its id.

    The first four ids are the same in every vocabulary: `PAD` fills up short captions, `START` comes before the first
    word, `END` after the last one, and `UNKNOWN` stands for words that are not in the vocabulary.

    Args:
        words: the words in the order of their ids, without the four special ones.

    Raises:
        ValueError: a word is not a string, cannot be encoded in UTF-8, is empty, occurs twice, or is a special one.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words: tuple[str, ...] = SPECIAL + tuple(words)
        for word in self.words:
            if not isinstance(word, str):
                raise ValueError(f"a vocabulary holds strings, not {word!r:.100}")
            word.encode()  # UnicodeEncodeError, a ValueError, of half a surrogate pair
        self.ids: dict[str, int] = {word: index for index, word in enumerate(self.words)}
        if len(self.ids) < len(self.words):
            repeated = [word for word, count in Counter(self.words).items() if count > 1]
            raise ValueError(f"a vocabulary holds every word once, but these repeat: {repeated[:5]!r:.100}")
        if "" in self.ids:
            raise ValueError("a vocabulary cannot hold the empty word")

    @classmethod
    def build(cls, captions: Iterable[Sequence[str]], minimum_count: int = 1) -> "Vocabulary":
        """The words that occur at least `minimum_count` times in `captions`, the most frequent first."""
        counts = Counter(word for caption in captions for word in caption if word not in SPECIAL)
        kept = [word for word, count in counts.items() if count >= minimum_count]
        # By frequency, then by alphabet, so that the same captions in another order give the same ids.
        return cls(sorted(kept, key=lambda word: (-counts[word], word)))

    def encode(self, words: Sequence[str]) -> list[int]:
        """The ids of a caption's words, with `START` before and `END` after them."""
        return [START, *(self.ids.get(word, UNKNOWN) for word in words), END]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The words of `ids` up to the first `END`, without `START` and `PAD`."""
        words = []
        for index in ids:
            if index == END:
                break
            if index not in (PAD, START):
                words.append(self.words[index])
        return words

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self.ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} words)"
