"""The recipes' settings are those of fairseq-train's command line that recipes.py has."""

import importlib.util
import sys

import pytest
from fairseq import options
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf
from recipes import EXAMPLES, OWN, ROOT, trained

sys.path.insert(0, str(EXAMPLES))
import recipe as runner

FOLDERS = {
    **dict.fromkeys(("multi30k", "iwslt14", "wmt14"), "translation"),
    **dict.fromkeys(("sst2", "documents"), "classification"),
    **dict.fromkeys(("sick", "snli"), "inference"),
    "wikitext2": "language_modeling",
    "conll2003": "ner",
    "squad": "reading_comprehension",
}


def load(name, monkeypatch):
    """The recipe's class."""
    folder = EXAMPLES / FOLDERS[name]
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    found = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == name]
    return next(x for x in found if issubclass(x, runner.Recipe))


@pytest.mark.parametrize("name", FOLDERS)
def test_yaml_file_is_the_command_line(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = load(name, monkeypatch)(["--work", "work"])
    words = ["data", "--user-dir", str(ROOT / "fairseq_lrn"), *trained(name)]
    said = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))

    written = OmegaConf.create(runner.resolve(recipe.training(recipe.run(recipe.config["models"][0]))))
    written.task.data = "data"
    if "num_classes" in written.task:
        written.task.num_classes = said.task.num_classes  # counted
    add_defaults(written)
    for group in list(written):
        if group not in ("task", "model", "criterion", "optimizer", "lr_scheduler"):
            default = OmegaConf.structured(FairseqConfig.__dataclass_fields__[group].default)
            written[group] = OmegaConf.merge(default, written[group])
    groups = list(written)
    for group in FairseqConfig.__dataclass_fields__:
        if group not in written and group in (
            "dataset",
            "optimization",
            "checkpoint",
            "distributed_training",
        ):
            written[group] = OmegaConf.structured(FairseqConfig.__dataclass_fields__[group].default)
            groups.append(group)
    written, said = (OmegaConf.to_container(x, resolve=True, enum_to_str=True) for x in (written, said))
    for group in groups:
        given = {key: value for key, value in said[group].items() if key not in OWN}
        assert {key: written[group][key] for key in given} == given, group
