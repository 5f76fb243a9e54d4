"""The duplication task: what it looks like, that LSH carries it, and that reversibility changes nothing."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from benchmarks.duplication import silence_lsh
from flash_reformer import functional
from flash_reformer.training import synthetic


def test_a_batch_repeats_its_words_and_judges_only_the_second() -> None:
    tokens, labels = synthetic.duplication_batch(5, 7, 3, torch.Generator().manual_seed(0))
    assert tokens.shape == labels.shape == (5, 8)
    assert (tokens[:, 0] == 0).all()
    assert torch.equal(tokens[:, :4], tokens[:, 4:])
    assert ((tokens[:, 1:4] >= 1) & (tokens[:, 1:4] < 7)).all()
    assert (labels[:, :5] == -100).all()
    assert torch.equal(labels[:, 5:], tokens[:, 5:])


def test_only_lsh_layers_can_look_into_the_first_half() -> None:
    config = synthetic.duplication_config()
    assert config.local_num_chunks_before == config.local_num_chunks_after == 0
    assert config.local_attn_chunk_length <= synthetic.WORD_LENGTH
    assert config.num_buckets >= 4


def test_reversible_and_plain_losses_are_the_same_numbers_in_training() -> None:
    losses: dict[bool, list[float]] = {True: [], False: []}
    for reversible in (True, False):
        synthetic.train_duplication(
            3, 30, reversible=reversible, on_step=lambda _, loss, kept=losses[reversible]: kept.append(loss)
        )
    assert losses[True][-1] != losses[True][0]
    assert losses[True] == losses[False]


@pytest.mark.slow
def test_duplication_is_learned_through_hashing_and_lost_without_lsh() -> None:
    with mock.patch.object(functional, "hash_vectors", wraps=functional.hash_vectors) as hashed:
        model = synthetic.train_duplication(0, 250)
    assert hashed.call_count == 250 * 2  # two LSH layers; the backward reuses the buckets
    assert synthetic.duplication_accuracy(model) > 0.9
    silence_lsh(model)
    assert synthetic.duplication_accuracy(model) < 3 / synthetic.VOCAB_SIZE
