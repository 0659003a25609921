"""`mdkernels STAGE`: one subcommand per pipeline stage, from the table in cli_stages.py.

Flags are the arguments of the stage's Python function in kebab-case. Nothing heavy is imported
before a stage runs, so help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import cli_commands
from .cli_stages import STAGES, Option, Stage


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)


class _Parser(argparse.ArgumentParser):
    """Errors are one line; the usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns 0, 2 for what the user can put right, 130 for Ctrl-C, 141 when
    nobody reads the output any more."""
    # Both count only before torch is loaded. Thread pools of two processes that spin while waiting
    # slow each other down severalfold; huge pages spare large fresh tensors most page faults.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    parser = build_parser()
    words = sys.argv[1:] if argv is None else list(argv)
    names = [stage.name for stage in STAGES]
    if words and not words[0].startswith("-") and words[0] not in names:
        near = _nearest(words[0], names) or f", there are {', '.join(names)}"
        parser.error(f"unknown stage {words[0]!r}{near}")
    arguments, unknown = parser.parse_known_args(words)
    stage: Stage | None = getattr(arguments, "stage", None)
    if stage is None:
        if unknown:
            parser.error(f"unknown argument {unknown[0]!r}")
        parser.print_help()
        return 0
    if unknown:
        arguments.parser.error(_unknown_flag(unknown[0], stage))
    try:
        text = getattr(cli_commands, stage.command)(**_settings(stage, vars(arguments)))
        print(f"{text}\n" if text else "", end="", flush=True)
    except BrokenPipeError:
        # Who read our output has read enough, as `head` does. Python would flush once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        how = str(stop) or "interrupted"
        if stage.continues and not str(stop):
            how += "; the same command continues from its last checkpoint, if it has made one"
        if os.environ.get("RANK", "0") == "0":  # of several processes, one is enough
            print(f"\nmdkernels {stage.name}: {how}", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_users(error):
            raise
        if arguments.traceback or os.environ.get("MDK_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"mdkernels {stage.name}: error: {message}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mdkernels",
        description="Memory Decoder: train a small model to imitate a kNN retriever and mix it\n"
        "with any base model of the same tokenizer.",
        epilog="A run goes through the stages in this order. `mdkernels STAGE --help` shows\n"
        "options, defaults and an example.",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(metavar="STAGE", title="stages")
    for stage in STAGES:
        sub = subparsers.add_parser(
            stage.name,
            help=stage.summary,
            description=stage.summary[0].upper() + stage.summary[1:] + ".",
            epilog=f"example:\n  {stage.example}",
            usage=_usage(stage),
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        for option in stage.options:
            _add(sub, option)
        if stage.options:
            sub.add_argument(
                "--config",
                metavar="FILE",
                help="JSON or YAML (.yaml, .yml) file of options, with underscores; flags win",
            )
        sub.add_argument(
            "--traceback",
            action="store_true",
            help="also show where an error was raised (or set MDK_DEBUG=1)",
        )
        sub.set_defaults(stage=stage, parser=sub)
    return parser


def _usage(stage: Stage) -> str:
    needed = [f"{o.flag} {o.metavar}" for o in stage.options if o.required]
    return " ".join(["mdkernels", stage.name, *needed, *(["[options]"] if stage.options else [])])


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    help_text = option.help
    if option.required:
        help_text += " [required]"
    elif option.default is not None and not isinstance(option.default, bool):
        help_text += f" (default: {option.default})"
    elif option.default is True:
        help_text += " (default: on)"
    # What is not given stays out of the namespace: a config file may then supply it, and else the
    # function's own default applies.
    settings: dict[str, Any] = {"help": help_text, "default": argparse.SUPPRESS}
    if isinstance(option.default, bool):
        on_off = argparse.BooleanOptionalAction
        settings["action"] = on_off if option.default else "store_true"
    else:
        settings |= {"type": option.type, "metavar": option.metavar}
        if option.choices:
            settings |= {"choices": option.choices, "metavar": None}
        if option.many:
            settings |= {"nargs": "+", "action": "extend"}
    parser.add_argument(option.flag, dest=option.name, **settings)


def _settings(stage: Stage, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the stage: the config file's, overridden by flags. Raises ValueError."""
    known = {option.name: option for option in stage.options}
    settings: dict[str, Any] = {}
    if given.get("config") is not None:
        settings = _read_config(given["config"])
        for name in settings:
            if name not in known:
                near = _nearest(str(name), list(known)) or f" (see mdkernels {stage.name} --help)"
                raise ValueError(f"config: unknown option {name!r}{near}")
        settings = {name: _configured(known[name], value) for name, value in settings.items()}
    settings |= {name: value for name, value in given.items() if name in known}
    missing = [o.flag for o in stage.options if o.required and o.name not in settings]
    if missing:
        raise ValueError(
            f"missing {', '.join(missing)}; for example: {' '.join(stage.example.split())}"
        )
    return settings


def _configured(option: Option, value: Any) -> Any:
    """A value of the config file, as the flag would give it. Raises ValueError."""
    if value is None and (option.nullable or (option.default is None and not option.required)):
        return None
    if isinstance(option.default, bool):
        if isinstance(value, bool):
            return value
        raise ValueError(f"config: {option.name} must be true or false, got {value!r}")
    if option.many:
        return [_one(option, item) for item in (value if isinstance(value, list) else [value])]
    return _one(option, value)


def _one(option: Option, value: Any) -> Any:
    kinds = {str: "text", int: "an integer", float: "a number"}
    expected = kinds.get(option.type, option.metavar)
    if option.choices:
        expected = f"one of {', '.join(option.choices)}"
    good = isinstance(value, str)
    if option.type is not str:
        good = isinstance(value, int | float if option.type is float else int)
        if isinstance(value, str):  # YAML takes 1e-3 for text
            try:
                return option.type(value)
            except ValueError:
                good = False
    if not good or isinstance(value, bool) or (option.choices and value not in option.choices):
        raise ValueError(f"config: {option.name} must be {expected}, got {value!r}")
    return value


def _read_config(path: str) -> dict[str, Any]:
    text = Path(path).read_bytes()
    if path.endswith((".yaml", ".yml")):
        import yaml  # transformers requires it

        try:
            settings = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"config: {path} is no YAML: {error}") from error
    else:
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise ValueError(f"config: {path} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config: {path} must hold a JSON object or a YAML mapping")
    return settings


def _unknown_flag(argument: str, stage: Stage) -> str:
    flags = [option.flag for option in stage.options]
    return f"unknown argument {argument!r}{_nearest(argument.split('=')[0], flags)}"


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _is_users(error: Exception) -> bool:
    """Whether the message of `error` is meant for the user; anything else is a bug of ours."""
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return True
    dispatch = sys.modules.get("mdkernels.ops.dispatch")
    return dispatch is not None and isinstance(error, dispatch.BackendUnavailable)
