"""The cache as an object: one of transformers, with a size that is known."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Cache

import flash_reformer as ours
from tests.models.builders import ids
from tests.models.test_generation import NEW, generate, without_end
from tests.models.test_generation_cache import DEEP, start, step


@pytest.mark.floor
def test_the_cache_is_one_of_transformers():
    model = without_end(attn_layers=DEEP)
    output = generate(model, ids(2, 13), return_dict_in_generate=True)
    cache = output.past_key_values
    assert isinstance(cache, Cache)
    assert isinstance(cache, ours.ReformerCache)
    # The last token is written, not read.
    assert cache.get_seq_length() == cache.get_seq_length(2) == 13 + NEW - 1
    assert cache.get_max_length() == cache.get_max_cache_shape() == cache.max_cache_len == cache.get_max_length(1) == -1
    assert cache.layers[0].get_max_length() == cache.layers[1].get_max_cache_shape() == -1
    assert cache.get_mask_sizes(1, 0) == (13 + NEW, 0)
    assert (len(cache), cache.batch_size, cache.is_compileable, cache.is_croppable) == (3, 2, False, True)
    assert cache.is_sliding == [False, True, False]
    assert cache.is_initialized
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert keys.shape[:2] == values.shape[:2] == (2, 3)
    # LSH keys are unit vectors.
    assert torch.allclose(keys[:, :, : 13 + NEW - 1].norm(dim=-1), torch.ones(()), atol=1e-5)
    assert cache.nbytes > 0
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized, bool(cache)) == (0, -1, False, True)
    with pytest.raises(TypeError, match="forward"):
        cache.update(keys, values, 0)


def test_an_empty_cache_is_filled_in_place():
    model = without_end()
    for fill in (
        lambda cache: model(ids(1, 9), past_buckets_states=cache),
        lambda cache: generate(model, ids(1, 9), past_key_values=cache, max_new_tokens=1),
    ):
        cache = ours.ReformerCache(model.config)
        fill(cache)
        assert cache.get_seq_length() == 9


def test_who_cannot_have_a_cache():
    config = without_end().config
    for name, changes in (("is_decoder", {"is_decoder": False}), ("num_chunks_after", {"lsh_num_chunks_after": 1})):
        other = copy.deepcopy(config)
        for field, value in changes.items():
            setattr(other, field, value)
        with pytest.raises(ValueError, match=name):
            ours.ReformerCache(other)
    with pytest.raises(TypeError, match="config"):
        ours.ReformerCache({"is_decoder": True})


@pytest.mark.parametrize("num_hashes", [1, 4])
def test_2000_steps_take_the_memory_that_the_formula_says(num_hashes):
    """Per token ``H * (2 * D * 4 + R * 6)`` bytes in an LSH layer; local layers do not grow."""
    shape = {"axial_pos_shape": [40, 64], "max_position_embeddings": 2560, "num_buckets": 16, "num_hashes": num_hashes}
    model = without_end(attn_layers=["local", "lsh"], **shape)
    cache, logits = start(model, ids(1, 21)[0])
    local, lsh = cache.states
    before = sum(tensor.nbytes for tensor in local.tensors())
    # Before the cache grows and after: 16 + 2 starts of buckets per head and round, rotations, keys, values, order.
    H, D, R = 3, 5, num_hashes
    fixed = 4 * H * R * 18 + 4 * H * D * R * 8
    for length in range(22, 2022):
        logits = step(model, cache, logits.argmax().view(1))
        if length % 200 == 0:
            taken = sum(tensor.nbytes for tensor in lsh.tensors()) - fixed
            per_token = H * (2 * D * 4 + R * 6)
            assert length * per_token <= taken <= (length * 5 / 4 + 65) * per_token
    # before + 2 chunks of 4.
    assert sum(tensor.nbytes for tensor in local.tensors()) == before == 3 * 4 * H * 2 * D * 4
    assert cache.get_seq_length() == 2021


def test_a_cache_made_in_inference_mode_goes_on_outside_and_the_reverse():
    model = without_end(attn_layers=DEEP, num_buckets=None)
    tokens = ids(1, 70)[0]
    expected, _ = start(model, tokens[:6])
    wanted = [step(model, expected, [token]) for token in tokens[6:]]
    with torch.inference_mode():
        cache, _ = start(model, tokens[:6])
    for turn, token in enumerate(tokens[6:]):
        with torch.inference_mode(mode=turn % 2 == 1):
            found = step(model, cache, [token])
            cache.crop(-1)
            cache.batch_select_indices(torch.tensor([0, 0]))
            cache.batch_select_indices(torch.tensor([1]))
            assert torch.equal(step(model, cache, [token]), found)
        assert torch.equal(found, wanted[turn])


def test_what_is_cached_carries_no_gradients():
    """Asked for with gradients on, a cache holds constants; the forward itself can still be differentiated."""
    model = without_end(attn_layers=DEEP)
    output = model(ids(1, 13), use_cache=True)
    cache = output.past_buckets_states
    assert not any(tensor.requires_grad for state in cache.states for tensor in state.tensors())
    output.logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    stepped = model(ids(1, 1), past_key_values=cache).logits
    assert stepped.shape == (1, 1, 29)
    assert cache.get_seq_length() == 14


def test_rows_of_different_lengths_reach_the_end_of_the_table_together():
    """The longer row takes the last positions while the shorter one gets more tokens in the same call."""
    model = without_end(attn_layers=DEEP, axial_pos_shape=[4, 6]).double()
    real = torch.ones(2, 20, dtype=torch.long)
    real[1, 12:] = 0
    tokens = ids(2, 32)
    with torch.no_grad():
        cache = model(tokens[:, :20], attention_mask=real, use_cache=True).past_buckets_states
        more = torch.ones(2, 12, dtype=torch.long)
        more[0, 4:] = 0
        mask = torch.cat([real, more], dim=1)
        logits = model(tokens[:, 20:], attention_mask=mask, past_key_values=cache).logits
        assert cache.lengths == [24, 24]
        assert logits[0, :4].isfinite().all()
        with pytest.raises(ValueError, match="position table"):
            model(tokens[:, :1], past_key_values=cache)
        assert cache.lengths == [24, 24]


def test_more_buckets_than_16_bits_hold():
    """65,536 buckets: ids of 32 bits, and two bytes more per head, round and position."""
    model = without_end(attn_layers=["local", "lsh"], num_buckets=[256, 256], num_hashes=2).double()
    tokens = ids(1, 60)[0]
    cache, _ = start(model, tokens[:7])
    for t in range(7, 60):
        with torch.no_grad():
            expected = model(tokens[: t + 1].view(1, -1), use_cache=False).logits[0, -1, 3:]
        assert torch.allclose(step(model, cache, tokens[t])[3:], expected, rtol=0, atol=1e-9)
    assert cache.states[1].buckets.dtype == torch.int32
    assert cache.states[1].buckets.max() > 32_767


@pytest.mark.parametrize("field", ["num_buckets", "hash_seed"])
def test_a_configuration_changed_under_a_cache_is_noticed(field):
    model = without_end(attn_layers=DEEP)
    cache, _ = start(model, ids(1, 13)[0])
    before = getattr(model.config, field)
    setattr(model.config, field, 8)
    with pytest.raises(ValueError, match=field):
        step(model, cache, [5])
    setattr(model.config, field, before)
    step(model, cache, [5])
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize("number", [True, 1.0, "1", None])
def test_only_integers_crop(number):
    cache, _ = start(without_end(), ids(1, 13)[0])
    with pytest.raises(TypeError, match="tokens_to_remove"):
        cache.crop(number)
    assert cache.get_seq_length() == 13
