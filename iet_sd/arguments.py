"""`load` fills the settings of `iet_sd.config` from YAML and the command line.

Lowest first: a field's default, the ``--config`` file, the flags. In each of these layers
``method`` and ``preset`` stand for the values they name (`iet_sd.presets`), and what is written out
beside them wins; so ``--preset paper`` also replaces a ``bank_bins`` of the file. What a file
writes out of its own method and preset goes with these: with ``--method iet`` nothing is left of
the one shard of a run without proxies, whose ``training_config.yaml`` says all there is.
"""

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from iet_sd.config import Config, Settings
from iet_sd.config.hub import SECRETS
from iet_sd.errors import UserError
from iet_sd.presets import METHODS, PRESETS, stand_for

S = TypeVar("S", bound=Settings)
# Two ways to say one thing: a later layer that uses one of them lets go of the other.
_EXCLUSIVE = (
    ("steps_per_round", "max_train_steps"),
    ("dataset_name", "train_data_dir"),
    ("heldout_split", "heldout_data_dir"),
    ("validation_prompt", "validation_prompts"),
)


def load(
    argv: Sequence[str],
    settings: type[S] = Config,
    prog: str = "train_iet_sd.py",
    below: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: {},
) -> S:
    """The settings of a command line, with the file of ``--config`` as defaults.

    ``below`` gives values that stand in for defaults, from what file and flags say.
    Errors: `UserError` for an unknown key, a value of the wrong type, or a contradiction.
    """
    parsed, unknown = build_parser(settings, prog).parse_known_args(argv)
    if unknown:
        raise UserError(_unknown(unknown[0], settings))
    flags = vars(parsed)
    path = flags.pop("config", None)
    layers = (read_yaml(Path(path), settings, "--config") if path else {}, flags)
    return from_layers(below(layers[0] | layers[1]), *layers, settings=settings)


def from_layers(*layers: dict[str, Any], settings: type[S] = Config) -> S:
    """Settings from flat mappings, the later ones winning over the earlier."""
    known = settings.fields()
    choices = {k: v for k, v in {"preset": PRESETS, "method": METHODS}.items() if k in known}
    chosen = {name: known[name].default for name in choices}
    written: dict[str, Any] = {}
    for layer in layers:
        for one, other in (*_EXCLUSIVE, *[pair[::-1] for pair in _EXCLUSIVE]):
            if one in layer and other not in layer:
                written.pop(other, None)
        if anew := choices.keys() & layer.keys():
            before = stand_for(written, **chosen)
            written = {k: v for k, v in written.items() if k not in before or before[k] != v}
        for name in anew:
            chosen[name] = layer[name]
            # What it stands for replaces what is written out in a lower layer.
            for key in choices[name][layer[name]]:
                written.pop(key, None)
        written |= layer
    values = (stand_for(written, **chosen) if chosen else {}) | written
    for name, field in known.items():
        if values.get(name) == "" != field.default:
            raise UserError(
                f"--{name} is empty, as where a variable of the shell is not set. Give a value, or "
                "leave it out."
            )
    if "pretrained_model_name_or_path" in known and "pretrained_model_name_or_path" not in values:
        raise UserError(
            "Which model? Give --pretrained_model_name_or_path, or a --config that names it."
        )
    return settings(
        **{
            section: cls(**{k: v for k, v in values.items() if k in cls.__dataclass_fields__})
            for section, cls in settings.sections().items()
        }
    )


