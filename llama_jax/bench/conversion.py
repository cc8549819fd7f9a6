"""Conversion: seconds, and host memory, beside copying the same bytes on that disk."""

import dataclasses
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.config import LlamaConfig
from llama_jax.conversion import convert, prepare_conversion
from llama_jax.conversion.host_memory import anonymous_bytes
from llama_jax.conversion.meta import write_meta
from llama_jax.conversion.source import LazyModel
from llama_jax.conversion.tensor_tables import FormatName
from llama_jax.loading import bundled
from llama_jax.params import axes_of, leaf_paths, weight_shape

_BFLOAT16 = np.dtype(jnp.bfloat16)
_BLOCK = 1 << 24  # random numbers, used again and again


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """One conversion between two copies of its source.

    Attributes:
      params: of the model.
      source_bytes: of Meta's folder.
      seconds: of the conversion, until the disk has it.
      copy_seconds: of the copies before and after it, likewise.
      gb_per_s: source bytes per second of the conversion.
      ratio: of the copies' mean time to the conversion's.
      peak_bytes: of host memory during the conversion, page cache not counted.
      base_bytes: of host memory before it.
      predicted_bytes: what it was thought to take at most.
    """

    params: int
    source_bytes: int
    seconds: float
    copy_seconds: tuple[float, float]
    gb_per_s: float
    ratio: float
    peak_bytes: int
    base_bytes: int
    predicted_bytes: int


def measure_conversion(
    config: LlamaConfig, *, ranks: int, target: FormatName, folder: pathlib.Path
) -> ConversionReport:
    """Write a folder of Meta's with random weights, copy it, and convert it.

    Args:
      config: of the model; its weights are bfloat16.
      ranks: model-parallel files.
      target: the format to convert to.
      folder: where there is room for three times the model.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = pathlib.Path(name)
        source = place / "meta"
        source.mkdir()
        write_meta(source, LazyModel(config, _random_leaves(config), None), ranks=ranks)
        size = sum(file.stat().st_size for file in source.iterdir())
        # Any that is no larger than the model's vocabulary will do.
        tokenizer = bundled() / "tokenizer.model"

        def copy() -> None:
            shutil.copytree(source, place / "copy")

        prepared = prepare_conversion(
            source,
            place / "ours",
            target_format=target,
            tokenizer=tokenizer,
            max_seq_len=config.max_seq_len,
        )
        before = _timed(copy)
        shutil.rmtree(place / "copy")
        base = anonymous_bytes() or 0
        start = time.perf_counter()
        done = convert(
            source,
            place / "ours",
            target_format=target,
            tokenizer=tokenizer,
            max_seq_len=config.max_seq_len,
        )
        os.sync()
        taken = time.perf_counter() - start
        shutil.rmtree(place / "ours")
        after = _timed(copy)
    return ConversionReport(
        params=done.num_params,
        source_bytes=size,
        seconds=taken,
        copy_seconds=(before, after),
        gb_per_s=size / taken / 1e9,
        ratio=(before + after) / 2 / taken,
        peak_bytes=done.peak_host_bytes or 0,
        base_bytes=base,
        predicted_bytes=prepared.host_bytes or 0,
    )


def _timed(run: Callable[[], None]) -> float:
    """Seconds until the disk has what was written."""
    os.sync()
    start = time.perf_counter()
    run()
    os.sync()
    return time.perf_counter() - start


def _random_leaves(config: LlamaConfig) -> dict[str, LazyLeaf]:
    rng = np.random.default_rng(0)
    block = rng.standard_normal(_BLOCK, np.float32).astype(_BFLOAT16)

    def leaf(path: str) -> LazyLeaf:
        shape = weight_shape(config, axes_of(path))
        size = int(np.prod(shape))
        return LazyLeaf(shape, _BFLOAT16, lambda: np.resize(block, size).reshape(shape))

    return {path: leaf(path) for path in leaf_paths(config)}
