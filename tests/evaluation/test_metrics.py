import math

import numpy as np
import pytest

from peft_jax.errors import PeftJaxError
from peft_jax.evaluation.metrics import expected_rating, first_word, rating_metrics, spearman

VALUES = {"bad": -1.0, "okay": 0.0, "good": 1.0}


def test_three_views_of_a_rating():
    logprobs = np.log([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    got = rating_metrics(
        logprobs, ["bad", "good", "well", "bad"], ["bad", "good", "good", "okay"], VALUES, [-3, 2, 1, 0]
    )
    assert got["exact"] == 0.5 and got["among_choices"] == 0.5
    assert got["spearman"] == pytest.approx(by_definition([-0.6, 0.6, 0.1, -0.5], [-3, 2, 1, 0]))


def by_definition(x, y):
    """Pearson's correlation of the ranks, where equal values share the mean of theirs."""
    ranks = [[np.sum(values < one) + (np.sum(values == one) + 1) / 2 for one in values]
             for values in (np.array(x), np.array(y))]  # fmt: skip
    return np.corrcoef(*ranks)[0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_spearman_shares_ranks_among_ties(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, 40), rng.normal(size=40).round(1)
    assert spearman(x, y) == pytest.approx(by_definition(x, y), abs=1e-12)


def test_spearman_where_there_is_nothing_to_rank():
    assert spearman([1.0, 1.0, 1.0], [1, 2, 3]) == 0.0
    assert math.isnan(spearman([1, 2, 3], [2.0, 2.0, 2.0])) and math.isnan(spearman([1], [1]))
    assert math.isnan(spearman([1.0, math.nan, 3.0], [1, 2, 3]))  # of a model that broke
    assert spearman([1, 2, 3], [10, 20, 30]) == 1.0 and spearman([3, 2, 1], [10, 20, 30]) == -1.0


def test_expected_rating_renormalises_over_the_choices():
    unnormalised = np.log([[0.2, 0.1, 0.1]]) - 900
    assert expected_rating(unnormalised, [-1.0, 0.0, 1.0]) == pytest.approx([-0.25])


@pytest.mark.parametrize(
    "text, word", [(" Good.", "good"), ("\n'great' fun", "great"), ("", ""), (" ... ", ""), ("so-so", "so-so")]
)
def test_first_word(text, word):
    assert first_word(text) == word


@pytest.mark.parametrize(
    "change, message",
    [
        ({"references": ["bad"]}, "cannot compare"),
        ({"choice_logprobs": np.zeros((2, 2))}, "cannot compare"),
        ({"choice_logprobs": np.full((2, 3), np.nan)}, "NaN"),
        ({"references": ["bad", "odd"]}, "not among the choices"),
    ],
)
def test_inputs_that_do_not_fit(change, message):
    inputs = {
        "choice_logprobs": np.zeros((2, 3)),
        "generated_words": ["bad"] * 2,
        "references": ["bad"] * 2,
        "human_means": [0, 1],
    }
    with pytest.raises(PeftJaxError, match=message):
        rating_metrics(**{**inputs, **change}, choice_values=VALUES)


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(PeftJaxError, match="cannot compare"):
        rating_metrics(np.zeros((0, 3)), [], [], VALUES, [])
