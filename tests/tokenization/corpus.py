"""Texts that tokenizers must agree on, made from numbers: sentences of many scripts, and strings meant to hurt."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, then it sleeps.",
    "It's 10:30 — “time” to go… 3½ cups at 25 °C, x² + y² = z², № 5, ™.",
    "Der Straßenverkehr wächst über ältere Brücken; Größe, Maß, naïve Café-Gäste.",
    "Où est la bibliothèque ? L’été, un œuvre sans fin : ça va.",
    "El niño soñó con pingüinos: ¿Cuánto cuesta? ¡Mañana por la mañana!",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία, και πάλι από την αρχή.",
    "我能吞下玻璃而不伤身体。中文，標點！？「引號」（全形）１２３ＡＢＣ。",
    "日本語のテキスト、カタカナとひらがな。ﾊﾝｶｸ ｶﾅ ｶﾞｷﾞ。",
    "나는 유리를 먹을 수 있어요. 그래도 아프지 않아요. 한국어 문장입니다.",
    "أنا قادر على أكل الزجاج و هذا لا يؤلمني، أليس كذلك؟",
    "אני יכול לאכול זכוכית וזה לא מזיק לי.",
    "मैं काँच खा सकता हूँ और मुझे उससे कोई चोट नहीं पहुंचती।",
    "ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ ข้าวน้ำ",
    "Tôi có thể ăn thủy tinh mà không hại gì. Đường phố rất đẹp.",
    "😀 👍🏽 👨‍👩‍👧 🇩🇪 on a Monday; hmm, banana, Mississippi, ba-ba-ba...",
    "def f(x):\n\treturn x  # code\r\n<xml a='b'>text &amp; more</xml>",
)

#: What goes wrong in tokenizers: ligatures, marks that combine, invisible and control characters, spaces of all kinds,
#: jamo, half widths, joiners, names of special tokens, runs of one character.
PIECES = (
    *"ﬁ ﬀ ﬃ ½ … ™ ① ㎏ ㍿ ﷺ ﻻ ſ ß Å ² Ω ΐ e a o A É z̈ ế ẛ̣ é の か\u3099 ﾊﾟ ｶﾞ ｶ ﾞ 我 標 ー ａ Ａ ！".split(),
    *"ا لا ّ कि क्ष น้ำ ก 가 각 ᄀ ᅡ ᆨ 가 각 ᄀ각 👨‍👩‍👧 👍🏽 🇩🇪 🇩 ☎️ 1️⃣".split(),
    *"<unk> </s> <s> <pad> <0x41> < > s the th aaa aa .... . -- ▁ ▁▁".split(),
    *("\u0301", "\u0308", "\u0323", "\u0345", "\u0344", "\u0e33", "\u0600", "\u0d4e", "\u200b", "\u200d"),
    *("\ufeff", "\u00ad", "\x00", "\x01", "\x07", "\x1f", "\x7f", "\u0085", "\u00a0", "\u2028", "\u3000"),
    *("\t", "\n", "\r", "\r\n", " ", "  ", "     ", " the"),
    *(
        "\U00010330",
        "\U000e0001",
        "\ue000",
        "\U0010ffff",
        "\ufffd",
        "\uffff",
        "I\u0307",
        "e\u0302\u0301",
        "\u1100\u1161",
    ),
)


def ordinary(count: int, seed: int) -> list[str]:
    """Return texts put together from words of the sentences, up to some 300 characters long."""
    dice = random.Random(seed)
    texts = []
    for _ in range(count):
        words: list[str] = []
        for _ in range(dice.randint(1, 5)):
            sentence = dice.choice(SENTENCES).split(" ")
            start = dice.randrange(len(sentence))
            words += sentence[start : start + dice.randint(1, 12)]
        texts.append(" ".join(words))
    return texts


def adversarial(count: int, seed: int) -> list[str]:
    """Return strings of pieces that hurt, of any code points, of few letters repeated, and sentences with intruders."""
    dice = random.Random(seed)

    def pieces() -> str:
        return "".join(dice.choice(PIECES) for _ in range(dice.randint(0, 16)))

    def code_points() -> str:
        blocks = ((0x20, 0x7F), (0, 0x300), (0x300, 0x370), (0, 0x3000), (0x3000, 0xD800), (0xE000, 0x110000))
        return "".join(chr(dice.randrange(*dice.choice(blocks))) for _ in range(dice.randint(1, 20)))

    def repetitive() -> str:
        parts = dice.choice(("aab. -e", ("ba", "na", "ab", "aba", "."), (".", "..", " ", "a")))
        return "".join(dice.choice(parts) for _ in range(dice.randint(0, 30)))

    def intruder() -> str:
        sentence = dice.choice(SENTENCES)
        place = dice.randrange(len(sentence))
        return sentence[:place] + dice.choice(PIECES) * dice.randint(1, 5) + sentence[place:]

    kinds = (pieces, pieces, pieces, code_points, repetitive, intruder)
    return [dice.choice(kinds)() for _ in range(count)]


#: The models that tests and benchmarks train: what is special about each.
MODELS: dict[str, dict[str, Any]] = {
    "bpe": {},
    "unigram": {},
    "bpe_bytes": {"byte_fallback": True, "character_coverage": 0.98},
    "unigram_bytes": {"byte_fallback": True, "character_coverage": 0.98},
    "bpe_identity": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "unigram_identity": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "bpe_symbols": {"user_defined_symbols": ["[MASK]", "<sep>", "ﬁx"], "control_symbols": ["<ctl>"], "pad_id": 3},
    "unigram_symbols": {"user_defined_symbols": ["[MASK]", "<sep>", "ﬁx"], "control_symbols": ["<ctl>"], "pad_id": 3},
    "bpe_suffix": {"treat_whitespace_as_suffix": True},
    "unigram_suffix": {"treat_whitespace_as_suffix": True},
    "bpe_plain_start": {"add_dummy_prefix": False},
    "unigram_across_words": {"split_by_whitespace": False, "split_by_unicode_script": False},
}


def train_model(path: Path, name: str) -> Path:
    """Train the model of this name on :func:`ordinary` text, and return the path of its file."""
    written = io.BytesIO()
    arguments: dict[str, Any] = {"character_coverage": 1.0, **MODELS[name]}
    if name.startswith("unigram"):
        arguments["hard_vocab_limit"] = False
    SentencePieceTrainer.train(
        sentence_iterator=iter(ordinary(500, seed=7)),
        model_writer=written,
        vocab_size=750,
        model_type=name.split("_")[0],
        num_threads=1,
        minloglevel=2,
        **arguments,
    )
    file = path / f"{name}.model"
    file.write_bytes(written.getvalue())
    return file
