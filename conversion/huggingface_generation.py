"""What `generation_config.json` says: ends of an answer, and defaults of sampling."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from llama_jax.checkpoint.json_files import read_json
from llama_jax.errors import TokenizerError
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import JsonObject

GENERATION = "generation_config.json"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_ends(
    folder: pathlib.Path, special: Mapping[str, int], vocab_size: int
) -> tuple[tuple[int, ...], list[str]]:
    """Return the ids that end an answer according to any file, and notes.

    The first configurations had wrong ids, so those of begin of sequence, unknown text
    and padding are left out.

    Args:
      folder: of the checkpoint.
      special: ids `bos`, `eos`, `unk` and `pad` of the tokenizer.
      vocab_size: of the model.

    Raises:
      TokenizerError: a list of ids is damaged.
    """
    ends: dict[int, None] = {}
    notes = []
    wrong = {
        "begin of sequence": special["bos"],
        "unknown text": special["unk"],
        "padding": special["pad"],
    }
    for name in (GENERATION, "config.json"):
        for id in _end_ids(folder / name):
            kind = next((kind for kind in wrong if wrong[kind] == id), None)
            if id == special["eos"]:
                continue
            if not 0 <= id < vocab_size:
                kind = "no token of the model"
            if kind is None:
                ends[id] = None
            else:
                notes.append(f"eos_token_id {id} of {name} is left out: it is {kind}")
    return tuple(ends), notes


def _end_ids(file: pathlib.Path) -> list[int]:
    value = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int for id in ids):
        raise TokenizerError(
            f"{file}: eos_token_id is {value!r:.60}; it must be an integer, or a list "
            "of integers"
        )
    return ids


def read_sampling(folder: pathlib.Path) -> dict[str, float]:
    """Return the defaults of sampling; without `do_sample`, the likeliest token.

    Raises:
      TokenizerError: a value is not a number.
    """
    file = folder / GENERATION
    fields = read_json(file) if file.is_file() else {}
    sampling: dict[str, float] = {}
    for name in _SAMPLING:
        value = fields.get(name)
        if value is None:
            continue
        if type(value) not in (int, float) or not math.isfinite(value):
            raise TokenizerError(
                f"{file}: {name} is {value!r:.60}; it must be a number"
            )
        sampling[name] = value
    if fields.get("do_sample") is False:
        # The other fields do not change which token is the likeliest.
        penalty = sampling.get("repetition_penalty")
        sampling = {"temperature": 0}
        if penalty is not None:
            sampling["repetition_penalty"] = penalty
    return sampling


def generation_fields(tokenizer: Tokenizer) -> JsonObject:
    """Return a `generation_config.json`; inverse of `read_ends` and `read_sampling`."""
    ids = special_ids(tokenizer)
    fields: dict[str, Any] = {f"{name}_token_id": id for name, id in ids.items()}
    sampling: Mapping[str, float] = tokenizer.settings.sampling
    if sampling:
        greedy = sampling.get("temperature") == 0
        fields["do_sample"] = not greedy
        names = ("repetition_penalty",) if greedy else _SAMPLING
        fields |= {name: sampling[name] for name in names if name in sampling}
    return fields


def special_ids(tokenizer: Tokenizer) -> dict[str, int | list[int]]:
    """Return the ids that `config.json` has too: begins, ends and padding."""
    ends = list(tokenizer.end_ids)
    ids: dict[str, int | list[int]] = {}
    if tokenizer.bos_id >= 0:
        ids["bos"] = tokenizer.bos_id
    if ends:
        ids["eos"] = ends if len(ends) > 1 else ends[0]
    if tokenizer.pad_id >= 0:
        ids["pad"] = tokenizer.pad_id
    return ids
