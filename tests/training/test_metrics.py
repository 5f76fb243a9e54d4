import numpy as np
import pytest

from flash_reformer.training.metrics import accuracy, answer_f1, exact_match, macro_f1, normalise_answer


def test_accuracy_and_f1_by_hand():
    predicted, wanted = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 0, 2])
    assert accuracy(predicted, wanted) == pytest.approx(4 / 6)
    # Class 0: precision 1/2, recall 1/2; class 1: 1 and 1/2; class 2: 2/3 and 1.
    assert macro_f1(predicted, wanted) == pytest.approx(np.mean([1 / 2, 2 / 3, 4 / 5]))
    assert macro_f1(np.array([1, 1]), np.array([1, 1])) == 1.0
    assert macro_f1(np.array([0, 0]), np.array([1, 1])) == 0.0


@pytest.mark.parametrize(
    ("text", "bare"),
    [("The Cat.", "cat"), ("an  apple, a day", "apple day"), ("...", ""), ("Theatre", "theatre"), ("U.S.", "us")],
)
def test_normal_forms(text, bare):
    assert normalise_answer(text) == bare


@pytest.mark.parametrize(
    ("answer", "accepted", "exact", "overlap"),
    [
        ("the blue Nile", ["Nile"], 0.0, 2 / 3),
        ("Nile!", ["the nile", "Blue Nile"], 1.0, 1.0),
        ("", [], 1.0, 1.0),
        ("Nile", [], 0.0, 0.0),
        ("", ["Nile"], 0.0, 0.0),
        ("x x y", ["x y y"], 0.0, 2 / 3),
        ("a b", ["c d"], 0.0, 0.0),
    ],
)
def test_answers_by_hand(answer, accepted, exact, overlap):
    assert exact_match(answer, accepted) == exact
    assert answer_f1(answer, accepted) == pytest.approx(overlap)
