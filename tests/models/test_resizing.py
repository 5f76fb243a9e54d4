"""Position tables of another size: old positions stay what they were, and nothing happens that was not asked for."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import flash_reformer as ours
from flash_reformer.models.resizing import resize_rows
from tests.models.builders import CLASSES, TINY, build, fields, generator, hf_twin, ids

AUTO = {
    "ReformerModel": transformers.AutoModel,
    "ReformerModelWithLMHead": transformers.AutoModelForCausalLM,
    "ReformerForMaskedLM": transformers.AutoModelForMaskedLM,
    "ReformerForSequenceClassification": transformers.AutoModelForSequenceClassification,
    "ReformerForQuestionAnswering": transformers.AutoModelForQuestionAnswering,
}
REMAPS = "trailing axis"
OLD = tuple(TINY["axial_pos_shape"])  # (6, 12)


def module_of(model: Any) -> Any:
    return model.get_position_embeddings()


@torch.no_grad()
def table(model: Any) -> Tensor:
    """The embedding of every position, ``[T, E]``, as the model reads it."""
    length = model.config.max_length_of_positions
    return module_of(model).eval()(torch.arange(length).unsqueeze(0), 1)[0].clone()


def others(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "position_embeddings" not in name}


def assert_same_otherwise(model: Any, expected: Any) -> None:
    actual, wanted = others(model), others(expected)
    assert actual.keys() == wanted.keys()
    assert all(torch.equal(actual[name], wanted[name]) for name in wanted)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    model = build()
    model.save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.floor
@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_axis_0_grows_and_every_old_position_stays(name, auto, tmp_path):
    model = build(name, num_labels=2)
    model.save_pretrained(tmp_path)
    cls = AUTO[name] if auto else getattr(ours, name)
    grown = cls.from_pretrained(tmp_path, axial_pos_shape=[11, 12], num_labels=2)
    assert type(grown) is type(model)
    assert not grown.training
    assert grown.config.axial_pos_shape == grown.base_model.config.axial_pos_shape == (11, 12)
    assert torch.equal(table(grown)[:72], table(model))
    assert len(table(grown).unique(dim=0)) == 132
    assert_same_otherwise(grown, model)
    # Beyond the old limit it runs; below it, the values are the old model's.
    assert grown(ids(1, 131))[0].isfinite().all()
    assert torch.equal(grown(ids(2, 37))[0], model(ids(2, 37))[0])
    grown.resize_position_embeddings(OLD)
    assert_same_tables(grown, model)


def assert_same_tables(model: Any, expected: Any) -> None:
    actual, wanted = module_of(model).state_dict(), module_of(expected).state_dict()
    assert list(actual) == list(wanted)
    assert all(torch.equal(actual[key], wanted[key]) for key in wanted)
    assert model.config.max_length_of_positions == expected.config.max_length_of_positions


@pytest.mark.parametrize("shape", [(9, 12), (6, 17), (9, 17), (6, 24)])
def test_a_table_that_grew_gives_the_old_one_back(shape):
    model, expected = build(), build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_position_embeddings(shape)
        assert model.config.axial_pos_shape == shape
        model.resize_position_embeddings(OLD)
    assert_same_tables(model, expected)


def test_new_rows_are_fresh_and_spread_as_documented():
    for fields_of_kind, size, std in (
        ({"axial_norm_std": 0.7}, (4000, 12), 0.7),
        ({"axial_pos_embds": False, "initializer_range": 0.2}, 3000, 0.2),
    ):
        model = build(**fields_of_kind)
        old = sum(parameter.shape[0] for parameter in module_of(model).parameters()) - 1
        torch.manual_seed(3)
        model.resize_position_embeddings(size)
        fresh = next(module_of(model).parameters())[max(6, 0 if isinstance(size, tuple) else old + 1) :]
        assert fresh.std().item() == pytest.approx(std, rel=0.05)
        assert abs(fresh.mean().item()) < 0.02
        again = build(**fields_of_kind)
        torch.manual_seed(3)
        again.resize_position_embeddings(size)
        assert torch.equal(table(again), table(model))
        torch.manual_seed(4)
        other = build(**fields_of_kind)
        other.resize_position_embeddings(size)
        assert not torch.equal(table(other), table(model))


def test_axis_0_shrinks_and_what_is_left_stays(saved):
    model, folder = saved
    small = ours.ReformerModelWithLMHead.from_pretrained(folder, axial_pos_shape=(2, 12))
    assert torch.equal(table(small), table(model)[:24])
    with pytest.raises(ValueError, match="24"):
        small(ids(1, 25))


@pytest.mark.parametrize(("shape", "kept"), [((6, 17), 12), ((6, 5), 5), ((9, 7), 7)])
def test_a_trailing_axis_remaps_positions_and_warns(shape, kept, saved):
    model, folder = saved
    with pytest.warns(UserWarning, match=REMAPS) as caught:
        other = ours.ReformerModelWithLMHead.from_pretrained(folder, axial_pos_shape=shape)
    (message,) = [str(warning.message) for warning in caught]
    assert str(OLD) in message
    assert str(shape) in message
    assert f"from {kept} on" in message
    old, new = table(model).view(*OLD, -1), table(other).view(*shape, -1)
    # The points that both grids have keep their vectors ...
    rows, columns = min(OLD[0], shape[0]), min(OLD[1], shape[1])
    assert torch.equal(new[:rows, :columns], old[:rows, :columns])
    # ... so the first positions keep their embedding, and the next one does not.
    flat_old, flat_new = old.flatten(0, 1), new.flatten(0, 1)
    same = (flat_old[: len(flat_new)] == flat_new[: len(flat_old)]).all(-1)
    assert same.nonzero().flatten().tolist() == list(range(kept))
    assert len(flat_new.unique(dim=0)) == len(flat_new)


def test_the_middle_of_three_axes(saved):
    model = build(axial_pos_shape=[3, 4, 5], axial_pos_embds_dim=[2, 3, 6])
    old = table(model)
    with pytest.warns(UserWarning, match="from 20 on"):
        model.resize_position_embeddings((3, 6, 5))
    new = table(model)
    assert torch.equal(new.view(3, 6, 5, 11)[:, :4], old.view(3, 4, 5, 11))
    assert (new[:60] == old).all(-1).nonzero().flatten().tolist() == list(range(20))


@pytest.mark.parametrize("length", [101, 31])
def test_a_learned_table_changes_its_length(length, tmp_path):
    model = build(axial_pos_embds=False)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, max_position_embeddings=length)
    assert other.config.max_position_embeddings == length
    assert module_of(other).embedding.num_embeddings == length
    kept = min(length, 72)
    assert torch.equal(table(other)[:kept], table(model)[:kept])
    assert other(ids(1, length)).logits.isfinite().all()
    other.resize_position_embeddings(72)
    if length > 72:
        assert_same_tables(other, model)


def test_max_position_embeddings_says_nothing_about_axial_tables(saved):
    model, folder = saved
    other = ours.ReformerModelWithLMHead.from_pretrained(folder, max_position_embeddings=999)
    assert other.config.max_position_embeddings == 999
    assert_same_tables(other, model)


def test_interpolation_stretches_between_the_ends():
    rows = torch.randn(5, 3, generator=generator(0), dtype=torch.float64)
    stretched = resize_rows(rows, 9, 1.0, interpolate=True)
    assert torch.equal(stretched[::2], rows)
    torch.testing.assert_close(stretched[1::2], (rows[1:] + rows[:-1]) / 2, rtol=1e-15, atol=1e-15)
    line = torch.linspace(2, 7, 11).unsqueeze(1)
    torch.testing.assert_close(resize_rows(line, 17, 1.0, interpolate=True)[:, 0], torch.linspace(2, 7, 17))
    torch.testing.assert_close(resize_rows(line, 4, 1.0, interpolate=True)[:, 0], torch.linspace(2, 7, 4))
    assert torch.equal(resize_rows(rows, 1, 1.0, interpolate=True), rows[:1])
    assert torch.equal(resize_rows(rows[:1], 3, 1.0, interpolate=True), rows[:1].expand(3, 3))


def test_interpolation_on_load_is_opt_in_and_draws_nothing(saved):
    model, folder = saved
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = transformers.AutoModelForCausalLM.from_pretrained(
            folder, axial_pos_shape=(11, 23), interpolate_positions=True
        )
    assert torch.equal(torch.get_rng_state(), state)
    for new, old in zip(module_of(other).weights, module_of(model).weights, strict=True):
        assert torch.equal(new.flatten(0, -2)[::2], old.flatten(0, -2))
    assert other(ids(1, 253)).logits.isfinite().all()
    with pytest.warns(UserWarning, match="interpolate_positions=True has no effect"):
        ours.ReformerModelWithLMHead.from_pretrained(folder, interpolate_positions=True)
    with pytest.raises(TypeError, match="interpolate_positions must be True or False; got 1"):
        ours.ReformerModelWithLMHead.from_pretrained(folder, interpolate_positions=1)


@pytest.mark.parametrize("form", ["shards", "bin", "transformers"])
def test_every_form_of_checkpoint_resizes(form, tmp_path):
    model = build()
    if form == "shards":
        model.save_pretrained(tmp_path, max_shard_size="5KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    elif form == "bin":
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        model.config.save_pretrained(tmp_path)
    else:
        hf_twin(model).save_pretrained(tmp_path)
    grown = ours.ReformerModelWithLMHead.from_pretrained(tmp_path, axial_pos_shape=(7, 12), dtype=torch.float64)
    assert {parameter.dtype for parameter in grown.parameters()} == {torch.float64}
    assert torch.equal(table(grown)[:72], table(model).double())
    half = ours.ReformerModelWithLMHead.from_pretrained(tmp_path, axial_pos_shape=(7, 12), dtype=torch.bfloat16)
    assert torch.equal(table(half)[:72], table(model).bfloat16())


def test_a_base_model_from_a_head_and_back(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "head")
    base = ours.ReformerModel.from_pretrained(tmp_path / "head", axial_pos_shape=(8, 12))
    assert torch.equal(table(base)[:72], table(model))
    base.save_pretrained(tmp_path / "base")
    head, info = ours.ReformerModelWithLMHead.from_pretrained(
        tmp_path / "base", axial_pos_shape=OLD, is_decoder=True, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"lm_head.bias", "lm_head.decoder.weight"}
    assert not info["mismatched_keys"]
    assert_same_tables(head, model)


def test_what_was_resized_is_saved_in_its_new_size(saved):
    _, folder = saved
    grown = ours.ReformerModelWithLMHead.from_pretrained(folder, axial_pos_shape=(8, 12))
    grown.save_pretrained(folder / "grown")
    written = json.loads((folder / "grown" / "config.json").read_text())
    assert written["axial_pos_shape"] == [8, 12]
    assert not any("checkpoint" in key for key in written)
    again = ours.ReformerModelWithLMHead.from_pretrained(folder / "grown")
    assert torch.equal(table(again), table(grown))
    for model in (again, grown):
        assert "checkpoint_positions" not in vars(model.config)


def test_a_configuration_loaded_in_another_size_resizes(saved):
    model, folder = saved
    config = transformers.AutoConfig.from_pretrained(folder, axial_pos_shape=[9, 12])
    before = copy.deepcopy(config.to_dict())
    grown = ours.ReformerModelWithLMHead.from_pretrained(folder, config=config)
    assert torch.equal(table(grown)[:72], table(model))
    assert grown.config.axial_pos_shape == (9, 12)
    assert config.to_dict() == before
    shrunk = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, axial_pos_shape=(2, 12))
    assert torch.equal(table(shrunk), table(model)[:24])


def test_a_mismatch_that_nobody_asked_for_stays_an_error(saved):
    _, folder = saved
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ours.ReformerModelWithLMHead.from_pretrained(
            folder, config=ours.ReformerConfig(**fields(axial_pos_shape=[9, 12], is_decoder=True))
        )
    config = ours.ReformerConfig.from_pretrained(folder)
    config.axial_pos_shape = (9, 12)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ours.ReformerModelWithLMHead.from_pretrained(folder, config=config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"axial_pos_shape": (6, 3, 4)},
            r"axial_pos_shape must keep the number of axes, 2: .*\(6, 12\); got \(6, 3, 4\)",
        ),
        ({"axial_pos_shape": (6, 0)}, r"axial_pos_shape must be .* integers >= 1; got \(6, 0\)"),
        ({"axial_pos_shape": (7.0, 12)}, "axial_pos_shape must be .* integers >= 1"),
        ({"axial_pos_shape": "72"}, "axial_pos_shape must be .* integers >= 1"),
        ({"axial_pos_shape": 72}, "axial_pos_shape must be .* integers >= 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be an integer >= 1; got 0"),
        (
            {"axial_pos_shape": (7, 12), "axial_pos_embds_dim": (5, 6)},
            r"axial_pos_embds_dim must be the checkpoint's, \[4, 7\].*got \(5, 6\)",
        ),
    ],
)
def test_what_the_tables_cannot_take_is_refused(options, message, saved):
    _, folder = saved
    for cls in (ours.ReformerModelWithLMHead, transformers.AutoModelForCausalLM):
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained(folder, **options)


def test_a_learned_table_has_no_shape(tmp_path):
    model = build(axial_pos_embds=False)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"axial_pos_shape has no meaning.*max_position_embeddings; got \[8, 12\]"):
        ours.ReformerModelWithLMHead.from_pretrained(tmp_path, axial_pos_shape=[8, 12])
    with pytest.raises(ValueError, match="new_num_position_embeddings must be an integer"):
        model.resize_position_embeddings((8, 12))


def test_tables_of_another_kind_start_fresh_in_any_size(tmp_path):
    build(axial_pos_embds=False).save_pretrained(tmp_path)
    other, info = ours.ReformerModelWithLMHead.from_pretrained(
        tmp_path,
        axial_pos_embds=True,
        axial_pos_shape=[3, 5, 7],
        axial_pos_embds_dim=[2, 4, 5],
        output_loading_info=True,
    )
    assert len(info["missing_keys"]) == 3
    assert table(other).shape == (105, 11)


def test_a_refusal_in_memory_changes_nothing():
    model, expected = build(), build()
    for size in ((6, 3, 4), (6, 0), 71, 0, "72", None, True, (True, 12)):
        with pytest.raises(ValueError, match=r"axial_pos_shape|new_num_position_embeddings"):
            model.resize_position_embeddings(size)
    # Warnings are errors here: a user who wants them so keeps the old tables.
    with pytest.raises(UserWarning, match=REMAPS):
        model.resize_position_embeddings((6, 13))
    assert_same_tables(model, expected)
    assert model.config.axial_pos_shape == OLD
    with torch.device("meta"):
        empty = ours.ReformerModelWithLMHead(model.config)
    with pytest.raises(ValueError, match="meta device"):
        empty.resize_position_embeddings((7, 12))


def test_in_memory_the_model_trains_on_with_what_it_was():
    model = build().train()
    model.requires_grad_(False)
    module_of(model).weights[0].requires_grad_(True)
    untouched = module_of(model).weights[1]
    assert model.resize_position_embeddings(9 * 12) is module_of(model)
    first, second = module_of(model).weights
    assert (first.requires_grad, second.requires_grad) == (True, False)
    assert second is untouched
    tokens = ids(1, 107)
    model(tokens, labels=tokens).loss.backward()
    assert (first.grad.flatten(0, -2).norm(dim=-1) > 0).all()
    first.requires_grad_(False)
    model.resize_position_embeddings((7, 12))
    assert not any(weight.requires_grad for weight in module_of(model).weights)
    learned = build(axial_pos_embds=False).requires_grad_(False)
    assert not learned.resize_position_embeddings(80).embedding.weight.requires_grad
