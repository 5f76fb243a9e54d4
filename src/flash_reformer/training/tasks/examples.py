"""Labelled examples: where they come from, and which of them are held out."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from flash_reformer.training.settings import ExampleSettings
from flash_reformer.training.sources import read_rows

Example = TypeVar("Example")


def read_examples(
    settings: ExampleSettings, read: Callable[[Any, str], list[Example]], load: Callable[..., Any] = read_rows
) -> tuple[list[Example], list[Example]]:
    """Return examples to train on and examples to be judged on.

    Args:
        settings: name the data.
        read: turns a table (and its name, for messages) into examples, or raises ``ValueError``.
        load: opens what a flag names.
    """
    assert settings.dataset is not None
    examples = read(load(settings.dataset, settings.dataset_split, flag="--dataset"), settings.dataset)
    if settings.validation is not None:
        split = settings.validation_split or "train"
        train, held_out = examples, read(load(settings.validation, split, flag="--validation"), settings.validation)
    elif settings.validation_split is not None:
        rows = load(settings.dataset, settings.validation_split, flag="--dataset")
        train, held_out = examples, read(rows, settings.dataset)
    else:
        train, held_out = set_aside(examples, settings.held_out, settings.seed)
    for name, part in (("train on", train), ("be judged on", held_out)):
        if not part:
            raise ValueError(f"there is no example to {name}")
    return train, held_out


def set_aside(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold a random part of the examples out, at least one; the rest stay in their order."""
    if len(examples) < 2:
        raise ValueError(f"there are {len(examples)} example(s): too few to set some aside; name --validation")
    count = min(len(examples) - 1, max(1, round(fraction * len(examples))))
    chosen = set(np.random.default_rng(seed).permutation(len(examples))[:count].tolist())
    train = [example for place, example in enumerate(examples) if place not in chosen]
    return train, [examples[place] for place in sorted(chosen)]
