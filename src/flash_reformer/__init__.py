"""flash-reformer: the Reformer for very long sequences, correct, fast and lean.

The classes have the names, arguments, configuration and checkpoints of ``transformers``' Reformer. Importing the
package registers them with the Auto classes.
"""

from flash_reformer.models.auto import register as _register
from flash_reformer.models.cache import ReformerCache
from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.models.modeling_heads import ReformerForQuestionAnswering, ReformerForSequenceClassification
from flash_reformer.models.modeling_language import ReformerForMaskedLM, ReformerModelWithLMHead
from flash_reformer.models.modeling_reformer import (
    ReformerAttention,
    ReformerLayer,
    ReformerModel,
    ReformerPreTrainedModel,
)
from flash_reformer.models.outputs import ReformerModelOutput, ReformerModelWithLMHeadOutput
from flash_reformer.models.pipelines import QuestionAnsweringPipeline
from flash_reformer.tokenization.auto import register as _register_tokenizers
from flash_reformer.tokenization.byte_tokenizer import ReformerByteTokenizer
from flash_reformer.tokenization.tokenizer import ReformerTokenizer
from flash_reformer.tokenization.tokenizer_fast import ReformerTokenizerFast

_register()
_register_tokenizers(ReformerConfig)

__version__ = "0.1.0"

__all__ = [
    "QuestionAnsweringPipeline",
    "ReformerAttention",
    "ReformerByteTokenizer",
    "ReformerCache",
    "ReformerConfig",
    "ReformerForMaskedLM",
    "ReformerForQuestionAnswering",
    "ReformerForSequenceClassification",
    "ReformerLayer",
    "ReformerModel",
    "ReformerModelOutput",
    "ReformerModelWithLMHead",
    "ReformerModelWithLMHeadOutput",
    "ReformerPreTrainedModel",
    "ReformerTokenizer",
    "ReformerTokenizerFast",
    "__version__",
]
