"""Convert a checkpoint of any format to any other, tensor by tensor."""

import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from llama_jax.arguments import checked
from llama_jax.checkpoint.atomic_write import new_file, new_folder
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, Progress
from llama_jax.checkpoint.model_folder import save_params
from llama_jax.config import LlamaConfig
from llama_jax.conversion.checksums import verify_checksums
from llama_jax.conversion.formats import (
    check_target,
    format_of_target,
    open_source,
)
from llama_jax.conversion.gguf import write_gguf
from llama_jax.conversion.gguf_tensors import GGUFDtype
from llama_jax.conversion.host_memory import anonymous_bytes, track_peak_memory
from llama_jax.conversion.huggingface import write_hugging_face
from llama_jax.conversion.llama2c import check_config, write_llama2c
from llama_jax.conversion.llama2c_tokenizer import (
    pack_llama2c_tokenizer,
    unpack_llama2c_tokenizer,
)
from llama_jax.conversion.meta import write_meta
from llama_jax.conversion.meta_params import check_ranks, params_from_config
from llama_jax.conversion.meta_tokenizer import meta_tokenizer
from llama_jax.conversion.source import LazyModel, Source
from llama_jax.conversion.tensor_mapping import tensors_from_leaves
from llama_jax.conversion.tensor_tables import ORBAX, TABLES, FormatName
from llama_jax.conversion.tokenizer_comparison import different_facts
from llama_jax.conversion.tokenizer_files import open_tokenizer
from llama_jax.errors import CheckpointError, ConfigError, TokenizerError
from llama_jax.params import count_params
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.types import Path

_DEFAULT_DTYPES: Mapping[FormatName, GGUFDtype] = {
    "gguf": "float16",
    "llama2c": "float32",
}
_OVERHEAD_BYTES = 64 << 20  # interpreter, Orbax and its threads while writing


class PreparedConversion(NamedTuple):
    """A conversion before any weight is read or written.

    Attributes:
      source: the opened checkpoint.
      target_format: name of the format to write.
      model: configuration, leaves in their final dtype, and tokenizer.
      tensors: to be written, by foreign name.
      tokenizer_file: where the tokenizer was read from.
      notes: sentences about what the source says about text, but the target will not.
      gguf_dtype: of the matrices of a GGUF file.
      ranks: model-parallel files of a Meta folder.
      host_bytes: limit of host memory, page cache not counted; None if the system does
        not report the memory in use.
    """

    source: Source
    target_format: FormatName
    model: LazyModel
    tensors: Mapping[str, LazyLeaf]
    tokenizer_file: pathlib.Path
    notes: tuple[str, ...]
    gguf_dtype: GGUFDtype
    ranks: int
    host_bytes: int | None


class ConversionResult(NamedTuple):
    """What a conversion wrote.

    Attributes:
      config: of the model.
      max_seq_len_origin: where `config.max_seq_len` comes from.
      tokenizer_file: where the tokenizer was read from.
      notes: sentences about what the source says about text, but the target does not.
      num_params: parameters of the model.
      num_bytes: size of the new folder or file.
      seconds: duration.
      peak_host_bytes: peak of host memory, page cache not counted; None if the system
        does not report it.
    """

    config: LlamaConfig
    max_seq_len_origin: str
    tokenizer_file: pathlib.Path
    notes: tuple[str, ...]
    num_params: int
    num_bytes: int
    seconds: float
    peak_host_bytes: int | None


