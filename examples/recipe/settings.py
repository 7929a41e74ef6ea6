"""Settings: read from OPTION=VALUE, checked, and completed as fairseq's command line does."""

import argparse
import difflib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Set, Tuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .text import Refused, cannot_import
from .work import package

LISTS = ("models", "compare", "languages", "train", "valid", "test", "urls")  # of a recipe's own settings
OPTIONAL = ("run", "tokenizer")  # which may be null
GROUPS = (
    "architectures task model criterion optimizer lr_scheduler optimization dataset checkpoint generation"
)


class Settings(dict):
    """Settings by name. To read one that the YAML file lacks is refused in one sentence."""

    def __init__(self, where: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.where = where

    def __missing__(self, name: str) -> Any:
        raise Refused(f"{self.where}{name} is missing")


def read_file(path: Path) -> Tuple[Dict[str, Any], Dict[str, Dict[str, Any]]]:
    """Return a YAML file's own settings, and its groups of settings, with references left as they are."""
    try:
        read = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where, reason = f", line {mark.line + 1}" if mark else "", getattr(error, "problem", str(error))
        raise Refused(f"{path}{where}: {reason}".split("\n")[0]) from error
    if not isinstance(read, dict) or not read:
        raise Refused(f"{path} has no settings")
    for group in GROUPS.split():
        read[group] = read.get(group) or {}
        if not isinstance(read[group], dict):
            raise Refused(f"{path}: {group} is {read[group]}, but must have options")
    if not read["architectures"]:
        raise Refused(f"{path}: architectures is missing")
    groups = {name: value for name, value in read.items() if isinstance(value, dict)}
    return {name: read[name] for name in read if name not in groups}, groups


def expand(path: str) -> Path:
    """Return a path with the home folder for ``~``, which a shell leaves after a comma or an equals sign."""
    return Path(os.path.expanduser(path))


def require(package: str, module: str = "") -> None:
    """Refuse to go on without a Python package. Its module has the same name, unless given."""
    if importlib.util.find_spec(module or package) is None:
        raise Refused(f"there is no package {package}: {sys.executable} -m pip install {package}")


def read_option(word: str) -> Tuple[str, Any]:
    """Split OPTION=VALUE. The value is read as YAML, so it may contain commas and blanks."""
    option, equals, value = word.partition("=")
    option = option.lstrip("+")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", option):
        raise Refused(f"the argument {word!r} must be OPTION=VALUE, as model.dropout=0.2")
    try:
        read = OmegaConf.to_container(OmegaConf.create(f"value: {value}"))
    except Exception as error:
        raise Refused(f"{option} is {value!r}, which is not a YAML value") from error
    if set(read) != {"value"} or read["value"] == "???":  # which is OmegaConf's sign of no value
        raise Refused(f"{option} is {value!r}, which is not a YAML value")
    return option, read["value"]


def own_value(name: str, value: Any, default: Any) -> Any:
    """Return a recipe's setting with the type of the YAML file's ``default``."""
    kind = type(default)
    if name in LISTS:
        values = value if isinstance(value, list) else [] if value is None else str(value).split(",")
        if name == "models" and not values:
            raise Refused("models is empty, but must have at least one architecture")
        return [str(x).strip() for x in values]
    if value is None:
        if name not in OPTIONAL:
            raise Refused(f"{name} has no value")
        return None
    if kind in (str, type(None)) and not isinstance(value, (list, dict)):
        return str(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        kinds = {int: "a whole number", bool: "true or false", float: "a number"}
        raise Refused(f"{name} is {value!r}, but must be {kinds.get(kind, 'text')}")
    if kind in (int, float) and value < 0:
        raise Refused(f"{name} is {value}, but must not be negative")
    return value


def near(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for the unknown ``name``. The known are names, or GROUP.NAME."""
    full: Dict[str, List[str]] = {}
    for one in known:
        full.setdefault(one.rpartition(".")[2], []).append(one)
    close = [name] if name in full else difflib.get_close_matches(name, full, 3, 0.7)
    found = [one for x in close for one in full[x]]
    return f" (did you mean {' or '.join(found[:3])}?)" if found else ""


def fairseq_groups() -> Mapping[str, Any]:
    """Import fairseq and this package, and return the fields of fairseq's configuration by name."""
    try:
        from fairseq.dataclass.configs import FairseqConfig
        from fairseq.utils import import_user_module

        import_user_module(argparse.Namespace(user_dir=str(package())))
    except ImportError as error:
        raise cannot_import(error) from error
    return {name: x for name, x in FairseqConfig.__dataclass_fields__.items() if name != "_name"}


def fields(group: str, settings: Mapping[str, Any]) -> Tuple[Any, Set[str]]:
    """Return the dataclass of one of fairseq's groups, or None, and the names of the group's options."""
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
    from fairseq.registry import REGISTRIES
    from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY

    node, options = fairseq_groups()[group].type, settings.get(group, {})
    if node is Any:  # a choice of several, by name
        if options.get("_name") is None:
            raise Refused(f"{group}._name is missing")
        name = str(options["_name"])
        if group == "model":
            model = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)
            if model is None:
                raise Refused(f"there is no model {name}{near(name, ARCH_MODEL_REGISTRY)}")
            node = getattr(model, "__dataclass", None)
            if node is None:
                parser = argparse.ArgumentParser(allow_abbrev=False)
                model.add_args(parser)
                # such a model also reads what are the task's options, as fairseq-train has one list of all
                _, known = fields("task", settings)
                return None, known | {action.dest for action in parser._actions} | {"criterion"}
        else:
            registry, nodes = TASK_REGISTRY, TASK_DATACLASS_REGISTRY
            if group != "task":
                registry, nodes = REGISTRIES[group]["registry"], REGISTRIES[group]["dataclass_registry"]
            if name not in registry:
                raise Refused(f"{group}._name is {name}, which fairseq does not know{near(name, registry)}")
            node = nodes.get(name)
    return node, set(node.__dataclass_fields__ if node else options)


def options_of(settings: Mapping[str, Any]) -> List[str]:
    """Return all of fairseq's options, as GROUP.OPTION, but those that take the value of another one."""
    groups, found = fairseq_groups(), []
    for group in groups:
        if group in settings or groups[group].type is not Any:
            node, known = fields(group, settings)
            values = {x: str(node.__dataclass_fields__[x].default) for x in known} if node else {}
            found += [f"{group}.{x}" for x in sorted(known) if not values.get(x, "").startswith("${")]
    return found


def resolve(settings: Mapping[str, Mapping[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Check fairseq's groups of settings, and complete the model as ``fairseq-train --arch`` does.

    ``fairseq-hydra-train`` itself ignores options that the model does not have, and the values of an
    architecture.
    """
    groups, resolved = fairseq_groups(), {}
    from fairseq.dataclass.utils import _set_legacy_defaults
    from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_REGISTRY

    for group, options in settings.items():
        if group not in groups:
            raise Refused(f"there is no group of options {group}{near(group, groups)}")
        node, known = fields(group, settings)
        values = {}
        for option, value in options.items():
            if option not in {*known, "_name"}:
                raise Refused(f"there is no option {group}.{option}{near(option, options_of(settings))}")
            if value == "???":
                raise Refused(f"{group}.{option} has no value")
            if node is not None and option != "_name":
                if "List[" in str(node.__dataclass_fields__[option].type) and isinstance(value, (int, float)):
                    value = [value]
                try:
                    OmegaConf.merge(OmegaConf.structured(node), {option: value})
                except Exception as error:
                    reason = str(error).split("\n")[0]
                    raise Refused(f"{group}.{option} is {value!r}: {reason}") from error
            values[option] = value
        if group == "model":
            name, namespace = values["_name"], argparse.Namespace(**values)
            ARCH_CONFIG_REGISTRY.get(name, lambda _: None)(namespace)
            if node is None:
                _set_legacy_defaults(namespace, ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name))
                # fairseq's lstm looks for the criterion among its own options, fairseq 0.12.2 for the other
                for option, value in (("criterion", settings["criterion"]["_name"]), ("base_layers", 0)):
                    vars(namespace).setdefault(option, value)
            values = vars(namespace)
        resolved[group] = values
    return resolved
