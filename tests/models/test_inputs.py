"""Bad input is refused at the door: the right kind of error, and a message that names the parameter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import flash_reformer as ours
from tests.models.builders import CLASSES, build, causal, fields, ids, mask

B, T, E, H, LAYERS, V = 3, 9, 11, 3, 2, 29
IDS = ids(B, T)


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """A copy with one entry changed."""
    changed = tensor.clone()
    changed.view(-1)[-2] = value
    return changed


#: What is passed, the error, what its message must name besides the parameter.
FORWARD = [
    # exactly one of ids and embeddings
    ({}, ValueError, ["input_ids", "inputs_embeds", "neither"]),
    ({"input_ids": IDS, "inputs_embeds": torch.zeros(B, T, E)}, ValueError, ["input_ids", "inputs_embeds", "both"]),
    # ids
    ({"input_ids": IDS.tolist()}, TypeError, ["input_ids", "list"]),
    ({"input_ids": IDS[0]}, ValueError, ["input_ids", "[batch, length]", "[9]"]),
    ({"input_ids": IDS.unsqueeze(0)}, ValueError, ["input_ids", "[1, 3, 9]"]),
    ({"input_ids": IDS.float()}, TypeError, ["input_ids", "int64", "float32"]),
    ({"input_ids": IDS.bool()}, TypeError, ["input_ids", "bool"]),
    ({"input_ids": IDS[:0]}, ValueError, ["input_ids", "[0, 9]"]),
    ({"input_ids": IDS[:, :0]}, ValueError, ["input_ids", "[3, 0]"]),
    ({"input_ids": with_value(IDS, V)}, ValueError, ["input_ids", "29"]),
    ({"input_ids": with_value(IDS, -1)}, ValueError, ["input_ids", "-1"]),
    ({"input_ids": with_value(IDS, -100)}, ValueError, ["input_ids", "-100"]),
    ({"input_ids": ids(1, 73)}, ValueError, ["73", "72", "axial_pos_shape"]),
    # embeddings
    ({"inputs_embeds": torch.zeros(B, T)}, ValueError, ["inputs_embeds", "hidden_size", "[3, 9]"]),
    ({"inputs_embeds": torch.zeros(B, T, E + 1)}, ValueError, ["inputs_embeds", "(3, 9, 11)", "(3, 9, 12)"]),
    ({"inputs_embeds": torch.zeros(B, T, E, dtype=torch.long)}, TypeError, ["inputs_embeds", "int64"]),
    ({"inputs_embeds": torch.zeros(0, T, E)}, ValueError, ["inputs_embeds"]),
    ({"inputs_embeds": torch.zeros(B, 0, E)}, ValueError, ["inputs_embeds"]),
    ({"inputs_embeds": torch.zeros(B, 73, E)}, ValueError, ["73", "72"]),
    # masks
    ({"input_ids": IDS, "attention_mask": torch.ones(B, T + 1)}, ValueError, ["attention_mask", "(3, 9)", "(3, 10)"]),
    ({"input_ids": IDS, "attention_mask": torch.full((B, T), 0.5)}, ValueError, ["attention_mask", "0.5"]),
    ({"input_ids": IDS, "attention_mask": torch.ones(B, T) * 1j}, TypeError, ["attention_mask", "complex64"]),
    ({"input_ids": IDS, "attention_mask": mask("left", B, T + 1)}, ValueError, ["attention_mask", "(3, 9)", "(3, 10)"]),
    ({"input_ids": IDS, "attention_mask": mask("left", B + 1, T)}, ValueError, ["attention_mask", "(4, 9)"]),
    ({"input_ids": IDS, "attention_mask": torch.ones(T).bool()}, ValueError, ["attention_mask", "(9,)"]),
    ({"input_ids": IDS, "attention_mask": torch.ones(B, 1, T, T).bool()}, ValueError, ["attention_mask"]),
    ({"input_ids": IDS, "attention_mask": [[1] * T] * B}, TypeError, ["attention_mask", "list"]),
    ({"input_ids": IDS, "attention_mask": with_value(mask("left", B, T), 2)}, ValueError, ["attention_mask", "2"]),
    ({"input_ids": IDS, "attention_mask": with_value(mask("left", B, T), -1)}, ValueError, ["attention_mask", "-1"]),
    # positions
    ({"input_ids": IDS, "position_ids": torch.zeros(B, T + 1).long()}, ValueError, ["position_ids", "(3, 9)"]),
    ({"input_ids": IDS, "position_ids": torch.zeros(2, T).long()}, ValueError, ["position_ids", "(2, 9)"]),
    ({"input_ids": IDS, "position_ids": torch.zeros(T).long()}, ValueError, ["position_ids", "(9,)"]),
    ({"input_ids": IDS, "position_ids": torch.zeros(B, T)}, TypeError, ["position_ids", "float32"]),
    ({"input_ids": IDS, "position_ids": torch.full((B, T), 72)}, ValueError, ["position_ids", "72"]),
    ({"input_ids": IDS, "position_ids": torch.full((1, T), -1)}, ValueError, ["position_ids", "-1"]),
    # head masks
    ({"input_ids": IDS, "head_mask": torch.ones(H + 1)}, ValueError, ["head_mask", "(3,)", "(2, 3)", "(4,)"]),
    ({"input_ids": IDS, "head_mask": torch.ones(LAYERS + 1, H)}, ValueError, ["head_mask", "(3, 3)"]),
    ({"input_ids": IDS, "head_mask": torch.ones(LAYERS, 1, H, 1, 1)}, ValueError, ["head_mask"]),
    ({"input_ids": IDS, "head_mask": [1.0] * H}, TypeError, ["head_mask", "list"]),
    ({"input_ids": IDS, "head_mask": torch.ones(H, dtype=torch.complex64)}, TypeError, ["head_mask", "complex64"]),
    # rounds
    ({"input_ids": IDS, "num_hashes": 0}, ValueError, ["num_hashes", "0"]),
    ({"input_ids": IDS, "num_hashes": -2}, ValueError, ["num_hashes", "-2"]),
    ({"input_ids": IDS, "num_hashes": 1.5}, TypeError, ["num_hashes", "float"]),
    ({"input_ids": IDS, "num_hashes": True}, TypeError, ["num_hashes", "bool"]),
    ({"input_ids": IDS, "num_hashes": "2"}, TypeError, ["num_hashes", "str"]),
]


def check(call, error, words):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("inputs", "error", "words"), FORWARD, ids=lambda value: str(value)[:60])
def test_bad_forward_arguments(name, inputs, error, words):
    state = torch.get_rng_state()
    check(lambda: build(name)(**inputs), error, words)
    assert torch.equal(torch.get_rng_state(), state), "checks come before anything changes"


def test_a_refused_training_forward_changes_nothing():
    model = build(num_buckets=None, hash_seed=None).train()
    before, state = model.config.to_dict(), torch.get_rng_state()
    for inputs, error, _ in FORWARD:
        with pytest.raises(error):
            model(**inputs)
    assert model.config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_learned_table_is_named_too():
    check(lambda: build(axial_pos_embds=False)(ids(1, 73)), ValueError, ["73", "72", "max_position_embeddings"])


CLASSIFIER, QA = "ReformerForSequenceClassification", "ReformerForQuestionAnswering"
FLOATS = torch.zeros(B, 4)
LABELS = [
    *[
        case
        for name in ("ReformerModelWithLMHead", "ReformerForMaskedLM")
        for case in (
            (name, {}, {"labels": with_value(IDS, V)}, ValueError, ["labels", "29", "-100"]),
            (name, {}, {"labels": with_value(IDS, -1)}, ValueError, ["labels", "-1"]),
            (name, {}, {"labels": IDS[:, 1:]}, ValueError, ["labels", "(3, 9)", "(3, 8)"]),
            (name, {}, {"labels": IDS[1:]}, ValueError, ["labels", "(2, 9)"]),
            (name, {}, {"labels": IDS.float()}, TypeError, ["labels", "float32"]),
            (name, {}, {"labels": IDS.tolist()}, TypeError, ["labels", "list"]),
        )
    ],
    (CLASSIFIER, {"num_labels": 4}, {"labels": torch.tensor([0, 1, 4])}, ValueError, ["labels", "4"]),
    (CLASSIFIER, {"num_labels": 4}, {"labels": torch.tensor([0, 1, -2])}, ValueError, ["labels", "-2"]),
    (CLASSIFIER, {"num_labels": 4}, {"labels": torch.tensor([0, 1])}, ValueError, ["labels", "(3,)", "(2,)"]),
    (CLASSIFIER, {"num_labels": 4}, {"labels": FLOATS[:, :3]}, ValueError, ["labels", "(3, 4)", "(3, 3)"]),
    (CLASSIFIER, {"num_labels": 4}, {"labels": [0, 1, 2]}, TypeError, ["labels", "list"]),
    (CLASSIFIER, {"num_labels": 1}, {"labels": FLOATS[:2, 0]}, ValueError, ["labels", "(2,)"]),
    (CLASSIFIER, {"num_labels": 1}, {"labels": FLOATS[:, 0].bool()}, TypeError, ["labels", "bool"]),
    (QA, {}, {"start_positions": torch.tensor([0, 1, 2])}, ValueError, ["end_positions"]),
    (QA, {}, {"end_positions": torch.tensor([0, 1, 2])}, ValueError, ["start_positions"]),
    *[
        (QA, {}, {"start_positions": value, "end_positions": torch.zeros(B).long()}, error, ["start_positions", word])
        for value, error, word in (
            (torch.zeros(B + 1).long(), ValueError, "(4,)"),
            (torch.zeros(B), TypeError, "float32"),
            ([0, 1, 2], TypeError, "list"),
        )
    ],
    ("ReformerModelWithLMHead", {}, {"return_logits": False}, ValueError, ["return_logits", "labels"]),
    ("ReformerModelWithLMHead", {}, {"labels": IDS, "logits_to_keep": 2}, ValueError, ["logits_to_keep", "labels"]),
    ("ReformerModelWithLMHead", {}, {"logits_to_keep": -1}, ValueError, ["logits_to_keep", "-1"]),
    ("ReformerModelWithLMHead", {}, {"logits_to_keep": 1.5}, TypeError, ["logits_to_keep", "float"]),
    ("ReformerModelWithLMHead", {}, {"logits_to_keep": True}, TypeError, ["logits_to_keep", "bool"]),
    ("ReformerModelWithLMHead", {}, {"logits_to_keep": torch.tensor([T])}, ValueError, ["logits_to_keep", "9"]),
    ("ReformerModelWithLMHead", {}, {"logits_to_keep": torch.tensor([[1]])}, ValueError, ["logits_to_keep"]),
]


@pytest.mark.parametrize(("name", "config", "inputs", "error", "words"), LABELS, ids=lambda value: str(value)[:40])
def test_bad_labels(name, config, inputs, error, words):
    check(lambda: build(name, **config)(input_ids=IDS, **inputs), error, words)


def test_checks_of_values_do_not_read_a_device():
    """Shapes are checked everywhere, values on CPU tensors only: the meta device has none, and is not asked for any."""
    from flash_reformer.models.inputs import check_inputs

    config = ours.ReformerConfig(**fields())
    tokens = torch.empty(2, 5, dtype=torch.long, device="meta")
    checked = check_inputs(config, tokens, tokens, tokens, None, None)
    assert checked.mask_BT.dtype == torch.bool
    with pytest.raises(ValueError, match="attention_mask"):
        check_inputs(config, tokens, tokens[:, :4], None, None, None)


# --- the configuration: every field -----------------------------------------------------------------------------------

COUNT = (0, -1, 1.5, "3", True, None)
FROM_ZERO = (-1, 1.5, "3", True, None)
FROM_ZERO_OR_NONE = (-1, 1.5, "3", True)
PROBABILITY = (-0.1, 1.1, "0.1", float("nan"), True, None)
STD = (-0.1, "1", float("nan"), float("inf"), True, None)
FLAG = (0, 1, "True", None)
SIZES = ([], [0, 4], [4, -1], [4, 1.5], [4, True], 16, "64", None)
BAD_FIELDS = {
    "answer_lengths": (3, [1], {"stride": 1}, {"doc_stride": -1}, {"max_answer_len": "3"}),
    "attention_head_size": COUNT,
    "attn_layers": ([], ["lsh", "global"], "lsh", None, 3, [None]),
    "axial_norm_std": STD,
    "axial_pos_embds": FLAG,
    "axial_pos_embds_dim": SIZES,
    "axial_pos_shape": SIZES,
    "bos_token_id": ("x", 1.5, []),
    "chunk_size_feed_forward": FROM_ZERO,
    "chunk_size_lm_head": FROM_ZERO,
    "classifier_pooling": ["cls", 1, True],
    "classifier_dropout": PROBABILITY[:-1],
    "eos_token_id": ("x", 1.5),
    "feed_forward_size": COUNT,
    "full_attention_below": FROM_ZERO,
    "hash_seed": (1.5, "3", True, 2**63, -(2**63) - 1),
    "hidden_act": ("no such activation", None, 3, []),
    "hidden_dropout_prob": PROBABILITY,
    "hidden_size": COUNT,
    "initializer_range": STD,
    "is_decoder": FLAG,
    "layer_norm_eps": STD,
    "local_attention_probs_dropout_prob": PROBABILITY[:-1],
    "local_attn_chunk_length": COUNT[:-1],
    "local_num_chunks_after": FROM_ZERO_OR_NONE,
    "local_num_chunks_before": FROM_ZERO_OR_NONE,
    "lsh_allow_duplicate_attention": FLAG,
    "lsh_attend_across_buckets": FLAG,
    "lsh_attention_probs_dropout_prob": PROBABILITY[:-1],
    "lsh_attn_chunk_length": COUNT[:-1],
    "lsh_num_chunks_after": FROM_ZERO_OR_NONE,
    "lsh_num_chunks_before": FROM_ZERO_OR_NONE,
    "max_position_embeddings": COUNT,
    "num_attention_heads": COUNT,
    "num_buckets": (0, 1, 3, -2, 2.0, "4", True, [], [2, 3], [2, 0], [4, 2.0], [True, 4], [[2], 4]),
    "num_buckets_automatic": FLAG,
    "num_hashes": COUNT,
    "pad_token_id": (-1, 1.5, "0", True),
    "residual_in_fp32": FLAG,
    "reversible": FLAG,
    "tie_word_embeddings": (True, 1, None),
    "trained_num_buckets": (3, [3], [], "4", [2, 0]),
    "use_cache": FLAG,
    "vocab_size": COUNT,
    "wrap_around": FLAG,
}


def test_the_table_of_bad_values_is_complete():
    declared = {name for name in ours.ReformerConfig.__annotations__ if not name.startswith("_")}
    assert declared | {"chunk_size_feed_forward"} == set(BAD_FIELDS)


@pytest.mark.parametrize(
    ("field", "value"), [(f, v) for f, values in BAD_FIELDS.items() for v in values], ids=lambda v: str(v)[:40]
)
def test_nonsense_in_one_field_is_refused_at_once(field, value):
    # TypeError where transformers' own base class declares the field's type.
    check(lambda: ours.ReformerConfig(**{field: value}), (ValueError, TypeError), [field])


@pytest.mark.parametrize(("field", "value"), [("num_hashes", 0), ("num_buckets", 3), ("attn_layers", ["x"])])
def test_nonsense_set_later_is_refused_when_a_model_is_built(field, value):
    config = ours.ReformerConfig(**fields(is_decoder=True))
    setattr(config, field, value)
    for name in CLASSES:
        check(lambda name=name: getattr(ours, name)(config), ValueError, [field])


CONTRADICTIONS = [
    ({"axial_pos_embds_dim": [4, 8]}, ["axial_pos_embds_dim", "hidden_size", "11"]),
    ({"axial_pos_embds_dim": [11]}, ["axial_pos_embds_dim", "axial_pos_shape"]),
    ({"axial_pos_shape": [2, 3, 4]}, ["axial_pos_embds_dim", "axial_pos_shape"]),
    ({"pad_token_id": 29}, ["pad_token_id", "vocab_size", "29"]),
    ({"lsh_num_chunks_before": None}, ["lsh_num_chunks_before"]),
    ({"lsh_num_chunks_after": None}, ["lsh_num_chunks_after"]),
    ({"lsh_attention_probs_dropout_prob": None}, ["lsh_attention_probs_dropout_prob"]),
    ({"local_num_chunks_before": None}, ["local_num_chunks_before"]),
    ({"local_num_chunks_after": None}, ["local_num_chunks_after"]),
    ({"local_attention_probs_dropout_prob": None}, ["local_attention_probs_dropout_prob"]),
]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(("changes", "words"), CONTRADICTIONS, ids=lambda value: str(value)[:50])
def test_contradictions_are_found_when_a_model_is_built(name, changes, words):
    config = ours.ReformerConfig(**fields(**causal(name), **changes))
    check(lambda: getattr(ours, name)(config), ValueError, words)


def test_heads_need_the_right_direction():
    lm, mlm = ours.ReformerModelWithLMHead, ours.ReformerForMaskedLM
    check(lambda: lm(ours.ReformerConfig(**fields(is_decoder=False))), ValueError, ["is_decoder", "True"])
    check(lambda: mlm(ours.ReformerConfig(**fields(is_decoder=True))), ValueError, ["is_decoder", "False"])
    for kind in ("lsh", "local"):
        field = f"{kind}_num_chunks_after"
        config = ours.ReformerConfig(**fields(is_decoder=True, **{field: 1}))
        check(lambda config=config: lm(config), ValueError, [field, "0"])
        absent = {"attn_layers": ["local" if kind == "lsh" else "lsh"], field: 1}
        lm(ours.ReformerConfig(**fields(is_decoder=True, **absent)))


def test_a_mapping_is_no_configuration():
    check(lambda: ours.ReformerModel(SimpleNamespace(**fields())), (TypeError, ValueError, AttributeError), [])
