"""Configuration: strict conversion of plain mappings into frozen dataclasses, and back.

Numbers live in YAML only; the dataclasses carry no defaults. Hydra composes the YAML,
`ring_rl.hydra_config.resolve` turns it into a plain dict, and `from_mapping` turns that into dataclasses: an
unknown key, a missing one or a value of the wrong type is a `ValueError` that names the dotted path and what
is allowed there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import pathlib
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

__all__ = ["describe_differences", "exit_on_bad_input", "from_mapping", "to_mapping"]

T = TypeVar("T")

_SCALARS = {bool: "a bool (true or false)", int: "an int", float: "a float", str: "a string"}
_ABSENT = object()


def from_mapping(cls: type[T], mapping: Mapping[str, Any], *, path: str = "") -> T:
    """Build the dataclass `cls` from a plain nested mapping, strictly.

    Field types: int, float, bool, str, `pathlib.Path`, `X | None`, `Literal`, `tuple[T, ...]` and fixed
    tuples (given as lists), `dict[str, T]`, nested dataclasses, and unions. A union of dataclasses is told
    apart by the members' field `name: Literal[...]`. An int serves as a float; a bool is never an int; text
    is never a number.

    Args:
        cls: the dataclass to build.
        mapping: keys are field names; values plain YAML values.
        path: dotted path of `mapping` in the whole configuration, for messages.

    Raises:
        ValueError: one line with the dotted path, the value seen and what is allowed; also when the
            dataclass's own `__post_init__` refuses the values.
        TypeError: a field is annotated with a type that this function does not know (a mistake in the code).
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"from_mapping builds dataclasses, not {cls!r}")
    if not isinstance(mapping, Mapping):
        raise _wrong(path, f"a mapping with the keys {_listed(_field_names(cls))}", mapping)
    types_of_fields = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in mapping:
        if key not in fields:
            raise ValueError(_unknown_key(str(key), list(fields), path))
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(types_of_fields[name], mapping[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"missing key '{_join(path, name)}'; the keys there are {_listed(fields)}")
    try:
        return cls(**values)
    except ValueError as error:
        if not path:
            raise
        raise ValueError(f"{path}: {error}") from error


def to_mapping(config: Any) -> dict[str, Any]:
    """The inverse of `from_mapping`: plain dicts, lists and scalars that YAML and JSON can hold.

    Paths become strings and tuples lists, so `from_mapping(type(config), to_mapping(config)) == config`.
    """
    if isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise TypeError(f"to_mapping takes a dataclass instance, not {config!r}")
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


def describe_differences(
    saved: Mapping[str, Any], wanted: Mapping[str, Any], *, ignore: tuple[str, ...] = ()
) -> list[str]:
    """One line a leaf at which two plain mappings differ: `"model.layers: saved 2, wanted 4"`.

    Args:
        saved: the mapping that stands on disk.
        wanted: the mapping asked for now.
        ignore: dotted paths (whole subtrees too) that may differ.
    """
    return list(_differences(saved, wanted, "", frozenset(ignore)))


@contextlib.contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """For entry scripts: an expected error becomes one line on stderr and exit status 1.

    ValueError, OSError (missing or existing files, a full disk), ImportError and FloatingPointError (a simulation that
    became unstable) print `error: <message>`.
    Ctrl-C prints `interrupted`, and what the exception says, and exits with 130. `RING_RL_TRACEBACK=1` shows
    the full traceback as well.
    Under Hydra it belongs inside the decorated function, because Hydra catches what leaves it.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        _print_traceback_if_asked()
        print(": ".join(filter(None, ("interrupted", str(interrupt)))), file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        _print_traceback_if_asked()
        message = " ".join(str(error).split()) or type(error).__name__
        if not _raised_by_ring_rl(error):
            # A library's words seldom say which of our lines led there.
            message += " (RING_RL_TRACEBACK=1 shows where)"
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from None


def _convert(annotation: Any, value: Any, path: str) -> Any:
    """`value` as the type `annotation`, or a ValueError that names `path`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _SCALARS:
        if type(value) is annotation:
            return value
        if annotation is float and type(value) is int:
            return float(value)
        raise _wrong(path, _SCALARS[annotation], value)
    if annotation is None or annotation is type(None):
        if value is None:
            return None
        raise _wrong(path, "null", value)
    if annotation is pathlib.Path:
        if isinstance(value, (str, pathlib.Path)) and str(value):
            return pathlib.Path(value)
        raise _wrong(path, "a path (a non-empty string)", value)
    if dataclasses.is_dataclass(annotation):
        return from_mapping(typing.cast(Any, annotation), value, path=path)
    if origin is Literal:
        for allowed in arguments:
            if type(value) is type(allowed) and value == allowed:
                return value
        raise _wrong(path, f"one of {_listed(arguments)}", value)
    if origin is tuple:
        return _convert_tuple(arguments, value, path)
    if origin is dict and arguments[0] is str:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _wrong(path, "a mapping with string keys", value)
        return {key: _convert(arguments[1], item, _join(path, key)) for key, item in value.items()}
    if origin is Union or origin is types.UnionType:
        return _convert_union(arguments, value, path)
    raise TypeError(f"'{path}' is annotated with {annotation!r}, which from_mapping does not know")


def _convert_tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(path, "a list", value)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(value) != len(arguments):
        raise _wrong(path, f"a list of length {len(arguments)}", value)
    return tuple(
        _convert(annotation, item, f"{path}[{index}]")
        for index, (annotation, item) in enumerate(zip(arguments, value, strict=True))
    )


def _convert_union(members: tuple[Any, ...], value: Any, path: str) -> Any:
    concrete = [member for member in members if member is not type(None)]
    if value is None and len(concrete) < len(members):
        return None
    if len(concrete) == 1:
        try:
            return _convert(concrete[0], value, path)
        except ValueError as error:
            if isinstance(value, Mapping):
                raise
            raise ValueError(f"{error}; null is allowed too") from None
    variants = [member for member in concrete if dataclasses.is_dataclass(member)]
    if isinstance(value, Mapping) and variants:
        variant = variants[0] if len(variants) == 1 else _select_variant(variants, value, path)
        return _convert(variant, value, path)
    # An exact type goes before a lenient one, so that 1 in `float | int` stays an int.
    for member in sorted(concrete, key=lambda member: member is not type(value)):
        with contextlib.suppress(ValueError):
            return _convert(member, value, path)
    raise _wrong(path, " or ".join(_name_of(member) for member in members), value)


def _select_variant(variants: list[Any], value: Mapping[str, Any], path: str) -> Any:
    """The dataclass whose field `name: Literal[...]` allows `value["name"]`."""
    by_name: dict[Any, Any] = {}
    for variant in variants:
        annotation = typing.get_type_hints(variant).get("name")
        if typing.get_origin(annotation) is not Literal:
            raise TypeError(f"{variant.__name__} stands in a union at '{path}' and needs a field name: Literal[...]")
        by_name.update(dict.fromkeys(typing.get_args(annotation), variant))
    name = value.get("name", _ABSENT)
    if name is _ABSENT:
        raise ValueError(f"missing key '{_join(path, 'name')}'; it must be one of {_listed(by_name)}")
    for allowed, variant in by_name.items():
        if type(name) is type(allowed) and name == allowed:
            return variant
    raise _wrong(_join(path, "name"), f"one of {_listed(by_name)}", name)


def _unknown_key(key: str, allowed: list[str], path: str) -> str:
    closest = difflib.get_close_matches(key, allowed, n=1)
    guess = f"did you mean '{closest[0]}'? " if closest else ""
    return f"unknown key '{_join(path, key)}'; {guess}allowed keys: {_listed(allowed) or 'none'}"


def _wrong(path: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"'{path or 'the configuration'}' must be {expected}, got {value!r} ({type(value).__name__})")


def _differences(saved: Any, wanted: Any, path: str, ignore: frozenset[str]) -> Iterator[str]:
    if path and path in ignore:
        return
    # A whole subtree that one side lacks is listed leaf by leaf too.
    if isinstance(saved, Mapping) and saved and wanted is _ABSENT:
        wanted = {}
    elif isinstance(wanted, Mapping) and wanted and saved is _ABSENT:
        saved = {}
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        for key in sorted({*saved, *wanted}, key=str):
            yield from _differences(saved.get(key, _ABSENT), wanted.get(key, _ABSENT), _join(path, str(key)), ignore)
    elif saved is _ABSENT:
        yield f"{path}: not saved, wanted {wanted!r}"
    elif wanted is _ABSENT:
        yield f"{path}: saved {saved!r}, not wanted"
    elif saved != wanted or isinstance(saved, bool) != isinstance(wanted, bool):
        yield f"{path}: saved {saved!r}, wanted {wanted!r}"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_mapping(value)
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _field_names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.init]


def _name_of(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is Literal:
        return f"one of {_listed(typing.get_args(annotation))}"
    if typing.get_origin(annotation) is tuple:
        return "a list"
    return _SCALARS.get(annotation) or getattr(annotation, "__name__", None) or str(annotation)


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _raised_by_ring_rl(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    return module.split(".")[0] in ("ring_rl", "__main__")


def _print_traceback_if_asked() -> None:
    if os.environ.get("RING_RL_TRACEBACK") == "1":
        traceback.print_exc()
