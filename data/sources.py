"""Which data a `--dataset` means, where it comes from, and its split into training and validation.

A name is looked for in this order: your own entries (`--dataset-config`), a task family (hub primary, hub
fallback, then embedded), an embedded dataset, a path, a hub name. `Source.origin` and `Source.note` say what
was used.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import itertools
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.example import Example
from data.hub import HUB, Hub, HubDataset, hub_rows
from data.readers import SUFFIXES, files_of, read_path
from data.schema import check_names, to_example
from training.config import DataArguments, UserError, did_you_mean


@dataclass(frozen=True)
class Embedded:
    """A dataset made or found on this machine: a function of this package that yields examples."""

    family: str
    function: str
    licence: str
    about: str


OURS = "this project's"
EMBEDDED = {
    "chitchat": Embedded("chat", "data.conversations:conversations", "MIT", "human conversations"),
    "instructions": Embedded(
        "chat", "data.instructions:instructions", OURS, "procedural, one right answer each"
    ),
    "stdlib": Embedded(
        "code", "data.stdlib_functions:stdlib_functions", "PSF", "Python's documented functions"
    ),
    "functions": Embedded("code", "data.code_tasks:code_tasks", OURS, "procedural, with unit tests"),
    "word_problems": Embedded(
        "reasoning", "data.word_problems:word_problems", OURS, "procedural, with steps"
    ),
}
GROUPS = {"all": tuple(HUB), "embedded": tuple(EMBEDDED)}
LICENCES = {name: dataset.licence for name, dataset in EMBEDDED.items()} | {
    dataset.path: dataset.licence for datasets in HUB.values() for dataset in datasets
}


@dataclass(frozen=True)
class Source:
    """A dataset that was found.

    Attributes:
        name: what the report calls it.
        kind: embedded, path or hub.
        location: an embedded dataset's name, a path, or a hub name.
        origin: `embedded`, `hub`, `hub fallback`, or the path.
        weight: how often an epoch shows it.
        note: why it is not the first choice, empty if it is.
        family, prompt_format, fields: override what the columns suggest.
        configs, revision: of a hub dataset.
        validation: path of a separate validation set.
    """

    name: str
    kind: str
    location: str
    origin: str
    weight: float = 1.0
    licence: str = "not stated"
    note: str = ""
    family: str | None = None
    prompt_format: str | None = None
    fields: dict[str, str] | None = None
    configs: tuple[str, ...] = ()
    revision: str = ""
    validation: str | None = None

    def examples(self, split: str = "train", streaming: bool = False) -> Iterator[Example]:
        """The rows as examples; `split="validation"` gives the dataset's own validation set, often empty.

        Raises:
            UserError: a file or row that cannot be read, naming file and line.
        """
        for where, row in self._rows(split, streaming):
            yield to_example(
                row,
                dataset=self.name,
                where=where,
                family=self.family,
                prompt_format=self.prompt_format,
                fields=self.fields,
            )

    def _rows(self, split: str, streaming: bool) -> Iterable[tuple[str, Any]]:
        if split == "validation" and self.validation:
            return read_path(Path(self.validation))
        if self.kind == "path":
            return read_path(Path(self.location), split)
        if split == "validation":
            return ()
        if self.kind == "embedded":
            return ((f"{self.name}: example", example) for example in _function(self.location)())
        return hub_rows(self.location, self.configs, self.revision, streaming)

    def fingerprint(self) -> str:
        """A hash of the content, which together with this package's code decides the rows."""
        digest = hashlib.sha256()
        if self.kind == "embedded":
            made_from = platform.python_version(), importlib.metadata.version("chitchat-dataset")
            digest.update(f"{self.location} {made_from}".encode())
        elif self.kind == "hub":
            digest.update(f"{self.location} {self.configs} {self.revision}".encode())
        elif self.location.endswith(".py"):
            # The file may read anything, so only what it yields tells whether it changed.
            for example in self.examples():
                digest.update(repr(example).encode("utf-8", "surrogatepass"))
        else:
            for path in filter(None, (self.location, self.validation)):
                for file in files_of(Path(path)):
                    with file.open("rb") as stream:
                        while block := stream.read(1 << 20):
                            digest.update(block)
        return digest.hexdigest()


def _function(name: str) -> Any:
    module, function = EMBEDDED[name].function.split(":")
    return getattr(importlib.import_module(module), function)