@checked(ConfigError)
def convert(
    src: Path,
    dst: Path,
    *,
    source_format: FormatName | None = None,
    target_format: FormatName | None = None,
    ranks: int = 1,
    tokenizer: Path | None = None,
    dtype: GGUFDtype | None = None,
    max_seq_len: int | None = None,
    max_host_bytes: int | None = None,
    progress: Progress | None = None,
) -> ConversionResult:
    """Convert a checkpoint to another format; `dst` appears complete or not at all.

    Host memory holds a few tensors, never the whole model.

    Args:
      src: a folder (Meta, Hugging Face, or of this library), a GGUF file, or a llama2.c
        `.bin`.
      dst: the new folder or file.
      source_format: of `src`; recognized by its files if omitted.
      target_format: of `dst`; defaults to gguf or llama2c if `dst` ends in `.gguf` or
        `.bin`, else to orbax, the format of this library.
      ranks: model-parallel files of a Meta folder.
      tokenizer: `tokenizer.model`, `tokenizer.json`, or llama2.c's `tokenizer.bin`;
        defaults to the checkpoint's own, or the one in the folder above.
      dtype: of the weights; defaults to that of `src`, for GGUF to float16. `q8_0` is
        for GGUF only; llama2.c has only float32.
      max_seq_len: maximum sequence length in tokens; defaults to the checkpoint's own,
        or for Meta's to that of the published model of the same sizes.
      max_host_bytes: limit of host memory; a conversion that may exceed it is refused.
      progress: called with the bytes that are verified and written.

    Raises:
      CheckpointError: `src` is damaged or unknown, `dst` exists, or the conversion may
        exceed `max_host_bytes`.
      ConfigError: the configuration is not supported, or the target format has no
        field for what the model needs.
      TokenizerError: there is no tokenizer, or it has more pieces than the model ids.

    >>> import tempfile
    >>> from llama_jax.loading import bundled
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = convert(bundled(), f"{folder}/hf", target_format="hf")
    >>> result.num_params
    2361408
    """
    start = time.monotonic()
    prepared = prepare_conversion(
        src,
        dst,
        source_format=source_format,
        target_format=target_format,
        ranks=ranks,
        tokenizer=tokenizer,
        dtype=dtype,
        max_seq_len=max_seq_len,
        max_host_bytes=max_host_bytes,
    )
    with track_peak_memory() as peak:
        verify_checksums(prepared.source.checksums, progress)
        _write(prepared, pathlib.Path(dst), progress)
    return ConversionResult(
        config=prepared.source.config,
        max_seq_len_origin=prepared.source.max_seq_len_origin,
        tokenizer_file=prepared.tokenizer_file,
        notes=prepared.notes,
        num_params=count_params(prepared.model.leaves),
        num_bytes=_disk_bytes(pathlib.Path(dst)),
        seconds=time.monotonic() - start,
        peak_host_bytes=peak.bytes,
    )


@checked(ConfigError)
def prepare_conversion(
    src: Path,
    dst: Path,
    *,
    source_format: FormatName | None = None,
    target_format: FormatName | None = None,
    ranks: int = 1,
    tokenizer: Path | None = None,
    dtype: GGUFDtype | None = None,
    max_seq_len: int | None = None,
    max_host_bytes: int | None = None,
) -> PreparedConversion:
    """Check a conversion, and decide all of it, without reading or writing weights.

    Arguments and errors are those of `convert`.

    >>> from llama_jax.loading import bundled
    >>> prepared = prepare_conversion(bundled(), "model.gguf")
    >>> prepared.target_format, prepared.gguf_dtype
    ('gguf', 'float16')
    >>> prepared.tensors["blk.0.attn_q.weight"].shape
    (192, 192)
    """
    target = target_format or format_of_target(dst)
    check_target(dst, target)
    if dtype == "q8_0" and target != "gguf":
        raise ConfigError("dtype is 'q8_0', which only GGUF has; use --to gguf")
    source = open_source(src, format=source_format, max_seq_len=max_seq_len)
    if source.format is ORBAX and target == "orbax":
        raise CheckpointError(
            f"{src}: is already a llama_jax checkpoint; name another format with --to "
            "(target_format=)"
        )
    if tokenizer is not None:
        source = source.with_tokenizer(open_tokenizer(tokenizer), tokenizer)
    opened_tokenizer, tokenizer_file = source.find_tokenizer()
    opened_tokenizer.check_fits(source.config.vocab_size)
    dtype = dtype or _DEFAULT_DTYPES.get(target)
    if target == "llama2c" and dtype != "float32":
        raise ConfigError(f"dtype is {dtype!r}, but llama2.c's format has only float32")
    if target == "meta":
        params_from_config(source.config)
        check_ranks(source.config, ranks)
    elif target == "llama2c":
        check_config(source.config)
    # Quantization is done by the writer, from float32.
    leaves = source.leaves("float32" if dtype == "q8_0" else dtype, finite=True)
    model = LazyModel(source.config, leaves, opened_tokenizer)
    tensors = tensors_from_leaves(TABLES[target], model.leaves, source.config)
    host_bytes = anonymous_bytes()
    if host_bytes is not None:
        # Orbax reads the next tensor while it writes one.
        host_bytes += _write_bytes(tensors, reads_ahead=target == "orbax")
    if max_host_bytes is not None:
        _check_memory(src, host_bytes, max_host_bytes)
    return PreparedConversion(
        source=source,
        target_format=target,
        model=model,
        tensors=tensors,
        tokenizer_file=tokenizer_file,
        notes=(
            *source.text_notes(),
            *_lost_facts(opened_tokenizer, source.config, target),
        ),
        gguf_dtype=dtype or "float16",
        ranks=ranks,
        host_bytes=host_bytes,
    )


