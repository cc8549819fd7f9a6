"""SentencePiece models of GGUF files.

llama.cpp stores the pieces with their scores and types, in SentencePiece's numbers. The
rest of a model is the same for all tokenizers of Llama 1, Llama 2 and Code Llama.
"""

import dataclasses

import numpy as np

from llama_jax.conversion.gguf_header import (
    Header,
)
from llama_jax.conversion.gguf_text_settings import flag, read_settings
from llama_jax.conversion.gguf_vocabulary import (
    TOKENIZER,
    damaged_tokenizer,
    read_vocabulary,
    special_ids,
)
from llama_jax.errors import ConfigError
from llama_jax.text.sentencepiece_codec import SentencePieces
from llama_jax.text.sentencepiece_proto import (
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    model_of_pieces,
)
from llama_jax.text.settings import PrefixSpace, TextSettings
from llama_jax.text.tokenizer import Tokenizer

_SPACE = "▁"


def read_sentencepiece(
    header: Header, num_pieces: int | None
) -> tuple[bytes, TextSettings]:
    """Return the SentencePiece model in a file, and its settings.

    Tokens at the end that are not normal text were added to the model later.

    Args:
      header: of the file.
      num_pieces: of the model, if that is known.

    Raises:
      TokenizerError: the tokens or settings are damaged.
    """
    vocabulary = read_vocabulary(header)
    texts, kinds = vocabulary
    scores = header.value(f"{TOKENIZER}scores")
    if not (
        isinstance(scores, np.ndarray)
        and len(scores) == len(texts)
        and scores.dtype.kind == "f"
        and np.isfinite(scores).all()
    ):
        raise damaged_tokenizer(header)
    pieces = [
        Piece(text.replace(" ", _SPACE) if kind == USER_DEFINED else text, score, kind)
        for text, score, kind in zip(texts, scores.tolist(), kinds, strict=True)
    ]
    special = special_ids(header, len(pieces), bos=1, eos=2, unk=0)
    # An added token may be the end of sequence; the model has its own.
    controls = {texts[id]: id for id in vocabulary.ids(CONTROL)}
    own = {
        "bos_id": controls.get("<s>", special["bos"]),
        "eos_id": controls.get("</s>", special["eos"]),
        "unk_id": (*vocabulary.ids(UNKNOWN), special["unk"])[0],
    }
    first = max(own.values()) + 1
    if num_pieces is not None and first <= num_pieces <= len(pieces):
        first = num_pieces
    while len(pieces) > first and pieces[-1].kind in (CONTROL, USER_DEFINED, UNUSED):
        pieces.pop()
    add_space_prefix = flag(header, "add_space_prefix", default=True)
    model = model_of_pieces(pieces, add_dummy_prefix=add_space_prefix, **own)
    settings = read_settings(
        header, vocabulary, special, first_added=len(pieces), add_bos=True
    )
    prefix_space: PrefixSpace = "always" if add_space_prefix else "never"
    return model, dataclasses.replace(settings, prefix_space=prefix_space)


def adds_space_prefix(tokenizer: Tokenizer) -> bool:
    """Return whether text gets a space in front.

    Raises:
      ConfigError: the tokenizer normalizes text, which llama.cpp does not.
    """
    pieces = SentencePieces(tokenizer.model_proto)
    with_space, without = "▁ﬁ▁▁X▁", "ﬁ▁▁X▁"
    normalized = pieces.sp.normalize("ﬁ  X ")
    if normalized not in (with_space, without):
        raise ConfigError(
            "the tokenizer normalizes text (NFKC, or repeated spaces), which a GGUF "
            "file of a Llama cannot store; is it another model's tokenizer?"
        )
    if (prefix_space := tokenizer.settings.prefix_space) is not None:
        return prefix_space != "never"
    return bool(normalized == with_space)
