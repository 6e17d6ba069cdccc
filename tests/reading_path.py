"""Count the rooms that a reader passes who follows one value through the package.

    python -m tests.reading_path FOLDER MODULE:FUNCTION:PARAMETER

The reader starts in the function and follows the value in the order of the text: into each
function or method of the package that it is handed to or called on, once, and on from there. What a
call makes of it, and what keeps it in `self`, is followed too; into what gets only a part of it the
reader looks, and comes back. Calls are resolved without running anything: by imports, annotations,
constructors and return types. It prints

    stays    functions that the reader reads, one after the other
    rooms    modules that they stand in
    climbs   steps from one to the next that lead into a module which imports the one left, directly
             or by others
    returns  steps into a module that the reader has been in before, and left
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Place = tuple[str, str]
"""Module, and a name in it: `f`, `C` or `C.f`."""


@dataclass
class Package:
    """The sources below one folder, by dotted module."""

    folder: Path

    @cached_property
    def trees(self) -> dict[str, ast.Module]:
        found = {}
        for path in sorted(self.folder.rglob("*.py")):
            parts = path.relative_to(self.folder.parent).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
        return found

    @cached_property
    def names(self) -> dict[str, dict[str, Place]]:
        """What each module's names are bound to by imports, and by its own definitions."""
        return {module: self._names_of(module, tree) for module, tree in self.trees.items()}

    def _names_of(self, module: str, tree: ast.Module) -> dict[str, Place]:
        bound: dict[str, Place] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    target = (whole, "") if whole in self.trees else (node.module, alias.name)
                    bound[alias.asname or alias.name] = target
        for node in tree.body:
            if isinstance(node, Function | ast.ClassDef):
                bound[node.name] = (module, node.name)
        return bound

    def resolve(self, module: str, name: str) -> Place | None:
        """Where a name of the module is defined, through modules that only hand it on."""
        for _ in range(5):
            target = self.names.get(module, {}).get(name)
            if target is None or target[0] not in self.trees:
                return None
            if not target[1] or target == (module, name):
                return target
            module, name = target
        return None

    @cached_property
    def definitions(self) -> dict[Place, ast.AST]:
        found: dict[Place, ast.AST] = {}
        for module, tree in self.trees.items():
            for node in tree.body:
                if isinstance(node, Function | ast.ClassDef):
                    found[module, node.name] = node
                if isinstance(node, ast.ClassDef):
                    for inner in node.body:
                        if isinstance(inner, Function):
                            found[module, f"{node.name}.{inner.name}"] = inner
        return found

    def method(self, kind: Place, name: str) -> Place | None:
        """A method of a class, or of the classes that it derives from."""
        if (kind[0], f"{kind[1]}.{name}") in self.definitions:
            return kind[0], f"{kind[1]}.{name}"
        node = self.definitions.get(kind)
        for base in node.bases if isinstance(node, ast.ClassDef) else []:
            parent = self.resolve(kind[0], base.id) if isinstance(base, ast.Name) else None
            if parent is not None and (found := self.method(parent, name)):
                return found
        return None

    @cached_property
    def imported(self) -> dict[str, set[str]]:
        """Every module that a module imports, directly or by others."""
        direct = {
            module: {place[0] for place in names.values() if place[0] in self.trees} - {module}
            for module, names in self.names.items()
        }
        whole: dict[str, set[str]] = {}
        for module in direct:
            seen, ahead = set(), [module]
            while ahead:
                for other in direct[ahead.pop()] - seen:
                    seen.add(other)
                    ahead.append(other)
            whole[module] = seen
        return whole


@dataclass
class Count:
    """What a reader has passed; see the module."""

    trail: list[Place] = field(default_factory=list)
    rooms: set[str] = field(default_factory=set)
    climbs: int = 0
    returns: int = 0


