"""Experiment configs: YAML files that extend one another, overridden on the command line, checked against the keys of
config.py.

jsonargparse checks and converts the values; errors name the file (or the command line), the key and the value.
"""

import dataclasses
import difflib
import functools
import os
import re
import sys
from pathlib import Path
from typing import Any, get_args

from jsonargparse import ArgumentParser

from harness.config import SECTIONS, Config, describe_field, help_text
from harness.errors import UserError
from harness.text_files import read_yaml

_PATHS = (("run", "out_dir"), ("data", "corpus"), ("training", "init_from"), ("kl", "reference"))


def load_config(arguments: list[str], source: str = "command line") -> Config:
    """The config of a command line `CONFIG [--section.key value …]`; UserError for every mistake in it, which says that
    the values after CONFIG come from `source`."""
    if not arguments or arguments[0].startswith("--"):
        raise UserError("no config given: python train.py CONFIG [--section.key value …]; --help lists the keys")
    path, overrides = Path(arguments[0]), arguments[1:]
    values, sources = _read_file(path, ())
    for key, value in parse_overrides(overrides):
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
        sources[key] = source
    config = build_config(values, sources)
    config.inherited = {key for key, file in sources.items() if file not in (str(path), source)}
    config.run.name = config.run.name or path.stem
    name = config.run.name
    if name == ".." or "\0" in name or Path(name).name != name or len(name.encode()) > 200:
        raise config.error("run.name", f"{name!r:.80} is not the plain name of a folder; run.out_dir may be a path")
    if found := re.search(r"[/\\#?%:]", config.tracking.project):
        problem = f"wandb allows no {found[0]!r} in the name of a project; a team is named by WANDB_ENTITY"
        raise config.error("tracking.project", f"{config.tracking.project!r}: {problem}")
    config.check()
    return config


def build_config(values: dict[str, dict[str, Any]], sources: dict[str, str]) -> Config:
    """Check and convert `{section: {key: value}}`; UserError names the source, key and value of the first mistake."""
    for section, entries in values.items():
        where = next((source for key, source in sources.items() if key.split(".")[0] == section), "config")
        if section not in SECTIONS:
            raise UserError(f"{where}: unknown section '{section}'; the sections are {', '.join(SECTIONS)}")
        known = {f.name: f.type for f in dataclasses.fields(SECTIONS[section])}
        for name in entries:
            source = sources.get(f"{section}.{name}", where)
            if name not in known:
                meant = difflib.get_close_matches(str(name), known, 1)
                advice = f"; did you mean '{meant[0]}'?" if meant else f", which has {', '.join(known)}"
                raise UserError(f"{source}: unknown key '{name}' in section '{section}'{advice}")

    try:
        parsed = _parser().parse_object(values)
        sections = {section: {k: _plain(v) for k, v in vars(parsed[section]).items()} for section in SECTIONS}
        for section, cls in SECTIONS.items():
            for f in dataclasses.fields(cls):  # jsonargparse lets null pass for any type
                value, choices = sections[section][f.name], f.metadata.get("choices")
                if (value is None and type(None) not in get_args(f.type)) or (choices and value not in choices):
                    raise _InvalidValue(f"{section}.{f.name}")
    except _InvalidValue as e:
        section, _, name = e.key.partition(".")
        wanted = describe_field(next(f for f in dataclasses.fields(SECTIONS[section]) if f.name == name))
        value = "nothing" if values[section][name] is None else repr(values[section][name])
        raise UserError(f"{sources.get(e.key, 'config')}: {e.key} takes {wanted}, not {value:.200}") from e
    for section, name in _PATHS:
        if "\0" in (sections[section][name] or ""):
            where = sources.get(f"{section}.{name}", "config")
            raise UserError(f"{where}: {section}.{name}: {sections[section][name]!r:.80} is no path")
        if path := sections[section][name]:  # ~ is the user's home here too, where no shell has put it in
            scheme = "hf:" if path.startswith("hf:") else ""
            sections[section][name] = scheme + os.path.expanduser(path.removeprefix(scheme))
    try:
        config = Config(**{section: cls(**sections[section]) for section, cls in SECTIONS.items()})
    except ValueError as e:  # GPTConfig's own checks
        named = [f"model.{word}" for word in re.findall(r"\w+", str(e)) if f"model.{word}" in sources]
        where = sources[named[-1]] if named else "default"
        raise UserError(f"{where}: model: {e}") from e
    config.sources = sources
    return config


def _plain(value: Any) -> Any:
    """jsonargparse's restricted numbers (PositiveInt, …) are classes of their own: back to what YAML can write."""
    return next((t(value) for t in (bool, int, float) if isinstance(value, t)), value)


class _InvalidValue(Exception):
    def __init__(self, key: str):
        self.key = key


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None):
        key = re.search(r'"(\w+\.\w+)"', message)
        raise (_InvalidValue(key[1]) if key else UserError(f"config: {' '.join(message.split())}")) from ex


@functools.cache
def _parser() -> ArgumentParser:
    parser = _Parser()
    for section, cls in SECTIONS.items():
        parser.add_class_arguments(cls, section)
    return parser


def _read_file(path: Path, extending: tuple[Path, ...]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The values of a config file over those of the files it extends, and the source of each key."""
    if "\0" in str(path):
        raise UserError(f"{extending[-1] if extending else 'command line'}: {str(path)!r:.80} is no path")
    if path.resolve() in extending:
        cycle = " → ".join(p.name for p in (*extending, path))
        raise UserError(f"{extending[-1]}: extends: a cycle, {cycle}")
    content = read_yaml(path, "config", f"{extending[-1]}: extends: " if extending else "") or {}
    if not isinstance(content, dict):
        found = "" if extending else f", not {content!r:.80}"  # `extends` may name any file: its content is not printed
        raise UserError(f"{path}: a config is a mapping of sections ({', '.join(SECTIONS)}){found}")

    values: dict[str, dict[str, Any]] = {}
    sources: dict[str, str] = {}
    if base := content.pop("extends", None):
        values, sources = _read_file(path.parent / os.path.expanduser(str(base)), (*extending, path.resolve()))
    for section, entries in content.items():
        entries = {} if entries is None else entries  # all of its keys commented out
        if section not in SECTIONS:
            raise UserError(f"{path}: unknown section '{section!s:.40}'; the sections are {', '.join(SECTIONS)}")
        if not isinstance(entries, dict):
            raise UserError(f"{path}: section '{section}' is a mapping of keys to values, not {entries!r:.80}")
        values.setdefault(section, {}).update(entries)
        sources |= {f"{section}.{name}": str(path) for name in entries}
    return values, sources


def parse_overrides(arguments: list[str]):
    """`--section.key value` or `--section.key=value` → (key, value), in order; the parser converts the strings."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not re.fullmatch(r"\w+\.\w+", key):
            raise UserError(
                f"command line: {argument!r}: overrides are --section.key value; python train.py --help lists the keys"
            )
        if not equals:
            if not rest or rest[0].startswith("--"):  # a value that starts so is given as --section.key=value
                raise UserError(f"command line: --{key} has no value")
            text = rest.pop(0)
        yield key, text


def main_config(arguments: list[str]) -> Config:
    """load_config for a program: `--help` and `--print_config` print and end it."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text())
        sys.exit(0)
    config = load_config([a for a in arguments if a != "--print_config"])
    if "--print_config" in arguments:
        print(config.to_yaml(), end="")
        sys.exit(0)
    return config
