"""What the heads return: losses by hand, pooling, spans, states, attentions, and every option of the forward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import flash_reformer as ours
from tests.models.builders import CLASSES, assert_close, build, generator, ids, mask, relative_error

T = 21
LM = "ReformerModelWithLMHead"
MLM = "ReformerForMaskedLM"


def labels_with_holes(seed: int = 4) -> torch.Tensor:
    labels = ids(2, T, seed)
    labels[0, 3:9] = -100
    labels[1, -1] = -100
    return labels


def shifted_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Minus the log-probability of every next token that counts, one at a time."""
    found = []
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1] - 1):
            target = int(labels[row, place + 1])
            if target != -100:
                found.append(math.log(logits[row, place].exp().sum().item()) - logits[row, place, target].item())
    return found


# --- language models --------------------------------------------------------------------------------------------------


def test_the_causal_loss_is_that_of_the_next_token():
    model, labels = build(LM).double(), labels_with_holes()
    output = model(ids(2, T), labels=labels)
    terms = shifted_by_hand(output.logits.detach(), labels)
    assert len(terms) == 2 * (T - 1) - 6 - 1
    assert output.loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)
    whole = model(ids(2, T), labels=labels, num_items_in_batch=100)
    assert whole.loss.item() == pytest.approx(sum(terms) / 100, rel=1e-9)
    as_tensor = model(ids(2, T), labels=labels, num_items_in_batch=torch.tensor(100))
    assert as_tensor.loss.item() == pytest.approx(sum(terms) / 100, rel=1e-9)


def test_the_masked_loss_is_not_shifted():
    model, labels = build(MLM).double(), labels_with_holes()
    output = model(ids(2, T), labels=labels)
    log_probs = output.logits.log_softmax(-1)
    terms = [-log_probs[b, t, labels[b, t]] for b in range(2) for t in range(T) if labels[b, t] != -100]
    assert output.loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-9)
    output = model(ids(2, T), labels=labels, num_items_in_batch=9)
    assert output.loss.item() == pytest.approx(torch.stack(terms).sum().item() / 9, rel=1e-9)


@pytest.mark.parametrize("name", [LM, MLM])
def test_a_batch_in_which_nothing_counts_has_loss_zero(name):
    model = build(name).train()
    output = model(ids(2, T), labels=torch.full((2, T), -100))
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_losses_are_fp32_in_half_precision_and_fp64_in_double():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert build(LM).to(dtype)(ids(1, T), labels=ids(1, T)).loss.dtype == expected


