"""The configuration of a run: experiment file, Python defaults, command line; complete, checked, saved.

Order: Hydra composes the yaml files; ``--tiny`` merges the experiment's ``tiny:`` block; every default in the signature
of a ``_target_`` is written out; ``key=value`` arguments change what is there; interpolations are resolved; every value
is checked against the annotation of the argument it goes to. Plain settings are checked before any ``_target_`` is
imported, so that a typo is reported at once.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from platform import overrides as arguments
from platform import signatures
from platform.draft import Draft, flatten, merge
from platform.origins import BASE, EXPERIMENTS, Origins, experiments, groups, layers
from platform.overrides import Override
from platform.settings import is_volatile
from platform.suggest import closest
from platform.verbs import PROGRAM

if TYPE_CHECKING:
    from omegaconf import DictConfig

ABSENT = "(absent)"  # in difference(): the key exists on the other side only


def compose(
    experiment: str, overrides: Sequence[str], *, tiny: bool = False, folder: Path = EXPERIMENTS
) -> "DictConfig":
    """The complete configuration of one command.

    A pure function of its arguments, the files and the environment variables they name, so every rank computes the
    same.

    Args:
        experiment: name of a file in ``folder``, without suffix.
        overrides: ``key=value`` arguments, and ``group=choice`` for the groups ``data`` and ``hardware``.
        tiny: merge the experiment's miniature.
        folder: the experiments folder.

    Returns:
        Resolved configuration without missing values; unknown keys cannot be read or set.

    Raises:
        ValueError: anything unknown, missing, malformed or of the wrong type; says where and what to type.
    """
    _check_experiment(experiment, folder)
    changes = [arguments.parse(text) for text in overrides]
    choices = {change.key: change.raw for change in changes if change.key in groups(folder)}
    _check_choices(changes, folder)
    origins = Origins(layers(experiment, choices, folder), changes, tiny)
    _check_groups(experiment, choices, origins)
    tree = _compose_files(experiment, choices, folder)
    if tiny:
        merge(tree, tree.get("tiny") or {})
    tree.pop("tiny", None)
    draft = Draft({"experiment": experiment, "tiny_run": tiny, **tree}, origins, groups(folder))
    return draft.finish([change for change in changes if change.key not in choices])


def check_sampling(cfg: "DictConfig", overrides: Sequence[str] = (), call: str = "sample") -> dict[str, Any]:
    """Settings for ``module.sample``: the experiment's ``sampling:`` block, then arguments of the command line.

    For another ``call`` of the room, entries of the block that have no meaning there are left out.

    Args:
        cfg: a composed or loaded configuration.
        overrides: ``key=value``; the key may be written with or without ``sampling.`` in front.
        call: name of the room's method that takes them.

    Returns:
        Keyword arguments, checked against the signature of the room's ``sample``, or other ``call``.

    Raises:
        ValueError: ``sample`` takes no such argument, or not such a value.
    """
    changes = [arguments.parse(text) for text in overrides]
    changes = [replace(change, key=f"sampling.{change.key.removeprefix('sampling.')}") for change in changes]
    tree = {name: _plain(cfg)[name] for name in ("experiment", "module", "sampling")}
    if call != "sample":
        known = signatures.of(f"{tree['module']['_target_']}.{call}").arguments
        tree["sampling"] = {name: value for name, value in tree["sampling"].items() if name in known}
    draft = Draft(tree, Origins([], changes, tiny=False), {})
    for change in changes:
        draft.apply(change)
    draft.check_sampling(call)
    return dict(draft.tree["sampling"])


def save(cfg: "DictConfig", path: str | Path) -> None:
    """Write a configuration, complete and resolved, so that the file is either the old or the new one."""
    from omegaconf import OmegaConf

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(OmegaConf.to_yaml(cfg, resolve=True))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must survive a power cut
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: str | Path) -> "DictConfig":
    """Read a configuration written by :func:`save`.

    Raises:
        ValueError: the file is missing, not yaml, or not a configuration.
    """
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the configuration that fit writes into a run folder.")
    try:
        cfg = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable configuration ({str(error).splitlines()[0]}).") from None
    if not isinstance(cfg, DictConfig) or "module" not in cfg or "experiment" not in cfg:
        raise ValueError(f"{path}: not a configuration of a run: it has no experiment or no module.")
    OmegaConf.set_struct(cfg, True)
    return cfg


def difference(old: "DictConfig", new: "DictConfig") -> list[tuple[str, Any, Any]]:
    """Settings that shape the result and differ, as ``(key, old value, new value)`` sorted by key.

    Keys that do not change what is computed (``platform.settings.VOLATILE``) are left out; a key on one side only is
    paired with :data:`ABSENT`.
    """
    before, after = (dict(flatten(_plain(cfg))) for cfg in (old, new))
    return [
        (key, before.get(key, ABSENT), after.get(key, ABSENT))
        for key in sorted(before.keys() | after.keys())
        if not is_volatile(key) and before.get(key, ABSENT) != after.get(key, ABSENT)
    ]


def run_name(cfg: "DictConfig", experiment: str) -> str:
    """Name of the run folder: ``experiment[-tag][-tiny]``; no time, rank or job in it, so the same command resumes."""
    return "-".join([experiment, *([str(cfg.tag)] if cfg.tag else []), *(["tiny"] if cfg.tiny_run else [])])


def _check_experiment(name: str, folder: Path) -> None:
    names = experiments(folder)
    if name in names:
        return
    if name == BASE:
        raise ValueError(f"{name}: holds what every run has, but is no experiment. List them: {PROGRAM} show")
    meant = closest(Path(name).stem, names)
    raise ValueError(
        f"{name}: no such experiment in {folder.name}/.{f' Did you mean {meant}?' if meant else ''}"
        f" List them: {PROGRAM} show"
    )


def _check_choices(changes: Sequence[Override], folder: Path) -> None:
    for change in changes:
        choices = groups(folder).get(change.key)
        if choices is None:
            continue
        if change.raw not in choices:
            meant = closest(change.raw, choices)
            raise ValueError(
                f"{change.key}={change.raw}: no such choice.{f' Did you mean {change.key}={meant}?' if meant else ''}"
                f" Choices: {', '.join(choices)}. Set on the command line. Type {change.key}={meant or choices[0]}."
            )
        if change.sign:
            raise ValueError(f"{change.text}: no {change.sign!r} is needed. Type {change.key}={change.raw}.")


def _check_groups(experiment: str, choices: dict[str, str], origins: Origins) -> None:
    for group, option in choices.items():
        if not any(layer.name == f"experiments/{group}/{option}.yaml" for layer in origins.files):
            raise ValueError(
                f"{group}={option}: experiments/{experiment}.yaml has no {group} in its defaults, so there is nothing"
                f" to replace. Add '{group}: {option}' to its defaults."
            )


def _compose_files(experiment: str, choices: dict[str, str], folder: Path) -> dict[str, Any]:
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        with hydra.initialize_config_dir(config_dir=str(folder.resolve()), version_base="1.3"):
            cfg = hydra.compose(experiment, overrides=[f"{group}={option}" for group, option in choices.items()])
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"experiments/{experiment}.yaml cannot be composed: {' '.join(str(error).split())}") from None
    tree = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _plain(cfg: "DictConfig") -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True)
