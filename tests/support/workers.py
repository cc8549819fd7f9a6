"""What the tests of several processes run in each of them, and in one alone.

python tests/support/workers.py TASK PORT COUNT INDEX FOLDER MESH
"""

import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from support.models import TALKING, random_params, talking_model

from llama_jax import distributed
from llama_jax.checkpoint.device_put import device_put_leaves
from llama_jax.checkpoint.lazy_leaf import LazyLeaf, lazy_leaves
from llama_jax.checkpoint.model_folder import save_params
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
    """Some rows of a global batch; those of others are never made."""
    made = []
    for row in range(*rows.indices(B)):
        rng = np.random.default_rng([step, row])
        made.append(rng.integers(CONFIG.vocab_size, size=T + 1))
    ids = np.stack(made).astype(np.int32)
    return Batch(
        tokens=ids[:, :-1],
        targets=ids[:, 1:],
        loss_mask=(ids[:, 1:] % 3 > 0).astype(np.float32),
        segment_ids=np.ones_like(ids[:, 1:]),
        positions=np.tile(np.arange(T, dtype=np.int32), (len(ids), 1)),
    )


def here(tree: Any) -> list[float]:
    """Which part of each matrix's bytes this process holds."""
    parts = []
    for leaf in jax.tree.leaves(tree):
        if leaf.ndim > 1 and leaf.size > 500:
            shards = {str(s.index): s.data.nbytes for s in leaf.addressable_shards}
            parts.append(sum(shards.values()) / leaf.nbytes)
    return parts


def train(mesh: Any, folder: pathlib.Path | None = None) -> dict[str, Any]:
    """A few steps from random weights, and where everything lies."""
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
        state, found = step(state, {}, batch)
        found = distributed.to_host(found)
        metrics.append([float(found.loss), float(found.grad_norm)])
    if folder is not None:
        save_params(folder, state.params, CONFIG)
    return {
        "metrics": metrics,
        "rows": [rows.start, rows.stop],
        "params": here(state.params),
        "opt_state": here(state.opt_state),
    }


def write(mesh: Any) -> list[list[int]]:
    """What a random model says, drawn and not drawn."""
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


class Watched(np.ndarray):
    """An array that knows how many bytes were taken out of it."""

    taken: list[int]

    def __array_finalize__(self, source: Any) -> None:
        """Views count for the array that they are of."""
        self.taken = getattr(source, "taken", [])

    def __getitem__(self, index: Any) -> Any:
        """A part of it."""
        found = super().__getitem__(index)
        self.taken.append(found.nbytes)
        return found


def read(mesh: Any) -> float:
    """Which part of the matrices' bytes this process reads when it loads them."""
    taken: list[int] = []
    whole = 0

    def watched(leaf: LazyLeaf) -> LazyLeaf:
        def read() -> np.ndarray:
            array = leaf.read().view(Watched)
            array.taken = taken
            return array

        return LazyLeaf(leaf.shape, leaf.dtype, read)

    leaves = lazy_leaves(random_params(CONFIG))
    for path, leaf in leaves.items():
        if len(leaf.shape) > 1:
            leaves[path] = watched(leaf)
            whole += leaf.nbytes
    device_put_leaves(leaves, CONFIG, runtime=Runtime(), mesh=mesh)
    return sum(taken) / whole


def main(port: str, count: str, index: str, folder: str, mesh: str) -> None:
    """Do it all, and leave what was found in the folder."""
    distributed.initialize(f"localhost:{port}", int(count), int(index), timeout=60)
    out = pathlib.Path(folder)
    devices = make_mesh(parse_mesh(mesh))
    found = train(devices, out / "saved") | {"tokens": write(devices)}
    if int(count) > 1:
        found |= {"read": read(devices)}
    found |= {"agreed": distributed.agreed(1 << 40 | int(index))}
    (out / f"{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
