"""Settings: read from OPTION=VALUE, checked, and completed as fairseq's command line does."""

import argparse
import difflib
import re
from pathlib import Path
from typing import Any, Dict, Iterable, Tuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .text import Refused
from .work import package

LISTS = ("models", "compare", "languages", "train", "valid", "test", "urls")  # of a recipe's own settings


def read_file(path: Path) -> Dict[str, Any]:
    """Return the settings of a YAML file, with references left as they are."""
    try:
        read = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where, reason = f", line {mark.line + 1}" if mark else "", getattr(error, "problem", str(error))
        raise Refused(f"{path}{where}: {reason}".split("\n")[0]) from error
    if not isinstance(read, dict) or not read:
        raise Refused(f"{path} has no settings")
    return read


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
    if default is None and value is None:
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
    """Return a suggestion for the unknown ``name``."""
    found = difflib.get_close_matches(name, list(known), 3)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def resolve(settings: Dict[str, Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Check fairseq's groups of settings, and complete the model as ``fairseq-train --arch`` does.

    ``fairseq-hydra-train`` itself ignores options that the model does not have, and the values of an
    architecture.
    """
    try:
        from fairseq.dataclass.configs import FairseqConfig
        from fairseq.dataclass.utils import _set_legacy_defaults
        from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_REGISTRY
        from fairseq.registry import REGISTRIES
        from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
        from fairseq.utils import import_user_module

        import_user_module(argparse.Namespace(user_dir=str(package())))
    except ImportError as error:
        raise Refused(f"fairseq and this package must be installed: {error}") from error

    resolved = {}
    for group, options in settings.items():
        if group not in FairseqConfig.__dataclass_fields__:
            names = FairseqConfig.__dataclass_fields__
            raise Refused(f"there is no group of options {group}{near(group, names)}")
        node, known = FairseqConfig.__dataclass_fields__[group].type, None
        name = str(options.get("_name"))
        if group == "model":
            model = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)
            if model is None:
                raise Refused(f"there is no model {name}{near(name, ARCH_MODEL_REGISTRY)}")
            node = getattr(model, "__dataclass", None)
            if node is None:
                parser = argparse.ArgumentParser(allow_abbrev=False)
                model.add_args(parser)
                # such a model also reads what are the task's options, as fairseq-train has one list of all
                known = {action.dest for action in parser._actions} | {"criterion"}
                known |= set(TASK_DATACLASS_REGISTRY[settings["task"]["_name"]].__dataclass_fields__)
        elif node is Any:  # a choice of several, by name
            registry, nodes = TASK_REGISTRY, TASK_DATACLASS_REGISTRY
            if group != "task":
                registry, nodes = REGISTRIES[group]["registry"], REGISTRIES[group]["dataclass_registry"]
            if name not in registry:
                raise Refused(f"{group}._name is {name}, which fairseq does not know{near(name, registry)}")
            node = nodes.get(name)
        known = known or (set(node.__dataclass_fields__) if node else set(options))
        values = {}
        for option, value in options.items():
            if option not in {*known, "_name"}:
                raise Refused(f"there is no option {group}.{option}{near(option, known)}")
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
            namespace = argparse.Namespace(**values)
            ARCH_CONFIG_REGISTRY.get(name, lambda _: None)(namespace)
            if node is None:
                _set_legacy_defaults(namespace, model)
                # fairseq's lstm looks for the criterion among its own options, fairseq 0.12.2 for the other
                for option, value in (("criterion", settings["criterion"]["_name"]), ("base_layers", 0)):
                    vars(namespace).setdefault(option, value)
            values = vars(namespace)
        resolved[group] = values
    return resolved
