"""From any checkpoint to any other, tensor by tensor."""

import hashlib
import pathlib
import time
from collections.abc import Mapping
from typing import NamedTuple

from llama_jax.checkpoint.atomic_write import new_file, new_folder
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress
from llama_jax.checkpoint.model_folder import save_params
from llama_jax.config import LlamaConfig
from llama_jax.conversion.formats import FormatName, format_of_target, open_source
from llama_jax.conversion.gguf import GGUFKind, write_gguf
from llama_jax.conversion.host_memory import anonymous_bytes, watching
from llama_jax.conversion.huggingface import write_hugging_face
from llama_jax.conversion.llama2c import check_config, write_llama2c
from llama_jax.conversion.llama2c_tokenizer import to_llama2c
from llama_jax.conversion.meta import check_ranks, params_from_config, write_meta
from llama_jax.conversion.source import Export, Source
from llama_jax.conversion.tensor_mapping import export
from llama_jax.conversion.tensor_tables import (
    GGUF,
    HUGGING_FACE,
    LLAMA2C,
    META,
    ORBAX,
    Format,
)
from llama_jax.conversion.tokenizer_files import open_tokenizer
from llama_jax.errors import CheckpointError, ConfigError, TokenizerError
from llama_jax.params import count_params
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Path

_TABLES: Mapping[FormatName, Format] = {
    "orbax": ORBAX,
    "hf": HUGGING_FACE,
    "meta": META,
    "gguf": GGUF,
    "llama2c": LLAMA2C,
}
_DTYPES = ("float32", "bfloat16", "float16", "q8_0")
_FLOATS: Mapping[str | None, GGUFKind] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
}
_BESIDES = 64 << 20  # what the interpreter, Orbax and its threads take meanwhile


class Plan(NamedTuple):
    """A conversion that is thought through and not begun.

    Attributes:
      source: what is read.
      to: the format that is written.
      model: its leaves in their final dtype, and the tokenizer.
      tensors: what will be written, by foreign name.
      tokenizer: where it was found.
      gguf_kind: of a GGUF's matrices.
      host_bytes: of memory that will be taken at most, page cache not counted; None
        where the system does not say what is taken already.
    """

    source: Source
    to: FormatName
    model: Export
    tensors: Mapping[str, LazyLeaf]
    tokenizer: pathlib.Path
    gguf_kind: GGUFKind
    host_bytes: int | None


class Converted(NamedTuple):
    """What a conversion did.

    Attributes:
      config: of the model.
      context: where its `max_seq_len` comes from, in words.
      tokenizer: the file that was used.
      parameters: how many numbers.
      bytes: what the new folder or file takes on disk.
      seconds: how long it took.
      peak_bytes: of host memory, page cache not counted; None where unknown.
    """

    config: LlamaConfig
    context: str
    tokenizer: pathlib.Path
    parameters: int
    bytes: int
    seconds: float
    peak_bytes: int | None


def convert(
    src: Path,
    dst: Path,
    *,
    source_format: FormatName | None = None,
    target_format: FormatName | None = None,
    ranks: int = 1,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    max_seq_len: int | None = None,
    max_host_bytes: int | None = None,
    progress: Progress | None = None,
) -> Converted:
    """Write a checkpoint in another format; it appears complete or not at all.

    Memory holds a few tensors, never the model.

    Args:
      src: a folder of Meta's, Hugging Face's or ours, a GGUF, or a llama2.c `.bin`.
      dst: the new folder or file.
      source_format: of `src`; recognised where not given.
      target_format: of `dst`; where not given its suffix decides, and ours is the
        format of a folder.
      ranks: model-parallel files of a folder of Meta's.
      tokenizer: a `tokenizer.model`, `tokenizer.json`, or llama2.c `tokenizer.bin`; the
        checkpoint's own, or the one in the folder above, where not given.
      dtype: of the weights: float32, bfloat16, float16, or q8_0 in a GGUF; as they are
        where not given (in a GGUF float16, and llama2.c has only float32).
      max_seq_len: longest sequence; what the checkpoint or the published model of
        its sizes says where not given.
      max_host_bytes: refuse beforehand what would take more memory.
      progress: told of the bytes that are verified and written.

    Raises:
      CheckpointError: the source is damaged or unknown, there is something at `dst`, or
        `max_host_bytes` does not suffice.
      ConfigError: its configuration is not understood, or cannot be said in the
        target's format.
      TokenizerError: there is no tokenizer, or it has more pieces than the model ids.
    """
    start = time.monotonic()
    plan = plan_conversion(
        src,
        dst,
        source_format=source_format,
        target_format=target_format,
        ranks=ranks,
        tokenizer=tokenizer,
        dtype=dtype,
        max_seq_len=max_seq_len,
    )
    if max_host_bytes is not None and (plan.host_bytes or 0) > max_host_bytes:
        raise CheckpointError(
            f"{src}: would take {plan.host_bytes:,} bytes of host memory, more than "
            f"the {max_host_bytes:,} that are allowed; allow more, or convert on a "
            "larger machine"
        )
    with watching() as peak:
        verify_checksums(plan.source, progress)
        _write(plan, pathlib.Path(dst), ranks, progress)
    return Converted(
        plan.source.config,
        plan.source.context,
        plan.tokenizer,
        count_params(plan.model.leaves),
        _size(pathlib.Path(dst)),
        time.monotonic() - start,
        peak.bytes,
    )


