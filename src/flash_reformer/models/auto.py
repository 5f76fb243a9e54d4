"""Registration with the Auto classes: ``model_type: reformer`` means this package once it is imported."""

from __future__ import annotations

import transformers

from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.models.modeling_heads import (
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerModelWithLMHead,
)
from flash_reformer.models.modeling_reformer import ReformerModel


def register() -> None:
    """Make the Auto classes resolve ``reformer`` to the classes of this package, in place of those they ship with."""
    transformers.AutoConfig.register(ReformerConfig.model_type, ReformerConfig, exist_ok=True)
    for auto_class, model_class in (
        (transformers.AutoModel, ReformerModel),
        (transformers.AutoModelForCausalLM, ReformerModelWithLMHead),
        (transformers.AutoModelForMaskedLM, ReformerForMaskedLM),
        (transformers.AutoModelForSequenceClassification, ReformerForSequenceClassification),
        (transformers.AutoModelForQuestionAnswering, ReformerForQuestionAnswering),
    ):
        auto_class.register(ReformerConfig, model_class, exist_ok=True)
