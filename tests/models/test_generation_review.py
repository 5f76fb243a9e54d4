"""What a fresh pair of eyes broke in cached generation. Every test here failed once."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig

import flash_reformer as ours
from tests.models.builders import build, ids
from tests.models.test_generation import NEW, PAD, generate, without_end
from tests.models.test_generation_cache import DEEP, start, step


def test_a_given_cache_is_used_or_refused_never_both():
    model = without_end(attn_layers=DEEP)
    first = generate(model, ids(2, 13), return_dict_in_generate=True)
    cache = first.past_key_values
    with pytest.raises(ValueError, match=r"use_cache=False contradicts past_key_values"):
        generate(model, first.sequences, past_key_values=cache, use_cache=False)
    assert cache.get_seq_length() == 13 + NEW - 1
    # A model whose own default is no cache uses the one it is given.
    model.config.use_cache = model.generation_config.use_cache = False
    more = generate(model, first.sequences, past_key_values=cache, max_new_tokens=4)
    assert torch.equal(more, generate(model, ids(2, 13), use_cache=True, max_new_tokens=NEW + 4))


@pytest.mark.parametrize("size", [1, 4, 12, 13, 50])
def test_candidates_are_sought_after_a_prompt_in_chunks_too(size):
    model = without_end(attn_layers=DEEP)
    prompt = ids(1, 13)
    expected = generate(model, prompt, max_new_tokens=30, prefill_chunk_size=size)
    options = {"max_new_tokens": 30, "prefill_chunk_size": size}
    assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=3, **options), expected)
    assert torch.equal(generate(model, prompt, assistant_model=without_end(seed=3), **options), expected)


def test_candidates_are_sought_after_new_text_with_pads_too():
    model = without_end(attn_layers=DEEP)
    first = generate(model, ids(1, 13), return_dict_in_generate=True)
    text = torch.cat([first.sequences, torch.tensor([[PAD, PAD, 5, 6]])], dim=1)
    mask = torch.ones_like(text)
    mask[:, -4:-2] = 0
    cache = copy.deepcopy(first.past_key_values)
    expected = generate(model, text, attention_mask=mask, past_key_values=first.past_key_values)
    found = generate(model, text, attention_mask=mask, past_key_values=cache, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


def test_going_on_where_a_row_has_ended_and_where_pads_were_written():
    """transformers takes pads for no tokens where no mask is given; those in a cache were tokens."""
    model = without_end(attn_layers=DEEP, num_hashes=2, seed=4)
    written = generate(model, ids(2, 20), max_new_tokens=20)[:, 20:].tolist()
    end = next(token for token in written[0][:-1] if token not in written[1])
    first = generate(model, ids(2, 20), max_new_tokens=20, eos_token_id=end, return_dict_in_generate=True)
    assert (first.sequences[0] == PAD).any()
    more = generate(model, first.sequences, max_new_tokens=5, eos_token_id=end, past_key_values=first.past_key_values)
    assert more.shape == (2, 45)
    whole = generate(model, ids(2, 20), max_new_tokens=25, eos_token_id=end)
    assert torch.equal(more[1], whole[1])


def test_candidates_do_not_go_beyond_the_table():
    model = without_end(axial_pos_shape=[4, 6])
    prompt = ids(1, 4).repeat(1, 2)
    for new in (15, 16, 17):
        expected = generate(model, prompt, max_new_tokens=new)
        assert torch.equal(generate(model, prompt, max_new_tokens=new, prompt_lookup_num_tokens=5), expected)


@pytest.mark.parametrize("kept", [-1, 1.5, torch.tensor([7]), torch.zeros(1, 1, dtype=torch.long)])
def test_a_refused_step_leaves_the_cache_as_it_was(kept):
    model = without_end(attn_layers=DEEP)
    cache, _ = start(model, ids(1, 13)[0])
    other, empty = copy.copy(cache), ours.ReformerCache(model.config)
    for each in (cache, empty):
        with pytest.raises((ValueError, TypeError), match="logits_to_keep"):
            model(ids(1, 1), past_key_values=each, logits_to_keep=kept)
    assert (cache.get_seq_length(), empty.get_seq_length()) == (13, 0)
    assert torch.equal(step(model, cache, [5]), step(model, other, [5]))


def test_a_copy_is_a_cache_of_its_own():
    model = without_end(attn_layers=DEEP)
    cache, _ = start(model, ids(1, 13)[0])
    other = copy.copy(cache)
    wanted = step(model, copy.deepcopy(cache), [7])
    for token in range(3, 28):
        step(model, cache, [token])
    assert torch.equal(step(model, other, [7]), wanted)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"max_new_tokens": 600}, "position table"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"cache_implementation": "static"}, "cache_implementation"),
    ],
)
def test_what_a_generation_config_asks_for_in_vain_is_refused(config, message):
    model = without_end()
    config = GenerationConfig(**{"max_new_tokens": 3, "pad_token_id": PAD, **config})
    for call in (
        lambda: model.generate(ids(2, 13), config),
        lambda: model.generate(ids(2, 13), generation_config=config),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_guidance_that_is_off_is_none():
    model = without_end()
    assert torch.equal(generate(model, ids(1, 13), guidance_scale=1.0), generate(model, ids(1, 13)))


def test_a_configuration_that_asks_for_attentions_can_still_step():
    model = build(output_attentions=True)
    output = model(ids(1, 13), use_cache=True)
    assert output.attentions is not None
    assert model(ids(1, 1), past_key_values=output.past_key_values).attentions is None
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids(1, 1), past_key_values=output.past_key_values, output_attentions=True)


def test_what_generate_asks_of_a_forward_takes_nothing_else():
    model = without_end()
    cache, _ = start(model, ids(1, 13)[0])
    for other in ({"past_buckets_states": cache}, {"labels": ids(1, 13)}, {"head_mask": torch.ones(3)}):
        with pytest.raises(ValueError, match="rows_alone"):
            model(ids(1, 13), rows_alone=True, **other)
    with pytest.raises(TypeError, match="logits_to_keep"):
        model(ids(1, 13), rows_alone=True, logits_to_keep=torch.tensor([0]))
    embeds = model.get_input_embeddings()(ids(2, 13))
    alone = model(inputs_embeds=embeds, rows_alone=True).logits
    assert torch.equal(alone, model(ids(2, 13), rows_alone=True).logits)


def test_masks_of_floats_are_masks():
    model = without_end()
    mask = torch.ones(2, 13)
    mask[0, :5] = 0
    assert torch.equal(
        generate(model, ids(2, 13), attention_mask=mask), generate(model, ids(2, 13), attention_mask=mask.long())
    )
    assert torch.equal(model(ids(2, 13), attention_mask=mask).logits, model(ids(2, 13), attention_mask=mask > 0).logits)


def test_positions_of_a_batch_serve_its_beams():
    model = without_end()
    places = torch.arange(13).view(1, -1)
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        torch.manual_seed(0)
        given = generate(model, ids(2, 13), position_ids=places, **options)
        torch.manual_seed(0)
        assert torch.equal(given, generate(model, ids(2, 13), **options))
    with pytest.raises(ValueError, match="position_ids"):
        generate(model, ids(2, 13), position_ids=torch.arange(13))
    with pytest.raises(TypeError, match="position_ids"):
        generate(model, ids(2, 13), position_ids=list(range(13)))


def test_a_layer_of_a_cache_is_not_changed_alone():
    model = without_end(attn_layers=DEEP)
    cache, _ = start(model, ids(1, 13)[0])
    for name in ("reset", "reorder_cache", "crop", "offload", "batch_select_indices"):
        with pytest.raises(TypeError, match="ReformerCache"):
            getattr(cache.layers[0], name)()
    with pytest.raises(ValueError, match="rows"):
        cache.batch_select_indices(torch.tensor([True, True, False]))


def test_embeddings_and_candidates_do_not_go_together():
    model = without_end()
    with pytest.raises(ValueError, match="inputs_embeds"):
        generate(model, None, inputs_embeds=model.get_input_embeddings()(ids(1, 7)), prompt_lookup_num_tokens=3)