def build_parser(
    settings: type[Settings] = Config, prog: str = "train_iet_sd.py"
) -> argparse.ArgumentParser:
    """The command line: one flag a field, its text the docstring under the field."""
    parser = _Parser(
        prog=prog,
        description=inspect.cleandoc(settings.__doc__ or ""),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with defaults for the flags below")
    for cls in settings.sections().values():
        title = cls.__name__.removesuffix("Config").lower()
        text = inspect.cleandoc(cls.__doc__ or "").replace("``", "")
        group = parser.add_argument_group(title, text)
        docs, hints = field_docs(cls), typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            options = _flag_options(hints[field.name])
            text = docs[field.name].replace("%", "%%")
            if field.default is dataclasses.MISSING:
                text += " (required)"
            elif isinstance(field.default, tuple):
                text += f" (default: {' '.join(map(str, field.default))})"
            elif field.default not in (None, ""):
                text += f" (default: {field.default})"
            # SUPPRESS keeps a flag that was not given out of the result, so the file can fill it.
            name = f"--{field.name}"
            if field.name in settings.POSITIONAL:
                name, options["metavar"] = field.name, field.name.upper()
            group.add_argument(name, help=text, default=argparse.SUPPRESS, **options)
    return parser


def read_yaml(path: Path, settings: type[Settings], whence: str) -> dict[str, Any]:
    """A flat YAML mapping with every key known and every value of its field's type.

    ``whence`` says in errors why the file is read, such as ``--config``.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{whence} {path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{whence} {path} is not valid YAML: {_where(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{whence} {path}: expected lines of `name: value`, got {content!r:.80}.")
    hints = {
        name: hint
        for cls in settings.sections().values()
        for name, hint in typing.get_type_hints(cls).items()
    }
    return {k: _checked(k, v, hints, f"{whence} {path}") for k, v in content.items()}


def field_docs(cls: type) -> dict[str, str]:
    """The string literal under each field of a dataclass, by field name."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    docs = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            docs[field.target.id] = " ".join(text.value.value.split())
    return docs


def _flag_options(hint: Any) -> dict[str, Any]:
    """Keyword arguments of ``add_argument`` for a field's type."""
    hint = _without_none(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        metavar = "TEXT" if item is str else "NUMBER"
        return {"nargs": "+", "type": item, "metavar": metavar, "action": _StoreTuple}
    return {"type": hint, "metavar": hint.__name__.upper()}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a flag as any other mistake, without two pages of usage."""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}. See --help.")


class _StoreTuple(argparse.Action):
    """Stores several values as a tuple, so that settings stay hashable."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def _without_none(hint: Any) -> Any:
    """``X`` of ``X | None``."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (hint,) = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    return hint


def _checked(key: str, value: Any, hints: dict[str, Any], whence: str) -> Any:
    """``value`` as the type of field ``key``, or a `UserError` that names key and file."""
    if key not in hints:
        close = _close_matches(str(key), hints)
        raise UserError(f"{whence}: unknown key {key!r}.{close}")
    hint, bare = hints[key], _without_none(hints[key])
    if value is None and hint is not bare:
        return None
    if typing.get_origin(bare) is Literal:
        if isinstance(value, bool):
            # YAML reads these words so, where they are bare.
            words = ("on",) if value else ("no", "off")
            value = next((word for word in words if word in typing.get_args(bare)), value)
        if value in typing.get_args(bare):
            return value
        expected = "one of " + ", ".join(typing.get_args(bare))
    elif typing.get_origin(bare) is tuple:
        item = typing.get_args(bare)[0]
        kinds = str if item is str else int | float
        if isinstance(value, list) and all(isinstance(v, kinds) for v in value):
            return tuple(item(v) for v in value)
        expected = "a list of texts" if item is str else "a list of numbers"
    elif bare is float:
        # YAML reads 1e-4 as a text, since its numbers need a point.
        try:
            if not isinstance(value, bool):
                return float(value)
        except (TypeError, ValueError):
            pass
        expected = "a number"
    elif isinstance(value, bare) and not (bare is int and isinstance(value, bool)):
        return value
    else:
        expected = {"int": "a whole number", "str": "a text", "bool": "true or false"}[
            bare.__name__
        ]
    got = "something else" if key in SECRETS else repr(value)
    raise UserError(f"{whence}: {key} must be {expected}; got {got}.")


def _unknown(word: str, settings: type[Settings]) -> str:
    """What is wrong with a word of the command line; it may be a secret, if it is no flag."""
    if not word.startswith("-"):
        return (
            "a word that is the value of no flag. Flags that are on or off take none: --NAME, "
            "--no-NAME. See --help."
        )
    flag = word.partition("=")[0]
    known = [f"--{name}" for name in settings.fields()]
    return f"unknown flag {flag}.{_close_matches(flag, known)}"


def _where(error: Exception) -> str:
    """What is wrong with a file, without its lines, as one may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error)
    return f"line {error.problem_mark.line + 1}: {error.problem}"


def _close_matches(key: str, known: Iterable[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=3)
    return f" Did you mean {' or '.join(close)}?" if close else " See --help for the known names."
