"""The command line of the scripts, and the YAML file below it; no torch.

Every settings dataclass of `training/config.py` is a group of flags.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.cluster import ClusterArguments
from training.config import (
    CacheArguments,
    DataArguments,
    MemoryArguments,
    ModelArguments,
    TrainingArguments,
    TreeArguments,
    UserError,
    did_you_mean,
    flag_of,
)


@dataclass
class RunArguments:
    """Everything `train_ds.py` was told."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    memory: MemoryArguments
    cache: CacheArguments
    tree: TreeArguments
    dry_run: bool
    list_datasets: bool
    local_rank: int
    given: dict[str, Any]
    """Field -> value, of the flags and the --config file."""
    plan: ClusterArguments | None
    """What --plan plans for; None without it."""


LAUNCHED = {"train_ds.py": "./launch.sh train", "eval_ds.py": "./launch.sh eval"}  # script -> its launcher


def launcher_flags() -> list[str]:
    """The flags of `training/launch.py`, which strips them off before a script sees the rest."""
    from training.launch import launcher_parser  # which imports this file

    shown = (action for action in launcher_parser()._actions if action.help != argparse.SUPPRESS)
    return [flag for action in shown for flag in action.option_strings]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: it names the nearest flag and takes no flag twice.

    It takes no abbreviation, and reads `--some_flag` as `--some-flag`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message.removeprefix("argument "))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        parsed, extras = self.parse_known_args(args, namespace)
        flags = [extra.split("=")[0] for extra in extras if extra.startswith("-") and extra != "-"]
        if flags:
            is_plan = getattr(parsed, "plan", False)  # which has no ranks
            launcher = None if is_plan else LAUNCHED.get(self.prog)
            others = launcher_flags() if launcher else []
            if flags[0] in others:
                raise UserError(
                    f"{flags[0]} is for the launcher, which starts ranks of {self.prog}: {launcher} {flags[0]} …"
                )
            known = [*others, *(flag for flag in self._option_string_actions if flag[:2] == "--")]
            raise UserError(
                f"unknown option {flags[0]}{did_you_mean(flags[0], known) or '; --help lists all'}"
            )
        if extras:
            raise UserError(f"unexpected argument {extras[0]!r}: options start with --")
        return parsed

    def parse_known_args(
        self, args: Any = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = [_dashed(word) for word in (sys.argv[1:] if args is None else args)]
        seen = set()
        for word in words:
            action = self._option_string_actions.get(word.split("=")[0])
            if action is not None and action.dest in seen:
                raise UserError(f"{word.split('=')[0]} is set twice: give it once")
            if action is not None:
                seen.add(action.dest)
        return super().parse_known_args(words, namespace)


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds a flag for each field of a settings dataclass; flags not given leave nothing in the namespace."""
    group = parser.add_argument_group((settings.__doc__ or settings.__name__).splitlines()[0].rstrip("."))
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        help_text = field.metadata["help"]
        if bool in (hints[field.name], *typing.get_args(hints[field.name])):
            group.add_argument(
                flag_of(field),
                dest=field.name,
                action=argparse.BooleanOptionalAction,
                default=argparse.SUPPRESS,
                help=help_text,
            )
            continue
        if field.default is not None:
            help_text += f" (default: {field.default})"
        choices = field.metadata["choices"]
        metavar = "|".join(choices) if choices and not field.metadata["several"] else field.name.upper()
        group.add_argument(
            flag_of(field), dest=field.name, default=argparse.SUPPRESS, metavar=metavar, help=help_text
        )


SETTINGS = (
    ModelArguments, DataArguments, TrainingArguments, MemoryArguments, CacheArguments, TreeArguments
)  # fmt: skip
FIELDS = {field.name: field for settings in SETTINGS for field in dataclasses.fields(settings)}
ONE_SETTING = {"placement", "offload_to_cpu"}  # under two names


def words_of(name: str, value: Any) -> list[str]:
    """What sets a field on the command line; nothing for None."""
    flag = flag_of(FIELDS[name])
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    return [] if value is None else [flag, str(value)]


def _over(above: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
    """The fields of `above`, and those of `below` that it does not set."""
    hidden = ONE_SETTING if ONE_SETTING & above.keys() else set()
    return {name: value for name, value in below.items() if name not in hidden} | above


def parse(argv: Sequence[str] | None = None) -> RunArguments:
    """Reads the command line of `train_ds.py`; a `--config` file lies below the flags, and below that, with
    `--resume`, what the resumed run recorded.

    Raises:
        UserError: unknown, doubled or misspelt settings, values of a wrong type or out of range.
    """
    parser = Parser(
        prog="train_ds.py",
        description="Train a Mixture-of-Experts language model.",
        epilog="The value none unsets an option that need not have one, also where --config or --resume sets it.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags override it")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument(
        "--list-datasets", action="store_true", help="print the known datasets and their licences"
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="estimate memory and speed on other GPUs, for every way to share the experts, and stop",
    )
    parser.add_argument("--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    for settings in (*SETTINGS, ClusterArguments):
        add_options(parser, settings)
    given = vars(parser.parse_args(argv))
    from_file = _read_yaml(given["config"]) if given["config"] else {}
    asked = values = _over({name: value for name, value in given.items() if name in FIELDS}, from_file)
    if values.get("resume"):
        recorded = _recorded_settings(values["resume"], given.get("output_dir"))
        if values.get("expert_store") == "host":  # back from the disk
            recorded = {n: v for n, v in recorded.items() if n not in ("nvme_path", "expert_ram")}
        if values.get("routing") == "token":
            recorded.pop("expert_pool", None)
        values = _over(values, recorded)
    groups = (
        settings(**{f.name: values[f.name] for f in dataclasses.fields(settings) if f.name in values})
        for settings in SETTINGS
    )
    planned = {f.name: given[f.name] for f in dataclasses.fields(ClusterArguments) if f.name in given}
    if planned and not given["plan"]:
        raise UserError(f"--{next(iter(planned))} is for --plan: leave it out, or add --plan")
    plan = ClusterArguments(**planned) if given["plan"] else None
    return RunArguments(*groups, given["dry_run"], given["list_datasets"], given["local_rank"], asked, plan)


def _recorded_settings(resume: str, output_dir: str | None) -> dict[str, Any]:
    """Field name -> value from the run.json of the run that `--resume` names.

    Raises:
        UserError: an `--output-dir` where that run is not.
    """
    from training.checkpoint import resolve_checkpoint

    try:
        run = resolve_checkpoint(resume).parent
        groups = json.loads((run / "run.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError):
        return {}  # a checkpoint moved out of its run, or none, which whoever resumes it will say
    if output_dir and Path(output_dir).expanduser().resolve() != run.resolve().parent:
        raise UserError(
            f"--output-dir {output_dir}: a resumed run goes on in {run}; leave it out, or start a new run there "
            f"from its weights with --init-from"
        )
    names = FIELDS.keys() - {"resume"}
    return {name: value for group in groups.values() for name, value in group.items() if name in names}


def _read_yaml(path: str) -> dict[str, Any]:
    """Field name -> value of a flat YAML file; keys may be flags or field names, with `-` or `_`."""
    import yaml

    try:
        node = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"--config {path}{where}: not YAML ({getattr(error, 'problem', error)})") from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"--config {path}: expected lines of the form `setting: value`")
    flags = {flag_of(field)[2:].replace("-", "_"): name for name, field in FIELDS.items()}
    fields = flags | {name: name for name in FIELDS}
    planned = {field.name for field in dataclasses.fields(ClusterArguments)}
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"--config {path} line {key_node.start_mark.line + 1}"
        key = str(key_node.value)
        name = fields.get(key.replace("-", "_"))
        if key in planned:
            raise UserError(f"{where}: {key} is for --plan, on the command line: --plan --{key} …")
        flag = "--" + key.replace("_", "-")
        if name is None and flag in launcher_flags():
            raise UserError(
                f"{where}: {key} is for the launcher, on the command line: {flag} … (--plan: --gpus)"
            )
        if name is None:
            raise UserError(f"{where}: unknown setting {key}{did_you_mean(key, fields)}")
        if name in values:
            raise UserError(f"{where}: {key} is set twice")
        loader = yaml.SafeLoader("")
        try:
            values[name] = loader.construct_object(value_node, deep=True)
        except yaml.YAMLError:
            raise UserError(f"{where}: the value of {key} cannot be read") from None
    return values


RANK_0_SECONDS = 10  # before another rank says what it found: by then rank 0 has said the same, or will not


def run_script(main: Callable[[], int | None]) -> typing.NoReturn:
    """Runs a script's `main` and exits: a UserError is one `error:` line and exit code 2, Ctrl-C is 130.

    What all ranks find is said by rank 0, whose end makes the launcher stop the others.
    """
    try:
        # Its launcher has blocked them; one that came since then is raised here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
        sys.exit(main() or 0)
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(RANK_0_SECONDS)
        print(f"error{f' (rank {rank})' * (rank > 0)}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