def resolve(args: DataArguments) -> list[Source]:
    """The sources that `args.dataset` means.

    Raises:
        UserError: an unknown name, a weight that is no positive number, a name given twice, a missing file,
            a hub dataset that cannot be had, or a mistake in the `--dataset-config` file.
    """
    custom = read_dataset_config(Path(args.dataset_config)) if args.dataset_config else {}
    hub = Hub()
    sources: list[Source] = []
    seen: set[str] = set()
    for name, weight in _parse(args.dataset):
        for member in GROUPS.get(name, (name,)):
            if member in seen:
                raise UserError(
                    f"dataset {member} is named twice in {args.dataset!r}; give it a weight: {member}:2"
                )
            seen.add(member)
            sources += [
                replace(source, weight=weight * source.weight) for source in _find(member, custom, hub)
            ]
    return sources


def _parse(spec: str) -> Iterator[tuple[str, float]]:
    """Names and weights of `chat:2,my.jsonl`."""
    for part in spec.split(","):
        name, colon, weight = part.strip().rpartition(":")
        if not colon or (re.search(r"[/\\.]", weight) and not re.fullmatch(r"[\d.]+", weight)):
            name, weight = part.strip(), "1"
        if not name:
            raise UserError(f"--dataset {spec!r} has an empty name")
        try:
            number = float(weight)
        except ValueError:
            number = 0.0
        if not 0 < number < float("inf"):
            raise UserError(f"dataset {name}: its weight must be a number above 0, not {weight!r}")
        yield name, number


def _find(name: str, custom: dict[str, Source], hub: Hub) -> list[Source]:
    """The sources of one name."""
    if name in custom:
        source = custom[name]
        return [source if source.kind == "path" else _from_hub(source, hub)]
    if name in HUB:
        return _family(name, hub)
    if name in EMBEDDED:
        return [_embedded(name)]
    path = Path(name).expanduser()
    if path.exists() or path.suffix in SUFFIXES or name.startswith((".", "/", "~")):
        if not path.exists():
            raise UserError(f"dataset {name} does not exist")
        return [Source(name=name, kind="path", location=str(path), origin=str(path))]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        known = next(
            (dataset for datasets in HUB.values() for dataset in datasets if dataset.path == name), None
        )
        return [_from_hub(_hub_source(known or HubDataset(name, "see the hub")), hub)]
    known_names = [*custom, *GROUPS, *HUB, *EMBEDDED]
    hint = did_you_mean(name, known_names) or f"; there are {', '.join(known_names)}, paths and hub names"
    raise UserError(f"no dataset {name!r}{hint}")


def _embedded(name: str, note: str = "") -> Source:
    entry = EMBEDDED[name]
    return Source(name, "embedded", name, "embedded", licence=entry.licence, note=note, family=entry.family)


def _hub_source(
    dataset: HubDataset, family: str | None = None, origin: str = "hub", note: str = ""
) -> Source:
    return Source(
        name=dataset.path,
        kind="hub",
        location=dataset.path,
        origin=origin,
        licence=dataset.licence,
        family=family,
        configs=dataset.configs,
        note=note,
    )


def _from_hub(source: Source, hub: Hub) -> Source:
    revision, problem = hub.revision(source.location)
    if revision is None:
        raise UserError(
            f"hub dataset {source.location} cannot be had ({problem}); check the name or use a local file"
        )
    return replace(source, revision=revision)


def _family(family: str, hub: Hub) -> list[Source]:
    """Hub primary, else hub fallback, else the embedded datasets of a family."""
    note = ""
    for dataset, origin in zip(HUB[family], ("hub", "hub fallback"), strict=True):
        revision, problem = hub.revision(dataset.path)
        if revision is not None:
            source = replace(_hub_source(dataset, family, origin, note), revision=revision)
            try:  # the first row is had before the source counts as found
                next(source.examples(streaming=not revision.startswith("cached")))
                return [source]
            except Exception as error:  # downloads fail in many ways; each means the next source
                problem = (
                    f"{dataset.path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
                )
        note = problem or ""
    return [_embedded(name, note) for name, entry in EMBEDDED.items() if entry.family == family]


