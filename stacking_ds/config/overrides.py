"""`--set section.key=value`: where it goes, and what its value is."""

from dataclasses import dataclass

from stacking_ds.config.keys import declared, is_list, meant, unknown_part
from stacking_ds.config.yaml_text import Scalar, Tree, YamlTextError, read_yaml
from stacking_ds.console import shortened

__all__ = ["Override", "OverrideError"]


class OverrideError(ValueError):
    """An override that cannot be applied; the message goes after its text."""


@dataclass(frozen=True)
class Override:
    text: str
    path: tuple[str, ...]
    value: Tree

    @classmethod
    def parse(cls, text: str) -> "Override":
        """Read `key=value`. Where the key takes text, the value is all that follows the first =,
        as it is; elsewhere it is YAML.

        Raises:
            OverrideError: it has another form, names an unknown key, or its value is not YAML.
        """
        key, separator, written = text.partition("=")
        if not separator:
            raise OverrideError("it has no =; write section.key=value")
        path = tuple(key.strip().split("."))
        if not all(path):
            raise OverrideError("its key is not complete; write section.key=value")
        unknown = unknown_part(path)
        if unknown is not None:
            _refuse(path[: unknown + 1])
        if declared(path) is str:
            blanks_around = key != key.rstrip()
            literal = written.strip() if blanks_around else written
            return cls(text, path, Scalar(literal, literal))
        try:
            return cls(text, path, read_yaml(written))
        except YamlTextError as error:
            reason = str(error).removeprefix("line 1: ")
            raise OverrideError(f"{shortened(written)} is not a YAML value ({reason})") from None

    def apply(self, tree: dict[str, Tree]) -> None:
        """Put the value into a recipe.

        Raises:
            OverrideError: a place in a list that the recipe does not have.
        """
        *parents, leaf = self.path
        container: Tree = tree
        for depth, part in enumerate(parents):
            if isinstance(container, dict):
                child = container.get(part)
                if child is None or (isinstance(child, Scalar) and child.value is None):
                    child = [] if is_list(declared(self.path[: depth + 1])) else {}
                    container[part] = child
                container = child
            else:
                container = _items(container, self.path[:depth])[_position(container, part)]
        if isinstance(container, dict):
            container[leaf] = self.value
        else:
            items = _items(container, self.path[:-1])
            items[_position(items, leaf)] = self.value


def _refuse(path: tuple[str, ...]) -> None:
    *parents, part = path
    if is_list(declared(parents)):
        raise OverrideError(f"{shortened(part)} is not a position in the list {'.'.join(parents)}")
    raise OverrideError(f"{shortened('.'.join(path))} is not a key; {meant(path)}")


def _items(container: Tree, path: tuple[str, ...]) -> list[Tree]:
    if isinstance(container, list):
        return container
    written = container.text if isinstance(container, Scalar) else "..."
    raise OverrideError(
        f"the recipe has {'.'.join(path)}: {shortened(written)}, which holds no keys; override that"
    )


def _position(container: Tree, part: str) -> int:
    assert isinstance(container, list)
    if not container:
        raise OverrideError("the recipe writes no such list; give the whole list, in brackets")
    if len(part) > 9 or int(part) >= len(container):
        raise OverrideError(
            f"{shortened(part)} is not one of the list's positions 0 to {len(container) - 1}"
        )
    return int(part)
