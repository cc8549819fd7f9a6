"""Tokenizer files beside checkpoints of every format."""

import pathlib
from typing import Any

from llama_jax.arguments import checked
from llama_jax.checkpoint.json_files import read_json, write_json
from llama_jax.conversion.llama2c_tokenizer import read_llama2c_tokenizer
from llama_jax.conversion.tokenizer_json import make_tokenizer_json
from llama_jax.errors import TokenizerError
from llama_jax.file_kinds import check_file
from llama_jax.text.sentencepiece_proto import pieces_of_model
from llama_jax.text.settings import AddedToken
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Path

_MODEL, _LLAMA2C, _JSON = "tokenizer.model", "tokenizer.bin", "tokenizer.json"
_ADDED, _SETTINGS = "added_tokens.json", "tokenizer_config.json"


def find_tokenizer(path: pathlib.Path) -> tuple[Tokenizer, pathlib.Path]:
    """Return the tokenizer beside a checkpoint, or in the folder above, and its file.

    Args:
      path: of the checkpoint.

    Raises:
      TokenizerError: there is none.
    """
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    names = (_MODEL,) if path.is_dir() else (_MODEL, _LLAMA2C)
    for parent in (folder, folder.parent):
        for name in names:
            if (file := parent / name).is_file():
                return open_tokenizer(file), file
    raise TokenizerError(
        f"{path}: there is no {' or '.join(names)} in its folder or the one above; "
        "name one with --tokenizer FILE (tokenizer=)"
    )


@checked(TokenizerError)
def open_tokenizer(file: Path) -> Tokenizer:
    """Open a `tokenizer.model`, `tokenizer.json` or `tokenizer.bin` (llama2.c).

    Raises:
      TokenizerError: the file is not a tokenizer.
    """
    file = pathlib.Path(file)
    if file.suffix == ".bin" and file.is_file():
        check_file(file, "tokenizer", TokenizerError)
        return Tokenizer(read_llama2c_tokenizer(file))
    return Tokenizer.from_file(file)


def read_hugging_face_tokenizer(
    folder: pathlib.Path, vocab_size: int
) -> tuple[Tokenizer, pathlib.Path]:
    """Return the tokenizer of a Hugging Face folder, with added tokens, and its file.

    Args:
      folder: of the checkpoint.
      vocab_size: of the model; added ids beyond it are dropped, since some folders list
        more than were trained.

    Raises:
      TokenizerError: there is none, or it is damaged.
    """
    file = folder / _MODEL
    if not file.is_file():
        file = folder / _JSON
        if not file.is_file():
            raise TokenizerError(
                f"{folder}: there is no {_MODEL} or {_JSON}; name a tokenizer with "
                "--tokenizer FILE (tokenizer=)"
            )
        return open_tokenizer(file), file
    tokenizer = Tokenizer.from_file(file)
    added = {
        id: name
        for id, name in _added_tokens(folder).items()
        if tokenizer.vocab_size <= id < vocab_size
    }
    if added:
        tokens = {id: AddedToken(name) for id, name in added.items()}
        tokenizer = tokenizer.replace_settings(added_tokens=tokens)
    return tokenizer, file


def _added_tokens(folder: pathlib.Path) -> dict[int, str]:
    """Return id and name of added tokens, from either file that may list them."""
    added: dict[int, str] = {}
    if (folder / _ADDED).is_file():
        for name, id in read_json(folder / _ADDED).items():
            if type(id) is not int:
                raise TokenizerError(
                    f"{folder / _ADDED}: the id of {name!r} is {id!r}; it must be an "
                    "integer"
                )
            added[id] = name
    if (folder / _SETTINGS).is_file():
        listed: Any = read_json(folder / _SETTINGS).get("added_tokens_decoder")
        for id, token in (listed if isinstance(listed, dict) else {}).items():
            content = token.get("content") if isinstance(token, dict) else None
            if not id.isdecimal() or len(id) > 9 or not isinstance(content, str):
                raise TokenizerError(
                    f"{folder / _SETTINGS}: added_tokens_decoder has the entry "
                    f"{id[:20]!r}; each must be an id and an object with `content`"
                )
            added.setdefault(int(id), content)
    return added


def write_hugging_face_tokenizer(
    folder: pathlib.Path, tokenizer: Tokenizer, max_seq_len: int
) -> None:
    """Write the tokenizer files that `transformers` looks for in a model's folder.

    A SentencePiece model is written twice: unchanged, and as a `tokenizer.json` that
    gives the same ids.

    Args:
      folder: of the checkpoint.
      tokenizer: to write.
      max_seq_len: of the model, in tokens.
    """
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id}
    names = {
        f"{kind}_token": tokenizer.piece(id) for kind, id in ids.items() if id >= 0
    }
    (folder / tokenizer.file_name).write_bytes(tokenizer.contents)
    if tokenizer.added_tokens:
        added = {name: id for id, name in tokenizer.added_tokens.items()}
        write_json(folder / _ADDED, added)
    if tokenizer.has_pieces and tokenizer.file_name != _JSON:
        content = make_tokenizer_json(
            pieces_of_model(tokenizer.model_proto),
            tokenizer.added_tokens,
            unk=names["unk_token"],
            bos=names["bos_token"],
        )
        write_json(folder / _JSON, content)
    write_json(folder / "special_tokens_map.json", names)
    settings = {
        # This class uses tokenizer.json unchanged. LlamaTokenizer of transformers 5
        # builds its own, which splits leading spaces in another way.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        **names,
    }
    write_json(folder / _SETTINGS, settings)
