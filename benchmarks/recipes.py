"""What the recipes learn with their defaults, on one small task each; the saved folders are judged by the pipelines.

Run ``python -m benchmarks.recipes [mlm classify qa]``. Prints one line per task and one JSON line last.

- mlm: a grammar in which every content word of a sentence follows from any other one, but not from its neighbours.
- classify: ``[a]`` to ``[d]`` at a uniformly random place in 4,096 random letters (a to d among them) decides.
- qa: the question names one of 12 facts; they stand in 2,048 tokens of random words.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import pipeline

import flash_reformer  # noqa: F401  (registers the models, the tokenizers and the question answering pipeline)
from flash_reformer.tokenization.training import train_vocabulary
from flash_reformer.training import train
from flash_reformer.training.metrics import normalise_answer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_words(count: int, rng: random.Random, low: int = 3, high: int = 6) -> list[str]:
    """Return different words of random letters."""
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(LETTERS, k=rng.randint(low, high)))] = None
    return list(words)


# --- masked language modelling ----------------------------------------------------------------------------------------

TOPICS, SLOTS = 12, ("of", "in", "at", ".")


def grammar_sentences(count: int, seed: int, grammar_seed: int = 0) -> list[str]:
    """Return sentences ``w0 of w1 in w2 at w3 .``: one topic chooses all four words.

    Some begin with "so", or else a word's place in the text would tell its slot.
    """
    rng = random.Random(grammar_seed)
    words = make_words(TOPICS * len(SLOTS), rng)
    rng = random.Random(seed)
    sentences = []
    for _ in range(count):
        topic = rng.randrange(TOPICS)
        sentence = " ".join(f"{words[topic * len(SLOTS) + slot]} {after}" for slot, after in enumerate(SLOTS))
        sentences.append(rng.choice(["", "so "]) + sentence)
    return sentences


def bigram_guesses(train_words: Sequence[str], words: Sequence[str], places: Sequence[int]) -> list[str]:
    """Guess words from both neighbours: the product of how often each pair was seen."""
    after: dict[str, Counter[str]] = {}
    before: dict[str, Counter[str]] = {}
    for left, right in itertools.pairwise(train_words):
        after.setdefault(left, Counter())[right] += 1
        before.setdefault(right, Counter())[left] += 1
    guesses = []
    for place in places:
        left, right = after.get(words[place - 1], Counter()), before.get(words[place + 1], Counter())
        guesses.append(max(left, key=lambda word: left[word] * right[word], default=""))
    return guesses


def run_mlm(folder: Path, model: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Train on the grammar; recover masked words of unseen sentences."""
    text, judged = grammar_sentences(8000, 1), grammar_sentences(400, 2)
    (folder / "text.txt").write_text("\n".join(text) + "\n")
    train_vocabulary([folder / "text.txt"], folder / "vocabulary", vocab_size=320, model_type="bpe")
    source, vocabulary = str(folder / "text.txt"), str(folder / "vocabulary")
    asked = {"text": (source,), "tokenizer": vocabulary, "output": str(folder / "run")}
    result = train("mlm", {**asked, **settings}, model)
    network = result.task.model_class.from_pretrained(folder / "run").eval()
    tokenizer = result.task.vocabulary.tokenizer
    rng, right, guessed, asked = random.Random(3), 0, 0, 0
    train_words = " ".join(text).split()
    for start in range(0, len(judged), 10):
        part = judged[start : start + 10]
        plain = " ".join(part).split()
        places = [place for place in range(1, len(plain) - 1) if rng.random() < 0.15]
        guesses = bigram_guesses(train_words, plain, places)
        right_here, guessed_here = _recovered(network, tokenizer, part, places, guesses)
        right, guessed, asked = right + right_here, guessed + guessed_here, asked + len(places)
    return {"recovered": right / asked, "bigram": guessed / asked, "words": asked, **_facts(result)}


def _recovered(
    model: Any, tokenizer: Any, sentences: Sequence[str], places: Sequence[int], guesses: Sequence[str]
) -> tuple[int, int]:
    """Return how many words at ``places`` the model finds, with all their tokens, and how many guesses are right."""
    text = "\n".join(sentences)
    found = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    ids, offsets = found["input_ids"], found["offset_mapping"][0]
    spans, place = [], 0
    for word in text.split():
        place = text.index(word, place)
        spans.append((place, place + len(word)))
        place += len(word)
    hidden = ids.clone()
    of_word = []
    for number in places:
        start, end = spans[number]
        tokens = ((offsets[:, 0] < end) & (offsets[:, 1] > start)).nonzero().flatten()
        hidden[0, tokens] = tokenizer.mask_token_id
        of_word.append(tokens)
    with torch.no_grad():
        likeliest = model(hidden).logits[0].argmax(-1)
    right = sum(bool((likeliest[tokens] == ids[0, tokens]).all()) for tokens in of_word)
    return right, sum(guess == text[slice(*spans[place])] for guess, place in zip(guesses, places, strict=True))


# --- classification ---------------------------------------------------------------------------------------------------


