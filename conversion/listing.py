"""A checkpoint, or a conversion that is planned, as lines to read."""

import collections
from collections.abc import Iterator, Mapping

from llama_jax.checkpoint.lazy_leaf import LazyLeaf
from llama_jax.conversion.convert import Plan
from llama_jax.conversion.source import Source
from llama_jax.conversion.tensor_mapping import foreign_names


def of_source(source: Source, *, every: bool = False) -> Iterator[str]:
    """What `inspect` prints: configuration, tensors, dtypes, ranks, size."""
    yield f"{source.path}: a checkpoint of {source.form.name}'s format"
    for name, value in source.config.to_dict().items():
        note = f"  ({source.context})" if name == "max_seq_len" else ""
        yield f"  {name:<16} {value}{note}"
    tensors = source.tensors
    size = sum(tensor.nbytes for tensor in tensors.values())
    dtypes = collections.Counter(tensor.dtype.name for tensor in tensors.values())
    kinds = ", ".join(f"{count} of {name}" for name, count in dtypes.items())
    ranks = f", in {source.ranks} model-parallel ranks" if source.ranks > 1 else ""
    numbers = sum(leaf.size for leaf in source.leaves().values())
    yield f"  {'parameters':<16} {numbers:,}"
    yield f"  {'tensors':<16} {kinds}; {size:,} bytes{ranks}"
    yield from _rows(tensors, every=every)


def of_plan(plan: Plan, *, every: bool = False) -> Iterator[str]:
    """What `--dry-run` prints: which tensor becomes which, sizes, and the memory."""
    source = plan.source
    yield f"{source.path} ({source.form.name}) to the format {plan.to}"
    names = foreign_names(source.form, source.config)
    # Where embeddings cannot be tied, the embedding is written once more at the end.
    names += names[:1] * (len(plan.tensors) - len(names))
    for name, (target, after) in zip(names, plan.tensors.items(), strict=True):
        if every or _is_first(target):
            before = source.tensors[name]
            yield f"  {name:<44} {_shape(before):<28} -> {target:<44} {_shape(after)}"
    read = sum(tensor.nbytes for tensor in source.tensors.values())
    written = sum(tensor.nbytes for tensor in plan.tensors.values())
    yield f"  {len(source.tensors)} tensors, {read:,} bytes"
    yield f"  to {len(plan.tensors)} tensors, {written:,} bytes"
    if plan.host_bytes is not None:
        yield f"  host memory at most {plan.host_bytes:,} bytes, page cache not counted"
    yield f"  tokenizer {plan.tokenizer}"


def _rows(tensors: Mapping[str, LazyLeaf], *, every: bool) -> Iterator[str]:
    for name, tensor in tensors.items():
        if every or _is_first(name):
            yield f"  {name:<44} {_shape(tensor)}"


def _is_first(name: str) -> bool:
    """Whether this belongs to no layer, or to the first: the others are alike."""
    numbers = [part for part in name.replace("/", ".").split(".") if part.isdecimal()]
    return not numbers or numbers[0] == "0"


def _shape(tensor: LazyLeaf) -> str:
    return f"{tensor.dtype.name}{list(tensor.shape)}"