def _lost_facts(
    tokenizer: Tokenizer, config: LlamaConfig, target: FormatName
) -> Iterator[str]:
    """Yield a sentence about facts of a tokenizer that the target does not store."""
    match target:
        case "meta":
            stored = Tokenizer(meta_tokenizer(tokenizer, config.vocab_size))
        case "llama2c":
            packed = pack_llama2c_tokenizer(tokenizer)
            stored = Tokenizer(unpack_llama2c_tokenizer(packed, "tokenizer.bin"))
        case _:
            return
    if facts := different_facts(tokenizer, stored, config.vocab_size):
        yield f"the {target} format does not store {', '.join(facts)}"


def _check_memory(src: Path, needed: int | None, limit: int) -> None:
    if needed is None:
        raise CheckpointError(
            f"{src}: this system does not report the memory in use, so that no limit "
            "can be checked; leave out --max-host-bytes (max_host_bytes=)"
        )
    if needed > limit:
        raise CheckpointError(
            f"{src}: the conversion may need {needed:,} bytes of host memory, more "
            f"than the limit of {limit:,}; raise the limit, or convert on a larger "
            "machine"
        )


def _write_bytes(tensors: Mapping[str, LazyLeaf], *, reads_ahead: bool) -> int:
    """Return the limit of memory while writing: one tensor read, another written."""
    reading = max(tensor.host_bytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    return _OVERHEAD_BYTES + reading + largest * (1 + reads_ahead)


def _write(
    prepared: PreparedConversion, dst: pathlib.Path, progress: Progress | None
) -> None:
    model = prepared.model
    match prepared.target_format:
        case "orbax":
            save_params(
                dst,
                model.leaves,
                model.config,
                tokenizer=model.tokenizer,
                progress=progress,
            )
        case "meta":
            with new_folder(dst) as folder:
                write_meta(folder, model, ranks=prepared.ranks, progress=progress)
        case "hf":
            with new_folder(dst) as folder:
                write_hugging_face(folder, model, progress=progress)
        case "gguf":
            with new_file(dst) as file:
                write_gguf(file, model, dtype=prepared.gguf_dtype, progress=progress)
        case "llama2c":
            new_tokenizer = _new_tokenizer_bin(model.tokenizer, dst)
            with new_file(dst) as file:
                write_llama2c(file, model, progress=progress)
            if new_tokenizer is not None:
                with new_file(dst.with_name("tokenizer.bin")) as file:
                    file.write_bytes(new_tokenizer)


def _new_tokenizer_bin(tokenizer: Tokenizer | None, dst: pathlib.Path) -> bytes | None:
    """Return the `tokenizer.bin` to write beside a `.bin`; None if it is there already.

    Raises:
      TokenizerError: there is another one.
    """
    if tokenizer is None:
        return None
    file = dst.with_name("tokenizer.bin")
    packed = pack_llama2c_tokenizer(tokenizer)
    if not file.exists():
        return packed
    if file.read_bytes() != packed:
        raise TokenizerError(
            f"{file}: is another model's tokenizer; write to another folder"
        )
    return None


def _disk_bytes(path: pathlib.Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
