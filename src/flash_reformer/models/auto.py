"""Registration with the Auto classes and ``pipeline``: ``model_type: reformer`` means this package once imported."""

from __future__ import annotations

import transformers
from transformers.pipelines import PIPELINE_REGISTRY

from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.models.modeling_heads import ReformerForQuestionAnswering, ReformerForSequenceClassification
from flash_reformer.models.modeling_language import ReformerForMaskedLM, ReformerModelWithLMHead
from flash_reformer.models.modeling_reformer import ReformerModel
from flash_reformer.models.pipelines import QUESTION_ANSWERING, QuestionAnsweringPipeline


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
    if QUESTION_ANSWERING not in PIPELINE_REGISTRY.supported_tasks:
        PIPELINE_REGISTRY.register_pipeline(
            QUESTION_ANSWERING,
            pipeline_class=QuestionAnsweringPipeline,
            pt_model=transformers.AutoModelForQuestionAnswering,
            type="text",
        )
        # It marks code that is saved with a pipeline and trusted when that is loaded. This is code of a package.
        del QuestionAnsweringPipeline._registered_impl  # type: ignore[attr-defined]