@pytest.mark.parametrize("items", [None, 13])
@pytest.mark.parametrize("chunk", [0, 1, 4, 7, 20, 64])
def test_a_loss_without_logits_is_the_same_loss(chunk, items):
    """Chunks of 4 and 7 do not divide the 20 predictions."""
    labels, tokens = labels_with_holes(), ids(2, T)
    results = []
    for return_logits in (True, False):
        model = build(LM, chunk_size_lm_head=chunk).double().train()
        output = model(tokens, labels=labels, num_items_in_batch=items, return_logits=return_logits)
        output.loss.backward()
        assert (output.logits is None) == (not return_logits)
        results.append((output.loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (with_logits, wanted), (without, actual) = results
    assert without.item() == pytest.approx(with_logits.item(), rel=1e-12)
    for name, grad in wanted.items():
        assert grad.abs().max() > 1e-6, name
        assert relative_error(actual[name], grad) < 1e-10, name


def test_a_loss_without_logits_never_makes_them(monkeypatch):
    sizes = []
    model = build(LM, chunk_size_lm_head=4)
    model.lm_head.decoder.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    model(ids(2, T), labels=ids(2, T), return_logits=False).loss.backward()
    assert max(sizes) == 4
    # The last position, which has nothing to predict, goes along.
    assert sum(sizes) == 2 * T, "each chunk once forward and once for its gradient"


def test_a_loss_without_logits_refuses_what_a_loss_with_logits_refuses():
    for return_logits in (True, False):
        with pytest.raises(ValueError, match=r"input_ids must have shape \[batch, length\]; got \[5\]"):
            build(LM)(ids(1, 5)[0], labels=ids(1, 5)[0], return_logits=return_logits)


def test_logits_to_keep():
    model, tokens = build(LM), ids(2, T)
    with torch.no_grad():
        logits = model(tokens).logits
        for kept in (1, 5, T):
            assert_close(model(tokens, logits_to_keep=kept).logits, logits[:, -kept:], 1e-6)
        places = torch.tensor([3, 0, 20, 3])
        assert_close(model(tokens, logits_to_keep=places).logits, logits[:, places], 1e-6)
        assert model(tokens, logits_to_keep=0).logits.shape == (2, T, 29)


@pytest.mark.parametrize("name", [LM, MLM])
def test_the_output_bias_is_used_and_trained(name):
    """FAULTS F8."""
    model, tokens = build(name), ids(2, T)
    with torch.no_grad():
        before = model(tokens).logits
        model.lm_head.bias[3] = 5.0
        after = model(tokens).logits
    assert torch.allclose(after[..., 3], before[..., 3] + 5.0)
    assert torch.equal(after[..., :3], before[..., :3])
    model(tokens, labels=tokens).loss.backward()
    assert model.lm_head.bias.grad.abs().max() > 1e-3


@pytest.mark.parametrize("forward", [0, 1, 4, 5, 17, 100])
@pytest.mark.parametrize("head", [0, 3, 8, 100])
def test_chunked_layers_give_what_whole_ones_give(forward, head):
    """Neither 4, 5 nor 8 divides 21; HF fails there."""
    whole, chunked = build(LM), build(LM, chunk_size_feed_forward=forward, chunk_size_lm_head=head)
    with torch.no_grad():
        assert_close(chunked(ids(2, T)).logits, whole(ids(2, T)).logits, 1e-5)


# --- classification ---------------------------------------------------------------------------------------------------

CLASSIFIER = "ReformerForSequenceClassification"


def test_regression_is_squared_error():
    labels = torch.tensor([0.5, -2.0])
    model = build(CLASSIFIER, num_labels=1)
    output = model(ids(2, T), labels=labels)
    assert output.logits.shape == (2, 1)
    assert output.loss.item() == pytest.approx(((output.logits[:, 0] - labels) ** 2).mean().item())
    assert model(ids(2, T), labels=labels.view(2, 1)).loss.item() == pytest.approx(output.loss.item())
    several = build(CLASSIFIER, num_labels=3, problem_type="regression")
    wanted = torch.randn(2, 3, generator=generator(1))
    output = several(ids(2, T), labels=wanted)
    assert output.loss.item() == pytest.approx(((output.logits - wanted) ** 2).mean().item(), rel=1e-5)


def test_single_label_is_cross_entropy():
    labels = torch.tensor([2, 0])
    output = build(CLASSIFIER, num_labels=3)(ids(2, T), labels=labels)
    expected = -output.logits.log_softmax(-1)[torch.arange(2), labels].mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_multi_label_is_binary_cross_entropy():
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    output = build(CLASSIFIER, num_labels=3)(ids(2, T), labels=labels)
    expected = -(labels * F.logsigmoid(output.logits) + (1 - labels) * F.logsigmoid(-output.logits)).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_evaluation_does_not_decide_the_problem_type():
    model = build(CLASSIFIER, num_labels=3)
    single, multi = torch.tensor([2, 0]), torch.zeros(2, 3)
    model(ids(2, T), labels=single)
    assert model.config.problem_type is None
    model(ids(2, T), labels=multi)
    model.train()(ids(2, T), labels=single)
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("kind", [None, "left", "right", "scattered"])
def test_a_causal_classifier_pools_the_last_real_token(kind):
    """FAULTS F13: what it pools must depend on every token that is real, so it is the last."""
    model = build(CLASSIFIER, is_decoder=True, num_labels=3)
    tokens, real = ids(3, T), mask(kind, 3, T)
    hidden = model.reformer(tokens, attention_mask=real).last_hidden_state
    last = [T - 1] * 3 if real is None else [int(row.nonzero().max()) for row in real]
    expected = model.classifier(torch.stack([hidden[row, place] for row, place in enumerate(last)]))
    output = model(tokens, attention_mask=real)
    assert_close(output.logits, expected, 1e-6)
    assert relative_error(output.logits, model.classifier(hidden[:, 0])) > 0.01
    if real is not None:
        assert_close(model(tokens, attention_mask=real.bool()).logits, expected, 1e-6)


def test_a_causal_classifier_hears_other_tokens():
    model = build(CLASSIFIER, is_decoder=True, num_labels=3, attn_layers=["local", "local"], full_attention_below=64)
    tokens = ids(1, T)
    changed = tokens.clone()
    changed[0, 5] = 3 + (changed[0, 5] - 2) % 26
    assert changed[0, 5] != tokens[0, 5]
    assert relative_error(model(changed).logits, model(tokens).logits) > 1e-3


def test_a_bidirectional_classifier_pools_the_first_token():
    model = build(CLASSIFIER, num_labels=3)
    tokens, real = ids(3, T), mask("right", 3, T)
    hidden = model.reformer(tokens, attention_mask=real).last_hidden_state
    assert_close(model(tokens, attention_mask=real).logits, model.classifier(hidden[:, 0]), 1e-6)


@pytest.mark.parametrize("kind", [None, "left", "right", "scattered"])
@pytest.mark.parametrize("pooling", ["first", "last", "mean", "max"])
def test_pooling_reads_real_tokens_only(pooling, kind):
    model = build(CLASSIFIER, num_labels=3, classifier_pooling=pooling)
    tokens, real = ids(3, T), mask(kind, 3, T)
    hidden = model.reformer(tokens, attention_mask=real).last_hidden_state
    rows = [row if real is None else row[real[place].bool()] for place, row in enumerate(hidden)]
    read = {
        "first": lambda row: hidden[row, 0],
        "last": lambda row: rows[row][-1],
        "mean": lambda row: rows[row].mean(0),
        "max": lambda row: rows[row].amax(0),
    }[pooling]
    expected = model.classifier(torch.stack([read(row) for row in range(3)]))
    assert_close(model(tokens, attention_mask=real).logits, expected, 1e-6)


def test_a_pooling_that_is_not_named_is_the_contracts():
    for is_decoder, pooling in ((False, "first"), (True, "last")):
        plain = build(CLASSIFIER, num_labels=3, is_decoder=is_decoder)
        named = build(CLASSIFIER, num_labels=3, is_decoder=is_decoder, classifier_pooling=pooling)
        named.load_state_dict(plain.state_dict())
        assert torch.equal(plain(ids(3, T)).logits, named(ids(3, T)).logits)
        assert plain.config.classifier_pooling is None


# --- question answering -----------------------------------------------------------------------------------------------

QA = "ReformerForQuestionAnswering"


@pytest.mark.parametrize("num_labels", [2, 3, 7])
def test_spans_are_judged_at_both_ends(num_labels):
    model = build(QA, num_labels=num_labels)
    start, end = torch.tensor([3, 0]), torch.tensor([9, 20])
    output = model(ids(2, T), start_positions=start, end_positions=end)
    assert output.start_logits.shape == output.end_logits.shape == (2, T)
    rows = torch.arange(2)
    halves = [
        -logits.log_softmax(-1)[rows, places].mean()
        for logits, places in ((output.start_logits, start), (output.end_logits, end))
    ]
    assert output.loss.item() == pytest.approx((sum(halves) / 2).item(), rel=1e-5)
    column = model(ids(2, T), start_positions=start.view(2, 1), end_positions=end.view(2, 1))
    assert column.loss.item() == output.loss.item()


def test_spans_outside_the_sequence_take_no_part():
    model = build(QA)
    start, end = torch.tensor([3, 500]), torch.tensor([T, -1])
    output = model(ids(2, T), start_positions=start, end_positions=end)
    only = -output.start_logits[0].log_softmax(-1)[3]
    assert output.loss.item() == pytest.approx(only.item() / 2, rel=1e-5)
    nothing = model(ids(2, T), start_positions=torch.tensor([99, 99]), end_positions=end)
    assert nothing.loss.item() == 0.0


# --- every class ------------------------------------------------------------------------------------------------------


def losses_of(name: str) -> dict[str, torch.Tensor]:
    if name == "ReformerModel":
        return {}
    if name == QA:
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    return {"labels": torch.tensor([1, 0]) if name == CLASSIFIER else ids(2, T)}


@pytest.mark.parametrize("name", CLASSES)
def test_tuples_hold_the_same_in_the_same_order(name):
    model = build(name, num_labels=2)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    for options in ({}, {"output_hidden_states": True}, {"output_attentions": True}, wanted):
        whole = model(ids(2, T), **options, **losses_of(name))
        parts = model(ids(2, T), **options, **losses_of(name), return_dict=False)
        assert isinstance(parts, tuple)
        assert len(parts) == len(whole)
        for part, (field, value) in zip(parts, whole.items(), strict=True):
            pairs = zip(part, value, strict=True) if isinstance(value, tuple) else [(part, value)]
            assert all(torch.equal(a, b) for a, b in pairs), field
        assert ("hidden_states" in whole) == ("output_hidden_states" in options)
        assert ("attentions" in whole) == ("output_attentions" in options)


def test_the_configuration_may_ask_for_states_and_tuples():
    model = build(LM, output_hidden_states=True, return_dict=False)
    logits, cache, states = model(ids(2, T))
    assert isinstance(cache, ours.ReformerCache)
    assert logits.shape == (2, T, 29)
    assert len(states) == 3


@pytest.mark.parametrize("name", CLASSES)
def test_outputs_have_the_callers_length(name):
    model = build(name, num_labels=2, attn_layers=["lsh", "local", "lsh"], axial_pos_shape=[6, 12])
    for length in (1, 3, 5, 71):
        output = model(ids(2, length), output_hidden_states=True)
        assert len(output.hidden_states) == 4
        assert {state.shape for state in output.hidden_states} == {(2, length, 11)}
        assert output[0].shape[:2] == ((2, 2) if name == CLASSIFIER else (2, length))


def test_the_cache_has_both_its_names():
    for output in (build("ReformerModel")(ids(1, 5)), build(LM)(ids(1, 5), use_cache=False)):
        assert output.past_buckets_states is None
        assert output.past_key_values is None
    for output in (build("ReformerModel", is_decoder=True)(ids(1, 5)), build(LM)(ids(1, 5))):
        assert isinstance(output.past_buckets_states, ours.ReformerCache)
        assert output.past_key_values is output.past_buckets_states
    assert ours.ReformerModelOutput(past_buckets_states=3).past_key_values == 3
    with pytest.raises(AttributeError):
        output.past_key_values = 3
