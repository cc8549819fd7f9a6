"""What a command line decides, by the command's own code, without running a model.

The effect of a command line is everything that is read of it: requests, batches, rates,
plans, prepared conversions. A setting that nothing would read is left out, whether a
configuration has a field for it or not.
"""

import argparse
import contextlib
import dataclasses
import io
import pathlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

import llama_jax.conversion.__main__ as conversion
import llama_jax.conversion.converter as converter
from llama_jax import __main__ as listing
from llama_jax import finetune, plan, sample
from llama_jax.bench import __main__ as bench
from llama_jax.bench.attention_work import Work
from llama_jax.bench.machine import Machine
from llama_jax.checkpoint.model_folder import Loaded
from llama_jax.cli import (
    preference_runs,
    prompt_files,
    reward_flags,
    rlhf_dpo,
    rlhf_ghost_attention,
    rlhf_ppo,
    rlhf_rejection,
    rlhf_reward,
    rlhf_score,
    serve,
)
from llama_jax.cli.parser import ArgumentParser
from llama_jax.conversion.converter import PreparedConversion, prepare_conversion
from llama_jax.conversion.report import describe_conversion
from llama_jax.data.prompts import Prompt
from llama_jax.data.records import OnBad
from llama_jax.errors import LlamaJaxError
from llama_jax.generation.request import Request
from llama_jax.model.transformer import ScalarModel
from llama_jax.planning import policy_compiler, policy_report
from llama_jax.planning.search import Plan
from llama_jax.planning.workload import Workload
from llama_jax.rlhf import __main__ as rlhf
from llama_jax.rlhf.optimization import PolicyMethod
from llama_jax.rlhf.pairs import PairSource
from llama_jax.rlhf.policy_config import PolicyConfig
from llama_jax.rlhf.preference_config import RewardConfig
from llama_jax.rlhf.reward_model import PairScores
from llama_jax.rlhf.rewards import ModelReward
from llama_jax.runtime import Runtime
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.finetune_config import FinetuneConfig
from llama_jax.train.methods import Method
from llama_jax.train.shared_base import train_critic_on

Main = Callable[[Sequence[str] | None], int]

MAINS: dict[str, Main] = {
    "": listing.main,
    "sample": sample.main,
    "serve": serve.main,
    "finetune": finetune.main,
    "conversion": conversion.main,
    "plan": plan.main,
    "bench": bench.main,
    "rlhf": rlhf.main,
    "rlhf ghost-attention": rlhf_ghost_attention.main,
    "rlhf ppo": rlhf_ppo.main,
    "rlhf rejection": rlhf_rejection.main,
    "rlhf reward": rlhf_reward.main,
    "rlhf score": rlhf_score.main,
    "rlhf dpo": rlhf_dpo.main,
}
SUBCOMMANDS = ("finetune merge", "finetune tokenizer", "conversion verify",
               "conversion inspect")  # fmt: skip
"""Those whose parser is not part of their command's parser."""


class _Decided(BaseException):
    """Ends a command where everything is decided."""


