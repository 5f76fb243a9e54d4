"""Generation against loops written by hand. Every row is on its own, wherever its pads stand (FAULTS F5)."""

from __future__ import annotations

import pytest
import torch

from flash_reformer import functional
from tests.models.builders import build, ids

PAD = 1
EOS = 2
NEW = 9


def by_hand(model, prompt: torch.Tensor, new: int = NEW, **options) -> list[int]:
    """Greedy decoding of one row ``[T]``: the forward of all so far, its last argmax, again; up to and with EOS."""
    tokens = prompt.view(1, -1)
    for _ in range(new):
        with torch.no_grad():
            last = model(tokens, use_cache=False, **options).logits[0, -1].argmax()
        tokens = torch.cat([tokens, last.view(1, 1)], dim=1)
        if last == EOS:
            break
    return tokens[0, len(prompt) :].tolist()


def without_end(name: str = "ReformerModelWithLMHead", **changes):
    """A model that never ends a sequence of its own accord, nor writes pads, so that lengths are known."""
    model = build(name, **changes)
    with torch.no_grad():
        model.lm_head.bias[PAD] = model.lm_head.bias[EOS] = -1e4
    return model


def settled(model, longest: int):
    """The same model with the bucket count that ``num_buckets=None`` stands for in a generation of that length."""
    if model.config.num_buckets is not None:
        return model
    padded = -(-longest // 4) * 4 if longest > 4 else longest
    twin = without_end(**{**fields_of(model), "num_buckets": functional.automatic_num_buckets(padded, 4, 72)})
    twin.load_state_dict(model.state_dict())
    return twin


def fields_of(model) -> dict:
    return {name: getattr(model.config, name) for name in ("attn_layers", "num_hashes", "hash_seed")}


def generate(model, tokens, **options):
    return model.generate(tokens, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, **options})


