"""Conversion: time and host memory, next to copying the same bytes on the same disk."""

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
_BLOCK = 1 << 24  # random numbers, repeated


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """A conversion, with copies of its source before and after it.

    Attributes:
      params: number of the model's parameters.
      source_bytes: of the folder in Meta's format.
      seconds: of the conversion, until everything is on disk.
      copy_seconds: of the copies before and after it, until everything is on disk.
      gb_per_s: source bytes per second of the conversion.
      ratio: mean time of the copies divided by that of the conversion.
      peak_bytes: host memory during the conversion, without the page cache.
      base_bytes: host memory before it.
      predicted_bytes: predicted peak of host memory.
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
    """Write random weights in Meta's format, copy them, and convert them.

    Args:
      config: the model; its weights are bfloat16.
      ranks: number of model-parallel files.
      target: format to convert to.
      folder: with room for three times the model.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        workspace = pathlib.Path(name)
        source = workspace / "meta"
        source.mkdir()
        write_meta(source, LazyModel(config, _random_leaves(config), None), ranks=ranks)
        size = sum(file.stat().st_size for file in source.iterdir())
        # Any tokenizer will do whose vocabulary is not larger than the model's.
        tokenizer = bundled() / "tokenizer.model"

        def copy() -> None:
            shutil.copytree(source, workspace / "copy")

        prepared = prepare_conversion(
            source,
            workspace / "ours",
            target_format=target,
            tokenizer=tokenizer,
            max_seq_len=config.max_seq_len,
        )
        before = _timed(copy)
        shutil.rmtree(workspace / "copy")
        base = anonymous_bytes() or 0
        start = time.perf_counter()
        converted = convert(
            source,
            workspace / "ours",
            target_format=target,
            tokenizer=tokenizer,
            max_seq_len=config.max_seq_len,
        )
        os.sync()
        seconds = time.perf_counter() - start
        shutil.rmtree(workspace / "ours")
        after = _timed(copy)
    return ConversionReport(
        params=converted.num_params,
        source_bytes=size,
        seconds=seconds,
        copy_seconds=(before, after),
        gb_per_s=size / seconds / 1e9,
        ratio=(before + after) / 2 / seconds,
        peak_bytes=converted.peak_host_bytes or 0,
        base_bytes=base,
        predicted_bytes=prepared.host_bytes or 0,
    )


def _timed(run: Callable[[], None]) -> float:
    """Seconds until everything written is on disk."""
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
