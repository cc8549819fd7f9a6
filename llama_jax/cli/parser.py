"""`ArgumentParser`: a flag without effect is refused, a near miss gets a suggestion.

Each command has a table of rules: when a flag has an effect. The same words are in its
--help and in its errors.
"""

import argparse
import functools
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from llama_jax.cli.version import add_version_argument
from llama_jax.errors import ConfigError, did_you_mean

_UNSET = object()
_USAGE_WIDTH = 72
_ALIASES = {
    "--lr": "--learning-rate",
    "--model": "--checkpoint",
    "--max-length": "--max-new-tokens",
    "--out": "--output",
}


class Rule(NamedTuple):
    """When a flag has an effect.

    Attributes:
      used: whether it has one, by the settings of the command: an object with the
        values of all flags as attributes, defaults included.
      unused: why not, as in "without --method lora or qlora"; follows "has no effect".
      help: precedes the flag's help, as in "with --method lora or qlora".
    """

    used: Callable[[Any], bool]
    unused: str
    help: str = ""


Rules = Mapping[str, Rule | tuple[Rule, ...]]
"""The rules of flags, by flag; one without a rule always has an effect."""


def needs(flag: str, *values: str) -> Rule:
    """A rule that another flag is given, with one of these values if there are any."""
    name, words = _dest(flag), flag
    if values:
        listed = filter(None, (", ".join(values[:-1]), values[-1]))
        words = f"{flag} {' or '.join(listed)}"

    def used(settings: Any) -> bool:
        value = getattr(settings, name)
        return value in values if values else bool(value)

    return Rule(used, f"without {words}", f"with {words}")


def excludes(flag: str) -> Rule:
    """A rule that another flag is not given."""
    name = _dest(flag)
    return Rule(lambda settings: not getattr(settings, name), f"with {flag}")


def refuse_unused(rules: Rules, given: Iterable[str], settings: Any) -> None:
    """Raise a `ConfigError` that names a given flag without effect.

    Args:
      rules: of the command.
      given: flags of the command line, as in `args.given`.
      settings: see `Rule`.
    """
    for flag in sorted(given):
        for rule in _rules_of(rules, flag):
            if not rule.used(settings):
                raise ConfigError(f"{flag}: has no effect {rule.unused}")


class ArgumentParser(argparse.ArgumentParser):
    """A parser with --version, short usage, and errors of one line.

    Flags cannot be abbreviated, since a new flag would make a script ambiguous. The
    parsed arguments have `given`, the flags of the command line in their full names.

    Args:
      rules: of the flags.
      check: check them with the values of all flags; otherwise the caller does so, by
        `refuse_unused`.
      **options: as of `argparse.ArgumentParser`.
    """

    def __init__(
        self, *, rules: Rules | None = None, check: bool = True, **options: Any
    ) -> None:
        self._rules = rules or {}
        formatter = functools.partial(_Help, rules=self._rules)
        super().__init__(allow_abbrev=False, formatter_class=formatter, **options)
        self._check = check
        add_version_argument(self)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: None = None
    ) -> argparse.Namespace:
        """Parse arguments; exits with status 2 if they are wrong."""
        parsed, rest = self.parse_known_args(args)
        if rest:
            self.error(f"there is no argument {rest[0]!r}")
        return parsed

    def parse_known_args(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse arguments, and check them; `ArgumentParser` parses commands by it."""
        argv = list(sys.argv[1:] if args is None else args)
        self._check_names(argv)
        parsed = argparse.Namespace()
        actions = [a for a in self._actions if a.default is not argparse.SUPPRESS]
        for action in actions:
            # An action that appends wants a list or None.
            appends = isinstance(action, argparse._AppendAction)
            setattr(parsed, action.dest, None if appends else _UNSET)
        parsed, rest = super().parse_known_args(argv, parsed)
        given = set(getattr(parsed, "given", ()))  # of a command inside this one
        for action in actions:
            value = getattr(parsed, action.dest)
            if value is _UNSET or value is None:
                setattr(parsed, action.dest, action.default)
            elif action.option_strings:
                given.add(action.option_strings[-1])
        parsed.given = frozenset(given)
        if self._check:
            try:
                refuse_unused(self._rules, given, parsed)
            except ConfigError as error:
                self.error(str(error))
        return parsed, rest

    def _check_names(self, argv: Sequence[str]) -> None:
        """Refuse unknown flags first: what is missing may be what is misspelt."""
        rest = (argparse.PARSER, argparse.REMAINDER)
        if any(action.nargs in rest for action in self._actions):
            return  # some of these arguments are another parser's
        for argument in argv:
            name = argument.partition("=")[0]
            if name == "--":
                return
            if not name.startswith("--") or " " in argument:
                continue
            if name not in self._option_string_actions:
                known = self._option_string_actions
                suggestion = did_you_mean(name, known, aliases=_ALIASES)
                self.error(f"there is no flag {name}{suggestion}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(map(str, action.choices))
            raise argparse.ArgumentError(
                action,
                f"{value!r} is not one of {', '.join(choices)}"
                f"{did_you_mean(str(value), choices)}",
            )

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line."""
        message = message.removeprefix("argument ")
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")

    def format_help(self) -> str:
        """Short usage, and flags with their rules; --help and --version last."""
        if self.usage is None:
            self.usage = textwrap.fill(
                " ".join([self.prog, *self._required(), "[options]"]),
                _USAGE_WIDTH,
                subsequent_indent=" " * 7,
                break_on_hyphens=False,
            )
        self._action_groups.sort(key=lambda group: group is self._optionals)
        return super().format_help()

    def _required(self) -> Iterator[str]:
        for action in self._actions:
            name = action.metavar or action.dest
            if not action.option_strings:
                yield f"[{name} ...]" if action.nargs == "*" else str(name)
            elif action.required:
                yield f"{action.option_strings[-1]} {name}"


class _Help(argparse.HelpFormatter):
    """Adds rules to help, keeps text with line ends, and does not hyphenate names."""

    def __init__(self, *args: Any, rules: Rules, **options: Any) -> None:
        super().__init__(*args, **options)
        self._rules = rules

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = super()._get_help_string(action)
        for flag in action.option_strings:
            for rule in _rules_of(self._rules, flag):
                text = f"{rule.help}: {text}" if rule.help else text
        return text

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines() if "\n" in text else self._split_lines(text, width)
        return "\n".join(indent + line for line in lines)


def _rules_of(rules: Rules, flag: str) -> tuple[Rule, ...]:
    rule = rules.get(flag, ())
    return (rule,) if isinstance(rule, Rule) else rule


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
