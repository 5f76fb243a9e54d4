"""The pipelines of transformers on a saved folder: text in, text or labels out, and nothing to complain about."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import pipeline

import flash_reformer as ours
from tests.models.pipeline_folders import LIMIT, make, save

PROMPTS = ["Raskolnikov", "A", "It was a dark and stormy night; the rain fell in torrents", "né"]


@pytest.fixture(autouse=True)
def complaints(caplog: Any) -> Iterator[Any]:
    """What transformers logs at warning level or above, which must be nothing."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("writer"), "ReformerModelWithLMHead")


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(
        tmp_path_factory.mktemp("filler"), "ReformerForMaskedLM", ours.ReformerByteTokenizer(mask_token="[MASK]")
    )


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    labels = {0: "novel", 1: "letter", 2: "law"}
    return save(
        tmp_path_factory.mktemp("classifier"),
        "ReformerForSequenceClassification",
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )


def generated(folder: str, prompt: str, **options: Any) -> str:
    """What ``generate`` itself makes of one prompt."""
    model = ours.ReformerModelWithLMHead.from_pretrained(folder)
    tokenizer = ours.ReformerByteTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompt, return_tensors="pt")
    (out,) = model.generate(**tokens, **options)
    return tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.floor
def test_generated_text_is_that_of_generate(writer):
    pipe = pipeline("text-generation", model=writer, device="cpu")
    assert type(pipe.model) is ours.ReformerModelWithLMHead
    assert type(pipe.tokenizer) is ours.ReformerByteTokenizer
    options = {"max_new_tokens": 12, "do_sample": False}
    texts = [generated(writer, prompt, **options) for prompt in PROMPTS]
    assert len({text[len(prompt) :] for text, prompt in zip(texts, PROMPTS, strict=True)}) > 1
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text.startswith(prompt)
        assert pipe(prompt, **options) == [{"generated_text": text}]
        assert pipe(prompt, return_full_text=False, **options) == [{"generated_text": text[len(prompt) :]}]
    (tokens,) = pipe(PROMPTS[0], return_tensors=True, **options)
    assert pipe.tokenizer.decode(tokens["generated_token_ids"], skip_special_tokens=True) == texts[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [2, 4])
def test_prompts_of_different_lengths_in_a_batch_are_each_on_their_own(side, batch_size, writer):
    pipe = pipeline("text-generation", model=writer, device="cpu")
    pipe.tokenizer.padding_side = side
    options = {"max_new_tokens": 9, "do_sample": False}
    alone = [pipe(prompt, **options) for prompt in PROMPTS]
    assert pipe(PROMPTS, batch_size=batch_size, **options) == alone


def test_sampled_text_repeats_with_the_seed(writer):
    pipe = pipeline("text-generation", model=writer, device="cpu")
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(pipe("night", max_new_tokens=12, do_sample=True, num_return_sequences=2))
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 2


def test_a_prompt_as_long_as_the_table_and_one_longer(writer):
    pipe = pipeline("text-generation", model=writer, device="cpu")
    (result,) = pipe("x" * (LIMIT - 4), max_new_tokens=5, do_sample=False, return_full_text=False)
    assert result["generated_text"] != ""
    with pytest.raises(ValueError, match=f"asks for 5 tokens after a prompt of {LIMIT - 3}.*holds {LIMIT}"):
        pipe("x" * (LIMIT - 3), max_new_tokens=5, do_sample=False)


@pytest.mark.floor
def test_masked_bytes_are_filled_with_what_the_model_finds_likeliest(filler):
    pipe = pipeline("fill-mask", model=filler, device="cpu")
    assert type(pipe.model) is ours.ReformerForMaskedLM
    text = "The rain fell in torr[MASK]nts" * 3
    first = text.replace("[MASK]", "e")[: -len("The rain fell in torrents")] + "The rain fell in torr[MASK]nts"
    results = pipe(first, top_k=4)
    tokens = pipe.tokenizer(first, return_tensors="pt")
    place = (tokens.input_ids[0] == 258).nonzero().item()
    with torch.no_grad():
        probs, found = pipe.model(**tokens).logits[0, place].softmax(-1).topk(4)
    assert [result["token"] for result in results] == found.tolist()
    assert [result["score"] for result in results] == pytest.approx(probs.tolist(), rel=1e-6)
    assert len(set(probs.tolist())) == 4
    for result in results:
        assert result["token_str"] == pipe.tokenizer.decode([result["token"]])
        assert result["sequence"].startswith("The rain fell in torrents")
    # One list for each mask, where there are several.
    assert [len(each) for each in pipe(text, top_k=2)] == [2, 2, 2]
    assert {each["token_str"] for each in pipe("torr[MASK]nts", targets=["e", "x"])} == {"e", "x"}


