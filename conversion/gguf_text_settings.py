"""What a GGUF file says about text besides its vocabulary: `TextSettings`."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.conversion.config_fields import short_repr
from llama_jax.conversion.gguf_header import (
    BOOL,
    FLOAT32,
    INT32,
    STRING,
    UINT32,
    Header,
    MetadataValue,
)
from llama_jax.conversion.gguf_vocabulary import (
    OTHER_TOKENIZER,
    SPECIAL_IDS,
    TOKENIZER,
    Vocabulary,
    read_text,
    token_id,
)
from llama_jax.errors import TokenizerError
from llama_jax.text.sentencepiece_proto import CONTROL
from llama_jax.text.settings import TextSettings
from llama_jax.text.tokenizer import Tokenizer

SETTINGS = "llama_jax.text_settings"
"""Key of all of `TextSettings` as JSON, since some have no key of llama.cpp's."""

_ENDS = ("eot_token_id", "eom_token_id")
# Control tokens that llama.cpp takes for ends of an answer whatever the keys say,
# because most files have no keys for them.
_END_NAMES = {
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>",
    "<|end_of_text|>", "<end_of_turn>", "<EOT>", "</s>",
}  # fmt: skip
_INFILLING = {
    "prefix": "fim_pre_token_id",
    "suffix": "fim_suf_token_id",
    "middle": "fim_mid_token_id",
    "end": "eot_token_id",
}
_TEMPLATE, _TEMPLATES = "tokenizer.chat_template", "tokenizer.chat_templates"
# Field of `Sampling`, and type, of each key of llama.cpp's defaults for sampling.
_SAMPLING = {
    "temp": ("temperature", FLOAT32),
    "top_k": ("top_k", INT32),
    "top_p": ("top_p", FLOAT32),
    "min_p": ("min_p", FLOAT32),
    "penalty_repeat": ("repetition_penalty", FLOAT32),
}


def flag(header: Header, key: str, *, default: bool) -> bool:
    """Read a setting that is on or off.

    Raises:
      TokenizerError: it is something else.
    """
    value = header.value(TOKENIZER + key)
    if value is not None and type(value) is not bool:
        raise TokenizerError(
            f"{header.path}: {TOKENIZER}{key} is {short_repr(value)}; it must be true "
            f"or false; {OTHER_TOKENIZER}"
        )
    return default if value is None else value


def read_settings(
    header: Header,
    vocabulary: Vocabulary,
    special: Mapping[str, int],
    *,
    first_added: int,
    add_bos: bool,
) -> TextSettings:
    """Read all that llama.cpp has keys for.

    Args:
      header: of the file.
      vocabulary: of the file.
      special: the special ids by name.
      first_added: id from which on tokens were added to a tokenizer.
      add_bos: what `add_bos_token` is if a file does not say it.

    Raises:
      TokenizerError: a value is damaged.
    """
    return TextSettings(
        added_tokens=vocabulary.added_tokens(first_added),
        bos_id=special["bos"],
        eos_id=special["eos"],
        unk_id=special["unk"],
        pad_id=special["pad"],
        end_ids=_read_ends(header, vocabulary, special),
        add_bos=flag(header, "add_bos_token", default=add_bos),
        add_eos=flag(header, "add_eos_token", default=False),
        chat_templates=_read_templates(header),
        sampling=_read_sampling(header),
    )


def _read_ends(
    header: Header, vocabulary: Vocabulary, special: Mapping[str, int]
) -> tuple[int, ...]:
    """The ids that end an answer, besides the end of sequence."""
    texts = vocabulary.texts
    named = (token_id(header, key, len(texts)) for key in _ENDS)
    ends = [id for id in named if id is not None]
    ends += [id for id in vocabulary.ids(CONTROL) if texts[id] in _END_NAMES]
    # Code Llama's end is that of an infilling.
    no_ends = {*special.values(), *(id for id in ends if texts[id] == "▁<EOT>")}
    return tuple(dict.fromkeys(id for id in ends if id not in no_ends))


