"""Descriptions of checkpoints, conversions and comparisons, as lines of text."""

import collections
from collections.abc import Iterable, Iterator

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.conversion.comparison import DIVERGED, Comparison
from llama_jax.conversion.converter import ConversionResult, PreparedConversion
from llama_jax.conversion.source import Source
from llama_jax.conversion.tensor_mapping import foreign_names
from llama_jax.conversion.tensor_tables import TABLES
from llama_jax.errors import LlamaJaxError


def describe_source(source: Source, *, all_layers: bool = False) -> Iterator[str]:
    """Yield what `inspect` prints: configuration, sizes, and a list of tensors.

    Args:
      source: the checkpoint.
      all_layers: list the tensors of all layers, not only of the first.
    """
    yield f"{source.path}: {source.format.name} checkpoint"
    for name, value in source.config.to_dict().items():
        note = f"  ({source.max_seq_len_origin})" if name == "max_seq_len" else ""
        yield f"  {name:<16} {value}{note}"
    tensors = source.tensors
    dtypes = collections.Counter(tensor.dtype.name for tensor in tensors.values())
    counts = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items())
    num_params = sum(leaf.size for leaf in source.leaves().values())
    yield f"  {'parameters':<16} {num_params:,}"
    yield f"  {'tensors':<16} {counts}; {_total_bytes(tensors.values()):,} bytes"
    if source.ranks > 1:
        yield f"  {'rank files':<16} {source.ranks}"
    yield from _describe_text(source)
    listed = [name for name in tensors if all_layers or _in_first_layer(name)]
    width = max(map(len, listed), default=0)
    for name in listed:
        yield f"  {name:<{width}}  {_shape(tensors[name])}"


def _describe_text(source: Source) -> Iterator[str]:
    """Yield where the tokenizer is, and what is wrong with it."""
    try:
        tokenizer, file = source.find_tokenizer()
    except LlamaJaxError:  # weights can be described without a tokenizer
        return
    added = len(tokenizer.settings.added_tokens)
    ends = ", ".join(map(str, tokenizer.end_ids))
    text = f"{file}; {added} added tokens, answers end with {ends}"
    yield f"  {'tokenizer':<16} {text}"
    yield from (f"  {'note':<16} {note}" for note in source.text_notes())


def describe_conversion(
    prepared: PreparedConversion, dst: object, *, all_layers: bool = False
) -> Iterator[str]:
    """Yield what `--dry-run` prints: which tensor becomes which, sizes, and memory.

    Args:
      prepared: the conversion.
      dst: its target path.
      all_layers: list the tensors of all layers, not only of the first.
    """
    source, target = prepared.source, TABLES[prepared.target_format]
    yield f"{source.path} ({source.format.name}) -> {dst} ({target.name})"
    names = foreign_names(source.format, source.config)
    # If embeddings cannot be tied, the embedding is written once more as the head.
    names += names[:1] * (len(prepared.tensors) - len(names))
    rows = [
        (name, _shape(source.tensors[name]), new_name, _shape(tensor))
        for name, (new_name, tensor) in zip(
            names, prepared.tensors.items(), strict=True
        )
        if all_layers or _in_first_layer(new_name)
    ]
    a, b, c = (max(len(row[column]) for row in rows) for column in range(3))
    for old, old_shape, new, new_shape in rows:
        yield f"  {old:<{a}}  {old_shape:<{b}}  -> {new:<{c}}  {new_shape}"
    for verb, tensors in (("read", source.tensors), ("written", prepared.tensors)):
        nbytes = _total_bytes(tensors.values())
        yield f"  {verb:<11} {len(tensors)} tensors, {nbytes:,} bytes"
    if prepared.host_bytes is not None:
        limit = f"at most {prepared.host_bytes:,} bytes without the page cache"
        yield f"  {'host memory':<11} {limit}"
    yield f"  {'tokenizer':<11} {prepared.tokenizer_file}"
    yield from (f"  {'note':<11} {note}" for note in prepared.notes)


def describe_result(result: ConversionResult, dst: object) -> Iterator[str]:
    """Yield what a conversion prints at its end.

    Args:
      result: of the conversion.
      dst: its target path.
    """
    fields = {name: str(value) for name, value in result.config.to_dict().items()}
    fields["max_seq_len"] += f" ({result.max_seq_len_origin})"
    yield (
        f"{dst}: {result.num_params:,} parameters, {result.num_bytes:,} bytes, "
        f"{result.seconds:.1f} s"
    )
    yield f"  config: {', '.join(f'{name} {value}' for name, value in fields.items())}"
    yield f"  tokenizer: {result.tokenizer_file}"
    yield from (f"  note: {note}" for note in result.notes)
    if result.peak_host_bytes is not None:
        yield f"  peak host memory: {result.peak_host_bytes:,} bytes"


def describe_comparison(comparison: Comparison) -> Iterator[str]:
    """Yield what `verify` prints, in a few lines."""
    yield (
        f"weights: {comparison.tensors} tensors, {comparison.equal} bit-identical, "
        f"{comparison.rounded} equal after rounding, "
        f"{len(comparison.differing)} different"
    )
    if comparison.differing:
        more = ", ..." if len(comparison.differing) > 3 else ""
        yield (
            f"different: {', '.join(comparison.differing[:3])}{more} (max error "
            f"{comparison.max_weight_error:.3g})"
        )
    yield (
        f"logits: max error {comparison.max_logit_error:.3g}, mean error "
        f"{comparison.mean_logit_error:.3g}, KL {comparison.kl:.3g} nats, top-1 "
        f"agreement {comparison.top1_agreement:.1%}"
    )
    layer = comparison.first_diverging_layer
    if layer is None:
        yield f"layers: all hidden states agree within {DIVERGED:.0%}"
    else:
        name = f"layer {layer}" if layer >= 0 else "the embedding"
        error = comparison.layer_errors[layer + 1]
        yield (
            f"layers: {name} is the first whose output differs by more than "
            f"{DIVERGED:.0%} ({error:.1%})"
        )
    if comparison.text is None:
        yield "text: not compared, since a checkpoint has no tokenizer"
    elif not comparison.text:
        yield "text: tokenizers, ends, templates and defaults agree"
    for difference in comparison.text or ():
        yield f"text: {difference}"


def _in_first_layer(name: str) -> bool:
    """Return whether a tensor belongs to layer 0 or to no layer."""
    numbers = [part for part in name.replace("/", ".").split(".") if part.isdecimal()]
    return not numbers or numbers[0] == "0"


def _shape(tensor: LazyLeaf) -> str:
    return f"{tensor.dtype.name}{list(tensor.shape)}"


def _total_bytes(tensors: Iterable[LazyLeaf]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