@dataclasses.dataclass
class Decisions:
    """Replaces what is slow in the commands by records of what it is called with.

    Attributes:
      loaded: the model of `sample`.
      values: what was decided, in order.
    """

    loaded: Loaded
    values: list[object] = dataclasses.field(default_factory=list)

    def record(self, *values: object) -> None:
        """Record a decision."""
        self.values.extend(values)

    def replace(self, patch: pytest.MonkeyPatch) -> None:
        """Replace functions in the commands' modules."""
        for module in (sample, finetune, rlhf_ghost_attention, rlhf_rejection):
            patch.setattr(module, "start_processes", self._start_processes)
        self._replace_sample(patch)
        self._replace_finetune(patch)
        self._replace_conversion(patch)
        self._replace_bench(patch)
        self._replace_rlhf(patch)
        patch.setattr(plan, "compile_plans", self._compile_plans)
        patch.setattr(policy_report, "policy_lines", self._report)
        patch.setattr(
            policy_report,
            "describe_policy",
            lambda *args: self._report("JSON", *args),
        )
        patch.setattr(policy_compiler, "compile_policy", self._end("compile"))
        patch.setattr(
            plan, "devices_of", lambda args, _: self.record(args.gpu_target_config)
        )
        patch.setattr(plan, "report_lines", self._report)
        patch.setattr(plan, "describe", lambda *args: self._report("JSON", *args))
        patch.setattr(plan, "what_fits", self.record)
        patch.setattr(plan, "table_lines", lambda _: [])

    def _end(self, name: str) -> Callable[..., None]:
        def decided(*args: object, **options: object) -> None:
            texts = (
                arg.contents if isinstance(arg, Tokenizer) else arg for arg in args
            )
            self.record(name, *texts, options)
            raise _Decided

        return decided

    def _start_processes(self, args: argparse.Namespace, **_: object) -> bool:
        self.record(args.coordinator, args.num_processes, args.process_id)
        return False

    def _replace_sample(self, patch: pytest.MonkeyPatch) -> None:
        loading = ("checkpoint", "tokenizer", "max_seq_len", "dtype", "mesh", "adapter")
        loading += ("quantize", "cache_dtype")

        def load_model(args: argparse.Namespace) -> Loaded:
            self.record([getattr(args, name) for name in loading])
            return self.loaded

        def stream(_: Loaded, requests: Sequence[Request]) -> Iterator[None]:
            self._request(*requests)
            return iter(())

        def complete_prompts(
            _: Loaded, pairs: Any, output: str, *, settings: object, **more: object
        ) -> None:
            for _, request in pairs:
                self._request(dataclasses.replace(request, logprobs=None))
            self.record(pathlib.Path(output))
            raise _Decided

        class Conversation:
            """Answers one message; nobody sees log-probabilities or other samples."""

            def __init__(
                self, ask: Any, answer: Any, context: int, system: str | None
            ) -> None:
                turns = [{"role": "user", "content": "Hi"}]
                if system is not None:
                    turns.insert(0, {"role": "system", "content": system})
                request = ask(turns)
                answer(dataclasses.replace(request, num_samples=1, logprobs=None))

            def loop(self) -> None:
                """End."""

        def read(files: Sequence[str], on_bad: OnBad) -> list[Prompt]:
            self.record(on_bad)
            return prompts_of(files, on_bad)

        prompts_of = prompt_files.read
        patch.setattr(prompt_files, "read", read)
        clock = types.SimpleNamespace(
            loaded=lambda: None, watch=lambda deltas: deltas, report=self.record
        )
        patch.setattr(sample, "Clock", lambda: clock)
        patch.setattr(sample.cli, "load_model", load_model)
        patch.setattr(serve, "serve", self._serve)
        patch.setattr(sample, "stream", stream)
        patch.setattr(sample, "Conversation", Conversation)
        patch.setattr(sample, "print_text", lambda *_: self.record("text"))
        patch.setattr(sample, "print_json", lambda *_: self.record("JSON"))
        patch.setattr(prompt_files.secrets, "randbits", lambda _: 1)
        patch.setattr(prompt_files, "complete_prompts", complete_prompts)

    def _serve(self, _: Loaded, *settings: object) -> None:
        self.record(*settings)
        raise _Decided

    def _request(self, request: Request) -> None:
        sampling = request.sampling
        if sampling.temperature == 0:  # nothing is drawn
            sampling = dataclasses.replace(sampling, top_k=0, top_p=1.0, min_p=0.0)
        self.record(dataclasses.replace(request, sampling=sampling))

    def _replace_finetune(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(finetune, "count_steps", lambda *_: None)
        patch.setattr(finetune, "run_training", self._train)
        for name in ("merge_checkpoint", "train_tokenizer"):
            patch.setattr(finetune, name, self._end(name))

    def _train(
        self, config: FinetuneConfig, opened: Any, mesh: Any, loader: Any,
        held_out: Any, output: object, steps: object, *, resume: bool,
    ) -> None:  # fmt: skip
        method = finetune.make_method(config, opened, mesh)
        self.record(
            opened.config, opened.tokenizer.contents,
            opened.tokenizer.settings, sorted(opened.leaves),
            method.model, method.shapes, method.lora, method.base_model, config.seed,
            [part.tolist() for part in next(loader)], config.on_bad,
            config.learning_rates(40).tolist(), config.steps, config.epochs,
            config.optimizer, config.weight_decay, config.clip, config.accumulate,
            config.max_skipped, config.save_every, config.keep, config.tensorboard,
            config.wandb, str(output), resume,
        )  # fmt: skip
        if config.method == "qlora":
            self.record(config.quantize)
        if config.method == "full":  # adapters are saved as they are trained
            self.record(config.save_dtype)
        if config.format != "infilling":  # whose texts are cut into windows
            self.record(config.on_long)
        if held_out is not None:
            self.record(config.eval_data, config.eval_every)
        if config.sample_prompt:
            self.record(config.sample_prompt, config.sample_every, config.sample_tokens)
        raise _Decided

    def _replace_conversion(self, patch: pytest.MonkeyPatch) -> None:
        def prepare(src: str, dst: str, **settings: Any) -> PreparedConversion:
            prepared = prepare_conversion(src, dst, **settings)
            self.record(prepared.source.config, prepared.gguf_dtype)
            self.record(settings["max_host_bytes"])
            if prepared.target_format == "meta":
                self.record(prepared.ranks)
            return prepared

        def convert(src: str, dst: str, progress: object, **settings: Any) -> object:
            prepared = prepare(src, dst, **settings)
            self.record(list(describe_conversion(prepared, dst)))
            return types.SimpleNamespace(config=prepared.source.config)

        def compare(a: Any, b: Any, _: object) -> None:
            self.record("compare", a.config)

        def open_source(path: str, **options: Any) -> object:
            # The target does not exist.
            return opened(path, **options) if path != "new" else None

        opened = conversion.open_source
        patch.setattr(converter, "anonymous_bytes", lambda: 1 << 28)
        patch.setattr(conversion, "prepare_conversion", prepare)
        patch.setattr(conversion, "convert", convert)
        patch.setattr(conversion, "describe_result", lambda *_: iter(()))
        patch.setattr(conversion, "open_source", open_source)
        patch.setattr(conversion, "compare", compare)
        patch.setattr(conversion, "_print_comparison", lambda _: 0)

    def _compile_plans(
        self, args: argparse.Namespace, work: Workload, topology: Any, fixed: Any
    ) -> None:
        self.record("compile", args.json, work, topology, fixed)
        if topology.chip.is_gpu:
            self.record(args.gpu_target_config)
        raise _Decided

    def _report(self, *args: object) -> list[str]:
        """Record the numbers of a plan, and no setting that they do not show."""
        for arg in args:
            if isinstance(arg, Plan):
                self.record(arg.topology, arg.mesh, arg.footprint, arg.bound)
                self.record(arg.work.batch)
            else:
                self.record(arg)
        return []

    def _replace_bench(self, patch: pytest.MonkeyPatch) -> None:
        def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
            args = parsed(argv)
            self.record(args.benchmark, args.json)
            return args

        def describe(work: Work) -> Work:
            return work if work.kind == "decode" else work._replace(page=0, int8=False)

        def compare(chip: str, shape: str, work: Work, *, sweep: bool) -> Iterator[Any]:
            self.record(chip, shape, describe(work), sweep)
            return iter(())

        def measure_times(works: Sequence[tuple[str, Work]]) -> None:
            self.record([(shape, describe(work)) for shape, work in works])
            raise _Decided

        parsed = bench.parse_args
        machine = Machine(device="", host="", jax="", date="")
        patch.setattr(bench, "describe_machine", lambda: machine)
        patch.setattr(bench, "parse_args", parse_args)
        patch.setattr(bench, "compare", compare)
        patch.setattr(bench, "measure_times", measure_times)
        patch.setattr(bench, "load", lambda path: str(path))
        names = ("train", "decode", "prefill", "data", "conversion", "learning")
        for name in (*names, "serve"):
            patch.setattr(bench, f"measure_{name}", self._end(name))
        package = types.SimpleNamespace(find_spec=bool, version=str)
        patch.setattr(
            bench, "importlib", types.SimpleNamespace(util=package, metadata=package)
        )

    def _replace_rlhf(self, patch: pytest.MonkeyPatch) -> None:
        def load_model(path: str, policy: object) -> Loaded:
            self.record("reward", path)
            return self.loaded

        def make_reward(loaded: object, style: Any = None, *, name: str) -> Any:
            self.record(getattr(style, "name", None), name)
            reward = mock.MagicMock(spec=ModelReward)
            reward.name = name
            return reward

        def sample_dialogs(
            _: object, items: Sequence[Any], answer: Any, path: object, **more: Any
        ) -> None:
            self.record(items, path, more["seed"], more["settings"])
            self._request(answer([{"role": "user", "content": "Hi"}]))
            raise _Decided

        def sample_and_score(
            _: object, works: Sequence[Any], reward: object, path: object, **more: Any
        ) -> None:
            self.record(path, [work.prompt for work in works])
            for work in works:
                for request in work.requests:
                    self._request(request)

        def run(*_: object, resume: bool, **__: object) -> None:
            self.record(resume)
            raise _Decided

        def select(_: object, *, allow_cut: bool) -> None:
            self.record(allow_cut)
            raise _Decided

        patch.setattr(reward_flags, "_load", load_model)
        patch.setattr(
            reward_flags, "load_reward", lambda name: make_reward(None, name=name)
        )
        for name in ("JudgeReward", "ModelReward"):
            patch.setattr(reward_flags, name, make_reward)
        patch.setattr(
            reward_flags,
            "SafetyGatedReward",
            lambda first, second, *, name: make_reward(None, name=name),
        )
        patch.setattr(rlhf_ghost_attention, "sample_dialogs", sample_dialogs)
        patch.setattr(rlhf_rejection, "sample_and_score", sample_and_score)
        patch.setattr(rlhf_rejection, "select", select)
        patch.setattr(
            rlhf_rejection, "read_earlier", lambda path: self.record(path) or {}
        )

        def make_critic(policy: Method, *, adapter: object, **more: Any) -> Method:
            self.record(adapter)
            return train_critic_on(policy, **more)

        patch.setattr(rlhf_ppo, "train_critic_on", make_critic)
        patch.setattr(rlhf_ppo, "optimize_policy", self._optimize_policy)
        patch.setattr(rlhf_ppo, "run", run)
        self._replace_preferences(patch)

    def _replace_preferences(self, patch: pytest.MonkeyPatch) -> None:
        def load(path: str, **settings: Any) -> Loaded:
            self.record(path, settings)
            config = self.loaded.model.config.replace(head="scalar")
            return self.loaded._replace(model=ScalarModel(config, Runtime()))

        def score_pairs(_: object, source: PairSource, *, batch_size: int) -> Any:
            self.record(source.on_bad, source.on_long, source.format.name, batch_size)
            zeros = np.zeros((1, 2))
            return PairScores(zeros, zeros + 1, np.zeros(1, int), ("line 1",))

        patch.setattr(preference_runs, "run", self._learn_preferences)
        patch.setattr(rlhf_score, "load", load)
        patch.setattr(rlhf_score, "score_pairs", score_pairs)
        patch.setattr(rlhf_score, "write_file", lambda path, _: self.record(path))

    def _learn_preferences(
        self, config: Any, method: Any, source: PairSource, folder: object, *,
        resume: bool, total_steps: int | None, eval_batches: PairSource | None,
        **_: object,
    ) -> None:  # fmt: skip
        self.record(
            method.model, method.shapes, method.lora, method.base_model, config.seed,
            [part.tobytes() for part in next(iter(source))], source.on_bad,
            source.on_long, source.settings(), total_steps, config.epochs,
            config.learning_rates(40).tolist(), config.optimizer, config.weight_decay,
            config.clip, config.accumulate, config.max_skipped, config.save_every,
            config.keep, config.tensorboard, config.wandb, str(folder), resume,
        )  # fmt: skip
        if config.lora is None:
            self.record(config.save_dtype)
        if isinstance(config, RewardConfig):
            self.record(config.safety_weight)
        else:
            self.record(config.loss, config.beta)
        if eval_batches is not None:
            self.record(eval_batches.settings(), config.eval_every)
        raise _Decided

    def _optimize_policy(
        self, config: PolicyConfig, policy: Any, reward: Any, prompts: object,
        tokenizer: Tokenizer, folder: object, *, critic: Any, format: object,
    ) -> mock.MagicMock:  # fmt: skip
        settings = dataclasses.asdict(config)
        ours = ["critic_learning_rate", "clip_value", "discount", "decay"]
        of_critic = [settings.pop(name) for name in ours]
        self.record(settings, policy.model, policy.shapes, policy.lora)
        self.record(
            [leaf.dtype for leaf in jax.tree.leaves(policy.frozen)], policy.base_model
        )
        self.record(prompts, tokenizer.contents, folder, format)
        if critic is not None:
            self.record(of_critic, critic.fingerprint, critic.model)
        return mock.MagicMock(spec=PolicyMethod)


def effect(loaded: Loaded, argv: Sequence[str]) -> tuple[str, str]:
    """The effect of a command line, and the error with which it is refused.

    Args:
      loaded: the model of `sample`.
      argv: the command and its arguments.

    Returns:
      Texts, one of which is empty.
    """
    decisions, out, err = Decisions(loaded), io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        decisions.replace(patch)
        try:
            words = 2 if " ".join(argv[:2]) in MAINS else 1
            MAINS[" ".join(argv[:words])](argv[words:])
        except LlamaJaxError as error:
            return "", str(error)
        except SystemExit as exit:
            return "", err.getvalue() or f"status {exit.code}"
        except _Decided:
            pass
    if "error: " in err.getvalue():  # of conversion, which prints its errors itself
        return "", err.getvalue()
    return f"{decisions.values}\n{out.getvalue()}", ""


def parsers() -> dict[str, ArgumentParser]:
    """The parsers of all commands, and of the commands inside them."""
    found: dict[str, ArgumentParser] = {}
    for command in (*MAINS, *SUBCOMMANDS):
        name, *words = (command,) if command in MAINS else command.split()
        with (
            mock.patch.object(
                ArgumentParser, "parse_known_args", autospec=True, side_effect=_Decided
            ) as parse,
            contextlib.suppress(_Decided),
        ):
            MAINS[name](words)
        found[command] = parse.call_args.args[0]
        for action in found[command]._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {f"{command} {n}": p for n, p in action.choices.items()}
    return found
