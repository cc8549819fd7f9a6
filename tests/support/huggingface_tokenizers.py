"""Small SentencePiece models, and the `tokenizers` of Hugging Face for them."""

import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llama_jax.text.settings import AddedToken, PrefixSpace

_SPACE = "▁"


@functools.cache
def small_model(
    *, user_defined: Sequence[str] = (), dummy_prefix: bool = True
) -> bytes:
    """A SentencePiece model like Llama's, with 320 pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["once upon a time in the  sun", "ünder   the sea"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=list(user_defined),
        add_dummy_prefix=dummy_prefix,
        minloglevel=2,
    )
    return model.getvalue()


def their_tokenizer(
    model_proto: bytes, added: Mapping[int, AddedToken], prefix_space: PrefixSpace
) -> tokenizers.Tokenizer:
    """The fast tokenizer that `transformers` makes of a SentencePiece model.

    Args:
      model_proto: without user-defined pieces.
      added: tokens beyond its pieces, without gaps.
      prefix_space: rule of spaces.
    """
    sp = sentencepiece.SentencePieceProcessor(model_proto=model_proto)
    texts = [sp.id_to_piece(id) for id in range(sp.vocab_size())]
    ids = {text: id for id, text in enumerate(texts)}
    normal = {text for id, text in enumerate(texts) if id > 2 and not sp.is_byte(id)}
    merges = [
        (text[:cut], text[cut:])
        for text in normal
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]

    def order(pair: tuple[str, str]) -> tuple[float, int, int]:
        return -sp.get_score(ids["".join(pair)]), ids[pair[0]], ids[pair[1]]

    bpe = models.BPE(
        ids, sorted(merges, key=order), unk_token="<unk>", fuse_unk=True,
        byte_fallback=True,
    )  # fmt: skip
    tokenizer = tokenizers.Tokenizer(bpe)
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    if prefix_space == "always":
        steps.insert(0, normalizers.Prepend(_SPACE))
    if prefix_space.endswith("_once"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            _SPACE, prefix_space.removesuffix("_once"), split=False
        )
    else:
        tokenizer.normalizer = normalizers.Sequence(steps)
    if prefix_space == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Metaspace(" ", "first", split=False),
            pre_tokenizers.Metaspace(_SPACE, "never", split=False),
        ])  # fmt: skip
    strip = [decoders.Strip(" ", 1, 0)] if prefix_space != "never" else []
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip
    ])  # fmt: skip
    special = [AddedToken(text) for text in texts[:3]]
    for token in (*special, *(added[id] for id in sorted(added))):
        flags = token._asdict()
        tokenizer.add_tokens([tokenizers.AddedToken(flags.pop("text"), **flags)])
    return tokenizer
