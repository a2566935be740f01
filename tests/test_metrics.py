"""Statistics of captions and of attention."""

import numpy as np
import pytest

from training.metrics import attention_entropy, calibration, diversity, mean_of_each


def test_diversity_counts_distinct_captions_and_words():
    figures = diversity([["a", "dog"], ["a", "dog"], ["two", "men", "play"], []])
    assert figures == {"distinct captions": 0.75, "words in use": 5, "mean length": 7 / 4, "repeated pairs": 0}


def test_diversity_counts_repetitions_and_captions_of_the_training_set():
    captions = [["a", "dog", "and", "a", "dog", "and", "a", "cat"], ["a", "dog"]]
    figures = diversity(captions, known={("a", "dog"), ("a", "cat")})
    assert figures["repeated pairs"] == 3 / 8
    assert figures["captions of the training set"] == 0.5


def test_entropy_is_that_of_one_region_and_of_all_of_them():
    one = np.zeros((2, 7, 7))
    one[:, 3, 3] = 1
    even = np.full((4, 3, 7, 7), 1 / 49)  # four words, three heads
    assert attention_entropy([one]) == (0, 0)
    assert attention_entropy([even]) == pytest.approx((np.log(49), 1))
    assert attention_entropy([one, even]) == pytest.approx((np.log(49) * 12 / 14, 12 / 14))
    assert attention_entropy([np.ones((2, 1, 1))]) == (0, 0)


def test_a_mean_is_of_the_figures_that_all_have():
    assert mean_of_each([{"CIDEr": 0.4, "SPICE": 0.2}, {"CIDEr": 0.6}]) == {"CIDEr": 0.5}


def test_calibration_ranks_captions_by_confidence():
    sure = np.linspace(0.1, 0.9, 20)
    good = calibration(sure, sure**3, groups=4)
    assert good.correlation == pytest.approx(1)
    assert [group["confidence from"] for group in good.groups] == pytest.approx(sure[[0, 5, 10, 15]])
    assert good.groups[1]["CIDEr"] == pytest.approx((sure[5:10] ** 3).mean())
    assert good.groups[1]["CIDEr from here on"] == pytest.approx((sure[5:] ** 3).mean())
    assert calibration(sure, 1 - sure).correlation == pytest.approx(-1)
    assert calibration(sure, np.ones(20)).correlation == 0
    assert len(calibration([0.5], [1.0]).groups) == 1
    # Ties share their rank: 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5.
    assert calibration([0.1, 0.2, 0.2, 0.3], [0.1, 0.3, 0.2, 0.2]).correlation == pytest.approx(0.5)
