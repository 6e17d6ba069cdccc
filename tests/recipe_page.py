"""`docs/recipe.md`: every key of a recipe, from the sections and what stands under each of their
fields. `python -m tests.recipe_page` writes it anew."""

import ast
import inspect
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from stacking_ds.config.run import RunConfig
from stacking_ds.records import Record
from tests.house import REPOSITORY

PAGE = REPOSITORY / "docs" / "recipe.md"
_HEAD = """# Every key of a recipe

A recipe is a YAML file of sections, such as `ds_configs/recipes/demo.yaml`. What it leaves out has
the default; a key without a default has to be there. `--set section.key=value` comes after the
file; a place in a list is a part of the key: `--set stages.0.steps=100`. How values are written is
said in `ds_configs/README.md`. The resolved recipe stands in the run as `config.yaml`. This page
is written by `python -m tests.recipe_page` from the sections themselves.
"""
_TABLE = "\n| key | value | default | meaning |\n|---|---|---|---|\n"
_PLAIN = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}
_BOUNDS = {"gt": " above", "ge": " from", "lt": ", below", "le": " up to"}


def keys(section: type[Record]) -> Iterator[tuple[str, str, str, str]]:
    """Key, value, default and meaning of the keys that are no sections themselves."""
    meanings = _meanings(section)
    for name, field in section.model_fields.items():
        if _section_of(field.annotation) is None:
            default = "" if field.is_required() else f"`{_text(field.get_default())}`"
            value = _value(field.annotation, field.metadata)
            yield name, value, default, meanings.get(name, "")


def page() -> str:
    """The whole page."""
    text = _HEAD + _TABLE + _rows(RunConfig, "")
    for name, section in sections():
        doc = " ".join((section.__doc__ or "").split())
        text += f"\n## {name}\n\n{doc}\n{_TABLE}{_rows(section, f'{name}.')}"
    return text


def sections() -> Iterator[tuple[str, type[Record]]]:
    """Each with the name that its keys begin with."""
    for name, field in RunConfig.model_fields.items():
        if (section := _section_of(field.annotation)) is not None:
            yield (f"{name}.N" if get_origin(field.annotation) is tuple else name), section
            for inner, inner_field in section.model_fields.items():
                if (below := _section_of(inner_field.annotation)) is not None:
                    yield f"{name}.{inner}", below


def _rows(section: type[Record], prefix: str) -> str:
    return "".join(f"| `{prefix}{key}` | {' | '.join(rest)} |\n" for key, *rest in keys(section))


def _section_of(kind: Any) -> type[Record] | None:
    found = (one for one in (kind, *get_args(kind)) if inspect.isclass(one))
    return next((one for one in found if issubclass(one, Record)), None)


def _meanings(section: type[Record]) -> dict[str, str]:
    """The string under each field, in one line."""
    (tree,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    return {
        ast.unparse(field.target): " ".join(text.value.value.split())
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        if isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _value(kind: Any, metadata: Any = ()) -> str:
    """What can be written there, in words."""
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return _value(inner, [part for one in more for part in getattr(one, "metadata", [one])])
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"list of {len(get_args(kind))}, each a {_value(get_args(kind)[0])}"
    parts = get_args(kind)
    if type(None) in parts:
        return f"{_value(next(one for one in parts if one is not type(None)), metadata)}, or `null`"
    bounds = [
        f"{words} {getattr(one, name):,}".removesuffix(".0")
        for name, words in _BOUNDS.items()
        for one in metadata
        if hasattr(one, name)
    ]
    return "".join([_PLAIN[kind], *bounds])


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