def test_a_batch_to_fill_and_a_text_without_a_mask(filler):
    pipe = pipeline("fill-mask", model=filler, device="cpu")
    texts = ["dar[MASK]", "a st[MASK]rmy night", "[MASK]" + "x" * (LIMIT - 1)]
    results = pipe(texts, batch_size=2, top_k=3)
    assert [len(result) for result in results] == [3, 3, 3]
    # The longest of a batch has no pads, so it is what it is alone.
    alone = pipe(texts[1], top_k=3)
    assert [r["token"] for r in results[1]] == [r["token"] for r in alone]
    assert [r["score"] for r in results[1]] == pytest.approx([r["score"] for r in alone], rel=1e-5)
    with pytest.raises(Exception, match="No mask_token"):
        pipe("nothing to fill")


def test_no_mask_token_is_said_at_once(tmp_path):
    folder = save(tmp_path, "ReformerForMaskedLM")
    with pytest.raises(Exception, match="does not define a `mask_token`"):
        pipeline("fill-mask", model=folder, device="cpu")


@pytest.mark.floor
def test_labels_have_their_names_and_probabilities(classifier):
    pipe = pipeline("text-classification", model=classifier, device="cpu")
    assert type(pipe.model) is ours.ReformerForSequenceClassification
    with torch.no_grad():
        probs = pipe.model(**pipe.tokenizer(PROMPTS[2], return_tensors="pt")).logits[0].softmax(-1).tolist()
    wanted = sorted(zip(probs, ("novel", "letter", "law"), strict=True), reverse=True)
    every = pipe(PROMPTS[2], top_k=None)
    assert [result["label"] for result in every] == [label for _, label in wanted]
    assert [result["score"] for result in every] == pytest.approx([score for score, _ in wanted], rel=1e-5)
    assert pipe(PROMPTS[2]) == [{"label": wanted[0][1], "score": pytest.approx(wanted[0][0], rel=1e-5)}]


def test_long_texts_are_truncated_and_batches_padded(classifier):
    pipe = pipeline("text-classification", model=classifier, device="cpu")
    long = "A long sentence about the weather. " * 30
    assert len(long) > LIMIT
    with pytest.raises(ValueError, match=str(LIMIT)):
        pipe(long)
    cut = {"truncation": True, "max_length": LIMIT}
    scores = [result["score"] for result in pipe(long, top_k=None, **cut)]
    assert scores == [result["score"] for result in pipe(long[:LIMIT], top_k=None)]
    batch = pipe([long, PROMPTS[0], PROMPTS[2]], batch_size=2, top_k=None, **cut)
    assert [result["score"] for result in batch[0]] == pytest.approx(scores, rel=1e-5)
    # A table of its own for the tokenizer makes truncation need no number.
    pipe.tokenizer.model_max_length = LIMIT
    assert [result["score"] for result in pipe(long, top_k=None, truncation=True)] == scores


def test_a_tokenizer_of_a_larger_vocabulary_is_named(tmp_path):
    tokenizer = ours.ReformerByteTokenizer(additional_special_tokens=["<a>", "<b>"])
    model = make("ReformerModelWithLMHead")
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    with pytest.raises(ValueError, match="vocab_size is 258, and id 259 is of a vocabulary of at least 260"):
        pipe("some <b> text", max_new_tokens=2, do_sample=False)
    model.resize_token_embeddings(len(tokenizer))
    assert pipe("some <b> text", max_new_tokens=2, do_sample=False)


def test_a_table_grows_inside_a_pipeline(writer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = pipeline("text-generation", model=writer, device="cpu", model_kwargs={"axial_pos_shape": (14, 24)})
    assert pipe.model.config.max_length_of_positions == 14 * 24
    assert pipe("x" * LIMIT, max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"] != ""
