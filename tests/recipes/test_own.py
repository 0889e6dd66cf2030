"""A recipe of one's own, in a file or a module, trains and resumes like those of the package."""

import json
import sys
from dataclasses import replace
from textwrap import dedent

import pytest

from stn_fast import train
from stn_fast.errors import UserError
from stn_fast.recipes import Recipe, digits, recipe

OWN = """
    from dataclasses import replace
    from stn_fast.recipes import Recipe, digits
    from neighbour import NAME

    def settings():
        config = digits.config()
        return replace(config, recipe=NAME, schedule=replace(config.schedule, epochs=4))

    small = Recipe(settings, digits.build)
    config, build = settings, digits.build
    broken = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    for name in ("neighbour", "my_task"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "neighbour.py").write_text("NAME = 'my task'\n")
    path = tmp_path / "my_task.py"
    path.write_text(dedent(OWN))
    return path


def test_a_recipe_in_a_file_trains_and_resumes(file, tmp_path, capsys):
    run = ["--run-dir", str(tmp_path / "run")]
    assert train.main([f"{file}:small", "--max-steps", "5", *run]) == 0
    assert train.main([f"{file}:small", "--max-steps", "9", *run]) == 0
    said = capsys.readouterr()
    assert "resuming" in said.out + said.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["recipe"], result["steps"]) == ("my task", 9)


def test_its_saved_configuration_belongs_to_it(file, tmp_path, capsys):
    saved = tmp_path / "saved.yaml"
    assert train.main([f"{file}:small", "--print-config"]) == 0
    saved.write_text(capsys.readouterr().out)
    assert train.main([f"{file}:small", "--config", str(saved), "--print-config"]) == 0
    assert capsys.readouterr().out == saved.read_text()
    assert train.main(["--config", str(saved), "--print-config"]) == 2
    assert "unknown recipe 'my task'" in capsys.readouterr().err
    assert train.main(["cifar10", "--config", str(saved), "--print-config"]) == 2
    assert "is for 'my task'" in capsys.readouterr().err


def test_a_module_is_a_recipe_by_itself_and_is_run_once(file, monkeypatch):
    assert recipe(str(file)).config().schedule.epochs == 4
    assert recipe(str(file)) is recipe(str(file))
    monkeypatch.syspath_prepend(file.parent)
    assert recipe("my_task:small").config().recipe == "my task"
    assert recipe("stn_fast.recipes.digits") is digits
    assert recipe("digits") is digits


def test_a_colon_in_a_path_does_not_end_it(file):
    folder = file.parent / "run:1"
    folder.mkdir()
    own, _ = (path.rename(folder / path.name) for path in (file, file.with_name("neighbour.py")))
    assert recipe(str(own)).config().recipe == "my task"
    assert recipe(f"{own}:small").config().recipe == "my task"
    # As on Windows, where it is not a name in the module C.
    with pytest.raises(UserError, match=r"there is no file C:\\tasks\\x.py to take"):
        recipe(r"C:\tasks\x.py")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("digit", "unknown recipe 'digit': did you mean 'digits'.*my_task.py:recipe"),
        ("nowhere.py", "there is no file nowhere.py to take a recipe from"),
        ("nowhere.module:recipe", "there is no module nowhere.module to take a recipe from"),
        ("stn_fast.recipes.images:resnet", "has no 'resnet'"),
        ("{file}:smal", "has no 'smal'"),
        ("{file}:broken", "has no function config and no function build: see stn_fast.recipes.Recipe"),
    ],
)
def test_an_invalid_recipe_is_a_clear_error(file, name, says):
    with pytest.raises(UserError, match=says):
        recipe(name.format(file=file))


def test_what_a_module_lacks_or_raises_is_its_own_error(file):
    (file.parent / "neighbour.py").write_text("import no_such_package\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        recipe(f"{file}:small")
    (file.parent / "neighbour.py").write_text("NAME = 'mended'\n")
    assert recipe(f"{file}:small").config().recipe == "mended"


def test_a_recipe_is_two_functions():
    one = Recipe(digits.config, digits.build)
    assert replace(one, config=lambda: 3).config() == 3
