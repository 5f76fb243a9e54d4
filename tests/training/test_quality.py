"""Do the recipes learn with their defaults? The tasks and their baselines are those of ``benchmarks/recipes.py``."""

import pytest
import torch

from benchmarks import recipes


@pytest.fixture
def all_threads(one_thread):
    """As many threads as torch would take; the other tests of this folder take one."""
    torch.set_num_threads(2)


@pytest.mark.full
def test_masked_words_of_a_grammar_are_recovered(tmp_path, all_threads):
    found = recipes.run_mlm(tmp_path)
    assert found["bigram"] <= 0.6
    assert found["recovered"] >= 0.95


@pytest.mark.full
def test_the_content_of_a_marker_anywhere_in_4096_tokens_decides(tmp_path, all_threads):
    found = recipes.run_classify(tmp_path)
    assert found["letters"] <= 0.5
    assert found["accuracy"] >= 0.95


@pytest.mark.full
def test_a_span_named_by_the_question_is_found_in_2048_tokens(tmp_path, all_threads):
    found = recipes.run_qa(tmp_path)
    assert found["first_fact"] <= 0.3
    assert found["exact_match"] >= 0.9


@pytest.mark.slow
def test_a_short_run_fills_in_words_better_than_their_neighbours_tell(tmp_path):
    found = recipes.run_mlm(tmp_path, max_steps=130, seq_len=256)
    assert found["bigram"] <= 0.6
    assert found["recovered"] >= 0.7
