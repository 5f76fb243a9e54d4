"""Decoding with a cache, step by step, in double precision.

Where earlier layers are prefix-stable a step equals the last row of the uncached forward: local layers alone, and one
LSH layer on top of them. Deeper models equal the reference decoder, which is SEMANTICS 5 written as loops.
"""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor

from flash_reformer.models.cache import ReformerCache
from tests.models.builders import assert_close, build, ids
from tests.models.reference_decoder import ReferenceDecoder, filled, more, padded_calls, uncached

#: Of the tiny configuration, both kinds.
CHUNK = 4
DEEP = (["lsh", "lsh"], ["lsh", "local", "lsh"], ["local", "lsh", "lsh", "local"])
#: What changes in a cached step on its way from one token to many.
BORDERS = {"num_buckets": None, "num_hashes": 2, "full_attention_below": 6}


def double(**changes):
    return build(**changes).double()


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# --- local layers, and one LSH layer on top: what the uncached forward gives ------------------------------------------

LOCAL = [
    *({"attn_layers": ["local"], "local_num_chunks_before": i // 2, "wrap_around": i % 2 == 0} for i in range(8)),
    *({"attn_layers": ["local"] * 2, "local_num_chunks_before": n, "wrap_around": n < 2} for n in range(4)),
    {"attn_layers": ["local"] * 3, "chunk_size_feed_forward": 2, "axial_pos_embds": False},
    {"attn_layers": ["local", "local"], "local_attn_chunk_length": None},
]
STACKS = (["lsh"], ["local", "lsh"], ["local", "local", "lsh"])
BUCKETS = (4, [2, 4], None)
#: Every number of chunks before with every number of rounds; stacks and bucket counts take turns.
WINDOWS = [
    {"attn_layers": STACKS[(n + i) % 3], "lsh_num_chunks_before": n, "num_buckets": BUCKETS[(n + 2 * i) % 3]}
    | {"num_hashes": 2**i}
    for n, i in itertools.product(range(4), range(4))
]
OFF = {"wrap_around": False, "lsh_attend_across_buckets": False, "lsh_allow_duplicate_attention": False}
MIXED = {"attn_layers": ["local", "lsh"], "num_hashes": 2}
LENGTHS = ((4, 6), (3, 6), (6, 3), (1, 1), (None, 4), (4, None))
VARIANTS = [
    *({"attn_layers": ["lsh"], "num_hashes": 4, "lsh_num_chunks_before": 3, name: False} for name in OFF),
    *({**MIXED, "num_hashes": n, "lsh_num_chunks_before": 4 - n, **OFF, "num_buckets": None} for n in (1, 3)),
    {**MIXED, "lsh_num_chunks_before": 2, "lsh_attend_across_buckets": False, "lsh_allow_duplicate_attention": False},
    {**MIXED, "lsh_num_chunks_before": 3, "wrap_around": False, "lsh_allow_duplicate_attention": False},
    {**MIXED, "axial_pos_shape": [6, 40], "num_buckets": None},
    *({**MIXED, "attn_layers": [kind], "full_attention_below": 9, "num_buckets": None} for kind in STACKS[1]),
    *(
        {**MIXED, "local_attn_chunk_length": local, "lsh_attn_chunk_length": lsh, "num_buckets": BUCKETS[i % 3]}
        for i, (local, lsh) in enumerate(LENGTHS)
    ),
]
#: What must not leave a step as it was, or the grid above would prove little.
MATTERS = [("num_buckets", None), ("num_buckets", [2, 4]), ("num_hashes", 2), ("hash_seed", 4), *OFF.items()]
MATTERS += [("local_num_chunks_before", 2), ("lsh_num_chunks_before", 2), ("full_attention_below", 9)]


def label(changes) -> str:
    return " ".join(f"{name}={value}".replace(" ", "") for name, value in changes.items())


@pytest.mark.floor
@pytest.mark.parametrize("changes", [*LOCAL, *WINDOWS, *VARIANTS], ids=label)
def test_a_step_equals_the_last_row_of_the_uncached_forward(changes):
    model = double(**changes)
    length = 150 if "axial_pos_shape" in changes else 34 if changes.get("num_buckets", 4) is None else 22
    tokens = ids(2, length)
    expected = uncached(model, tokens)
    assert expected.std(dim=1).min() > 0.1, "every logit must depend on where it stands"
    for prompt in (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1, 4 * CHUNK):
        until = length if prompt == 1 else prompt + CHUNK + 1
        logits, cache = filled(model, tokens[:, :prompt])
        assert_close(logits[:, -1], expected[:, prompt - 1], 1e-9)
        assert_close(more(model, cache, tokens[:, prompt:until], 1), expected[:, prompt:until], 1e-9)


@pytest.mark.parametrize("before", [2, 3])
def test_local_layers_that_wrapped_onto_themselves_keep_what_they_saw(before):
    """While a ring is shorter than the window, tokens count twice in it, so a longer forward differs from earlier ones.

    Beyond that, local layers are prefix-stable, and steps equal the uncached forward again.
    """
    model = double(attn_layers=["local", "local", "lsh"], local_num_chunks_before=before)
    tokens = ids(1, 22)
    for prompt in (3, before * CHUNK + 1):
        steps = more(model, filled(model, tokens[:, :prompt])[1], tokens[:, prompt:], 1)
        reference = ReferenceDecoder(model)
        reference.prefill(tokens[0, :prompt].tolist())
        assert_close(steps[0], reference.steps(tokens[0, prompt:].tolist()), 1e-9)
        assert (difference(steps, uncached(model, tokens)[:, prompt:]) < 1e-9) == (prompt > 3)


@pytest.mark.parametrize(("name", "value"), [*MATTERS, ("wrap_around of local layers", False)])
def test_what_the_tests_above_vary_matters(name, value):
    """With the same weights, some step differs: windows wrap, keys appear twice, buckets part tokens."""
    kind, name = "local" if "local" in name else "lsh", name.split()[0]
    base = {"attn_layers": [kind], "num_hashes": 3, "local_num_chunks_before": 3 if name == "wrap_around" else 1}
    models, tokens = (double(**base), double(**{**base, name: value})), ids(1, 18)
    steps = [more(model, filled(model, tokens[:, :3])[1], tokens[:, 3:], 1) for model in models]
    assert difference(*steps) > 1e-3


def test_without_a_hash_seed_the_rotations_of_the_first_forward_stay():
    model = double(attn_layers=["local", "lsh"], hash_seed=None, num_hashes=2)
    tokens = ids(1, 18)

    def seeded(n: int, seed: int = 5):
        torch.manual_seed(seed)
        return filled(model, tokens[:, :n])

    expected = torch.cat([seeded(n)[0][:, -1:] for n in range(12, 19)], dim=1)
    for prompt in (2, 11):
        steps, others = (more(model, seeded(prompt, n)[1], tokens[:, prompt:], 1)[:, -7:] for n in (5, 6))
        assert_close(steps, expected, 1e-9)
        assert difference(others, steps) > 1e-3


def test_other_arguments_reach_every_step():
    """Rounds, positions, which go on from the first ones, a head mask, embeddings in place of ids, hidden states."""
    model = double(attn_layers=["local", "lsh"], hidden_dropout_prob=0.5)
    tokens, positions = ids(2, 14), torch.arange(5, 19).view(1, -1)
    head_mask = torch.tensor([[1.0, 0.0, 0.5], [0.2, 1.0, 1.0]])
    every = {"num_hashes": 3, "head_mask": head_mask, "position_ids": positions}
    expected = uncached(model, tokens, **every)
    for name in every:
        assert difference(expected, uncached(model, tokens, **{**every, name: None})) > 1e-3
    _, cache = filled(model, tokens[:, :3], **{**every, "position_ids": positions[:, :3]})
    for t in range(3, 14):
        given = {"head_mask": head_mask, "output_hidden_states": True}
        embeds = model.get_input_embeddings()(tokens[:, t : t + 1])
        output = model(inputs_embeds=embeds, past_buckets_states=cache, num_hashes=3 if t % 2 else None, **given)
        assert output.past_buckets_states is cache
        assert output.past_key_values is cache
        assert cache.get_seq_length() == t + 1
        assert_close(output.logits[:, 0], expected[:, t], 1e-9)
        whole = model(tokens[:, : t + 1], position_ids=positions[:, : t + 1], num_hashes=3, **given)
        for state, wanted in zip(output.hidden_states, whole.hidden_states, strict=True):
            assert_close(state[:, -1], wanted[:, -1], 1e-9)


# --- deeper models: what the definition gives -------------------------------------------------------------------------


@pytest.mark.floor
@pytest.mark.parametrize("layers", DEEP, ids="-".join)
@pytest.mark.parametrize(
    ("prompt", "changes"),
    [
        (1, {"num_hashes": 2}),
        (3, {"num_buckets": None, "lsh_num_chunks_before": 0, "full_attention_below": 6}),
        (4, {"num_buckets": [2, 4], "lsh_num_chunks_before": 3, "lsh_allow_duplicate_attention": False}),
        (5, {"local_attn_chunk_length": 3, "lsh_attn_chunk_length": 6, "lsh_attend_across_buckets": False}),
        (9, {"num_hashes": 4, "lsh_num_chunks_before": 2, "local_num_chunks_before": 3, "num_buckets": None}),
        (10, {"num_hashes": 2, **OFF, "local_attn_chunk_length": 6}),
    ],
    ids=lambda value: label(value) if isinstance(value, dict) else None,
)
def test_a_step_of_a_deep_model_equals_the_reference(layers, prompt, changes):
    model = double(attn_layers=layers, **changes)
    tokens = ids(1, 22, seed=prompt)
    reference = ReferenceDecoder(model)
    logits, cache = filled(model, tokens[:, :prompt])
    assert_close(logits[0], reference.prefill(tokens[0, :prompt].tolist()), 1e-8)
    steps = more(model, cache, tokens[:, prompt:], 1)
    assert_close(steps[0], reference.steps(tokens[0, prompt:].tolist()), 1e-8)
    if "lsh_attend_across_buckets" not in changes:
        assert difference(steps, uncached(model, tokens)[:, prompt:]) > 1e-3, "else the reference proves nothing new"


@pytest.mark.parametrize("layers", [["local"], ["lsh"], *DEEP], ids="-".join)
@pytest.mark.parametrize("changes", [BORDERS, {"lsh_attn_chunk_length": 1, "lsh_num_chunks_before": 0}], ids=label)
def test_many_tokens_in_one_call_equal_as_many_calls(layers, changes):
    """Across borders of chunks, from exact to hashed attention, across doublings of the bucket count."""
    model = double(attn_layers=layers, **{"num_hashes": 2, **changes})
    tokens = ids(2, 44)
    for prompt in (1, 4, 11):
        _, cache = filled(model, tokens[:, :prompt])
        expected = more(model, cache, tokens[:, prompt:], 1)
        for size in (2, 5, 40):
            _, cache = filled(model, tokens[:, :prompt])
            assert_close(more(model, cache, tokens[:, prompt:], size), expected, 1e-9)


def test_an_empty_cache_is_filled_like_a_new_one_even_after_a_call_that_failed():
    model = double(attn_layers=DEEP[1])
    tokens, cache = ids(2, 12), ReformerCache(model.config)
    with pytest.raises(ValueError, match="position table"):
        more(model, cache, ids(1, 73))
    assert cache.get_seq_length() == 0
    logits, other = filled(model, tokens[:, :7])
    assert torch.equal(more(model, cache, tokens[:, :7]), logits)
    assert torch.equal(more(model, cache, tokens[:, 7:], 1), more(model, other, tokens[:, 7:], 1))


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("layers", [["lsh"], DEEP[2]], ids="-".join)
def test_generate_takes_each_row_alone_and_fixes_automatic_buckets(layers, chunk):
    """The count is that of the longest a row may get; ``prefill_chunk_size`` tokens come first, the rest are steps."""
    model = double(attn_layers=layers, num_buckets=None, num_hashes=2, eos_token_id=None)
    tokens, real = ids(3, 13), torch.ones(3, 13, dtype=torch.long)
    real[0, :9] = real[1, :2] = 0
    settings = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings |= {"prefill_chunk_size": chunk} if chunk else {}
    output = model.generate(tokens, attention_mask=real, **settings)
    for row, logits in enumerate(torch.stack(output.logits, dim=1)):
        prompt = tokens[row, real[row].bool()].tolist()
        reference = ReferenceDecoder(model, reach=len(prompt) + 20)
        whole = [reference.prefill(prompt[:chunk])[-1]]
        whole += [reference.step(token) for token in prompt[chunk or 13 :] + output.sequences[row, 13:-1].tolist()]
        assert_close(logits, torch.stack(whole[-20:]), 1e-5)  # generate rounds them to single precision
        following_the_length = uncached(model, output.sequences[row : row + 1, real[row].argmax() :])[0, -21:-1]
        assert difference(logits, following_the_length) > 0.1


# --- rows and their pads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["left", "right", "scattered", "whole row"])
@pytest.mark.parametrize("layers", [["local"], ["lsh"]], ids="-".join)
def test_steps_of_a_padded_batch_equal_those_of_the_row_alone(layers, kind):
    """Masked columns may come in any call. A first layer's keys know nothing of the other tokens."""
    model = double(attn_layers=layers, num_hashes=2, num_buckets=None)
    for tokens, prompt, _, steps in padded_calls(model, kind):
        assert_close(steps, uncached(model, tokens.view(1, -1))[0, len(prompt) :], 1e-9)


@pytest.mark.parametrize("kind", ["left", "right", "scattered"])
@pytest.mark.parametrize("layers", [["local", "local"], *DEEP[1:]], ids="-".join)
def test_steps_of_a_padded_batch_equal_the_reference(layers, kind):
    """After a plain padded forward, where pads take part in the ring, and after one that takes each row alone."""
    model = double(attn_layers=layers, num_hashes=2, num_buckets=None, lsh_num_chunks_before=2)
    differs = False
    plain = padded_calls(model, kind)
    alone = padded_calls(model, kind, ReformerCache(model.config), rows_alone=True)
    for (tokens, prompt, logits, steps), (all_tokens, own, last, own_steps) in zip(plain, alone, strict=True):
        reference = ReferenceDecoder(model)
        first = reference.prefill(tokens[: len(prompt)].tolist(), prompt.tolist(), 13)
        assert_close(logits[prompt], first, 1e-8)
        assert_close(steps, reference.steps(tokens[len(prompt) :].tolist()), 1e-8)
        reference = ReferenceDecoder(model)
        assert_close(last[-1], reference.prefill(all_tokens[: len(own)].tolist())[-1], 1e-8)
        assert_close(own_steps, reference.steps(all_tokens[len(own) :].tolist()), 1e-8)
        differs |= len(tokens) == len(all_tokens) and difference(steps, own_steps) > 1e-3
    assert differs or kind == "right", "else the two prompts prove the same"


@pytest.mark.parametrize("options", [{}, {"position_ids": torch.full((2, 3), 7)}], ids=["", "position_ids"])
def test_a_call_without_any_token_adds_columns_and_nothing_else(options):
    model, tokens = double(attn_layers=DEEP[1]), ids(2, 20)
    _, cache = filled(model, tokens[:, :6])
    expected = more(model, copy.deepcopy(cache), tokens[:, 9:])
    real = torch.ones(2, 20, dtype=torch.long)
    real[:, 6:9] = 0
    more(model, cache, tokens[:, 6:9], attention_mask=real, **options)
    assert cache.get_seq_length() == 9
    assert_close(more(model, cache, tokens[:, 9:], attention_mask=real), expected, 1e-9)


# --- what else may happen to a cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [["local"], ["lsh"], *DEEP], ids="-".join)
@pytest.mark.parametrize("changes", [BORDERS, *({"local_num_chunks_before": n} for n in (0, 2))], ids=label)
def test_after_a_crop_steps_equal_those_of_a_cache_that_never_saw_the_tokens(layers, changes):
    """Within a chunk, across its border, from hashed back to exact attention, back over a doubling of the buckets."""
    model = double(attn_layers=layers, **changes)
    tokens, others, real = ids(2, 20), ids(2, 30, seed=9), torch.ones(2, 50, dtype=torch.long)
    real[0, 10] = 0
    for length, crops in ((6, (1,)), (8, (1,)), (9, (2, 1, 1)), (12, (3,)), (16, (1, 0, 2)), (20, (4,))):
        _, cache = filled(model, tokens[:, :2])
        more(model, cache, tokens[:, 2:length], 5, attention_mask=real)
        for crop in crops:
            cache.crop(-crop if crop % 2 else cache.get_seq_length() - crop)
        kept = length - sum(crops)
        assert cache.get_seq_length() == kept
        _, never = filled(model, tokens[:, :2])
        more(model, never, tokens[:, 2:kept], 5, attention_mask=real)
        given = {"attention_mask": real[:, : kept + 30].index_fill(1, torch.arange(kept, kept + 30), 1)}
        assert_close(more(model, cache, others, 9, **given), more(model, never, others, 4, **given), 1e-9)


def test_a_crop_beyond_what_local_layers_keep_is_refused_unless_the_past_is_recorded():
    model, tokens = double(attn_layers=DEEP[1]), ids(2, 40)
    _, cache = filled(model, tokens[:, :3])
    more(model, cache, tokens[:, 3:12], 1)
    never, recorded = copy.deepcopy(cache), copy.deepcopy(cache)
    recorded.activate_past_recording()
    for each in (cache, recorded):
        more(model, each, tokens[:, 12:30], 1)
    with pytest.raises(ValueError, match=r"tokens_to_remove=-18 .* layer 1 "):
        cache.crop(-18)
    assert cache.get_seq_length() == 30
    assert_close(more(model, cache, tokens[:, 30:], 1), more(model, copy.deepcopy(recorded), tokens[:, 30:], 1), 1e-9)
    recorded.crop(12)
    assert_close(more(model, recorded, tokens[:, 30:], 1), more(model, never, tokens[:, 30:], 1), 1e-9)


@pytest.mark.parametrize("record", [False, True])
def test_after_a_crop_of_the_prompt_many_tokens_come_in_one_call(record):
    model, tokens = double(attn_layers=["local"]), ids(1, 21)
    _, cache = filled(model, tokens[:, :12])
    cache.crop(-1)
    if record:
        cache.activate_past_recording()
    assert_close(more(model, cache, tokens[:, 11:]), uncached(model, tokens)[:, 11:], 1e-9)


@pytest.mark.parametrize("layers", [["local"], *DEEP], ids="-".join)
def test_rows_can_be_chosen(layers):
    model = double(attn_layers=layers, **BORDERS)
    tokens, others = ids(3, 11), ids(6, 12, seed=4)
    real = torch.ones(3, 11, dtype=torch.long)
    real[1, 6:8] = 0
    _, cache = filled(model, tokens[:, :5])
    more(model, cache, tokens[:, 5:], attention_mask=real)
    alone = []
    for row in range(3):
        alone.append(filled(model, tokens[row : row + 1, :5])[1])
        more(model, alone[row], tokens[row : row + 1, 5:][:, real[row, 5:].bool()])
    for choose, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        chosen = copy.deepcopy(cache)
        choose(chosen)
        steps = more(model, chosen, others[: len(rows)], 4)
        for i, row in enumerate(rows):
            assert_close(steps[i], more(model, copy.deepcopy(alone[row]), others[i : i + 1], 4)[0], 1e-9)


DUPLICATES = {"copy": copy.deepcopy, "pickle": lambda cache: pickle.loads(pickle.dumps(cache))}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
@pytest.mark.parametrize("length", [3, 9])
def test_a_copy_goes_on_by_itself(duplicate, length):
    model = double(attn_layers=DEEP[2], num_hashes=2)
    tokens, others = ids(2, 24), ids(2, 9, seed=4)
    _, cache = filled(model, tokens[:, :length])
    _, expected = filled(model, tokens[:, :length])
    more(model, duplicate(cache), others)
    twin = duplicate(cache)
    more(model, cache, tokens[:, length:12], 1)
    more(model, expected, tokens[:, length:12], 1)
    wanted = more(model, expected, tokens[:, 12:], 1)
    assert torch.equal(more(model, cache, tokens[:, 12:], 1), wanted)
    assert torch.equal(more(model, twin, tokens[:, length:], 1)[:, 12 - length :], wanted)


TOKENS = ids(2, 10)
ONES = torch.ones(2, 13, dtype=torch.long)
WRONG = {
    "attention_mask too narrow": ({"attention_mask": ONES[:, :3]}, ValueError, "attention_mask must have shape"),
    "attention_mask with other pads": ({"attention_mask": ONES.tril()}, ValueError, "attention_mask differs"),
    "num_hashes": ({"num_hashes": 2}, ValueError, "num_hashes"),
    "output_attentions": ({"output_attentions": True}, ValueError, "output_attentions"),
    "beyond the table": ({"input_ids": ids(2, 63)}, ValueError, "position table"),
    "position_ids": ({"position_ids": torch.full((2, 3), 72)}, ValueError, "position_ids"),
    "rows": ({"input_ids": ids(3, 3)}, ValueError, "input_ids has 3 rows, but past_key_values"),
    "head_mask": ({"head_mask": torch.ones(2)}, ValueError, "head_mask"),
    "no cache": ({"past_key_values": (None, None)}, TypeError, "past_key_values must be a ReformerCache"),
    "two caches": ({"past_buckets_states": 0}, ValueError, "past_buckets_states and past_key_values"),
}
OTHERS = {"another model": {}, "another depth": {"attn_layers": DEEP[0]}, "another configuration": {"num_buckets": 6}}


@pytest.mark.parametrize("name", [*WRONG, *OTHERS, "another dtype", "training"])
def test_bad_input_names_the_parameter_and_leaves_the_cache_unharmed(name):
    model = user = double(attn_layers=DEEP[1])
    _, cache = filled(model, TOKENS)
    untouched = copy.deepcopy(cache)
    options, error, message = WRONG.get(name, ({}, ValueError, "past_key_values"))
    if name in OTHERS:
        user = double(**{"attn_layers": DEEP[1], **OTHERS[name]})
    elif name == "another dtype":
        user.float()
    user.train(name == "training")
    with pytest.raises(error, match=message):
        user(**{"input_ids": TOKENS[:, :3], "past_key_values": cache, **options})
    model.eval().double()
    for spoil in (lambda: cache.crop(-11), lambda: cache.crop("3"), lambda: cache.reorder_cache(torch.tensor([0, 2]))):
        with pytest.raises((ValueError, TypeError), match=r"tokens_to_remove|rows"):
            spoil()
    assert torch.equal(more(model, cache, TOKENS, 4), more(model, untouched, TOKENS, 4))
