"""Byte-level tokenizers of GGUF files, from and to a `tokenizer.json`.

A file names the rule that splits text before bytes are merged (`tokenizer.ggml.pre`).
The rules are llama.cpp's.
"""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llama_jax.conversion.config_fields import short_repr
from llama_jax.conversion.gguf_header import Header
from llama_jax.conversion.gguf_text_settings import read_settings
from llama_jax.conversion.gguf_vocabulary import (
    OTHER_TOKENIZER,
    TOKENIZER,
    damaged_tokenizer,
    read_text,
    read_vocabulary,
    special_ids,
)
from llama_jax.errors import ConfigError, TokenizerError
from llama_jax.text.byte_level_bpe import LLAMA3_PATTERN, is_ranks, json_of_ranks
from llama_jax.text.byte_level_json import (
    DIGIT_PATTERN,
    GPT2_PATTERN,
    make_byte_level_json,
    merge_pairs,
    split_patterns,
)
from llama_jax.text.sentencepiece_proto import NORMAL
from llama_jax.text.settings import TextSettings
from llama_jax.text.tokenizer import Tokenizer


class SplitRule(NamedTuple):
    """How text is split.

    Attributes:
      patterns: regular expressions, one after another.
      ignore_merges: whether a word that is a piece is not merged.
      add_bos: whether a prompt begins with the begin of sequence, if a file does not
        say so.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}*{_CASED[1]}+|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED[0]}+{_CASED[1]}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RULES = {
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "midm-2.0", "pixtral"):
        SplitRule((LLAMA3_PATTERN,), ignore_merges=True, add_bos=True),
    ("smaug-bpe", "dbrx"): SplitRule((LLAMA3_PATTERN,)),
    ("gpt-2", "exaone4", "gigachat", "jais", "mellum", "mpt", "olmo", "phi-2",
     "trillion"): SplitRule((GPT2_PATTERN,)),
    ("smollm", "codeshell", "command-r", "exaone", "mellum2", "minerva-7b", "refact",
     "starcoder"): SplitRule((DIGIT_PATTERN, GPT2_PATTERN)),
    ("qwen2", "deepseek-r1-qwen", "hunyuan", "kormo", "megrez", "stablelm2"):
        SplitRule((LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),)),
    ("tekken",): SplitRule((_TEKKEN_PATTERN,), ignore_merges=True, add_bos=True),
    ("deepseek-coder",): SplitRule(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", DIGIT_PATTERN)
    ),
}  # fmt: skip
SPLIT_RULES: Mapping[str, SplitRule] = {
    name: rule for names, rule in _RULES.items() for name in names
}
"""The rules by llama.cpp's names; the first name of equal rules is written."""


class ByteLevelPieces(NamedTuple):
    """The pieces of a byte-level tokenizer, as GGUF files describe them.

    Attributes:
      pieces: text of each id, spelled in `byte_characters`, without added tokens.
      merges: pairs of pieces, first to last.
      pre: name of the rule that splits text.
    """

    pieces: Mapping[int, str]
    merges: Sequence[tuple[str, str]]
    pre: str


def read_byte_level(header: Header) -> tuple[bytes, TextSettings]:
    """Return the byte-level tokenizer in a file (`tokenizer.json`), and its settings.

    Raises:
      TokenizerError: the rule that splits text is not known, or the tokens or settings
        are damaged.
    """
    name = read_text(header, f"{TOKENIZER}pre") or "default"
    merges = header.value(f"{TOKENIZER}merges")
    if (rule := SPLIT_RULES.get(name)) is None:
        problem = f"splits text by the rule {short_repr(name)}, which is not known here"
        if name == "default":
            problem = "does not name the rule that splits text"
        raise TokenizerError(
            f"{header.path}: its byte-level tokenizer {problem} ({TOKENIZER}pre; known "
            f"are {', '.join(SPLIT_RULES)}); {OTHER_TOKENIZER}"
        )
    vocabulary = read_vocabulary(header)
    special = special_ids(header, len(vocabulary.texts))
    settings = read_settings(
        header, vocabulary, special, first_added=0, add_bos=rule.add_bos
    )
    try:
        if not isinstance(merges, list) or len({*vocabulary.texts}) < len(
            vocabulary.texts
        ):
            raise ValueError
        content = make_byte_level_json(
            {vocabulary.texts[id]: id for id in vocabulary.ids(NORMAL)},
            merge_pairs(merges),
            settings.added_tokens,
            patterns=rule.patterns,
            ignore_merges=rule.ignore_merges,
        )
    except ValueError as error:
        raise damaged_tokenizer(header) from error
    return json.dumps(content, ensure_ascii=False).encode(), settings


def byte_level_pieces(tokenizer: Tokenizer) -> ByteLevelPieces:
    """Return the pieces of a byte-level tokenizer.

    Raises:
      ConfigError: llama.cpp has no name for the rule that splits text, or the tokenizer
        changes text before that.
    """
    contents = tokenizer.contents
    spec = json_of_ranks(contents) if is_ranks(contents) else json.loads(contents)
    if (normalizer := spec.get("normalizer")) is not None:
        raise ConfigError(
            f"the tokenizer normalizes text ({normalizer.get('type')}), which a GGUF "
            "file cannot store; choose another format"
        )
    model = spec["model"]
    rule = (split_patterns(spec), bool(model.get("ignore_merges")))
    names = [name for name, known in SPLIT_RULES.items() if known[:2] == rule]
    if not names:
        raise ConfigError(
            "the tokenizer splits text by a rule for which llama.cpp has no name that "
            "is known here; choose another format, or convert the Hugging Face folder "
            "with llama.cpp's converter"
        )
    added = tokenizer.settings.added_tokens
    pieces = {id: text for text, id in model["vocab"].items() if id not in added}
    return ByteLevelPieces(pieces, merge_pairs(model["merges"]), names[0])