def plan_conversion(
    src: Path,
    dst: Path,
    *,
    source_format: FormatName | None = None,
    target_format: FormatName | None = None,
    ranks: int = 1,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    max_seq_len: int | None = None,
) -> Plan:
    """Everything that a conversion decides before it reads a weight; see `convert`."""
    to = target_format or format_of_target(dst)
    if to not in _TABLES:
        choices = ", ".join(_TABLES)
        raise ConfigError(f"the format {to!r} is unknown; choose from {choices}")
    if dtype is not None and dtype not in _DTYPES:
        choices = ", ".join(_DTYPES)
        raise ConfigError(f"dtype is {dtype!r}; choose from {choices}")
    if dtype == "q8_0" and to != "gguf":
        raise ConfigError("dtype q8_0 is one of GGUF; write a .gguf file (--to gguf)")
    source = open_source(src, form=source_format, max_seq_len=max_seq_len)
    if source.form is ORBAX and to == "orbax":
        raise CheckpointError(
            f"{src}: is a llama_jax checkpoint already, no conversion is needed; name "
            "another format with --to (target_format=)"
        )
    if tokenizer is None:
        pieces, file = source.find_tokenizer()
    else:
        file = pathlib.Path(tokenizer)
        pieces = open_tokenizer(file)
    pieces.check_fits(source.config.vocab_size)
    default = {"llama2c": "float32", "gguf": "float16"}.get(to)
    kind = "float32" if dtype == "q8_0" else dtype or default
    if to == "llama2c" and kind != "float32":
        raise ConfigError(f"llama2.c's format has only float32, not {dtype}")
    if to == "meta":
        params_from_config(source.config)
        check_ranks(source.config, ranks)
    elif to == "llama2c":
        check_config(source.config)
    model = Export(source.config, source.leaves(kind), pieces)
    tensors = export(_TABLES[to], model.leaves, source.config)
    held = anonymous_bytes()
    if held is not None:
        held += _BESIDES + _most_bytes(tensors, reads_ahead=to == "orbax")
    gguf_kind: GGUFKind = "q8_0" if dtype == "q8_0" else _FLOATS.get(kind, "float16")
    return Plan(source, to, model, tensors, file, gguf_kind, held)


def verify_checksums(source: Source, progress: Progress | None = None) -> None:
    """Compare the files of a checkpoint with the md5 sums that came with it, if any.

    Raises:
      CheckpointError: a file differs.
    """
    done, total = 0, sum(file.stat().st_size for file in source.checksums)
    for file, wanted in source.checksums.items():
        digest = hashlib.md5(usedforsecurity=False)
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress("verifying", done, total)
        if digest.hexdigest() != wanted:
            raise CheckpointError(
                f"{file}: its md5 is not the one in checklist.chk; download it again, "
                "or remove checklist.chk if the change is meant"
            )


def _most_bytes(tensors: Mapping[str, LazyLeaf], *, reads_ahead: bool) -> int:
    """Of memory while writing: a tensor in the making, and the one being written."""
    making = max(tensor.host_bytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    return making + largest * (1 + reads_ahead)


def _write(
    plan: Plan, dst: pathlib.Path, ranks: int, progress: Progress | None
) -> None:
    model = plan.model
    if plan.to == "orbax":
        config, pieces = model.config, model.tokenizer
        save_params(dst, model.leaves, config, tokenizer=pieces, progress=progress)
    elif plan.to == "meta":
        with new_folder(dst) as folder:
            write_meta(folder, model, ranks=ranks, progress=progress)
    elif plan.to == "hf":
        with new_folder(dst) as folder:
            write_hugging_face(folder, model, progress=progress)
    elif plan.to == "gguf":
        with new_file(dst) as file:
            write_gguf(file, model, kind=plan.gguf_kind, progress=progress)
    else:
        packed = _packed_tokenizer(model.tokenizer, dst)
        with new_file(dst) as file:
            write_llama2c(file, model, progress=progress)
        if packed is not None:
            with new_file(dst.with_name("tokenizer.bin")) as file:
                file.write_bytes(packed)


def _packed_tokenizer(tokenizer: Tokenizer | None, dst: pathlib.Path) -> bytes | None:
    """What `tokenizer.bin` beside a `.bin` must hold; None where it does already.

    Raises:
      TokenizerError: another one is there.
    """
    if tokenizer is None:
        return None
    file = dst.with_name("tokenizer.bin")
    packed = to_llama2c(tokenizer.model_proto)
    if not file.exists():
        return packed
    if file.read_bytes() != packed:
        raise TokenizerError(
            f"{file}: is another tokenizer than this model's; write to another folder"
        )
    return None


def _size(path: pathlib.Path) -> int:
    """Of a file, or of all files in a folder, in bytes."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