def left_out_ends(header: Header, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return sentences about ids that a file names as ends, and that are none."""
    kinds = {
        tokenizer.bos_id: "begin of sequence",
        tokenizer.unk_id: "unknown text",
        tokenizer.pad_id: "padding",
    }
    size = header.entries[f"{TOKENIZER}tokens"].length or 0
    ids = {TOKENIZER + key: token_id(header, key, size) for key in _ENDS}
    return tuple(
        f"{key} {id} is left out: it is {kinds[id]}"
        for key, id in ids.items()
        if id in kinds and id != tokenizer.eos_id
    )


def _read_templates(header: Header) -> dict[str, str]:
    prefix = f"{_TEMPLATE}."
    templates = {}
    for key in header.entries:
        if key != _TEMPLATE and not key.startswith(prefix):
            continue
        name = "default" if key == _TEMPLATE else key.removeprefix(prefix)
        templates[name] = read_text(header, key) or ""
    return templates


def _read_sampling(header: Header) -> dict[str, float]:
    sampling: dict[str, float] = {}
    for key, (name, _) in _SAMPLING.items():
        value = header.value(f"general.sampling.{key}")
        if value is None:
            continue
        if not isinstance(value, (int, float)) or not np.isfinite(value):
            raise TokenizerError(
                f"{header.path}: general.sampling.{key} is {short_repr(value)}; it "
                "must be a number"
            )
        sampling[name] = value
    return sampling


def settings_metadata(
    tokenizer: Tokenizer, vocab_size: int
) -> dict[str, MetadataValue]:
    """Return the metadata of a tokenizer's settings, without ids a model lacks."""
    settings = tokenizer.settings
    ids = {key: getattr(tokenizer, f"{name}_id") for name, key in SPECIAL_IDS.items()}
    ends = [id for id in tokenizer.end_ids if id != tokenizer.eos_id]
    # Llama 3's end of a message to a tool.
    ends.sort(key=lambda id: id == tokenizer.piece_id("<|eom_id|>"))
    ids |= dict(zip(_ENDS, ends, strict=False))
    if tokenizer.infilling is not None:
        of_infilling = tokenizer.infilling._asdict()
        ids |= {key: of_infilling[name] for name, key in _INFILLING.items()}
    metadata = {
        TOKENIZER + key: MetadataValue(UINT32, id)
        for key, id in ids.items()
        if 0 <= id < vocab_size
    }
    metadata |= {
        f"{TOKENIZER}add_bos_token": MetadataValue(BOOL, settings.add_bos),
        f"{TOKENIZER}add_eos_token": MetadataValue(BOOL, settings.add_eos),
    }
    for name, template in settings.chat_templates.items():
        key = _TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}"
        metadata[key] = MetadataValue(STRING, template)
    if names := sorted(settings.chat_templates.keys() - {"default"}):
        metadata[_TEMPLATES] = MetadataValue(STRING, names)
    for key, (name, kind) in _SAMPLING.items():
        if (value := settings.sampling.get(name)) is not None:
            number = int(value) if kind == INT32 else float(value)
            metadata[f"general.sampling.{key}"] = MetadataValue(kind, number)
    return metadata


def own_settings(tokenizer: Tokenizer) -> MetadataValue:
    """Return all settings of a tokenizer, and the number of its pieces."""
    fields = {"pieces": tokenizer.vocab_size, **tokenizer.settings.to_dict()}
    return MetadataValue(STRING, json.dumps(fields))


def read_own_settings(header: Header) -> tuple[int, TextSettings] | None:
    """Read what `own_settings` wrote; None if this library did not write the file.

    Raises:
      TokenizerError: it is damaged.
    """
    value = read_text(header, SETTINGS)
    if value is None:
        return None
    try:
        fields: dict[str, Any] = dict(json.loads(value))
        return int(fields.pop("pieces")), TextSettings.from_dict(fields)
    except (TypeError, ValueError, KeyError, RecursionError, TokenizerError) as error:
        raise TokenizerError(
            f"{header.path}: {SETTINGS} is damaged ({error}); {OTHER_TOKENIZER}"
        ) from error


def agrees(header: Header, metadata: Mapping[str, MetadataValue]) -> bool:
    """Whether a file has these settings, and no others."""
    for key, (kind, content) in metadata.items():
        value = header.value(key)
        if kind == FLOAT32 and isinstance(value, (int, float)):
            value, content = (np.float32(str(x)).item() for x in (value, content))
        if isinstance(value, np.ndarray) or value != content:
            return False
    others = {TOKENIZER + key for key in (*SPECIAL_IDS.values(), *_ENDS)}
    others |= {f"general.sampling.{key}" for key in _SAMPLING}
    others |= {key for key in header.entries if key.startswith(_TEMPLATE)}
    return not (others - metadata.keys()) & header.entries.keys()
