"""A run of `finetune`: its parts put together, and what is told and written of it."""

import argparse
import contextlib
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoint.model_folder import save_params
from llama_jax.cli.finetune_settings import warmup_of
from llama_jax.data.loader import Loader
from llama_jax.distributed import agreed, barrier, from_host_rows, is_main, place
from llama_jax.errors import TrainError
from llama_jax.params import count_params
from llama_jax.planning.flops import forward_flops, train_flops
from llama_jax.planning.topology import local_topology
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train import metrics as writers
from llama_jax.train.adapters import save_adapters
from llama_jax.train.checkpoints import TrainCheckpoints
from llama_jax.train.evaluate import evaluate, make_evaluate
from llama_jax.train.loop import Calls, Fitted, fit
from llama_jax.train.methods import Method
from llama_jax.train.metrics import MetricsFile, Record
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.progress import Bar, asked_by_signals, most_memory, samples
from llama_jax.train.report import write_report
from llama_jax.train.state import TrainState, init_state, state_shapes
from llama_jax.train.step import make_train_step
from llama_jax.train.stopping import Stop

_SAMPLES = "samples.jsonl"


@dataclasses.dataclass
class Trainer:
    """A run: its parts put together, and what is written about it."""

    args: argparse.Namespace
    output: pathlib.Path
    run: Mapping[str, Any]
    method: Method
    tokenizer: Tokenizer
    loader: Loader
    held_out: Loader | None
    mesh: Any

    def __post_init__(self) -> None:
        args, self.steps = self.args, int(self.run["steps"])
        schedule = make_schedule(
            args.schedule,
            args.learning_rate,
            steps=self.steps,
            warmup=warmup_of(args, self.steps),
            final=args.final,
        )
        # Asked of the device, each rate would wait for the step that runs there.
        self.rates = np.asarray(jax.vmap(schedule)(jnp.arange(self.steps)))
        self.optimizer = make_optimizer(
            schedule,
            name=args.optimizer,
            weight_decay=args.weight_decay,
            clip=args.clip or None,
        )
        self.sums = make_evaluate(self.method.loss)
        self.start = None if self.held_out is None else self.held_out.state()
        self.tokens = 0
        self.best = math.inf
        self.sampled = -1
        self.flops, self.peak = self.rate_of_devices()

    def train(self) -> int:
        """From the first or the last step that was saved to the end."""
        folder = self.output / "checkpoints"
        shapes = state_shapes(self.method.shapes, self.optimizer, self.mesh)
        with TrainCheckpoints(folder, keep=self.args.keep) as checkpoints:
            self.checkpoints = checkpoints
            last = checkpoints.latest()
            facts: dict[str, Any] = {}
            if last is not None:
                facts = checkpoints.facts(last)
                self.loader.restore(facts["data"])
                if facts["best"] is not None:
                    self.best = facts["best"]
                state = checkpoints.restore(last, shapes)
            else:
                state = init_state(self.method.first(), self.optimizer)
            self.tokens = self.loader.statistics.tokens
            result = "model" if self.method.lora is None else "adapter"
            done = [self.output / result, self.output / "report.html"]
            if agreed(all(path.exists() for path in done)):
                self.say(f"{self.output}: this run is finished; see its {result}")
                return 0
            self.announce(last)
            began = time.perf_counter()
            with contextlib.ExitStack() as stack:
                self.open_writers(stack, last or 0)
                stop = Stop()
                stack.enter_context(asked_by_signals(stop))
                self.bar = Bar(last or 0, self.steps)
                stack.callback(self.bar.close)
                try:
                    fitted = self.fit(state, stop, int(facts.get("skipped", 0)), last)
                except TrainError:
                    # All have it; the first to say so would end the others at once.
                    checkpoints.wait()
                    barrier("what was trained is saved")
                    raise
                del state
                if fitted.stopped:
                    checkpoints.wait()
                    self.say(
                        f"stopped behind step {int(fitted.state.step)}; resume with: "
                        f"python -m llama_jax.finetune --resume --output {self.output}"
                    )
                    return 0
                if self.args.sample_prompt and self.sampled != int(fitted.state.step):
                    self.sample(fitted.state, {"step": int(fitted.state.step)})
            checkpoints.wait()
            step = int(fitted.state.step)
            self.write_result(result, fitted.state)
            del fitted
            best = checkpoints.best()
            if best is not None and best != step:
                self.write_result("best", checkpoints.restore(best, shapes))
        self.report(time.perf_counter() - began, result)
        return 0

    def fit(self, state: TrainState, stop: Stop, skipped: int, last: Any) -> Fitted:
        """Train, with all that belongs to it."""
        args, self.first = self.args, {}
        if self.held_out is not None and last is None:
            found = self.evaluate(state)
            self.first = {"eval_loss_before": found["eval_loss"]}
            read = self.held_out.statistics
            self.say(
                f"before the first step: held-out loss {found['eval_loss']:.4f} over "
                f"{read.targets:,} targets of {read.records:,} records; {read.left_out}"
            )
        return fit(
            make_train_step(
                self.method.loss, self.optimizer, accumulate=args.accumulate
            ),
            state,
            self.method.frozen,
            self.loader,
            Calls(
                record=self.record,
                evaluate=None if self.held_out is None else self.evaluate,
                sample=self.sample if args.sample_prompt else None,
                save=self.save,
                stop=stop,
                eval_every=args.eval_every,
                sample_every=args.sample_every,
                save_every=args.save_every,
            ),
            steps=args.steps,
            place=self.place,
            describe=self.describe,
            learning_rate=lambda update: float(
                self.rates[min(update, len(self.rates) - 1)]
            ),
            max_skipped=args.max_skipped,
            skipped=skipped,
            best=self.best,
            folder=self.output,
        )

    def place(self, batch: Any) -> Any:
        """A batch on the devices."""
        return from_host_rows(batch, self.mesh, self.method.model.runtime.rules)

    def describe(self, batch: Any) -> Record:
        """What is known of a batch of all processes together."""
        found = self.loader.statistics
        tokens, self.tokens = found.tokens - self.tokens, found.tokens
        return {
            "tokens": tokens,
            "epoch": round(self.loader.progress, 6),
            "records": found.records,
        }

    def record(self, record: Record) -> None:
        """Write a step's numbers, and show them."""
        if record["step"] == 1:
            record |= self.first
        record["time"] = round(time.time(), 3)
        if self.peak:
            record["mfu"] = self.flops / record["seconds"] / self.peak
        for writer in self.writers:
            writer.write(record)
        self.bar.show(record)
        if record["skipped"]:
            of_process = "-of-process-*" if place()[1] > 1 else ""
            self.say(
                f"step {record['step']}: loss or gradient is not finite, so it changed "
                f"nothing; its batch is skipped-{record['step']:06d}{of_process}.npz"
            )
        if "eval_loss" in record:
            self.say(
                f"step {record['step']}: loss {record['loss']:.4f}, held-out loss "
                f"{record['eval_loss']:.4f}"
            )

    def evaluate(self, state: TrainState) -> Record:
        """The mean loss over the held-out data."""
        assert self.held_out is not None
        self.held_out.restore(self.start)  # type: ignore[arg-type]
        loss, targets = evaluate(
            self.sums, state.params, self.method.frozen, self.held_out, place=self.place
        )
        return {"eval_loss": loss, "eval_targets": targets}

    def sample(self, state: TrainState, record: Record) -> None:
        """Let the model write."""
        args, self.sampled = self.args, record["step"]
        loaded = self.method.speaking(state.params, self.tokenizer)
        texts = samples(loaded, args.sample_prompt, args.format, args.sample_tokens)
        pairs = [
            {"prompt": prompt, "text": text}
            for prompt, text in zip(args.sample_prompt, texts, strict=True)
        ]
        if self.samples_file is not None:
            self.samples_file.write({"step": record["step"], "samples": pairs})
        for pair in pairs:
            self.say(f"step {record['step']}: {pair['prompt']} ⟶ {pair['text']}")

    def save(self, state: TrainState, record: Record) -> None:
        """Begin to write a checkpoint."""
        for writer in self.writers:
            if isinstance(writer, MetricsFile):
                writer.sync()
        self.best = min(self.best, record.get("eval_loss", math.inf))
        facts = {
            "data": self.loader.state(),
            "skipped": record["skipped_steps"],
            "best": self.best if math.isfinite(self.best) else None,
            "seed": self.args.seed,
        }
        self.checkpoints.save(state, facts, record.get("eval_loss"))

    def open_writers(self, stack: contextlib.ExitStack, step: int) -> None:
        """Whoever is told of the records; in process 0 only."""
        self.writers: list[writers.Writer] = []
        self.samples_file: MetricsFile | None = None
        if not is_main():
            return
        args, output = self.args, self.output
        self.writers.append(MetricsFile(output / writers.FILE_NAME, step=step))
        if args.tensorboard:
            self.writers.append(writers.TensorBoard(output / "tensorboard", step=step))
        if args.wandb:
            settings = self.run["arguments"]
            self.writers.append(writers.WeightsAndBiases(args.wandb, output, settings))
        if args.sample_prompt:
            self.samples_file = MetricsFile(output / _SAMPLES, step=step)
            stack.callback(self.samples_file.close)
        for writer in self.writers:
            stack.callback(writer.close)

    def write_result(self, name: str, state: TrainState) -> None:
        """A model's folder, or one of adapters."""
        config, lora = self.method.model.config, self.method.lora
        # Of a run that was killed behind this; asked before one of several writes it.
        if agreed((self.output / name).exists()):
            return
        if lora is None:
            save_params(
                self.output / name,
                state.params,
                config,
                tokenizer=self.tokenizer,
                dtype=self.args.save_dtype,
            )
        else:
            base = self.args.checkpoint
            save_adapters(
                self.output / name, state.params, config, lora, base_model=base
            )

    def announce(self, last: int | None) -> None:
        """What is about to happen."""
        count = count_params(self.method.shapes)
        what = "weights" if self.method.lora is None else "numbers of adapters"
        begun = f", resumed behind step {last}" if last else ""
        self.say(f"training {count:,} {what} for {self.steps:,} steps{begun}")

    def report(self, seconds: float, result: str) -> None:
        """The report, and where everything is."""
        if not is_main():
            return
        facts = {"time of this call": f"{seconds:,.1f} s"}
        if memory := most_memory():
            facts["most memory of a device"] = f"{memory / 1e9:.2f} GB"
        if self.loader.statistics.dropped:
            facts["records"] = self.loader.statistics.left_out
        files = write_report(
            self.output,
            self.run["arguments"],
            facts=facts,
            samples=writers.read_metrics(self.output / _SAMPLES),
        )
        names = ", ".join(file.name for file in files)
        self.say(f"{self.output}: {result}, metrics.jsonl, {names}")
        if not any(file.suffix == ".png" for file in files):
            self.say('for loss.png: pip install "llama-jax[plots]"')

    def rate_of_devices(self) -> tuple[float, float]:
        """Operations of a step, and the peak of the devices; 0 where not known."""
        config, args = self.method.model.config, self.args
        flops = train_flops(config, args.batch_size, args.seq_length)
        if self.method.lora is not None:  # frozen weights have no gradient
            flops -= forward_flops(config, args.batch_size, args.seq_length)
        peak = local_topology().chip.flops.get(self.method.model.runtime.dtype, 0.0)
        devices = 1 if self.mesh is None else self.mesh.size
        return flops, peak * devices

    def say(self, text: str) -> None:
        """A line on standard error."""
        bar = getattr(self, "bar", None)
        if bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            bar.say(text)
