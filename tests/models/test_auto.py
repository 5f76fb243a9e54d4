"""After ``import flash_reformer``, Auto classes resolve ``model_type: reformer`` to this package."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import flash_reformer as fr

PAIRS = [
    (transformers.AutoModel, fr.ReformerModel, False),
    (transformers.AutoModelForCausalLM, fr.ReformerModelWithLMHead, True),
    (transformers.AutoModelForMaskedLM, fr.ReformerForMaskedLM, False),
    (transformers.AutoModelForSequenceClassification, fr.ReformerForSequenceClassification, False),
    (transformers.AutoModelForQuestionAnswering, fr.ReformerForQuestionAnswering, False),
]


@pytest.mark.floor
@pytest.mark.parametrize(("auto_class", "model_class", "is_decoder"), PAIRS)
def test_a_saved_folder_loads_through_its_auto_class(
    auto_class: type, model_class: type, is_decoder: bool, tmp_path: Path
) -> None:
    config = fr.ReformerConfig(
        attn_layers=["lsh"],
        hidden_size=8,
        num_attention_heads=2,
        attention_head_size=4,
        axial_pos_shape=(4, 4),
        axial_pos_embds_dim=(4, 4),
        feed_forward_size=8,
        is_decoder=is_decoder,
    )
    model_class(config).save_pretrained(tmp_path)
    assert type(auto_class.from_pretrained(tmp_path)) is model_class
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is fr.ReformerConfig
    assert type(auto_class.from_config(config)) is model_class
