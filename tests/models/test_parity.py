"""Forward values and gradients equal those of transformers' Reformer, wherever that one is right.

``parity_grid.py`` says what is compared in which dtype, and what is not, and why.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models import parity_grid
from tests.models.builders import TINY, build, generator, hf_twin, ids, mask, relative_error
from tests.models.parity_grid import MIXES, TOLERANCE, Case

GRID = parity_grid.grid()
#: Changes of the configuration that each must show somewhere in the grid, and where they can show.
WRONG = {
    "hash_seed": 4,
    "wrap_around": False,
    "lsh_allow_duplicate_attention": False,
    "lsh_attend_across_buckets": False,
    "full_attention_below": 72,
}


def test_the_grid_is_broad():
    assert len(GRID) >= 150
    assert len({str(case) for case in GRID}) == len(GRID)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_forward_equals_transformers(case):
    model, inputs = parity_grid.model_of(case), case.inputs()
    actual = parity_grid.outputs_of(model, inputs)
    for name, error in parity_grid.errors(case, model, actual).items():
        assert error <= TOLERANCE[case.dtype], f"{name}: relative error {error:.3g}"
    inputs["head_mask"] = torch.zeros(model.config.num_attention_heads)
    without_attention = parity_grid.outputs_of(model, inputs)["logits"]
    assert relative_error(without_attention, actual["logits"]) > 0.01, "attention does not matter: this proves little"


def _may_show(case: Case, change: str) -> bool:
    """Whether a change can alter a case's values: rings longer than windows, and the kind of layer that it is about."""
    config = {**TINY, **case.config}
    kinds = {kind for kind in config["attn_layers"] if case.length > 6 * config[f"{kind}_attn_chunk_length"]}
    if change == "wrap_around":
        # Beyond the ends of the sequence, a causal local window finds nothing that it may see.
        return "local" in kinds and not config["is_decoder"] and case.family != "windows"
    rounds = case.call.get("num_hashes", config.get("num_hashes", 1))
    return "lsh" in kinds and (rounds > 1 or change != "lsh_allow_duplicate_attention")


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_variant_differs_clearly(change):
    cases = [
        case for case in GRID if case.dtype == torch.float64 and case.mask != "whole row" and _may_show(case, change)
    ]
    shown = 0
    for case in cases:
        right = parity_grid.outputs_of(parity_grid.model_of(case), case.inputs())["logits"]
        wrong = parity_grid.outputs_of(parity_grid.model_of(case, **{change: WRONG[change]}), case.inputs())["logits"]
        shown += relative_error(wrong, right) > 0.01
    assert len(cases) >= 10
    # Not all: a padded chunk at a border, or one bucket per chunk, may hide it.
    assert shown >= 0.8 * len(cases)


def _weights(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=generator(13), dtype=torch.float64).to(like.dtype)


def _gradients(model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter's gradient of one fixed functional of the logits; what gets none counts as zero."""
    logits = model(**inputs).logits
    (logits * _weights(logits)).sum().backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        # HF never uses lm_head.bias (FAULTS F8).
        if name != "lm_head.bias"
    }


@pytest.mark.parametrize("axial", [True, False], ids=["axial", "learned"])
@pytest.mark.parametrize("kind", [None, "scattered"])
@pytest.mark.parametrize("num_hashes", [1, 3])
@pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("layers", MIXES)
def test_gradients_equal_transformers(layers, is_decoder, num_hashes, kind, axial):
    """Without dropout HF's backward is right. It trains at exactly the size of the axial table, in whole chunks."""
    name = "ReformerModelWithLMHead" if is_decoder else "ReformerForMaskedLM"
    config = {"is_decoder": is_decoder, "attn_layers": MIXES[layers], "num_hashes": num_hashes}
    config |= {"axial_pos_shape": [4, 6], "axial_pos_embds": axial, "use_cache": False}
    model = build(name, **config).double().train()
    twin = hf_twin(model)
    inputs = {"input_ids": ids(3, 24)}
    if kind is not None:
        inputs["attention_mask"] = mask(kind, 3, 24)
    actual, expected = _gradients(model, inputs), _gradients(twin, inputs)
    assert actual.keys() == expected.keys()
    for parameter in expected:
        assert expected[parameter].abs().max() > 1e-3, f"{parameter}: a zero gradient proves nothing"
        error = relative_error(actual[parameter], expected[parameter])
        assert error <= 1e-6, f"{parameter}: relative error {error:.3g}"


def test_gradients_equal_transformers_in_fp32():
    model = build(axial_pos_shape=[4, 6], use_cache=False, attn_layers=MIXES["deep"]).train()
    twin = hf_twin(model)
    actual, expected = _gradients(model, {"input_ids": ids(3, 24)}), _gradients(twin, {"input_ids": ids(3, 24)})
    for parameter in expected:
        assert relative_error(actual[parameter], expected[parameter]) <= 1e-4, parameter


@pytest.mark.parametrize("name", ["ReformerForSequenceClassification", "ReformerForQuestionAnswering"])
@pytest.mark.parametrize("kind", [None, "right"])
def test_the_other_heads_equal_transformers(name, kind):
    # A causal classifier is another matter: HF pools token 0 (FAULTS F13).
    model = build(name, num_labels=2).double()
    inputs = {"input_ids": ids(3, 18)}
    if kind is not None:
        inputs["attention_mask"] = mask(kind, 3, 18)
    with torch.no_grad():
        actual, expected = model(**inputs), hf_twin(model)(**inputs)
    assert list(actual) == list(expected)
    for field in actual:
        assert relative_error(actual[field], expected[field]) < TOLERANCE[torch.float64], field


def test_losses_equal_transformers():
    labels, tokens = ids(3, 18, seed=5), ids(3, 18)
    labels[0, :7] = -100
    single = torch.tensor([0, 2, 1])
    multi = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    cases = [
        ("ReformerModelWithLMHead", {}, {"labels": labels}),
        ("ReformerForMaskedLM", {}, {"labels": labels}),
        ("ReformerForSequenceClassification", {"num_labels": 3}, {"labels": single}),
        ("ReformerForSequenceClassification", {"num_labels": 3}, {"labels": multi}),
        ("ReformerForSequenceClassification", {"num_labels": 1}, {"labels": torch.tensor([0.5, -1.0, 2.0])}),
        ("ReformerForQuestionAnswering", {}, {"start_positions": single, "end_positions": single + 5}),
        ("ReformerForQuestionAnswering", {}, {"start_positions": single, "end_positions": single + 50}),
    ]
    for name, config, inputs in cases:
        model = build(name, **config)
        with torch.no_grad():
            actual = model(tokens, **inputs).loss
            expected = hf_twin(model)(tokens, **inputs).loss
        if torch.isnan(expected):
            # HF divides by the number of spans inside the sequence, even where there is none.
            assert inputs["end_positions"].min() >= 18
            assert actual.isfinite()
        else:
            assert actual.shape == ()
            assert abs(actual - expected) <= 1e-5 * abs(expected), name
            assert expected > 0.1
