"""Training checkpoints: everything that a run needs to be resumed bit for bit.

Orbax writes the state asynchronously, and facts as JSON. A checkpoint appears under its
step's number when it is complete; the next run removes one whose process was killed.
"""

import math
import pathlib

import jax
from jax.sharding import SingleDeviceSharding

from llama_jax.errors import CheckpointError
from llama_jax.train.state import TrainState
from llama_jax.types import JsonObject, Path

_STATE, _FACTS = "state", "run"
_LOSS = "eval_loss"


class TrainCheckpoints:
    """The checkpoints in a folder: the latest ones, and the best by `eval_loss`.

    With several processes, all must call the same methods in the same order.

    Args:
      folder: created if it does not exist.
      keep: number of latest checkpoints to keep, besides the best.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers

        latest = checkpoint_managers.LatestN(n=keep)
        best = checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics[_LOSS],
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._folder = pathlib.Path(folder).absolute()
        self._args = ocp.args
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self._folder,
                item_names=(_STATE, _FACTS),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                        [latest, best]
                    ),
                    cleanup_tmp_directories=True,
                    # The policy decides, but without this no metrics are written.
                    best_fn=lambda metrics: metrics[_LOSS],
                    best_mode="min",
                ),
            )
        except Exception as error:  # Orbax and TensorStore raise many types
            raise self._error("cannot be opened", error) from error

    def save(
        self, state: TrainState, facts: JsonObject, eval_loss: float | None
    ) -> None:
        """Start writing a checkpoint; the state may be donated when this returns.

        Args:
          state: its step names the checkpoint.
          facts: position in the data, and others, for JSON.
          eval_loss: of this state; None if it was not evaluated.

        Raises:
          CheckpointError: it, or the checkpoint before it, cannot be written.
        """
        args = self._args
        # Among equals the latest is the best, which is kept anyway.
        metrics = {_LOSS: math.inf if eval_loss is None else float(eval_loss)}
        try:
            self._manager.save(
                int(state.step),
                metrics=metrics,
                args=args.Composite(
                    **{
                        _STATE: args.StandardSave(state),
                        _FACTS: args.JsonSave(dict(facts)),
                    }
                ),
            )
        except Exception as error:
            raise self._error("cannot be written", error) from error

    def latest(self) -> int | None:
        """The step of the last complete checkpoint."""
        step = self._manager.latest_step()
        return None if step is None else int(step)

    def best(self) -> int | None:
        """The step of the checkpoint with the best `eval_loss`; None without any."""
        losses = {}
        for step in self._manager.all_steps():
            loss = (self._manager.metrics(step) or {}).get(_LOSS, math.inf)
            if math.isfinite(loss):
                losses[int(step)] = loss
        return min(losses, key=lambda step: (losses[step], -step)) if losses else None

    def facts(self, step: int) -> JsonObject:
        """The facts that were saved with the state of a step."""
        args = self._args
        try:
            items = self._manager.restore(
                step, args=args.Composite(**{_FACTS: args.JsonRestore()})
            )
            return dict(items[_FACTS])
        except Exception as error:
            raise self._error(f"step {step} cannot be read", error) from error

    def restore(self, step: int, shapes: TrainState) -> TrainState:
        """Restore the state of a step on the devices of this run.

        Args:
          step: of a checkpoint.
          shapes: shapes and shardings of this run's state (`state_shapes`); mesh and
            number of processes may differ from those it was saved with.

        Raises:
          CheckpointError: it is damaged, or of another model or optimizer.
        """
        default = SingleDeviceSharding(jax.devices()[0])

        def with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding = leaf.sharding or default
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        args = self._args
        try:
            items = self._manager.restore(
                step,
                args=args.Composite(
                    **{
                        _STATE: args.StandardRestore(
                            jax.tree.map(with_sharding, shapes)
                        )
                    }
                ),
            )
        except Exception as error:
            raise self._error(f"step {step} cannot be restored", error) from error
        state: TrainState = items[_STATE]
        return state

    def wait(self) -> None:
        """Return when all checkpoints are on disk.

        Raises:
          CheckpointError: one could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._error("cannot be written", error) from error

    def close(self) -> None:
        """Finish writing."""
        self._manager.close()

    def __enter__(self) -> "TrainCheckpoints":
        """The checkpoints."""
        return self

    def __exit__(self, *_: object) -> None:
        """Finish writing."""
        self.close()

    def _error(self, what: str, error: Exception) -> CheckpointError:
        reason = str(error).partition("\n")[0]
        return CheckpointError(f"{self._folder}: {what} ({reason})")
