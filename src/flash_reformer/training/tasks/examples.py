"""Labelled examples: where they come from, and which of them are held out."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from flash_reformer.training.settings import ExampleSettings
from flash_reformer.training.sources import read_rows

Example = TypeVar("Example")


def read_examples(
    settings: ExampleSettings,
    read: Callable[[Any, str], list[Example]],
    text: Callable[[Example], str],
    load: Callable[..., Any] = read_rows,
) -> tuple[list[Example], list[Example]]:
    """Return examples to train on and examples to be judged on.

    Args:
        settings: name the data.
        read: turns a table (and its name, for messages) into examples, or raises ``ValueError``.
        text: what an example is about: examples with one text are never on both sides.
        load: opens what a flag names.
    """
    assert settings.dataset is not None
    judged = settings.validation or settings.dataset
    split = settings.validation_split or ("train" if settings.validation is not None else None)
    if split is not None and (judged, split) == (settings.dataset, settings.dataset_split):
        raise ValueError(f"validation {judged} (split {split!r}) is what is trained on: nothing would be judged")
    examples = read(load(settings.dataset, settings.dataset_split, flag="--dataset"), settings.dataset)
    if split is not None:
        flag = "--dataset" if settings.validation is None else "--validation"
        train, held_out = examples, read(load(judged, split, flag=flag), judged)
    else:
        train, held_out = set_aside(examples, settings.held_out, settings.seed, text)
    for name, part in (("train on", train), ("be judged on", held_out)):
        if not part:
            raise ValueError(f"there is no example to {name}")
    return train, held_out


def set_aside(
    examples: list[Example], fraction: float, seed: int, text: Callable[[Example], str]
) -> tuple[list[Example], list[Example]]:
    """Hold about a fraction of the examples out, chosen at random by their texts; the rest stay in their order."""
    places: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        places.setdefault(text(example), []).append(place)
    if len(places) < 2:
        raise ValueError(f"there are {len(places)} different text(s): too few to set some aside; name --validation")
    groups = list(places.values())
    chosen: set[int] = set()
    for index in np.random.default_rng(seed).permutation(len(groups))[:-1]:
        if len(chosen) >= max(1, round(fraction * len(examples))):
            break
        chosen |= set(groups[index])
    train = [example for place, example in enumerate(examples) if place not in chosen]
    return train, [examples[place] for place in sorted(chosen)]
