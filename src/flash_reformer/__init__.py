"""flash-reformer: the Reformer for very long sequences, correct, fast and lean.

The classes have the names, arguments, configuration and checkpoints of ``transformers``' Reformer. Importing the
package registers them with the Auto classes.
"""

from flash_reformer.models.auto import register as _register
from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.models.modeling_heads import (
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerModelWithLMHead,
)
from flash_reformer.models.modeling_reformer import (
    ReformerAttention,
    ReformerLayer,
    ReformerModel,
    ReformerPreTrainedModel,
)
from flash_reformer.models.outputs import ReformerModelOutput, ReformerModelWithLMHeadOutput

_register()

__version__ = "0.1.0"

__all__ = [
    "ReformerAttention",
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
    "__version__",
]
