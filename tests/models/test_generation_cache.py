"""``generate`` with its cache: every way of decoding that transformers offers, against steps taken by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.models.builders import assert_close, build, ids, relative_error
from tests.models.test_generation import NEW, PAD, by_hand, generate, padded, without_end

DEEP = ["lsh", "local", "lsh"]
FLAT = {"local": ["local", "local"], "lsh": ["local", "lsh"], "deep": DEEP}


def start(model, prompt: torch.Tensor, **options):
    """Read a prompt ``[T]`` by a full forward; return the cache and the last logits ``[V]``."""
    with torch.no_grad():
        output = model(prompt.view(1, -1), use_cache=True, **options)
    return output.past_buckets_states, output.logits[0, -1]


def step(model, cache, tokens) -> torch.Tensor:
    """Feed tokens to a cache and return the last logits ``[V]``."""
    with torch.no_grad():
        return model(torch.as_tensor(tokens).view(1, -1), past_key_values=cache).logits[0, -1]


def greedy(model, prompt: torch.Tensor, new: int = NEW, *, head: int | None = None) -> list[int]:
    """Greedy decoding by forwards with a cache; only the prompt's first ``head`` tokens are read at once."""
    cache, logits = start(model, prompt[:head])
    for token in prompt[len(prompt) if head is None else head :]:
        logits = step(model, cache, [token])
    written: list[int] = []
    while len(written) < new:
        written.append(int(logits.argmax()))
        logits = step(model, cache, written[-1:])
    return written


# --- faults of the existing ones --------------------------------------------------------------------------------------


def test_f2_every_row_of_a_batch_reads_its_own_states():
    model = build(attn_layers=DEEP, num_hashes=2).double()
    rows = ids(4, 30)
    with torch.no_grad():
        together = model(rows[:, :20], use_cache=True).past_buckets_states
        batched = [model(rows[:, t : t + 1], past_key_values=together).logits[:, -1] for t in range(20, 30)]
    for row in range(4):
        cache, _ = start(model, rows[row, :20])
        for t in range(20, 30):
            assert_close(batched[t - 20][row], step(model, cache, rows[row, t]), 1e-9)
    assert relative_error(batched[-1][0], batched[-1][1]) > 0.1


def test_f3_rotations_live_in_the_cache():
    """Without a ``hash_seed`` steps draw nothing, and a step repeated gives the same."""
    model = without_end(attn_layers=["lsh", "lsh"], hash_seed=None)
    cache, _ = start(model, ids(1, 40)[0])
    other = copy.deepcopy(cache)
    state = torch.get_rng_state()
    first = step(model, cache, [5])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(step(model, other, [5]), first)


