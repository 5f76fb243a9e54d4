"""The forward's options, each against an independent computation: attentions, masks, exact attention, positions."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import flash_reformer as ours
from tests.models.builders import CLASSES, assert_close, build, generator, hf_twin, ids, mask, relative_error

T = 21
LM = "ReformerModelWithLMHead"
BASE = "ReformerModel"
BASE_ARGUMENTS = (
    "input_ids attention_mask position_ids head_mask inputs_embeds num_hashes past_buckets_states use_cache "
    "output_hidden_states output_attentions return_dict"
)
LM_ARGUMENTS = (
    "input_ids position_ids attention_mask head_mask inputs_embeds num_hashes past_buckets_states use_cache "
    "output_hidden_states output_attentions return_dict labels logits_to_keep return_logits"
)
HEAD_ARGUMENTS = (
    "input_ids position_ids attention_mask head_mask inputs_embeds num_hashes {} output_hidden_states "
    "output_attentions return_dict"
)
ARGUMENTS = {
    "ReformerModel": BASE_ARGUMENTS,
    "ReformerModelWithLMHead": LM_ARGUMENTS,
    "ReformerForMaskedLM": HEAD_ARGUMENTS.format("labels"),
    "ReformerForSequenceClassification": HEAD_ARGUMENTS.format("labels"),
    "ReformerForQuestionAnswering": HEAD_ARGUMENTS.format("start_positions end_positions"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_have_their_public_order(name):
    parameters = inspect.signature(getattr(ours, name).forward).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["self", *ARGUMENTS[name].split()]


def logits(model, tokens, **options):
    with torch.no_grad():
        return model(tokens, **options).logits


# --- attentions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_decoder", [True, False])
@pytest.mark.parametrize("length", [3, 4, 16, 20])
@pytest.mark.parametrize("num_hashes", [1, 3])
def test_attentions_are_those_of_transformers(length, num_hashes, is_decoder):
    model = build(BASE, attn_layers=["lsh", "local"], num_hashes=num_hashes, is_decoder=is_decoder).double()
    tokens, real = ids(2, length), mask("right", 2, length)
    with torch.no_grad():
        actual = model(tokens, attention_mask=real, output_attentions=True).attentions
        expected = hf_twin(model)(tokens, attention_mask=real, output_attentions=True).attentions
    assert len(actual) == 2
    for ours_probs, their_probs in zip(actual, expected, strict=True):
        assert_close(ours_probs, their_probs, 1e-6)


def test_attentions_come_in_chunks_or_exact_and_sum_to_one():
    model = build(BASE, num_hashes=2, lsh_num_chunks_after=1)
    local, lsh = model(ids(2, T), output_attentions=True).attentions
    assert local.shape == (2, 3, 6, 4, 8)
    assert lsh.shape == (2, 3, 2 * 6, 4, 12)
    exact = build(BASE, local_attn_chunk_length=None, lsh_attn_chunk_length=24)
    padded = build(BASE, local_attn_chunk_length=8, lsh_attn_chunk_length=24)
    for probs in (local, lsh, *exact(ids(2, T), output_attentions=True).attentions):
        assert torch.allclose(probs.sum(-1), torch.ones(probs.shape[:-1]), atol=1e-5)
    # Padded to 24, which one LSH chunk holds: exact probabilities are cropped to the caller's tokens.
    _, cropped = padded(ids(2, T), output_attentions=True).attentions
    assert cropped.shape == (2, 3, T, T)
    assert torch.allclose(cropped.sum(-1), torch.ones(2, 3, T), atol=1e-5)


def test_asking_for_attentions_or_states_changes_no_value():
    model = build(LM, num_hashes=2)
    for training in (False, True):
        model.train(training)
        plain = model(ids(2, T)).logits
        assert_close(model(ids(2, T), output_attentions=True).logits, plain, 1e-6)
        assert_close(model(ids(2, T), output_hidden_states=True).logits, plain, 1e-6)


def test_attentions_and_states_carry_gradients():
    model = build(BASE).train()
    output = model(ids(2, T), output_attentions=True, output_hidden_states=True)
    weight = model.encoder.layers[0].attention.self_attention.query.weight
    for value in (output.attentions[0].square().sum(), output.hidden_states[1].square().sum()):
        (grad,) = torch.autograd.grad(value, weight, retain_graph=True)
        assert grad.abs().max() > 1e-4


# --- head mask --------------------------------------------------------------------------------------------------------


def silence(model, layer: int, head: int, factor: float) -> None:
    """What masking a head must amount to: its share of the output projection, scaled."""
    size = model.config.attention_head_size
    with torch.no_grad():
        weight = model.reformer.encoder.layers[layer].attention.output.dense.weight
        weight[:, head * size : (head + 1) * size] *= factor


@pytest.mark.parametrize("length", [3, T])
def test_a_head_mask_scales_heads_in_every_layer(length):
    model, other = build(LM), build(LM)
    factors = torch.tensor([1.0, 0.0, 0.5])
    for layer in range(2):
        for head, factor in enumerate(factors.tolist()):
            silence(other, layer, head, factor)
    tokens = ids(2, length)
    assert_close(logits(model, tokens, head_mask=factors), logits(other, tokens), 1e-5)
    assert relative_error(logits(model, tokens), logits(other, tokens)) > 0.05
    assert torch.equal(logits(model, tokens, head_mask=torch.ones(3)), logits(model, tokens))


def test_a_head_mask_may_differ_by_layer():
    model, other = build(LM), build(LM)
    factors = torch.tensor([[0, 1, 1], [1, 1, 0]])
    silence(other, 0, 0, 0.0)
    silence(other, 1, 2, 0.0)
    for value in (factors, factors.bool(), factors.float()):
        assert_close(logits(model, ids(2, T), head_mask=value), logits(other, ids(2, T)), 1e-5)


def test_a_head_mask_gets_gradients():
    model = build(LM).train()
    factors = torch.ones(2, 3, requires_grad=True)
    model(ids(2, T), head_mask=factors, labels=ids(2, T)).loss.backward()
    assert factors.grad.abs().min() > 1e-7


# --- exact attention --------------------------------------------------------------------------------------------------


def test_no_chunk_length_attends_exactly():
    """HF fails with None; but it attends exactly where one chunk holds everything."""
    exact = build(LM, lsh_attn_chunk_length=None, local_attn_chunk_length=None).double()
    wide = build(LM, lsh_attn_chunk_length=64, local_attn_chunk_length=64).double()
    assert_close(logits(exact, ids(2, T)), logits(hf_twin(wide), ids(2, T)), 1e-9)
    assert relative_error(logits(exact, ids(2, T)), logits(build(LM).double(), ids(2, T))) > 0.01


@pytest.mark.parametrize("kind", ["lsh", "local"])
def test_one_kind_alone_may_have_no_chunk_length(kind):
    exact = build(LM, **{f"{kind}_attn_chunk_length": None}).double()
    wide = build(LM, **{f"{kind}_attn_chunk_length": 24}).double()
    assert_close(logits(exact, ids(2, T)), logits(hf_twin(wide), ids(2, T)), 1e-9)


def test_short_inputs_may_attend_exactly():
    threshold = build(LM, full_attention_below=T)
    exact = build(LM, lsh_attn_chunk_length=None, local_attn_chunk_length=None)
    chunked = build(LM)
    for length in (3, 10, T):
        assert_close(logits(threshold, ids(2, length)), logits(exact, ids(2, length)), 1e-5)
        real = mask("left", 2, length)
        masked = logits(threshold, ids(2, length), attention_mask=real)
        assert_close(masked, logits(exact, ids(2, length), attention_mask=real), 1e-5)
    assert torch.equal(logits(threshold, ids(2, T + 1)), logits(chunked, ids(2, T + 1)))
    assert relative_error(logits(chunked, ids(2, T)), logits(exact, ids(2, T))) > 0.01


# --- rings and masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [1, 2])
def test_without_wrap_around_padding_changes_nothing(before):
    """FAULTS F14: with the default, the first chunk sees the last one, whatever that is."""
    sides = {"local_num_chunks_before": before, "local_num_chunks_after": 1, "attn_layers": ["local", "local"]}
    tokens = ids(2, 37)
    for wrap_around in (False, True):
        model = build("ReformerForMaskedLM", wrap_around=wrap_around, **sides)
        alone = logits(model, tokens[:, :13])
        errors = []
        for length in (14, 20, 32, 37):
            real = torch.zeros(2, length, dtype=torch.bool)
            real[:, :13] = True
            errors.append(relative_error(logits(model, tokens[:, :length], attention_mask=real)[:, :13], alone))
        if wrap_around:
            assert max(errors) > 0.05
        else:
            assert max(errors) < 1e-5


OPTIONS = ["wrap_around", "lsh_attend_across_buckets", "lsh_allow_duplicate_attention"]


@pytest.mark.parametrize("kind", ["lsh", "local"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_reaches_the_layers_it_is_about(option, kind):
    """What each one means is tested in ``tests/ops``."""
    changes = {"attn_layers": [kind, kind], "num_hashes": 2}
    default, changed = (build("ReformerForMaskedLM", **changes, **{option: value}) for value in (True, False))
    error = relative_error(logits(changed, ids(2, 40)), logits(default, ids(2, 40)))
    assert error > 0.01 if kind == "lsh" or option == "wrap_around" else error == 0.0


@pytest.mark.parametrize(("before", "lengths"), [(0, (1, 6, 13)), (1, (3, 6, 39)), (2, (1, 9, 39))])
def test_local_attention_is_strictly_causal(before, lengths):
    # Not compared: rings shorter than the window, where a chunk stands in it twice and counts twice (SEMANTICS 1.6).
    model, tokens = build(LM, attn_layers=["local"] * 3, local_num_chunks_before=before), ids(2, 40)
    whole = logits(model, tokens)
    for length in lengths:
        assert_close(logits(model, tokens[:, :length]), whole[:, :length], 1e-5)
        changed = tokens.clone()
        changed[:, length:] = ids(2, 40 - length, seed=8)
        assert torch.equal(logits(model, changed)[:, :length], whole[:, :length])


@pytest.mark.parametrize("name", [LM, "ReformerForMaskedLM"])
def test_masked_tokens_are_read_by_nobody(name):
    # The sort is by bucket, and masked positions have a bucket of their own: what they contain moves nothing.
    model, tokens, real = build(name, num_hashes=2), ids(3, T), mask("scattered", 3, T)
    changed = torch.where(real.bool(), tokens, ids(3, T, seed=9))
    assert not torch.equal(changed, tokens)
    before = logits(model, tokens, attention_mask=real)
    after = logits(model, changed, attention_mask=real)
    assert torch.equal(after[real.bool()], before[real.bool()])
    assert not torch.equal(logits(model, changed)[real.bool()], logits(model, tokens)[real.bool()])


def test_masks_of_any_dtype_say_the_same():
    model, real = build(LM), mask("left", 3, T)
    expected = logits(model, ids(3, T), attention_mask=real)
    for dtype in (torch.bool, torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(logits(model, ids(3, T), attention_mask=real.to(dtype)), expected)
    everything = logits(model, ids(3, T), attention_mask=torch.ones(3, T, dtype=torch.long))
    assert torch.equal(everything, logits(model, ids(3, T)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fully_masked_rows_stay_finite_and_alone(dtype):
    model, real = build(LM, num_hashes=3).to(dtype), mask("whole row", 3, T)
    both = logits(model, ids(3, T), attention_mask=real)
    assert both.isfinite().all()
    assert both.dtype == dtype


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [[72], [6, 12], [2, 5, 7], [3, 2, 4, 3]])
def test_axial_positions_by_hand(shape, training):
    """Row-major: the first table moves slowest. HF's evaluation fails with other than two axes."""
    widths = [[11], [4, 7], [2, 4, 5], [2, 2, 4, 3]][len(shape) - 1]
    model = build(BASE, axial_pos_shape=shape, axial_pos_embds_dim=widths).train(training)
    limit = math.prod(shape)
    places = torch.randint(limit, (2, T), generator=generator(6))
    table = model.embeddings.position_embeddings
    tokens = ids(2, T)
    states = model(tokens, position_ids=places, output_hidden_states=True).hidden_states[0]
    for b in range(2):
        for t in range(T):
            rest, index = int(places[b, t]), []
            for size in reversed(shape):
                rest, digit = divmod(rest, size)
                index.insert(0, digit)
            rows = [weight.flatten(0, -2)[i] for weight, i in zip(table.weights, index, strict=True)]
            word = model.embeddings.word_embeddings.weight[tokens[b, t]]
            assert torch.allclose(states[b, t], word + torch.cat(rows), atol=1e-6)


