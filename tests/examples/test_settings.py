"""The recipes' settings are those of fairseq-train's command line that recipes.py has."""

import pytest
from fairseq import options
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import DictConfig, OmegaConf
from recipes import OWN, ROOT, load, runner, trained

FOLDERS = {
    **dict.fromkeys(("multi30k", "iwslt14", "wmt14"), "translation"),
    **dict.fromkeys(("sst2", "documents"), "classification"),
    **dict.fromkeys(("sick", "snli"), "inference"),
    "wikitext2": "language_modeling",
    "conll2003": "ner",
    "squad": "reading_comprehension",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_yaml_file_is_the_command_line(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = load(f"{FOLDERS[name]}/{name}.py", monkeypatch)(["--work", "work"])
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


@pytest.mark.parametrize("name", FOLDERS)
def test_a_checkpoint_that_is_never_written_is_refused(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = load(f"{FOLDERS[name]}/{name}.py", monkeypatch)
    words = ["dataset.disable_validation=true", *["average=0"] * (FOLDERS[name] == "translation")]
    made = recipe(words)
    if name == "squad":  # which evaluates the last
        made.run("lrn")
    else:
        with pytest.raises(
            runner.Refused, match=r"dataset.disable_validation is True, but the best validation"
        ):
            made.execute()
    if "average=0" in words:
        recipe(words[:1]).run(made.config["models"][0])


@pytest.mark.parametrize("name", ["multi30k", "sst2", "wikitext2", "conll2003", "squad"])
def test_a_shortened_yaml_file_works_or_is_refused(name, monkeypatch, tmp_path):
    """Without one of its settings or groups, or of the groups' names; or with an empty one."""
    monkeypatch.chdir(tmp_path)
    recipe = load(f"{FOLDERS[name]}/{name}.py", monkeypatch)
    whole = OmegaConf.load(recipe.script.replace(".py", ".yaml"))
    whole.models = whole.models[:1]
    monkeypatch.setattr(recipe, "script", f"{tmp_path}/{name}.py")

    def end(shorter):
        OmegaConf.save(shorter, tmp_path / f"{name}.yaml")
        try:
            recipe(["--dry-run"]).execute()
        except runner.Refused as error:
            return str(error)

    for key in whole:
        end({**whole, key: None})
        end({other: whole[other] for other in whole if other != key})
        if isinstance(whole[key], DictConfig) and "_name" in whole[key]:
            nameless = {option: value for option, value in whole[key].items() if option != "_name"}
            assert end({**whole, key: nameless}) == f"{key}._name is missing" or key == "model"
    assert end({**whole, "models": None}) == "models is empty, but must have at least one architecture"
    assert end({**whole, "run": None}) == end(whole)
    del whole.models
    assert end(whole) == f"{name}.yaml: models is missing"