def test_f3_generation_draws_one_seed():
    model = without_end(attn_layers=DEEP, hash_seed=None)
    torch.manual_seed(5)
    generate(model, ids(3, 13))
    after = torch.get_rng_state()
    torch.manual_seed(5)
    torch.randint(2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("before", [2, 3])
def test_f4_local_windows_of_several_chunks_lose_nothing(before):
    """From as many chunks on as a window has; on a shorter ring chunks stand in a window twice, until it grows."""
    model = build(attn_layers=["local", "local"], local_num_chunks_before=before).double()
    tokens = ids(1, 60)[0]
    cache, _ = start(model, tokens[: 4 * before + 1])
    for t in range(4 * before + 1, 60):
        with torch.no_grad():
            expected = model(tokens[: t + 1].view(1, -1), use_cache=False).logits[0, -1]
        assert_close(step(model, cache, tokens[t]), expected, 1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_f5_masks_and_positions_reach_every_step(side):
    model = without_end(attn_layers=DEEP)
    prompts = [ids(1, length, seed=length)[0] for length in (5, 14, 2)]
    tokens, real = padded(prompts, 17, side)
    expected = [greedy(model, prompt) for prompt in prompts]
    assert generate(model, tokens, attention_mask=real)[:, 17:].tolist() == expected
    ignored = generate(model, tokens, attention_mask=torch.ones_like(real))[:, 17:].tolist()
    assert ignored != expected


# --- ways of decoding -------------------------------------------------------------------------------------------------


@pytest.mark.floor
@pytest.mark.parametrize("layers", FLAT)
def test_greedy_equals_steps_by_hand(layers):
    model = without_end(attn_layers=FLAT[layers], num_hashes=2)
    for length in (1, 3, 4, 5, 21):
        prompt = ids(1, length)
        assert generate(model, prompt, max_new_tokens=30)[0, length:].tolist() == greedy(model, prompt[0], 30)


@pytest.mark.floor
@pytest.mark.parametrize("layers", FLAT)
def test_assisted_decoding_writes_what_greedy_does(layers):
    model = without_end(attn_layers=FLAT[layers], num_hashes=2)
    stranger = without_end(attn_layers=["local"], seed=7)
    assistants = {"stranger": stranger, "twin": without_end(attn_layers=FLAT[layers], num_hashes=2)}
    for length in (3, 4, 13):
        prompt = ids(1, length)
        expected = generate(model, prompt, max_new_tokens=30)
        for name, assistant in assistants.items():
            for many in (3, 11):
                assistant.generation_config.num_assistant_tokens = many
                result = generate(model, prompt, max_new_tokens=30, assistant_model=assistant)
                assert torch.equal(result, expected), (name, many)
        looked_up = generate(model, prompt, max_new_tokens=30, prompt_lookup_num_tokens=4)
        assert torch.equal(looked_up, expected)


def test_assisted_decoding_accepts_candidates():
    """A twin's guesses are all right, so the model runs seldom."""
    model, twin = without_end(attn_layers=DEEP), without_end(attn_layers=DEEP)
    twin.generation_config.num_assistant_tokens = 8
    twin.generation_config.assistant_confidence_threshold = 0.0
    runs = []
    handle = model.reformer.encoder.layers[0].attention.register_forward_pre_hook(lambda *_: runs.append(1))
    original = model.reformer.encoder.decode
    model.reformer.encoder.decode = lambda *args, **kwargs: runs.append(1) or original(*args, **kwargs)
    result = generate(model, ids(1, 13), max_new_tokens=36, assistant_model=twin)
    handle.remove()
    model.reformer.encoder.decode = original
    assert len(runs) <= 8
    assert torch.equal(result, generate(model, ids(1, 13), max_new_tokens=36))


@pytest.mark.parametrize("name", ["past_key_values", "past_buckets_states"])
@pytest.mark.parametrize("layers", FLAT)
def test_a_continued_generation_is_one_long_one(layers, name):
    model = without_end(attn_layers=FLAT[layers])
    for rows in (1, 3):
        prompt = ids(rows, 13)
        whole = generate(model, prompt, max_new_tokens=30)
        first = generate(model, prompt, max_new_tokens=11, return_dict_in_generate=True)
        more = generate(model, first.sequences, max_new_tokens=19, **{name: first.past_key_values})
        assert torch.equal(more, whole)
        assert first.past_key_values.get_seq_length() == 13 + 30 - 1


def test_a_conversation_goes_on_from_its_cache():
    model = without_end(attn_layers=DEEP)
    first = generate(model, ids(1, 13), return_dict_in_generate=True)
    cache = first.past_key_values
    turn = ids(1, 6, seed=9)
    text = torch.cat([first.sequences, turn], dim=1)
    by_steps = copy.deepcopy(cache)
    logits = step(model, by_steps, text[0, cache.get_seq_length() :])
    expected = [int(logits.argmax())]
    while len(expected) < NEW:
        expected.append(int(step(model, by_steps, expected[-1:]).argmax()))
    only_new = text[:, cache.get_seq_length() :]
    for given, options in ((text, {}), (only_new, {"attention_mask": torch.ones_like(text)})):
        result = generate(model, given, past_key_values=copy.deepcopy(cache), **options)
        assert result[0, given.shape[1] :].tolist() == expected
    with pytest.raises(ValueError, match="input_ids"):
        generate(model, only_new, past_key_values=cache)
    with pytest.raises(ValueError, match="rows"):
        generate(model, text.repeat(2, 1), past_key_values=cache)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_conversation_goes_on_row_by_row(side):
    model = without_end(attn_layers=DEEP)
    prompts = [ids(1, length, seed=length)[0] for length in (5, 9)]
    turns = [ids(1, length, seed=20 + length)[0] for length in (7, 3)]
    tokens, real = padded(prompts, 10, side)
    first = generate(model, tokens, attention_mask=real, return_dict_in_generate=True)
    more, more_real = padded(turns, 8, side)
    mask = torch.cat([real, torch.ones(2, NEW, dtype=torch.long), more_real], dim=1)
    text = torch.cat([first.sequences, more], dim=1)
    result = generate(model, text, attention_mask=mask, past_key_values=first.past_key_values)[:, text.shape[1] :]
    for row, (prompt, turn) in enumerate(zip(prompts, turns, strict=True)):
        alone = generate(model, prompt.view(1, -1), return_dict_in_generate=True)
        both = torch.cat([alone.sequences, turn.view(1, -1)], dim=1)
        assert result[row].tolist() == generate(model, both, past_key_values=alone.past_key_values)[0, -NEW:].tolist()


@pytest.mark.floor
@pytest.mark.parametrize("layers", FLAT)
@pytest.mark.parametrize("size", [1, 4, 5, 6, 40])
def test_a_prefill_in_chunks_is_a_forward_and_steps(layers, size):
    model = without_end(attn_layers=FLAT[layers])
    prompt = ids(1, 21, seed=2)
    result = generate(model, prompt, prefill_chunk_size=size)[0, 21:].tolist()
    assert result == greedy(model, prompt[0], head=min(size, 21))


def test_a_prefill_in_chunks_is_another_thing_than_one_forward():
    model = without_end(attn_layers=DEEP)
    results = [generate(model, ids(1, 40, seed), prefill_chunk_size=5).tolist() for seed in range(4)]
    assert results != [generate(model, ids(1, 40, seed)).tolist() for seed in range(4)]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_may_be_given(side, use_cache):
    model = without_end()
    prompts = [ids(1, length, seed=length)[0] for length in (5, 14)]
    tokens, real = padded(prompts, 17, side)
    shifted = ((real.cumsum(1) - 1) * real + torch.tensor([[7], [3]])) * real
    result = generate(model, tokens, attention_mask=real, position_ids=shifted, use_cache=use_cache)[:, 17:]
    expected = []
    for prompt, shift in zip(prompts, (7, 3), strict=True):
        text = prompt.view(1, -1)
        while text.shape[1] < len(prompt) + NEW:
            with torch.no_grad():
                logits = model(text, position_ids=torch.arange(text.shape[1]).view(1, -1) + shift, use_cache=False)
            text = torch.cat([text, logits.logits[:, -1:].argmax(-1)], dim=1)
        expected.append(text[0, len(prompt) :].tolist())
    assert result.tolist() == expected
    assert result.tolist() != generate(model, tokens, attention_mask=real)[:, 17:].tolist()


def best_by_hand(model, prompt: torch.Tensor, beams: int, new: int) -> list[int]:
    """Beam search of one row, each beam with a cache of its own."""
    cache, logits = start(model, prompt)
    kept = [(0.0, [], cache, logits)]
    for _ in range(new):
        grown = []
        for score, written, cache, logits in kept:
            for token, log_prob in enumerate(logits.log_softmax(-1).tolist()):
                grown.append((score + log_prob, [*written, token], cache))
        best = sorted(grown, key=lambda beam: -beam[0])[:beams]
        kept = []
        for score, written, cache in best:
            own = copy.deepcopy(cache)
            kept.append((score, written, own, step(model, own, written[-1:])))
    return kept[0][1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_beams_keep_their_own_past(side):
    model = without_end(attn_layers=DEEP, num_hashes=2)
    with torch.no_grad():
        model.lm_head.decoder.weight *= 0.1  # flat enough that beams and greedy part
    prompts = [ids(1, length, seed=length)[0] for length in (6, 9)]
    expected = [best_by_hand(model, prompt, 3, 7) for prompt in prompts]
    tokens, real = padded(prompts, 9, side)
    result = generate(model, tokens, attention_mask=real, num_beams=3, max_new_tokens=7)
    assert result[:, 9:].tolist() == expected
    assert expected != [greedy(model, prompt, 7) for prompt in prompts]


def test_several_sequences_per_prompt_are_each_on_their_own():
    model = without_end(attn_layers=DEEP, hash_seed=3)
    torch.manual_seed(0)
    options = {"do_sample": True, "num_return_sequences": 4, "return_dict_in_generate": True, "output_logits": True}
    output = generate(model, ids(2, 13), **options)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 8
    for row, sequence in enumerate(output.sequences):
        cache, logits = start(model, sequence[:13])
        for made, token in zip(output.logits, sequence[13:], strict=True):
            assert_close(made[row, 3:], logits[3:], 1e-5)
            logits = step(model, cache, [token])


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class After(StoppingCriteria):
    """Stop when the last token is this one."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -1] == self.token


def test_tokens_are_streamed_and_criteria_stop():
    model = without_end(attn_layers=DEEP)
    prompt, streamer = ids(1, 7), Collector()
    result = generate(model, prompt, streamer=streamer, max_new_tokens=20)
    assert streamer.ended
    assert streamer.tokens == result[0].tolist()
    target = int(result[0, 12])
    first = result[0, 7:].tolist().index(target)
    stopped = generate(model, prompt, max_new_tokens=20, stopping_criteria=StoppingCriteriaList([After(target)]))
    assert torch.equal(stopped, result[:, : 7 + first + 1])


def test_without_a_cache_nothing_is_kept():
    model = without_end()
    output = generate(model, ids(1, 13), use_cache=False, return_dict_in_generate=True)
    assert output.past_key_values is None
    assert output.sequences[0, 13:].tolist() == by_hand(model, ids(1, 13)[0])


def test_training_mode_is_refused_and_evaluation_named():
    model = without_end().train()
    with pytest.raises(ValueError, match=r"model\.eval"):
        generate(model, ids(1, 13))
    assert generate(model, ids(1, 13), use_cache=False).shape == (1, 13 + NEW)


@pytest.mark.parametrize("given", [object(), "dynamic", ((1, 2),)])
def test_other_caches_are_refused(given):
    with pytest.raises(TypeError, match="past_key_values"):
        generate(without_end(), ids(1, 7), past_key_values=given)


def test_pads_cost_nothing_and_copies_are_read_once():
    model = without_end()
    seen = []
    handle = model.reformer.encoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    generate(model, ids(1, 13), num_beams=5)
    tokens, real = padded([ids(1, 4)[0]], 40, "left")
    generate(model, tokens, attention_mask=real)
    handle.remove()
    assert seen == [(1, 16, 11), (1, 4, 11)]
    assert PAD == 1
