"""What each process of a test runs, and one process for comparison.

python tests/support/workers.py PORT COUNT INDEX FOLDER MESH
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from support.models import TALKING, random_params, talking_model

from llama_jax import distributed
from llama_jax.checkpoint.device_put import device_put_leaves
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, lazy_leaves
from llama_jax.checkpoint.model_folder import save_params
from llama_jax.cli import command as cli
from llama_jax.data.batch import Batch
from llama_jax.generation.generate import generate
from llama_jax.generation.request import Request
from llama_jax.generation.sampling import Sampling
from llama_jax.model.init import init_params
from llama_jax.model.transformer import Llama
from llama_jax.runtime import Runtime
from llama_jax.sharding import make_mesh, parse_mesh
from llama_jax.train.losses import next_token_loss
from llama_jax.train.optimizer import make_optimizer
from llama_jax.train.state import init_state
from llama_jax.train.step import make_train_step

B, T, STEPS = 8, 16, 5
TRAIN = Runtime(layer_layout="stacked", remat="block")
CONFIG = TALKING.replace(num_layers=1)
PROMPTS = [[1, 50, 60], [1, 70], [1, 80, 90, 100, 110]]


def rows_of_step(step: int, rows: slice) -> Batch:
    """Return some rows of a global batch without making the others."""
    made_rows = []
    for row in range(*rows.indices(B)):
        rng = np.random.default_rng([step, row])
        made_rows.append(rng.integers(CONFIG.vocab_size, size=T + 1))
    ids = np.stack(made_rows).astype(np.int32)
    return Batch(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        loss_mask=(ids[:, 1:] % 3 > 0).astype(np.float32),
        segment_ids=np.ones_like(ids[:, 1:]),
        positions=np.tile(np.arange(T, dtype=np.int32), (len(ids), 1)),
    )


def local_parts(tree: Any) -> list[float]:
    """Return the fraction of each matrix's bytes that this process stores."""
    parts = []
    for leaf in jax.tree.leaves(tree):
        if leaf.ndim > 1 and leaf.size > 500:
            shards = {str(s.index): s.data.nbytes for s in leaf.addressable_shards}
            parts.append(sum(shards.values()) / leaf.nbytes)
    return parts


def train(mesh: Any, folder: pathlib.Path | None = None) -> dict[str, Any]:
    """Train a few steps from random weights."""
    model = Llama(CONFIG, TRAIN, mesh)
    optimizer = make_optimizer(1e-2)
    step = make_train_step(
        lambda params, _, batch: next_token_loss(model, params, batch), optimizer
    )
    state = init_state(init_params(model, jax.random.key(0)), optimizer)
    index, count = distributed.share_of_rows(mesh)
    size = B // count
    rows = slice(index * size, (index + 1) * size)
    metrics = []
    for number in range(STEPS):
        batch = distributed.from_host_rows(rows_of_step(number, rows), mesh)
        state, on_device = step(state, {}, batch)
        of_step = distributed.to_host(on_device)
        metrics.append([float(of_step.loss), float(of_step.grad_norm)])
    if folder is not None:
        save_params(folder, state.params, CONFIG)
    return {
        "metrics": metrics,
        "rows": [rows.start, rows.stop],
        "params": local_parts(state.params),
        "opt_state": local_parts(state.opt_state),
    }


def generate_tokens(mesh: Any) -> list[list[int]]:
    """Generate from a random model, greedily and sampled."""
    alone = talking_model(CONFIG)
    model = Llama(CONFIG, Runtime(), mesh)
    leaves = lazy_leaves(random_params(CONFIG, 1))
    params = device_put_leaves(leaves, CONFIG, runtime=Runtime(), mesh=mesh)
    loaded = alone._replace(model=model, params=params)
    settings = [Sampling(temperature=0), Sampling(seed=3), Sampling(seed=4)]
    requests = [
        Request(ids, max_new_tokens=6, sampling=sampling)
        for ids, sampling in zip(PROMPTS, settings, strict=True)
    ]
    return [list(completion.token_ids) for completion in generate(loaded, requests)]


class CountingArray(np.ndarray):
    """An array that counts the bytes read from it."""

    bytes_read: list[int]

    def __array_finalize__(self, source: Any) -> None:
        """Let views count for their base."""
        self.bytes_read = getattr(source, "bytes_read", [])

    def __getitem__(self, index: Any) -> Any:
        """Read a part."""
        part = super().__getitem__(index)
        self.bytes_read.append(part.nbytes)
        return part


def part_read(mesh: Any) -> float:
    """Load the weights; return the fraction of the matrices' bytes that were read."""
    bytes_read: list[int] = []
    total = 0

    def counting(leaf: LazyLeaf) -> LazyLeaf:
        def read() -> np.ndarray:
            array = leaf.read().view(CountingArray)
            array.bytes_read = bytes_read
            return array

        return LazyLeaf(leaf.shape, leaf.dtype, read)

    leaves = lazy_leaves(random_params(CONFIG))
    for path, leaf in leaves.items():
        if len(leaf.shape) > 1:
            leaves[path] = counting(leaf)
            total += leaf.nbytes
    device_put_leaves(leaves, CONFIG, runtime=Runtime(), mesh=mesh)
    return sum(bytes_read) / total


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything and write the results into the folder."""
    assert argv is not None
    port, count, index, folder, mesh_text = argv
    if int(count) > 1:
        distributed.initialize(f"localhost:{port}", int(count), int(index))
    out = pathlib.Path(folder)
    mesh = make_mesh(parse_mesh(mesh_text))
    results = train(mesh, out / "saved") | {"tokens": generate_tokens(mesh)}
    if int(count) > 1:
        results |= {"read": part_read(mesh)}
    broadcast = distributed.broadcast_from_main(1 << 40 | int(index))
    results |= {"broadcast": broadcast}
    (out / f"{index}.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