class Reader:
    """Follows a value from function to function."""

    def __init__(self, package: Package) -> None:
        self.package = package
        self.count = Count()
        self._present: str | None = None
        self._read: set[Place] = set()
        self._carrying: dict[Place, set[str]] = {}
        """Of a class: the attributes of `self` that hold the value."""
        self._kinds: dict[Place, dict[str, Place]] = {}
        """Of a class: the classes of its attributes."""

    def follow(self, place: Place, values: set[str]) -> Count:
        """Read the function in which the names `values` hold the value, and what it leads to."""
        node = self.package.definitions.get(place)
        if place in self._read or not isinstance(node, Function):
            return self.count
        self._read.add(place)
        self._step_to(place)
        owner = (place[0], place[1].split(".")[0]) if "." in place[1] else None
        kinds = dict(self._annotated(place[0], node))
        if owner and node.args.args:
            kinds[node.args.args[0].arg] = owner
        values = set(values)
        for statement in _in_order(node):
            if isinstance(statement, ast.Assign | ast.AnnAssign | ast.withitem | ast.For):
                self._bind(statement, place, owner, kinds, values)
            elif isinstance(statement, ast.Call):
                self._call(statement, place, owner, kinds, values)
        return self.count

    def _annotated(self, module: str, node: Function) -> Iterator[tuple[str, Place]]:
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            kind = self._kind_of_annotation(module, argument.annotation)
            if kind is not None:
                yield argument.arg, kind

    def _kind_of_annotation(self, module: str, annotation: ast.AST | None) -> Place | None:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        for name in ast.walk(annotation) if annotation is not None else ():
            if isinstance(name, ast.Name):
                found = self.package.resolve(module, name.id)
                if isinstance(self.package.definitions.get(found or ("", "")), ast.ClassDef):
                    return found
        return None

    def _is_value(self, node: ast.AST, owner: Place | None, values: set[str]) -> bool:
        if isinstance(node, ast.Name):
            return node.id in values
        carried = self._carrying.get(owner, set()) if owner else set()
        return isinstance(node, ast.Attribute) and _is_self(node.value) and node.attr in carried

    def _holds(self, node: ast.AST, owner: Place | None, values: set[str]) -> bool:
        """Is it the value, or what a call makes of it?"""
        if isinstance(node, ast.Call):
            handed = [*node.args, *(keyword.value for keyword in node.keywords)]
            return any(self._holds(one, owner, values) for one in handed)
        if isinstance(node, ast.Lambda):
            return self._holds(node.body, owner, values)
        if isinstance(node, Function):
            return any(self._is_value(inner, owner, values) for inner in ast.walk(node))
        return self._is_value(node, owner, values)

    def _is_part(self, node: ast.AST, owner: Place | None, values: set[str]) -> bool:
        while isinstance(node, ast.Attribute) and not self._is_value(node, owner, values):
            node = node.value
        return self._is_value(node, owner, values)

    def _kind(
        self, node: ast.AST, module: str, owner: Place | None, kinds: dict[str, Place]
    ) -> Place | None:
        """The class of an expression, where it can be told."""
        if isinstance(node, ast.Name):
            return kinds.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self._kind(node.value, module, owner, kinds)
            if base is None:
                return None
            kept = self._kinds.get(base, {}).get(node.attr)
            return kept or self._field(base, node.attr)
        if isinstance(node, ast.Call):
            target = self._target(node, module, owner, kinds)
            if target is None:
                # `held.enter_context(Thing(…))`, `closing(Thing(…))` give the thing
                inner = node.args[0] if len(node.args) == 1 else None
                return self._kind(inner, module, owner, kinds) if inner is not None else None
            definition = self.package.definitions[target]
            if isinstance(definition, ast.ClassDef):
                return target
            assert isinstance(definition, Function)
            return self._kind_of_annotation(target[0], definition.returns)
        return None

    def _field(self, kind: Place, name: str) -> Place | None:
        node = self.package.definitions.get(kind)
        for inner in node.body if isinstance(node, ast.ClassDef) else []:
            named = isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name)
            if named and inner.target.id == name:
                return self._kind_of_annotation(kind[0], inner.annotation)
            if isinstance(inner, Function) and inner.name == name:
                return self._kind_of_annotation(kind[0], inner.returns)
        return None

    def _target(
        self, call: ast.Call, module: str, owner: Place | None, kinds: dict[str, Place]
    ) -> Place | None:
        """The function, method or class that is called, if it is the package's."""
        function = call.func
        if isinstance(function, ast.Name):
            found = self.package.resolve(module, function.id)
            return found if found in self.package.definitions else None
        if not isinstance(function, ast.Attribute):
            return None
        if isinstance(function.value, ast.Name):
            there = self.package.resolve(module, function.value.id)
            if there is not None and not there[1]:
                found = self.package.resolve(there[0], function.attr)
                return found if found in self.package.definitions else None
            if there is not None and there in self.package.definitions:
                return self.package.method(there, function.attr)
        kind = self._kind(function.value, module, owner, kinds)
        return self.package.method(kind, function.attr) if kind is not None else None

    def _bind(
        self,
        statement: ast.Assign | ast.AnnAssign | ast.withitem | ast.For,
        place: Place,
        owner: Place | None,
        kinds: dict[str, Place],
        values: set[str],
    ) -> None:
        match statement:
            case ast.withitem():
                value, targets = statement.context_expr, [statement.optional_vars]
            case ast.For():
                value, targets = statement.iter, [statement.target]
            case ast.Assign():
                value, targets = statement.value, statement.targets
            case _:
                value, targets = statement.value, [statement.target]
        for target in targets:
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=False))
            for one, content in pairs:
                if one is None or content is None:
                    continue
                kind = self._kind(content, place[0], owner, kinds)
                held = self._holds(content, owner, values)
                if isinstance(one, ast.Name):
                    if kind is not None:
                        kinds[one.id] = kind
                    if held:
                        values.add(one.id)
                elif _is_own(one) and owner is not None:
                    if kind is not None:
                        self._kinds.setdefault(owner, {})[one.attr] = kind
                    if held:
                        self._carrying.setdefault(owner, set()).add(one.attr)

    def _call(
        self,
        call: ast.Call,
        place: Place,
        owner: Place | None,
        kinds: dict[str, Place],
        values: set[str],
    ) -> None:
        target = self._target(call, place[0], owner, kinds)
        if target is None:
            return
        on_value = isinstance(call.func, ast.Attribute) and self._holds(
            call.func.value, owner, values
        )
        on_self = isinstance(call.func, ast.Attribute) and _is_self(call.func.value)
        definition = self.package.definitions[target]
        if isinstance(definition, ast.ClassDef):
            made = self.package.method(target, "__init__")
            if made is None:  # a dataclass keeps what it is given in the fields of these names
                kept = self._handed(call, _written_init(definition), owner, values)
                self._carrying.setdefault(target, set()).update(kept)
                made = self.package.method(target, "__post_init__") if kept else None
                if made is not None:
                    self.follow(made, set())
                return
            target = made
            definition = self.package.definitions[target]
        handed = self._handed(call, definition, owner, values)
        carried = on_self and owner is not None and self._holds(definition, owner, set())
        part = any(
            self._is_part(one, owner, values)
            for one in [*call.args, *(keyword.value for keyword in call.keywords), call.func]
        )
        if target in self._read or not isinstance(definition, Function):
            return
        keeps = self._carrying.get((target[0], target[1].split(".")[0]))
        if on_value and definition.args.args and not keeps:
            handed.add(definition.args.args[0].arg)
        if handed or on_value or carried:
            self.follow(target, handed)
        elif part:
            self._look_in(target)

    def _look_in(self, place: Place) -> None:
        """Read a function that gets a part of the value, from which the reader comes back."""
        self._read.add(place)
        self._step_to(place)

    def _step_to(self, place: Place) -> None:
        self.count.trail.append(place)
        module = place[0]
        if self._present not in (None, module):
            self.count.climbs += self._present in self.package.imported[module]
            self.count.returns += module in self.count.rooms
        self._present = module
        self.count.rooms.add(module)

    def _handed(
        self, call: ast.Call, definition: ast.AST, owner: Place | None, values: set[str]
    ) -> set[str]:
        """The parameters of the function that get the value."""
        if not isinstance(definition, Function):
            return set()
        names = [argument.arg for argument in definition.args.args]
        skipped = 1 if names[:1] in (["self"], ["cls"]) else 0
        positional = zip(names[skipped:], call.args, strict=False)
        found = {name for name, value in positional if self._holds(value, owner, values)}
        found |= {
            keyword.arg
            for keyword in call.keywords
            if keyword.arg is not None and self._holds(keyword.value, owner, values)
        }
        return found


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """Calls and bindings in the order in which they are read: what is inside comes first."""
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)
    if isinstance(node, ast.Call | ast.Assign | ast.AnnAssign | ast.withitem | ast.For):
        yield node


def _written_init(node: ast.ClassDef) -> Function:
    """The constructor that `@dataclass` makes of the fields."""
    fields = [
        inner.target.id
        for inner in node.body
        if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name)
    ]
    text = f"def __init__({', '.join(['self', *fields])}): pass"
    written = ast.parse(text).body[0]
    assert isinstance(written, ast.FunctionDef)
    return written


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _is_own(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and _is_self(node.value)


def read(folder: Path, start: str) -> Count:
    """Follow `MODULE:FUNCTION:PARAMETER` through the package in `folder`.

    Raises:
        KeyError: there is no such function.
    """
    module, function, parameter = start.split(":")
    package = Package(folder)
    place = (f"{folder.name}.{module}", function)
    if place not in package.definitions:
        raise KeyError(f"{folder} has no {module}:{function}")
    return Reader(package).follow(place, {parameter})


if __name__ == "__main__":
    for journey in sys.argv[2:]:
        found = read(Path(sys.argv[1]).resolve(), journey)
        print(
            f"{journey}: {len(found.trail)} stays, {len(found.rooms)} rooms, "
            f"{found.climbs} climbs, {found.returns} returns"
        )