def read_dataset_config(path: Path) -> dict[str, Source]:
    """The datasets a YAML file declares, by name; relative paths are relative to the file.

    Raises:
        UserError: the file is missing or no YAML, or an entry has an unknown or a missing key.
    """
    import yaml

    keys = ("path", "hub", "config", "family", "fields", "prompt_format", "licence", "validation")
    try:
        entries = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("datasets")
    except FileNotFoundError:
        raise UserError(f"--dataset-config {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError, AttributeError) as error:
        raise UserError(f"{path}: no YAML file of datasets ({str(error).splitlines()[0]})") from error
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: must have an entry 'datasets' that maps names to datasets")
    sources = {}
    for name, entry in entries.items():
        where = f"{path}: dataset {name}"
        if not isinstance(entry, dict) or ("path" in entry) == ("hub" in entry):
            raise UserError(f"{where}: needs either path (a file or folder) or hub (owner/name)")
        for key in entry:
            if key not in keys:
                raise UserError(
                    f"{where}: no key {key!r}{did_you_mean(str(key), keys)}; there are {', '.join(keys)}"
                )
        if name in {*GROUPS, *HUB, *EMBEDDED}:
            raise UserError(f"{where}: {name} is a name of the built-in data; choose another")
        check_names(entry.get("family"), entry.get("prompt_format"), entry.get("fields"), where)
        local = {
            key: str(path.parent / Path(entry[key]).expanduser())
            for key in ("path", "validation")
            if key in entry
        }
        for key, file in local.items():
            if not Path(file).exists():
                raise UserError(f"{where}: {key} {file} does not exist")
        sources[name] = Source(
            name=name,
            kind="path" if "path" in entry else "hub",
            location=local.get("path") or entry["hub"],
            origin=local.get("path") or "hub",
            licence=entry.get("licence", "not stated"),
            family=entry.get("family"),
            prompt_format=entry.get("prompt_format"),
            fields=entry.get("fields"),
            configs=(entry["config"],) if "config" in entry else (),
            validation=local.get("validation"),
        )
    return sources


def validation_threshold(examples: Iterable[Example], fraction: float) -> int:
    """The split hash up to which an example is held out: `fraction` of the distinct hashes, at least one.

    A hash stands for a template, a file or a prompt, so none of these is ever on both sides. If there is only
    one hash, or `fraction` is 0, nothing is held out.
    """
    hashes = sorted({example.split_hash() for example in examples})
    if fraction == 0 or len(hashes) < 2:
        return -1
    by_share = int(fraction * 2**64)
    if any(example.template for example in itertools.islice(examples, 1)):
        return hashes[max(1, round(fraction * len(hashes))) - 1]
    # A prompt's side depends on its own text alone: a file that grows moves no row to the other side.
    return min(max(by_share, hashes[0]), hashes[-1] - 1)


def split_examples(
    source: Source, args: DataArguments, evaluation: bool = False
) -> tuple[list[Example], list[Example]]:
    """Training and validation examples of a source, each at most `args.max_samples`.

    `evaluation` takes a file, which was given to be evaluated, as validation examples whole.
    """
    own = list(itertools.islice(source.examples("validation"), args.max_samples))
    limit = args.max_samples if source.kind != "embedded" else None
    examples = list(itertools.islice(source.examples(), limit))
    if not examples:
        raise UserError(f"dataset {source.name} has no rows")
    if evaluation and source.kind == "path":
        return [], own or examples
    threshold = -1 if own else validation_threshold(examples, args.validation_fraction)
    train = [example for example in examples if example.split_hash() > threshold]
    held_out = own or [example for example in examples if example.split_hash() <= threshold]
    return train[: args.max_samples], held_out[: args.max_samples]


def load_examples(spec: str, args: DataArguments, split: str = "train") -> list[Example]:
    """The examples of a dataset spec on one side of the validation split (`train` or `validation`)."""
    index = ("train", "validation").index(split)
    sources = resolve(replace(args, dataset=spec))
    return [example for source in sources for example in split_examples(source, args)[index]]


def list_datasets() -> str:
    """The table that `--list-datasets` prints."""
    rows = [("name", "family", "source", "licence", "")]
    for family, datasets in HUB.items():
        for dataset, origin in zip(datasets, ("hub", "hub fallback"), strict=True):
            rows.append((dataset.path, family, origin, dataset.licence, ""))
        for name, entry in EMBEDDED.items():
            if entry.family == family:
                rows.append((name, family, "embedded", entry.licence, entry.about))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    table = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    ]
    return "\n".join(
        [
            *(line.rstrip() for line in table),
            "",
            f"--dataset all = {', '.join(HUB)}: each from the hub if it answers, else its embedded data.",
            f"--dataset embedded = {', '.join(EMBEDDED)}.",
            f"Any path ({', '.join(SUFFIXES)}, a folder saved by datasets), any hub name (owner/name).",
        ]
    )
