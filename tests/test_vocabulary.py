"""Words and ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.vocabulary import END, PAD, SPECIAL, START, UNKNOWN, Vocabulary

words = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda word: word not in SPECIAL)


@given(st.lists(words, unique=True), st.data())
def test_every_caption_of_known_words_comes_back_as_it_was(known, data):
    vocabulary = Vocabulary(known)
    caption = data.draw(st.lists(st.sampled_from(known)) if known else st.just([]))
    ids = vocabulary.encode(caption)
    assert (ids[0], ids[-1]) == (START, END)
    assert vocabulary.decode(ids) == caption
    assert vocabulary.decode([*ids, PAD, PAD]) == caption


@given(st.lists(st.lists(st.sampled_from("abcde"))), st.integers(1, 4))
def test_the_vocabulary_does_not_depend_on_the_order_of_the_captions(captions, minimum_count):
    vocabulary = Vocabulary.build(captions, minimum_count)
    assert vocabulary == Vocabulary.build(captions[::-1], minimum_count)
    text = [word for caption in captions for word in caption]
    assert set(vocabulary.words[4:]) == {word for word in text if text.count(word) >= minimum_count}


def test_frequent_words_come_first():
    assert Vocabulary.build([["dog", "a"], ["a", "cat"], ["a", "dog"]]).words[4:] == ("a", "dog", "cat")


def test_an_unknown_word_becomes_unk():
    assert Vocabulary(["dog"]).encode(["cat", "dog"]) == [START, UNKNOWN, 4, END]


@pytest.mark.parametrize("bad", [["dog", "dog"], ["<end>"], [""]])
def test_words_that_would_be_ambiguous_are_refused(bad):
    with pytest.raises(ValueError, match="vocabulary"):
        Vocabulary(bad)