def marked_texts(count: int, length: int, seed: int) -> list[dict[str, str]]:
    """Return texts of random letters and spaces with one marker, and the class that its content stands for."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        text = rng.integers(ord("a"), ord("z") + 1, length).astype(np.uint8)
        text[rng.random(length) < 0.17] = ord(" ")
        label = int(rng.integers(4))
        place = int(rng.integers(length - 2))
        text[place : place + 3] = np.frombuffer(f"[{LETTERS[label]}]".encode(), dtype=np.uint8)
        rows.append({"text": text.tobytes().decode(), "label": ("north", "east", "south", "west")[label]})
    return rows


def letter_baseline(train_rows: Sequence[dict[str, str]], rows: Sequence[dict[str, str]]) -> float:
    """Classify by how often each character occurs: least squares, then the highest score."""

    def counts(some: Sequence[dict[str, str]]) -> Any:
        return np.stack([np.bincount(np.frombuffer(row["text"].encode(), np.uint8), minlength=128) for row in some])

    names = sorted({row["label"] for row in train_rows})
    wanted = np.array([[row["label"] == name for name in names] for row in train_rows], dtype=float)
    weights = np.linalg.lstsq(counts(train_rows), wanted, rcond=None)[0]
    guesses = (counts(rows) @ weights).argmax(1)
    return float(np.mean([names[guess] == row["label"] for guess, row in zip(guesses, rows, strict=True)]))


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_classify(
    folder: Path, model: dict[str, Any] | None = None, *, length: int = 4096, count: int = 2400, **settings: Any
) -> dict[str, Any]:
    """Train on texts with markers; classify unseen ones with the pipeline."""
    rows, judged, validation = (marked_texts(n, length, seed) for n, seed in ((count, 1), (200, 2), (100, 3)))
    asked = {
        "dataset": _write(folder / "train.jsonl", rows),
        "validation": _write(folder / "validation.jsonl", validation),
        "output": str(folder / "run"),
    }
    result = train("classify", {**asked, **settings}, model)
    classify = pipeline("text-classification", model=str(folder / "run"))
    found = classify([row["text"] for row in judged])
    right = [answer["label"] == row["label"] for answer, row in zip(found, judged, strict=True)]
    return {"accuracy": float(np.mean(right)), "letters": letter_baseline(rows, judged), **_facts(result)}


# --- question answering -----------------------------------------------------------------------------------------------


def fact_questions(
    count: int, length: int, seed: int, facts: int = 12, word_seed: int = 0
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return SQuAD-style rows and all words used.

    A context is ``length`` random words, in which ``facts`` times stands "NAME has WORD WORD ." The question is
    "what has NAME".
    """
    rng = random.Random(word_seed)
    words = make_words(180 + 60, rng)
    fillers, names = words[:180], words[180:]
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        chosen = rng.sample(names, facts)
        context = rng.choices(fillers, k=length - 5 * facts)
        places = sorted(rng.sample(range(len(context)), facts))
        parts: list[str] = []
        answers = []
        for place, word in enumerate(context):
            if place in places:
                answer = " ".join(rng.choices(fillers, k=2))
                start = len(" ".join([*parts, chosen[len(answers)], "has"])) + 1
                answers.append((start, answer))
                parts += [chosen[len(answers) - 1], "has", *answer.split(), "."]
            parts.append(word)
        wanted = rng.randrange(facts)
        start, answer = answers[wanted]
        rows.append(
            {
                "id": str(number),
                "question": f"what has {chosen[wanted]}",
                "context": " ".join(parts),
                "answers": {"text": [answer], "answer_start": [start]},
            }
        )
    return rows, [*words, "what", "has", "."]


def first_fact_baseline(rows: Sequence[dict[str, Any]]) -> float:
    """Answer with the first fact of the context, whatever the question names."""
    right = []
    for row in rows:
        words = row["context"].split()
        place = words.index("has")
        right.append(" ".join(words[place + 1 : place + 3]) == row["answers"]["text"][0])
    return float(np.mean(right))


def run_qa(
    folder: Path, model: dict[str, Any] | None = None, *, length: int = 2048, count: int = 1600, **settings: Any
) -> dict[str, Any]:
    """Train on facts among random words; answer unseen questions with the pipeline."""
    rows, words = fact_questions(count, length, 1)
    judged, validation = fact_questions(100, length, 2)[0], fact_questions(50, length, 3)[0]
    # Of whole words, one token each.
    (folder / "words.txt").write_text("".join(" ".join(random.Random(i).sample(words, 60)) + "\n" for i in range(400)))
    train_vocabulary([folder / "words.txt"], folder / "vocabulary", vocab_size=900, model_type="bpe")
    asked = {
        "dataset": _write(folder / "train.jsonl", rows),
        "validation": _write(folder / "validation.jsonl", validation),
        "tokenizer": str(folder / "vocabulary"),
        "output": str(folder / "run"),
    }
    result = train("qa", {**asked, **settings}, model)
    answer = pipeline("extractive-question-answering", model=str(folder / "run"))
    found = [answer(question=row["question"], context=row["context"], max_seq_len=4096) for row in judged]
    right = [
        normalise_answer(each["answer"]) == normalise_answer(row["answers"]["text"][0])
        for each, row in zip(found, judged, strict=True)
    ]
    return {"exact_match": float(np.mean(right)), "first_fact": first_fact_baseline(judged), **_facts(result)}


def _facts(result: Any) -> dict[str, Any]:
    metrics = result.metrics
    return {name: metrics[name] for name in ("seconds", "steps", "kept_step", "tokens", "parameters")}


RUNS = {"mlm": run_mlm, "classify": run_classify, "qa": run_qa}


def main() -> None:
    """Run the tasks that are named, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(RUNS)}; all by default")
    results = {}
    names = parser.parse_args().tasks or list(RUNS)
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        parser.error(f"no task {unknown[0]!r}; there are {', '.join(RUNS)}")
    for name in names:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            results[name] = RUNS[name](Path(folder))
        results[name]["seconds_in_all"] = round(time.perf_counter() - started, 1)
        print(name, *(f"{key}={value}" for key, value in results[name].items()), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
