"""What the public documentation of the Reformer has its readers type, on folders trained here in place of hub ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash_reformer import (
    ReformerByteTokenizer,
    ReformerConfig,
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerModel,
    ReformerModelWithLMHead,
    ReformerTokenizer,
    ReformerTokenizerFast,
)
from flash_reformer.tokenization import train_vocabulary
from tests.models.pipeline_folders import BYTES, save

TEXT = """A few months later Raskolnikov walked along the canal in the evening.
Hello, my dog is cute and my cat is not.
The capital of France is Paris. The capital of Russia was Petersburg.
Jim Henson was a nice puppet. Who was Jim Henson?
This is a sentence from the training data, and this is another one.
"""
PROMPT = "A few months later"


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal model and its SentencePiece vocabulary, trained until it knows its one text by heart."""
    folder = tmp_path_factory.mktemp("novel")
    tokenizer = train_vocabulary([TEXT * 3], folder, vocab_size=90, model_type="bpe")
    torch.manual_seed(0)
    fields = {**BYTES, "is_decoder": True, "vocab_size": 90, "eos_token_id": 2, "hidden_size": 32}
    fields |= {
        "axial_pos_embds_dim": [12, 20],
        "axial_norm_std": 0.1,
        "initializer_range": 0.1,
        "feed_forward_size": 64,
    }
    model = ReformerModelWithLMHead(ReformerConfig(**fields)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    input_ids = tokenizer(TEXT, return_tensors="pt").input_ids
    first = None
    for _ in range(80):
        loss = model(input_ids, labels=input_ids).loss
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.15 * first
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def masked(novel: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("masked")
    ReformerForMaskedLM.from_pretrained(novel, is_decoder=False).save_pretrained(folder)
    AutoTokenizer.from_pretrained(novel).save_pretrained(folder)
    return str(folder)


@pytest.mark.floor
def test_configuration_and_model():
    configuration = ReformerConfig()
    model = ReformerModel(configuration)
    configuration = model.config
    assert type(configuration) is ReformerConfig
    assert list(configuration.attn_layers) == ["local", "lsh", "local", "lsh", "local", "lsh"]
    assert len(model.encoder.layers) == configuration.num_hidden_layers == 6
    assert configuration.hidden_size == sum(configuration.axial_pos_embds_dim) == 256
    shapes = [tuple(weight.shape) for weight in model.embeddings.position_embeddings.weights]
    assert shapes == [(64, 1, 64), (1, 64, 192)]


def test_axial_positions():
    """A table of n_1 x n_2 positions from n_1 + n_2 rows: each position is a row of one beside a row of the other."""
    model = ReformerModel(ReformerConfig(axial_pos_shape=(7, 11), axial_pos_embds_dim=(64, 192), attn_layers=["local"]))
    tables = model.embeddings.position_embeddings
    first, second = (weight.detach() for weight in tables.weights)
    for j in (0, 1, 10, 11, 12, 76):
        (row,) = tables.eval()(torch.tensor([[j]]), 1)[0].detach()
        assert torch.equal(row, torch.cat([first[j // 11, 0], second[0, j % 11]]))
    assert sum(weight.numel() for weight in tables.parameters()) == 7 * 64 + 11 * 192 < 77 * 256
    # The page asks for sequences of exactly n_1 * n_2 tokens in training. Here shorter ones train as well.
    model.train()
    model(torch.randint(320, (2, 50))).last_hidden_state.sum().backward()
    assert (first.grad if first.grad is not None else tables.weights[0].grad)[:5].abs().sum() > 0


@pytest.mark.floor
def test_training(novel):
    tokenizer = AutoTokenizer.from_pretrained(novel)
    model = ReformerModelWithLMHead.from_pretrained(novel)
    input_ids = tokenizer.encode("This is a sentence from the training data", return_tensors="pt")
    loss = model(input_ids, labels=input_ids)[0]
    assert 0 < loss.item() < 5
    loss.backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []


@pytest.mark.parametrize("tokenizer_class", [AutoTokenizer, ReformerTokenizer, ReformerTokenizerFast])
def test_last_hidden_states(tokenizer_class, novel):
    tokenizer = tokenizer_class.from_pretrained(novel)
    model = ReformerModel.from_pretrained(novel)
    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
    outputs = model(**inputs)
    last_hidden_states = outputs.last_hidden_state
    assert last_hidden_states.shape == (1, inputs["input_ids"].shape[1], 2 * 32)
    assert last_hidden_states.std() > 0.1
    assert tokenizer.decode(inputs["input_ids"][0]) == "Hello, my dog is cute"


def test_language_modelling(novel):
    tokenizer = AutoTokenizer.from_pretrained(novel)
    model = ReformerModelWithLMHead.from_pretrained(novel)
    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
    outputs = model(**inputs, labels=inputs["input_ids"])
    loss, logits = outputs.loss, outputs.logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], 90)
    targets = inputs["input_ids"][0, 1:]
    expected = -logits[0, :-1].log_softmax(-1)[torch.arange(len(targets)), targets].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.floor
def test_generation(novel):
    model = AutoModelForCausalLM.from_pretrained(novel)
    tokenizer = AutoTokenizer.from_pretrained(novel)
    assert type(model) is ReformerModelWithLMHead
    output = model.generate(tokenizer.encode(PROMPT, return_tensors="pt"), do_sample=False, max_new_tokens=12)
    text = tokenizer.decode(output[0])
    assert text.startswith(PROMPT)
    assert text[len(PROMPT) :].strip()
    # It has learned its text: where the prompt goes on is known.
    assert text.startswith(PROMPT + " Ra")


@pytest.mark.floor
def test_masked_language_modelling(masked):
    tokenizer = AutoTokenizer.from_pretrained(masked)
    model = ReformerForMaskedLM.from_pretrained(masked)
    bias = model.lm_head.bias.detach().clone()

    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    inputs = tokenizer("The capital of France is [MASK].", return_tensors="pt")
    model.resize_token_embeddings(new_num_tokens=model.config.vocab_size + 1)
    with torch.no_grad():
        logits = model(**inputs).logits
    mask_token_index = (inputs.input_ids == tokenizer.mask_token_id)[0].nonzero(as_tuple=True)[0]
    predicted_token_id = logits[0, mask_token_index].argmax(axis=-1)
    predicted_token = tokenizer.decode(predicted_token_id)

    assert tokenizer.mask_token_id == 90
    assert model.config.vocab_size == logits.shape[-1] == 91
    assert torch.equal(model.lm_head.bias[:90], bias)
    assert mask_token_index.shape == predicted_token_id.shape == (1,)
    assert isinstance(predicted_token, str)

    labels = tokenizer("The capital of France is Paris.", return_tensors="pt")["input_ids"]
    labels = torch.where(inputs.input_ids == tokenizer.mask_token_id, labels[:, : inputs["input_ids"].shape[-1]], -100)
    outputs = model(**inputs, labels=labels)
    assert (labels != -100).sum() == 1
    wanted = labels[labels != -100].item()
    expected = -logits[0, mask_token_index].log_softmax(-1)[0, wanted].item()
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-4)
    outputs.loss.backward()
    assert model.lm_head.bias.grad.any()


@pytest.mark.floor
def test_single_label_classification(novel):
    tokenizer = AutoTokenizer.from_pretrained(novel)
    torch.manual_seed(0)
    model = ReformerForSequenceClassification.from_pretrained(novel)
    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_class_id = logits.argmax().item()
    label = model.config.id2label[predicted_class_id]
    assert label in ("LABEL_0", "LABEL_1")

    num_labels = len(model.config.id2label)
    model = ReformerForSequenceClassification.from_pretrained(novel, num_labels=num_labels)
    labels = torch.tensor(1)  # the page's own form: no dimension at all
    outputs = model(**inputs, labels=labels)
    expected = -outputs.logits[0].log_softmax(-1)[1].item()
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)
    assert model(**inputs, labels=torch.tensor([1])).loss.item() == outputs.loss.item()
    outputs.loss.backward()
    assert model.classifier.dense.weight.grad.any()
    two = tokenizer(["Hello", "Paris."], padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\) or \(2, 1\); got \(\)"):
        model(**two, labels=labels)


def test_multi_label_classification(novel):
    tokenizer = AutoTokenizer.from_pretrained(novel)
    torch.manual_seed(0)
    model = ReformerForSequenceClassification.from_pretrained(
        novel, problem_type="multi_label_classification", num_labels=5
    )
    inputs = tokenizer("Hello, my dog is cute", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    predicted_class_ids = torch.arange(0, logits.shape[-1])[torch.sigmoid(logits).squeeze(dim=0) > 0.5]
    assert 0 < len(predicted_class_ids) < 5

    num_labels = len(model.config.id2label)
    model = ReformerForSequenceClassification.from_pretrained(
        novel, num_labels=num_labels, problem_type="multi_label_classification"
    )
    labels = torch.sum(
        torch.nn.functional.one_hot(predicted_class_ids[None, :].clone(), num_classes=num_labels), dim=1
    ).to(torch.float)
    outputs = model(**inputs, labels=labels)
    odds = outputs.logits[0].sigmoid()
    expected = -torch.where(labels[0] == 1, odds, 1 - odds).log().mean().item()
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.floor
def test_question_answering(novel):
    tokenizer = AutoTokenizer.from_pretrained(novel)
    torch.manual_seed(0)
    model = ReformerForQuestionAnswering.from_pretrained(novel)
    question, text = "Who was Jim Henson?", "Jim Henson was a nice puppet"
    inputs = tokenizer(question, text, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    answer_start_index = outputs.start_logits.argmax()
    answer_end_index = outputs.end_logits.argmax()
    predict_answer_tokens = inputs.input_ids[0, answer_start_index : answer_end_index + 1]
    answer = tokenizer.decode(predict_answer_tokens, skip_special_tokens=True)
    assert isinstance(answer, str)
    assert outputs.start_logits.shape == outputs.end_logits.shape == inputs.input_ids.shape

    target_start_index, target_end_index = torch.tensor([14]), torch.tensor([15])
    outputs = model(**inputs, start_positions=target_start_index, end_positions=target_end_index)
    expected = -(outputs.start_logits.log_softmax(-1)[0, 14] + outputs.end_logits.log_softmax(-1)[0, 15]) / 2
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_tokenizers(novel, tmp_path):
    tokenizer = ReformerTokenizer.from_pretrained(novel)
    ids = tokenizer("Hello, my dog is cute")["input_ids"]
    assert tokenizer.decode(ids) == "Hello, my dog is cute"
    assert ReformerTokenizerFast.from_pretrained(novel)("Hello, my dog is cute")["input_ids"] == ids
    (vocab_file,) = tokenizer.save_vocabulary(str(tmp_path))
    again = ReformerTokenizer(vocab_file)
    assert again("Hello, my dog is cute")["input_ids"] == ids
    assert Path(vocab_file).read_bytes() == (Path(novel) / "spiece.model").read_bytes()
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.unk_token == "<unk>"


# The model card of the byte-level model has its readers define these two.
def encode(list_of_strings: list[Any], pad_token_id: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    strings = [text if isinstance(text, bytes) else text.encode() for text in list_of_strings]
    longest = max(map(len, strings))
    input_ids = torch.full((len(strings), longest), pad_token_id, dtype=torch.long)
    masks = torch.zeros_like(input_ids)
    for row, text in enumerate(strings):
        input_ids[row, : len(text)] = torch.tensor([byte + 2 for byte in text])
        masks[row, : len(text)] = 1
    return input_ids, masks


def decode(output_ids: torch.Tensor) -> list[str]:
    return ["".join(chr(x - 2) if x > 1 else "" for x in row) for row in output_ids.tolist()]


def test_the_byte_level_model_card(tmp_path):
    folder = save(tmp_path, "ReformerModelWithLMHead")
    model = ReformerModelWithLMHead.from_pretrained(folder)
    encoded, attention_masks = encode(["In 1965, Brooks left IBM to found the Department of", "A"])
    texts = decode(model.generate(encoded, attention_mask=attention_masks, do_sample=False, max_new_tokens=9))
    tokenizer = ReformerByteTokenizer.from_pretrained(folder)
    batch = tokenizer(["In 1965, Brooks left IBM to found the Department of", "A"], padding=True, return_tensors="pt")
    assert torch.equal(batch.input_ids, encoded)
    assert torch.equal(batch.attention_mask, attention_masks)
    assert texts[0].startswith("In 1965, Brooks left IBM to found the Department of")
    alone = decode(model.generate(tokenizer("A", return_tensors="pt").input_ids, do_sample=False, max_new_tokens=9))
    assert texts[1] == alone[0]
