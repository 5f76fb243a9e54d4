"""The same pipelines on a SentencePiece vocabulary, whose tokens are not the characters that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import pipeline

import flash_reformer as ours
from flash_reformer.tokenization import train_vocabulary
from tests.models.pipeline_folders import make, save

TEXT = "The old officer affirmed that the final office was fine. He sat in a café near the river and waited for news.\n"
# Ligatures, wide letters and runs of spaces, which the vocabulary's normalisation changes.
CONTEXT = "  The o\ufb03cer   in the \uff43af\u00e9 waited.\u3000He had \ufb01ne  news,\tand\u00a0waited. " * 5


@pytest.fixture(scope="module", params=[("bpe", 60), ("unigram", 36)], ids=["bpe", "unigram"])
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("vocabulary")
    model_type, size = request.param
    return train_vocabulary([TEXT * 4], folder, vocab_size=size, model_type=model_type, mask_token="[MASK]")


def test_answers_are_pieces_of_the_text_as_it_was_given(tokenizer, tmp_path):
    folder = save(tmp_path, "ReformerForQuestionAnswering", tokenizer)
    pipe = pipeline("extractive-question-answering", model=folder, device="cpu")
    assert type(pipe.tokenizer) is ours.ReformerTokenizerFast
    for options in ({}, {"max_seq_len": 40, "doc_stride": 9}, {"align_to_words": False}):
        answers = pipe(question="Who  waited?", context=CONTEXT, top_k=40, **options)
        assert len(answers) == len({(answer["start"], answer["end"]) for answer in answers}) == 40
        for answer in answers:
            piece = CONTEXT[answer["start"] : answer["end"]]
            assert answer["answer"] == piece == piece.strip() != ""
            if options.get("align_to_words", True):
                around = CONTEXT[max(0, answer["start"] - 1) : answer["start"] + 1]
                assert not around.isalnum() or len(around) == 1, answer
    assert any("\ufb03" in answer["answer"] or "\u00e9" in answer["answer"] for answer in answers)
    with pytest.raises(ValueError, match="context holds nothing that the tokenizer reads"):
        pipe(question="Who?", context="\u200b")


def test_the_class_without_offsets_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    slow = ours.ReformerTokenizer.from_pretrained(tmp_path)
    model = make("ReformerForQuestionAnswering", slow)
    with pytest.raises(
        ValueError, match=r"tokenizer must tell where .*ReformerTokenizerFast.*; got ReformerTokenizer$"
    ):
        ours.QuestionAnsweringPipeline(model=model, tokenizer=slow)


def test_text_goes_on_is_filled_in_and_classified(tokenizer, tmp_path):
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    writer = pipeline(
        "text-generation", model=save(tmp_path / "a", "ReformerModelWithLMHead", tokenizer, **special), device="cpu"
    )
    prompts = ["The old", "He sat in a café near the"]
    options = {"max_new_tokens": 6, "do_sample": False}
    alone = [writer(prompt, **options) for prompt in prompts]
    assert writer(prompts, batch_size=2, **options) == alone
    tokens = tokenizer(prompts[1], return_tensors="pt")
    (expected,) = writer.model.generate(**tokens, **options)
    # The pipeline decodes the new tokens by themselves, so a space between them and the prompt is lost.
    written = expected[tokens.input_ids.shape[1] :]
    assert alone[1][0]["generated_text"] == prompts[1] + tokenizer.decode(written, skip_special_tokens=True)
    (same,) = writer(prompts[1], return_tensors=True, **options)
    assert same["generated_token_ids"] == expected.tolist()

    filler = pipeline(
        "fill-mask", model=save(tmp_path / "b", "ReformerForMaskedLM", tokenizer, **special), device="cpu"
    )
    results = filler("The old [MASK] sat in a café.", top_k=3)
    tokens = tokenizer("The old [MASK] sat in a café.", return_tensors="pt")
    assert (tokens.input_ids == tokenizer.mask_token_id).sum() == 1
    with torch.no_grad():
        logits = filler.model(**tokens).logits[tokens.input_ids == tokenizer.mask_token_id]
    assert [result["token"] for result in results] == logits[0].topk(3).indices.tolist()

    labels = {"id2label": {0: "calm", 1: "tense"}}
    folder = save(tmp_path / "c", "ReformerForSequenceClassification", tokenizer, **special, **labels)
    judge = pipeline("text-classification", model=folder, device="cpu")
    (result,) = judge(TEXT * 20, truncation=True, max_length=300)
    assert result["label"] in ("calm", "tense")
    assert 0.5 <= result["score"] < 1
