"""How good answers are: accuracy and F1 of classes, exact match and F1 of texts."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def accuracy(predicted: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    """Return the share of equal entries."""
    return float((predicted == wanted).mean())


def macro_f1(predicted: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    """Return the mean over classes of the harmonic mean of precision and recall.

    Over the classes that are predicted or wanted at all, as usual.

    >>> macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1]))
    0.6666666666666666
    """
    scores = []
    for label in np.union1d(predicted, wanted):
        both = int(((predicted == label) & (wanted == label)).sum())
        scores.append(2 * both / (int((predicted == label).sum()) + int((wanted == label).sum())))
    return float(np.mean(scores))


def normalise_answer(text: str) -> str:
    """Lower the case and drop what SQuAD's judges overlook: punctuation, English articles, extra white space.

    >>> normalise_answer("The  Nile, of course.")
    'nile of course'
    """
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Return 1.0 if an answer equals one of those accepted, both normalised; with none accepted, if it is empty."""
    wanted = [normalise_answer(each) for each in accepted] or [""]
    return float(normalise_answer(answer) in wanted)


def answer_f1(answer: str, accepted: Sequence[str]) -> float:
    """Return the best overlap of words with an accepted answer: harmonic mean of precision and recall.

    >>> answer_f1("the blue Nile", ["Nile"])
    0.6666666666666666
    """
    return max(_word_f1(answer, each) for each in (accepted or [""]))


def _word_f1(answer: str, wanted: str) -> float:
    found, sought = normalise_answer(answer).split(), normalise_answer(wanted).split()
    if not found or not sought:
        return float(found == sought)
    shared = sum((Counter(found) & Counter(sought)).values())
    return 2 * shared / (len(found) + len(sought))