def padded(prompts: list[torch.Tensor], length: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack prompts of different lengths. ``"both"`` puts pads on the left of the first row, on the right of others."""
    tokens = torch.full((len(prompts), length), PAD)
    real = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        left = side == "left" or (side == "both" and row == 0)
        place = slice(length - len(prompt), None) if left else slice(len(prompt))
        tokens[row, place], real[row, place] = prompt, 1
    return tokens, real


@pytest.mark.floor
@pytest.mark.parametrize("length", [1, 3, 4, 10, 21])
@pytest.mark.parametrize("num_buckets", [4, None])
def test_greedy_equals_a_loop_by_hand(length, num_buckets):
    model = without_end(num_buckets=num_buckets, num_hashes=2)
    prompt = ids(1, length)
    result = generate(model, prompt)
    assert result.shape == (1, length + NEW)
    assert torch.equal(result[:, :length], prompt)
    assert result[0, length:].tolist() == by_hand(settled(model, length + NEW), prompt[0])
    uncached = generate(model, prompt, use_cache=False)
    assert uncached[0, length:].tolist() == by_hand(model, prompt[0])


def test_what_is_generated_depends_on_the_prompt():
    model = without_end()
    results = {tuple(generate(model, ids(1, 10, seed))[0, 10:].tolist()) for seed in range(4)}
    assert len(results) == 4
    assert any(len(set(result)) > 2 for result in results)


@pytest.mark.floor
@pytest.mark.parametrize("num_buckets", [4, None])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_padded_row_generates_what_it_generates_alone(side, num_buckets):
    model = without_end(num_buckets=num_buckets)
    prompts = [ids(1, length, seed=seed)[0] for seed, length in enumerate((5, 14, 2, 14))]
    expected = {
        True: [by_hand(settled(model, len(prompt) + NEW), prompt) for prompt in prompts],
        False: [by_hand(model, prompt) for prompt in prompts],
    }
    for length in (14, 17, 30):
        tokens, real = padded(prompts, length, side)
        for attention_mask in (real, real.bool()):
            for use_cache, rows in expected.items():
                result = generate(model, tokens, attention_mask=attention_mask, use_cache=use_cache)
                assert result[:, length:].tolist() == rows
    assert len({tuple(row) for row in expected[True]}) == 4


def test_logits_of_a_padded_row_are_those_of_the_row_alone():
    model = without_end()
    prompts = [ids(1, length, seed=length)[0] for length in (5, 14, 2)]
    options = {"return_dict_in_generate": True, "output_logits": True}
    for side in ("left", "right"):
        tokens, real = padded(prompts, 17, side)
        for more in ({"use_cache": True}, {"use_cache": False}, {"prefill_chunk_size": 3}):
            together = generate(model, tokens, attention_mask=real, **options, **more).logits
            for row, prompt in enumerate(prompts):
                alone = generate(model, prompt.view(1, -1), **options, **more).logits
                for step, (a, b) in enumerate(zip(together, alone, strict=True)):
                    assert torch.allclose(a[row], b[0], rtol=1e-4, atol=1e-4), (side, row, step, more)


def test_pads_are_known_by_their_id_where_no_mask_is_given():
    """What ``GenerationMixin`` infers must reach us."""
    model = without_end()
    prompts = [ids(1, length, seed=length)[0] for length in (5, 14)]
    tokens, real = padded(prompts, 14, "left")
    assert torch.equal(generate(model, tokens), generate(model, tokens, attention_mask=real))


def test_a_forward_with_pads_is_another_thing():
    """The plain forward keeps one ring for reals and pads. If it did not differ, the tests above would prove little."""
    model = without_end()
    tokens, real = padded([ids(1, 14)[0]], 17, "left")
    with torch.no_grad():
        padded_logits = model(tokens, attention_mask=real).logits[0, -1]
        alone = model(ids(1, 14)).logits[0, -1]
    assert (padded_logits - alone).abs().max() > 0.05


def test_padding_works_without_a_hash_seed_too():
    """Rows of all lengths start each step from the same random state, so they meet the same rotations."""
    model = without_end(hash_seed=None)
    prompts = [ids(1, length, seed=length)[0] for length in (5, 14, 2)]
    alone = []
    for prompt in prompts:
        torch.manual_seed(0)
        alone.append(generate(model, prompt.view(1, -1))[0, len(prompt) :].tolist())
    for side in ("left", "right"):
        tokens, real = padded(prompts, 14, side)
        torch.manual_seed(0)
        assert generate(model, tokens, attention_mask=real)[:, 14:].tolist() == alone


def test_generation_ends_with_eos():
    model = build()
    prompts = [ids(1, 6, seed)[0] for seed in range(6)]
    with torch.no_grad():
        model.lm_head.bias[EOS] = 5.0
    expected = [by_hand(model, prompt, 20) for prompt in prompts]
    ended = [row for row in expected if row[-1] == EOS]
    assert len(ended) >= 2
    assert len({len(row) for row in expected}) >= 2, "rows must end at different steps"
    result = generate(model, torch.stack(prompts), max_new_tokens=20)
    for row, wanted in zip(result[:, 6:].tolist(), expected, strict=True):
        assert row == wanted + [PAD] * (len(row) - len(wanted))
    assert result.shape[1] == 6 + max(map(len, expected))


def test_sampling_follows_the_seed():
    model = without_end(hash_seed=None)

    def sample(seed):
        torch.manual_seed(seed)
        return generate(model, ids(2, 7), do_sample=True, top_k=0).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    state = torch.get_rng_state()
    sample(1)
    assert not torch.equal(state, torch.get_rng_state())


def test_greedy_with_a_hash_seed_leaves_the_generator_alone():
    model, state = without_end(), torch.get_rng_state()
    generate(model, ids(2, 7))
    assert torch.equal(torch.get_rng_state(), state)


def best_by_hand(model, prompt: torch.Tensor, beams: int, new: int) -> list[int]:
    """Beam search of one row without ends: the likeliest ``beams`` continuations of the likeliest, step by step."""
    kept = [(0.0, prompt.tolist())]
    for _ in range(new):
        grown = []
        for score, tokens in kept:
            with torch.no_grad():
                log_probs = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            grown += [(score + p, [*tokens, token]) for token, p in enumerate(log_probs.tolist())]
        kept = sorted(grown, reverse=True)[:beams]
    return kept[0][1][len(prompt) :]


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_beam_search_equals_a_search_by_hand(side):
    model = without_end()
    with torch.no_grad():
        model.lm_head.decoder.weight *= 0.1  # flat enough that beams and greedy part
    prompts = [ids(1, length, seed=length)[0] for length in (6, 9)]
    expected = [best_by_hand(model, prompt, 3, 5) for prompt in prompts]
    options = {"num_beams": 3, "max_new_tokens": 5}
    if side is None:
        result = [generate(model, p.view(1, -1), **options)[0, len(p) :].tolist() for p in prompts]
    else:
        tokens, real = padded(prompts, 9, side)
        result = generate(model, tokens, attention_mask=real, **options)[:, 9:].tolist()
    assert result == expected
    assert expected != [by_hand(model, prompt, 5) for prompt in prompts]


def test_several_sequences_per_prompt():
    model = without_end()
    beams = generate(model, ids(2, 7), num_beams=4, num_return_sequences=3)
    assert beams.shape == (6, 7 + NEW)
    assert len({tuple(row) for row in beams.tolist()}) == 6
    torch.manual_seed(0)
    samples = generate(model, ids(2, 7), do_sample=True, num_return_sequences=5)
    assert samples.shape == (10, 7 + NEW)
    assert torch.equal(samples[:, :7], ids(2, 7).repeat_interleave(5, 0))
    assert len({tuple(row) for row in samples.tolist()}) > 5


@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_generate_what_their_ids_do(side):
    model = without_end()
    prompts = [ids(1, length, seed=length)[0] for length in (5, 14)]
    tokens, real = padded(prompts, 14, side)
    embeds = model.get_input_embeddings()(tokens)
    result = model.generate(
        inputs_embeds=embeds, attention_mask=real, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD
    )
    assert result.tolist() == [by_hand(model, prompt) for prompt in prompts]


def test_num_hashes_reaches_every_step():
    model = without_end()
    prompt = ids(1, 21, seed=3)
    results = [generate(model, prompt, num_hashes=n)[0, 21:].tolist() for n in (1, 2, 4)]
    assert results == [by_hand(model, prompt[0], num_hashes=n) for n in (1, 2, 4)]
    assert results[0] != results[2]


def test_max_length_and_the_end_of_the_position_table():
    model = without_end(axial_pos_shape=[4, 6])
    assert generate(model, ids(1, 7), max_new_tokens=None, max_length=24).shape == (1, 24)
    with pytest.raises(ValueError, match="position table"):
        generate(model, ids(1, 7), max_new_tokens=30)


def test_pads_need_no_positions():
    """24 positions hold 10 tokens and 9 new ones, however many pads come first."""
    model = without_end(axial_pos_shape=[4, 6])
    prompt = ids(1, 10)[0]
    tokens, real = padded([prompt], 40, "left")
    assert generate(model, tokens, attention_mask=real)[0, 40:].tolist() == by_hand(model, prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_ids": torch.arange(7).unsqueeze(0) + 66}, "position"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"prefill_chunk_size": 4, "use_cache": False}, "prefill_chunk_size"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"head_mask": torch.zeros(3)}, "head_mask"),
        ({"num_hashes": 0}, "num_hashes"),
        ({"attention_mask": torch.zeros(1, 7, dtype=torch.long)}, "attention_mask"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_what_cannot_be_honoured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generate(without_end(), ids(1, 7), **options)


def test_nothing_is_printed(capsys):
    model = without_end(num_buckets=None)
    generate(model, ids(1, 3))
    generate(model, ids(2, 7), num_beams=2)
    assert capsys.readouterr().out == ""


def test_generation_leaves_the_model_as_it_was():
    model = without_end(num_buckets=None)
    before = model.config.to_dict()
    generate(model, ids(2, 7))
    assert model.config.to_dict() == before
    assert not model.training
