"""A configuration on its way from yaml to complete: changed, filled, resolved, checked."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from platform import signatures
from platform.origins import BASE, Origins
from platform.overrides import Override
from platform.settings import FROM_COMMAND, OPEN, PARTS, SECTIONS, SETTINGS
from platform.signatures import RESERVED, Argument, Signature, as_yaml
from platform.suggest import closest, closest_key
from platform.typecheck import REFUSED, coerce, describe, example
from platform.verbs import PROGRAM

if TYPE_CHECKING:
    from omegaconf import DictConfig

_ROOTS = ("module", "data")  # exactly one object each
_UNSET = "???"  # OmegaConf's mark for a value that must be given
_REQUEST = ("self", "seeds", "condition", "noise", "batch", "missing")  # arguments of sample() that are not settings


class Draft:
    """A configuration on its way from yaml to complete.

    Args:
        tree: nested plain containers, interpolations unresolved.
        origins: where keys were set.
        options: groups and their choices, for suggestions.
    """

    def __init__(self, tree: dict[str, Any], origins: Origins, options: dict[str, list[str]]) -> None:
        self.tree, self.origins, self.options = tree, origins, options

    def finish(self, changes: Sequence[Override]) -> "DictConfig":
        """Fill, change, resolve and check."""
        from omegaconf import OmegaConf

        plain = [change for change in changes if change.key.split(".")[0] not in (*PARTS, "sampling")]
        for change in plain:
            self.apply(change)
        self.check_plain()
        rest = [change for change in changes if change not in plain]
        for change in rest:
            if _names_target(change):  # defaults of the old target must not be written out
                self.apply(change)
        self.check_targets()
        signatures.fill({part: self.tree[part] for part in PARTS})
        for change in rest:
            if not _names_target(change):
                self.apply(change)
        self.check_plain()
        self.check_sampling()
        self.resolve()
        self.check_plain()
        self.check_arguments()
        self.check_sampling()
        cfg = OmegaConf.create(self.tree)
        OmegaConf.set_struct(cfg, True)
        return cfg

    # ---- changes --------------------------------------------------------------------------------------------------

    def apply(self, change: Override) -> None:
        """Put one argument of the command line into the tree.

        Raises:
            ValueError: there is no such setting, or it cannot be set there.
        """
        if change.key in FROM_COMMAND:
            how = "add or drop --tiny" if change.key == "tiny_run" else "write the experiment as the first word"
            raise ValueError(f"{change.text}: {change.key} is not a setting of its own; {how}.")
        node, path = self.tree, change.key.split(".")
        for depth, name in enumerate(path[:-1], start=1):
            if name not in node:
                raise self.unknown(change.key)
            node = self._enter(node[name], ".".join(path[:depth]), change)
        self._assign(node, change.key.rpartition(".")[0], path[-1], change.value)
        if change.sign == "~":
            raise ValueError(f"{change.text}: settings cannot be deleted. To switch a part off type {change.key}=null.")
        if change.sign:
            raise ValueError(
                f"{change.text}: every setting is there already, no {change.sign!r} is needed."
                f" Type {change.key}={change.raw}."
            )

    def _enter(self, value: Any, key: str, change: Override) -> dict[str, Any]:
        if isinstance(value, dict):
            return value
        if value is None:
            raise ValueError(f"{change.text}: {key} is switched off (null, {self.origins.find(key)}). Set {key} first.")
        if isinstance(value, str) and value.startswith("${"):
            meant = f"{value[2:-1]}.{change.key[len(key) + 1 :]}"
            raise ValueError(f"{change.text}: {key} follows {value[2:-1]}. Type {meant}={change.raw}.")
        raise ValueError(
            f"{change.text}: {key} is {_show(value)}, not a mapping. Give the whole value: {key}={_show(value)}."
        )

    def _assign(self, node: dict[str, Any], parent: str, name: str, value: Any) -> None:
        key = f"{parent}.{name}" if parent else name
        if not self._accepts(node, parent, name, value):
            raise self.unknown(key)
        old = node.get(name)
        if isinstance(value, dict) and isinstance(old, dict) and not _replaces(old, value):
            for inner, item in value.items():
                self._assign(old, key, str(inner), item)
        else:
            node[name] = value

    def _accepts(self, node: dict[str, Any], parent: str, name: str, value: Any) -> bool:
        key = f"{parent}.{name}" if parent else name
        if key in SETTINGS or key in SECTIONS or parent.split(".")[0] in OPEN:
            return True
        if parent == "callbacks":
            return name in node or (isinstance(value, dict) and "_target_" in value)
        if parent in ("", *SECTIONS) and "_target_" not in node:
            return False
        if "_target_" in node:
            return _takes(self._signature(node, parent), name)
        return True  # inside a mapping that some argument takes: its receiver knows the names

    def _signature(self, node: dict[str, Any], key: str) -> Signature:
        target = node["_target_"]
        try:
            if not isinstance(target, str):
                raise ValueError("expected a dotted path.")
            return signatures.of(target)
        except ValueError as error:
            raise ValueError(
                f"{key}._target_={target}: {error} Set {self.origins.find(f'{key}._target_')}. Type the full path,"
                f" package.module.Name."
            ) from None

    # ---- checks ---------------------------------------------------------------------------------------------------

    def check_plain(self) -> None:
        """Every plain setting exists, is known and of its type; every section is a mapping. Imports no target."""
        for name in SECTIONS:
            if not isinstance(self.tree.get(name), dict) or (name in _ROOTS and "_target_" not in self.tree[name]):
                raise self._not_a_section(name)
        plain = [name for name in self.tree if name not in SECTIONS]
        for key in [*plain, *(f"{name}.{inner}" for name in ("trainer", "checkpoints") for inner in self.tree[name])]:
            if key not in SETTINGS:
                raise self.unknown(key)
        for key, annotation in SETTINGS.items():
            *path, name = key.split(".")
            node = self.tree[path[0]] if path else self.tree
            if name not in node:
                raise ValueError(f"{key}: not set in any file. The experiment must list {BASE} first in its defaults.")
            node[name] = self._fit(key, node[name], Argument(annotation))
        self._check_callbacks()
        tag = self.tree["tag"]
        if tag is not None and not re.fullmatch(r"[A-Za-z0-9][\w.=-]*", tag):
            raise ValueError(
                f"tag={tag!r} names a folder: expected letters, digits and . _ = - only. Set"
                f" {self.origins.find('tag')}. Type e.g. tag={re.sub(r'[^A-Za-z0-9]+', '-', tag).strip('-') or 'wide'}."
            )

    def _check_callbacks(self) -> None:
        for name, value in self.tree["callbacks"].items():
            if value is not None and not (isinstance(value, dict) and "_target_" in value):
                meant = closest(name, [other for other in self.tree["callbacks"] if other != name])
                raise ValueError(
                    f"callbacks.{name}={_show(value)}: expected a mapping with _target_, or null for off."
                    f"{f' Did you mean callbacks.{meant}?' if meant else ''}"
                    f" Set {self.origins.find(f'callbacks.{name}')}. Type e.g. callbacks.{meant or name}=null."
                )

    def check_targets(self) -> None:
        """Every ``_target_`` can be imported and takes the names given to it."""
        for key, node in signatures.targets({part: self.tree[part] for part in PARTS}).items():
            signature = self._signature(node, key)
            for name in node:
                if not _takes(signature, name):
                    raise self.unknown(f"{key}.{name}", signature)

    def check_arguments(self) -> None:
        """Every argument of every ``_target_`` has a value of its annotated type."""
        for key, node in signatures.targets({part: self.tree[part] for part in PARTS}).items():
            partial = node.get("_partial_") is True
            for name, argument in self._signature(node, key).arguments.items():
                if name in node:
                    node[name] = self._fit(f"{key}.{name}", node[name], argument)
                elif argument.required and (argument.keyword_only or not partial):
                    raise self._missing(f"{key}.{name}", argument.annotation)

    def check_sampling(self, call: str = "sample") -> None:
        """Every key of ``sampling`` is an argument of the room's ``sample``, or other ``call``, and of its type.

        So is every key of ``settings`` of a callback: callbacks that sample take the room's keywords by this name.
        """
        room = signatures.locate(self._signature(self.tree["module"], "module").target)
        if not hasattr(room, call):
            return
        signature = signatures.read(f"{room.__name__}.{call}", getattr(room, call), without=_REQUEST)
        blocks = {"sampling": self.tree["sampling"]}
        for callback, node in self.tree.get("callbacks", {}).items():
            if isinstance(node, dict) and isinstance(node.get("settings"), dict):
                blocks[f"callbacks.{callback}.settings"] = node["settings"]
        for block, given in blocks.items():
            for name in given:
                if not _takes(signature, name):
                    raise self.unknown(f"{block}.{name}", signature)
                if name in signature.arguments:
                    given[name] = self._fit(f"{block}.{name}", given[name], signature.arguments[name])

    def resolve(self) -> None:
        """Replace every ``${...}`` by what it stands for."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            cfg = OmegaConf.create(self.tree)
            for key, value in flatten(self.tree):  # one by one, because OmegaConf's errors do not name the key
                if "${" in str(value):
                    found = OmegaConf.select(cfg, key)
                    OmegaConf.resolve(found) if OmegaConf.is_config(found) else None
            OmegaConf.resolve(cfg)
            self.tree = OmegaConf.to_container(cfg)  # type: ignore[assignment]
        except OmegaConfBaseException as error:
            problem = str(error.msg or error).splitlines()[0]
            if variable := re.search(r"Environment variable '([^']+)' not found", problem):
                problem = f"the environment variable {variable.group(1)} is not set"
            sought = re.search(r"Interpolation key '([^']+)' not found", problem)
            known = [name for name, _ in flatten(self.tree, sections=True)]
            meant = closest_key(sought.group(1), known) if sought else None
            raise ValueError(
                f"{key}={_show(value)}: {problem}.{f' Did you mean {meant}?' if meant else ''}"
                f" Set {self.origins.find(key)}. Type {key}=VALUE, or correct what it refers to."
            ) from None

    def _fit(self, key: str, value: Any, argument: Argument) -> Any:
        """The value in the type that its argument wants."""
        annotation = argument.annotation
        if value == _UNSET:
            raise self._missing(key, annotation)
        if isinstance(value, str) and "${" in value:
            return value  # checked once it is resolved
        if argument.plain and value == argument.default and type(value) is type(argument.default):
            return value  # right by definition, whatever the annotation
        if value != value:  # not a number passes every comparison
            raise ValueError(f"{key}={_show(value)}: expected {describe(annotation)}. Set {self.origins.find(key)}.")
        fit = coerce(value, annotation)
        raw = self.origins.raw(key)
        if fit is REFUSED and raw is not None:
            fit = coerce(raw, annotation)  # tag=5: yaml reads a number, text is wanted
        if fit is not REFUSED:
            return fit
        proposal = example(annotation, value, as_yaml(argument.default) if argument.plain else None)
        typed = "" if proposal is None else f" Type e.g. {key}={_show(proposal)}."
        raise ValueError(f"{key}={_show(value)}: expected {describe(annotation)}. Set {self.origins.find(key)}.{typed}")

    # ---- messages -------------------------------------------------------------------------------------------------

    def unknown(self, key: str, signature: Signature | None = None) -> ValueError:
        """The error for a key that does not exist."""
        there = [name for name, _ in flatten(self.tree, sections=True) if not f"{name}.".startswith(f"{key}.")]
        known = [name for name in (*there, *SETTINGS, *self.options) if name not in FROM_COMMAND]
        parent = key.rpartition(".")[0]
        if signature is not None:
            known += [f"{parent}.{name}" for name in signature.arguments]
        meant, where = closest_key(key, known), self.origins.find(key)
        message = f"{key}: no such setting." + (f" Did you mean {meant}?" if meant else "")
        if signature is not None:
            message += f" {signature.target} takes {', '.join(signature.arguments) or 'nothing'}."
        message += f" Set {where}."
        if self.origins.raw(f"{parent}._target_"):
            return ValueError(f"{message} A new _target_ needs its whole mapping: {parent}='{{_target_: ..., ...}}'.")
        change = next((change for change in self.origins.typed if change.key == key), None)
        if meant is None:
            return ValueError(f"{message} All settings: {PROGRAM} show {self.tree['experiment']}")
        if change is None:
            return ValueError(f"{message} Correct the name there.")
        if meant in self.options:
            return ValueError(f"{message} Type {meant}=CHOICE, one of {', '.join(self.options[meant])}.")
        if isinstance(block := _raw(self.tree, meant), dict) and change.value is not None:
            inside = next((name for name in block if not name.startswith("_")), "NAME")
            return ValueError(f"{message} {meant} is a block of settings: type e.g. {meant}.{inside}=VALUE.")
        plus = f" (no {change.sign!r} is needed)" if change.sign else ""
        return ValueError(f"{message} Type {meant}={change.raw}{plus}.")

    def _missing(self, key: str, annotation: Any) -> ValueError:
        home, proposal = self.origins.home(key), example(annotation, None)
        return ValueError(
            f"{key}: required, but missing{f' from what is set {home}' if home else ''}; expected"
            f" {describe(annotation)}. Type {key}={'VALUE' if proposal in (None, 'text') else _show(proposal)}."
        )

    def _not_a_section(self, name: str) -> ValueError:
        value = self.tree.get(name)
        if name in self.tree and value != _UNSET and not isinstance(value, dict):
            return ValueError(f"{name}={_show(value)}: expected a mapping of settings. Set {self.origins.find(name)}.")
        if isinstance(value, dict):
            home = self.origins.home(name)
            return ValueError(f"{name}: no _target_ in what is set {home}; expected the dotted path of a class there.")
        wanted = "a mapping with _target_" if name in _ROOTS else "a mapping of settings"
        return ValueError(
            f"{name}: required, but experiment {self.tree['experiment']} does not set it; expected {wanted}. List the"
            f" file that holds it in the experiment's defaults, or write it there."
        )


def merge(tree: dict[str, Any], block: dict[str, Any]) -> None:
    """Lay a block over a tree; a mapping that names another ``_target_`` replaces the old one."""
    for key, value in block.items():
        old = tree.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not _replaces(old, value):
            merge(old, value)
        else:
            tree[key] = value


def _replaces(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return "_target_" in new and new["_target_"] != old.get("_target_")


def flatten(tree: Any, prefix: str = "", sections: bool = False) -> Iterator[tuple[str, Any]]:
    """Dotted leaves of nested mappings; empty mappings are leaves, and with ``sections`` inner nodes are listed too."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            if sections:
                yield key, value
            yield from flatten(value, f"{key}.", sections)
        else:
            yield key, value


def _names_target(change: Override) -> bool:
    return change.key.endswith("._target_") or (isinstance(change.value, dict) and "_target_" in change.value)


def _takes(signature: Signature, name: str) -> bool:
    return name in signature.arguments or name in RESERVED or signature.any_keyword


def _raw(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _show(value: Any) -> str:
    """A value as it would be typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_show, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_show(item)}" for key, item in value.items()) + "}"
    return str(value)
