"""The same segmentation in ``tokenizers``: a SentencePiece model as its BPE or Unigram."""

from __future__ import annotations

from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from flash_reformer.tokenization.sentencepiece_model import SPACE, SentencePieceModel

# What SentencePiece gives a user-defined symbol, whatever its length: almost nothing, where every entry costs more.
_USER_DEFINED_SCORE = -0.1


def make_backend(model: SentencePieceModel) -> Tokenizer:
    """Return a tokenizer that can be saved: it stands alone, and agrees with SentencePiece on ordinary text.

    Its normaliser is the stock one, which reads the model's table by graphemes where SentencePiece looks for the
    longest match. :class:`ExactTokenizer` normalises with SentencePiece before and asks only for segmentation.
    Raises ``ValueError`` for models that are neither Unigram nor BPE.
    """
    if model.kind == "bpe":
        segmenter: models.Model = _bpe(model)
    elif model.kind == "unigram":
        segmenter = _unigram(model)
    else:
        raise ValueError(
            f"vocab_file must hold a Unigram or BPE model, got a {model.kind} model: ReformerTokenizer reads it"
        )
    backend = Tokenizer(segmenter)
    normalizer, backend.pre_tokenizer = _stock_rules(model)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = make_decoder(model)
    return backend


def make_segmenter(model: SentencePieceModel, backend: Tokenizer) -> Tokenizer:
    """Return a tokenizer for text that is already normalised: the backend's vocabulary, and no added tokens."""
    segmenter = Tokenizer(backend.model)
    if model.splits_at_spaces and model.space_at_end:
        segmenter.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_previous")
    elif model.splits_at_spaces:  # the same with the next word, and twice as fast
        segmenter.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "never")
    if model.kind == "bpe":  # merges do not lead to them; Unigram finds them by their score
        segmenter.add_tokens([AddedToken(name, normalized=False, special=False) for name in sorted(model.user_defined)])
    return segmenter


def make_decoder(model: SentencePieceModel) -> decoders.Decoder:
    """Return what makes text of tokens: spaces written as spaces, bytes joined, the dummy space taken off."""
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.adds_dummy_space:
        # Strip on the right panics on an empty text.
        steps.append(decoders.Replace(Regex(r" \z"), "") if model.space_at_end else decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _bpe(model: SentencePieceModel) -> models.BPE:
    return models.BPE(
        vocab=model.vocabulary,
        merges=list(_merges(model)),
        unk_token=model.unk_piece,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _merges(model: SentencePieceModel) -> Iterator[tuple[str, str]]:
    """Yield every pair whose union is an entry, the best entry first: SentencePiece merges by the union's score."""
    entries = {name: (-score, index) for index, name, score in model.pieces("NORMAL", "USER_DEFINED")}
    for name in sorted(entries, key=entries.__getitem__):
        for cut in range(1, len(name)):
            if name[:cut] in entries and name[cut:] in entries:
                yield name[:cut], name[cut:]


def _unigram(model: SentencePieceModel) -> models.Unigram:
    scores = [0.0] * len(model.vocabulary)
    for index, _, score in model.pieces("NORMAL"):
        scores[index] = score
    for index, _, _ in model.pieces("USER_DEFINED"):
        scores[index] = _USER_DEFINED_SCORE
    unk_id = model.vocabulary[model.unk_piece]
    return models.Unigram(list(zip(model.vocabulary, scores, strict=True)), unk_id, model.byte_fallback)


def _stock_rules(model: SentencePieceModel) -> tuple[normalizers.Normalizer | None, pre_tokenizers.PreTokenizer]:
    rules = model.proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.space_at_end:
        steps.append(normalizers.Replace(" ", SPACE))
        if rules.add_dummy_prefix:
            steps.append(normalizers.Replace(Regex("(?<=[^▁])$"), SPACE))
        splitter: pre_tokenizers.PreTokenizer = pre_tokenizers.Split(SPACE, "merged_with_previous")
    else:
        splitter = pre_tokenizers.Metaspace(
            SPACE, "always" if rules.add_dummy_prefix else "never", split=model.splits_at_spaces
        )
    return (normalizers.Sequence(steps) if steps else None), splitter