@pytest.mark.parametrize("axial", [True, False])
def test_position_ids_where_the_input_is_padded(axial):
    """HF fails here. Ours must equal embeddings that are moved by hand."""
    model = build(LM, axial_pos_embds=axial)
    tokens, places = ids(2, T), torch.randint(72, (2, T), generator=generator(3))
    embeddings = model.reformer.embeddings
    with torch.no_grad():
        counted = torch.arange(T).unsqueeze(0)
        moved = embeddings.word_embeddings(tokens)
        moved = moved + embeddings.position_embeddings(places, 2) - embeddings.position_embeddings(counted, 2)
        expected = model(inputs_embeds=moved).logits
    assert_close(logits(model, tokens, position_ids=places), expected, 1e-5)
    one_for_all = logits(model, tokens, position_ids=places[:1])
    assert torch.equal(one_for_all, logits(model, tokens, position_ids=places[:1].expand(2, -1)))
    assert torch.equal(logits(model, tokens, position_ids=counted.int()), logits(model, tokens))


@pytest.mark.parametrize("axial", [True, False])
def test_training_has_the_values_of_evaluation_at_any_length(axial):
    """FAULTS F12, and HF's two demands on the length."""
    model = build(LM, axial_pos_embds=axial, lsh_attn_chunk_length=3)
    for length in (1, 2, 5, 13, T, 72):
        places = torch.randint(72, (2, length), generator=generator(length))
        for options in ({}, {"position_ids": places}):
            expected = logits(model.eval(), ids(2, length), **options)
            assert_close(logits(model.train(), ids(2, length), **options), expected, 1e-6)
        if length > 2:
            changed = logits(model, ids(2, length), position_ids=places)
            assert relative_error(changed, logits(model, ids(2, length))) > 0.01


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("axial", [True, False])
def test_the_last_position_works_though_pads_lie_beyond(axial, training):
    """35 tokens are padded to 36, for which there is no position."""
    sizes = {"axial_pos_shape": [5, 7], "max_position_embeddings": 35, "axial_pos_embds": axial}
    model = build(LM, **sizes).train(training)
    output = model(ids(2, 35), labels=ids(2, 35))
    assert output.logits.shape == (2, 35, 29)
    output.loss.backward()
    with pytest.raises(ValueError, match="36 tokens"):
        model(ids(2, 36))


