"""trax checkpoints, built here in trax's layout, become the very model that they were built from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import flash_reformer as ours
from flash_reformer.models.conversion import convert_trax_checkpoint, load_trax_checkpoint
from tests.models.builders import build, ids
from tests.models.trax_writer import UNTOLD, around, flat, trax_weights, write

KINDS = ["local", "lsh", "lsh", "local"]


def original(**changes: Any) -> Any:
    model = build(**{"attn_layers": KINDS, "num_hashes": 2, **changes})
    with torch.no_grad():
        model.lm_head.bias.normal_(generator=torch.Generator().manual_seed(1))
    return model


def assert_same(actual: Any, expected: Any) -> None:
    states = actual.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[1].items():
        assert torch.equal(states[0][name], value), name
    with torch.no_grad():
        tokens = ids(2, 37)
        assert torch.equal(actual(tokens).logits, expected(tokens).logits)


@pytest.mark.floor
@pytest.mark.parametrize("nest", [tuple, list])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"axial_pos_embds": False}, {"axial_pos_shape": [3, 4, 6], "axial_pos_embds_dim": [2, 4, 5]}]
)
def test_a_checkpoint_becomes_the_model_that_it_came_from(changes, chunked, nest, tmp_path):
    model = original(**changes)
    path = write(tmp_path / "model.pkl.gz", around(trax_weights(model, nest=nest, chunked=chunked)))
    state = torch.get_rng_state()
    converted = convert_trax_checkpoint(path, tmp_path / "out", UNTOLD)
    assert torch.equal(torch.get_rng_state(), state)
    assert not converted.training
    assert_same(converted, model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is ours.ReformerModelWithLMHead
    assert_same(loaded, model)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    told = ("attn_layers", "hidden_size", "vocab_size", "feed_forward_size", "num_attention_heads")
    for name in (*told, "attention_head_size", "axial_pos_embds", "num_hidden_layers", "num_hashes"):
        assert getattr(loaded.config, name) == getattr(model.config, name), name


def test_flat_weights_and_a_whole_configuration(tmp_path):
    model = original()
    path = write(tmp_path / "model.pkl", {"flat_weights": flat(trax_weights(model)), "step": 3})
    assert_same(load_trax_checkpoint(path, model.config), model)


def test_wider_and_narrower_numbers_become_float32(tmp_path):
    model = original()
    for dtype in (np.float64, np.float16, np.dtype(">f4")):
        arrays = [leaf.astype(dtype) for leaf in flat(trax_weights(model))]
        path = write(tmp_path / "model.pkl.gz", {"flat_weights": arrays})
        converted = load_trax_checkpoint(path, UNTOLD)
        assert {value.dtype for value in converted.state_dict().values()} == {torch.float32}
        expected = model if dtype is not np.float16 else original().half().float()
        assert_same(converted, expected)


def test_published_configurations_agree_with_their_arrays(tmp_path):
    """A config.json as they were published, field by field, beside arrays of its (small) sizes."""
    model = original()
    path = write(tmp_path / "model.pkl.gz", {"weights": trax_weights(model)})
    fields = json.loads(model.config.to_json_string())
    assert_same(load_trax_checkpoint(path, fields), model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 30),
        ("hidden_size", 12),
        ("attn_layers", ["lsh", "local", "lsh", "local"]),
        ("attn_layers", ["local", "lsh"]),
        ("num_hidden_layers", 3),
        ("num_attention_heads", 5),
        ("attention_head_size", 3),
        ("feed_forward_size", 11),
        ("axial_pos_shape", [12, 6]),
        ("axial_pos_embds_dim", [7, 4]),
        ("axial_pos_embds", False),
        ("is_decoder", False),
    ],
)
def test_a_field_that_contradicts_the_arrays_is_named(field, value, tmp_path):
    path = write(tmp_path / "model.pkl.gz", {"weights": trax_weights(original())})
    with pytest.raises(ValueError, match=field) as caught:
        convert_trax_checkpoint(path, tmp_path / "out", {**UNTOLD, field: value})
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", [name for name in UNTOLD if name != "hash_seed"])
def test_what_no_array_tells_must_be_said(field, tmp_path):
    path = write(tmp_path / "model.pkl.gz", {"weights": trax_weights(original())})
    with pytest.raises(ValueError, match=f"config must say {field}: no array"):
        load_trax_checkpoint(path, {name: value for name, value in UNTOLD.items() if name != field})


def test_layers_of_one_kind_need_nothing_for_the_other(tmp_path):
    model = original(attn_layers=["local", "local"])
    path = write(tmp_path / "model.pkl.gz", {"weights": trax_weights(model)})
    assert_same(load_trax_checkpoint(path, {"hidden_act": "relu", "local_attn_chunk_length": 4}), model)


def edited(index: int, change: Any) -> dict[str, Any]:
    arrays = flat(trax_weights(original()))
    arrays[index] = change(arrays[index])
    return {"flat_weights": arrays}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (0, "must be the word embedding"),
        (2, r"must be the position table of axis 1 \[1, 1, n_2, d_2\]"),
        (3, "the scale of the attention's layer norm of layer 0"),
        (5, r"the query weight of the local attention of layer 0 \[H, 11, D\]"),
        (7, r"the value weight of the local attention of layer 0 \[3, 11, 5\]"),
        (8, r"the output weight of the local attention of layer 0 \[3, 5, 11\]"),
        (11, r"the first feed-forward weight of layer 0 \[11, F\]"),
        (14, r"the bias beside the second feed-forward weight of layer 0 \[11\]"),
        (17, r"the query_key weight of the lsh attention of layer 1 \[3, 11, 5\]"),
        (-3, r"the bias of the last layer norm \[22\]"),
        (-2, r"the logits' weight \[22, 29\]"),
        (-1, r"the bias beside the logits' weight \[29\]"),
    ],
)
def test_every_shape_is_checked_where_it_stands(index, message, tmp_path):
    longer = edited(index, lambda array: np.concatenate([array, array[:1]]))
    if index == 0:
        longer = edited(index, lambda array: array.reshape(-1))
    elif index == 5:
        longer = edited(index, lambda array: array.transpose(0, 2, 1))
    elif index == 11:
        longer = edited(index, lambda array: array.T)
    path = write(tmp_path / "model.pkl", longer)
    with pytest.raises(ValueError, match=message) as caught:
        load_trax_checkpoint(path, UNTOLD)
    place = len(flat(trax_weights(original()))) + index if index < 0 else index
    assert f"flat_weights[{place}]" in str(caught.value)


def test_places_are_those_of_the_nested_file(tmp_path):
    weights = trax_weights(original(), nest=list)
    weights[5][4][1][0] = weights[5][4][1][0][:, :-1]
    path = write(tmp_path / "model.pkl", {"weights": weights})
    with pytest.raises(ValueError, match=r"weights\[5\]\[4\]\[1\]\[0\] must be the query_key weight.*\[3, 10, 5\]"):
        load_trax_checkpoint(path, UNTOLD)


def test_missing_and_surplus_arrays(tmp_path):
    arrays = flat(trax_weights(original()))
    for kept, message in (
        (-1, "no more arrays"),
        (10, "no more arrays"),
        (0, "after the beginning must come the word"),
    ):
        path = write(tmp_path / "model.pkl", {"flat_weights": arrays[:kept]})
        with pytest.raises(ValueError, match=message):
            load_trax_checkpoint(path, UNTOLD)
    path = write(tmp_path / "model.pkl", {"flat_weights": [*arrays, arrays[-1]]})
    with pytest.raises(ValueError, match=r"stands behind the logits"):
        load_trax_checkpoint(path, UNTOLD)
    # A layer less its feed-forward half.
    path = write(tmp_path / "model.pkl", {"flat_weights": arrays[:9] + arrays[15:]})
    with pytest.raises(ValueError, match="the first feed-forward weight of layer 0"):
        load_trax_checkpoint(path, UNTOLD)


def loop() -> list[Any]:
    inner: list[Any] = []
    inner.append(inner)
    return inner


def doubled(times: int) -> list[Any]:
    tree: list[Any] = [np.zeros(1, np.float32)]
    for _ in range(times):
        tree = [tree, tree]
    return tree


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ([1, 2], "must be a dict with 'weights'; it is a list"),
        ({"step": 3, "model": ()}, "must have an entry 'weights' or 'flat_weights'; it has 'step', 'model'"),
        ({}, "it has none"),
        ({"flat_weights": 2, "step": 1}, "file of their own"),
        ({"weights": ()}, "after the beginning"),
        ({"weights": ((), "text")}, r"weights\[1\] must be an array or a tuple of weights; it is a str"),
        ({"weights": ((), {"a": np.zeros(2)})}, r"weights\[1\] must be an array .* it is a dict"),
        ({"weights": ((), np.zeros((2, 3), np.int32))}, r"weights\[1\] must hold floating-point numbers; .*int32"),
        ({"weights": loop()}, "no weights of a model nest like this"),
        ({"weights": doubled(40)}, "no weights of a model nest like this|must be the word embedding"),
    ],
)
def test_other_contents_are_named(checkpoint, message, tmp_path):
    path = write(tmp_path / "model.pkl.gz", checkpoint)
    with pytest.raises(ValueError, match=message):
        load_trax_checkpoint(path, UNTOLD)


def test_the_output_must_be_new(tmp_path):
    path = write(tmp_path / "model.pkl.gz", {"weights": trax_weights(original())})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ValueError, match="output must be a new or empty folder"):
        convert_trax_checkpoint(path, tmp_path / "out", UNTOLD)
    with pytest.raises(TypeError, match="config must be a ReformerConfig or a mapping of its fields; got str"):
        load_trax_checkpoint(path, "config.json")  # type: ignore[arg-type]