def test_axial_positions_ignore_the_learned_tables_size():
    assert build(LM, max_position_embeddings=8)(ids(1, 72)).logits.shape == (1, 72, 29)


def test_embeddings_in_place_of_ids():
    for pad_token_id in (1, None):
        model = build(LM, pad_token_id=pad_token_id)
        embeds = model.get_input_embeddings()(ids(2, T))
        with torch.no_grad():
            assert_close(model(inputs_embeds=embeds).logits, logits(model, ids(2, T)), 1e-6)


def test_num_hashes_of_a_call_are_those_of_a_configuration():
    for training in (False, True):
        one, three = build(LM).train(training), build(LM, num_hashes=3).train(training)
        assert_close(one(ids(2, T), num_hashes=3).logits, three(ids(2, T)).logits, 1e-6)
        assert relative_error(one(ids(2, T)).logits, three(ids(2, T)).logits) > 0.01
        assert one.config.num_hashes == 1


# --- the model as a whole ---------------------------------------------------------------------------------------------


def test_who_cannot_keep_a_cache_says_so():
    for model in (
        build(LM).train(),
        build("ReformerModel"),
        build("ReformerModel", is_decoder=True, lsh_num_chunks_after=1),
    ):
        assert model(ids(1, 5)).past_buckets_states is None
        with pytest.warns(UserWarning, match="use_cache"):
            assert (model.reformer if model.training else model)(ids(1, 5), use_cache=True).past_buckets_states is None
    for name in ("past_buckets_states", "past_key_values"):
        with pytest.raises(TypeError, match=name):
            build(LM)(ids(1, 5), **{name: object()})


@pytest.mark.parametrize("name", CLASSES)
def test_the_backend_is_chosen_per_model(name):
    model = build(name, num_labels=2)
    assert model.backend == "auto"
    model.set_backend("reference")
    assert model.backend == "reference"
    model(ids(1, T))
    with pytest.raises(ValueError, match="backend"):
        model.set_backend("abacus")
    assert model.backend == "reference"


def test_input_embeddings_can_be_replaced():
    model = build(LM)
    new = torch.nn.Embedding(29, 11)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new
    assert model.get_output_embeddings() is model.lm_head.decoder


def test_nothing_is_printed(capsys):
    model = build(LM, num_buckets=None)
    model.train()(ids(2, T), labels=ids(2, T)).loss.backward()
    model.eval()(ids(2, T))
    assert capsys.readouterr() == ("", "")
