"""Recipes: files, settings and the names of version 0.1."""

import json

import pytest
from support import run_here

from phi_runtime.errors import UsageError
from phi_train.recipes.catalogue import RECIPES, get_recipe
from phi_train.recipes.config import RENAMED, SETTINGS, to_dict, vary

BASE = 'recipe = "phi3-demo"\n'


@pytest.fixture
def file(tmp_path):
    def write(text, name="mine.toml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_a_file_changes_what_it_names(file):
    recipe = get_recipe(file(BASE + "seed = 7\n[optimizer]\nlr = 1e-3\n[model]\nnum_hidden_layers = 2\n"), ["seed=8"])
    demo = get_recipe("phi3-demo", [])
    assert (recipe.seed, recipe.optimizer.lr, recipe.model.num_hidden_layers) == (8, 1e-3, 2)
    assert (recipe.data, recipe.optimizer.beta2) == (demo.data, demo.optimizer.beta2)


def test_a_whole_recipe_as_a_run_writes_it(file):
    demo = get_recipe("phi3-demo", [])
    assert get_recipe(file(json.dumps(to_dict(demo)), "whole.json"), []) == demo


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[optimizer]\nlr = 1e-3\n", "is missing"),
        (BASE + "[optimizr]\nlr = 1e-3\n", "optimizr: unknown field (did you mean optimizer?)"),
        (BASE + "[optimizer]\nlearning_rate = 1e-3\n", "optimizer.learning_rate: unknown field"),
        (BASE + "[optimizer]\nlr = '1e-3'\n", "optimizer.lr: expected `float`, got `str`"),
        (BASE + "[optimizer]\nlr = 0\n", "optimizer.lr: expected `float` > 0"),
        (BASE + "[schedule]\ntype = 'cosin'\n", "schedule.type: 'cosin' is none of constant, cosine, linear"),
        (BASE + "[data]\nsequence_length = 1000000\n", "is not between 2 and the context"),
        (BASE + "model = 5\n", "model: expected `object`"),
        ('recipe = "phi3-dem"\n', "no recipe 'phi3-dem' (did you mean phi3-demo?)"),
        ("recipe = 5\n", "recipe: should be the name of a recipe"),
        ("seed = \n", "is not valid TOML"),
    ],
)
def test_a_mistake_in_a_file_is_named(text, says, file):
    with pytest.raises(UsageError) as told:
        get_recipe(file(text), [])
    assert says in str(told.value), told.value
    assert "\n" not in str(told.value)


def test_files_that_are_none(file, tmp_path):
    with pytest.raises(UsageError, match=r"is not valid JSON"):
        get_recipe(file("[" * 100_000, "deep.json"), [])
    with pytest.raises(UsageError, match="no such file"):
        get_recipe(str(tmp_path / "none.toml"), [])


def test_names_of_version_0_1_work_with_a_note(tmp_path):
    assert set(RENAMED.values()) <= set(SETTINGS)
    old = ("phi3-demo", "--out", tmp_path / "x", "--dry-run", "--set", "learning_rate=1e-3", "--set", "steps=60")
    done = run_here("phi-train", *old)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "note: --set learning_rate is now --set optimizer.lr",
        "note: --set steps is now --set schedule.steps",
    ]
    said = json.loads(done.stdout)
    assert (said["optimizer"]["lr"], said["schedule"]["steps"]) == (1e-3, 60)
    done = run_here("phi-train", "questions", "--help")
    assert done.returncode == 0 and "note: `phi-train questions` is now `phi-train make-sft-data`" in done.stderr


def test_a_bare_name_is_told_its_component():
    with pytest.raises(UsageError, match=r"no setting 'lr' \(did you mean optimizer.lr\?\)"):
        get_recipe("phi3-demo", ["lr=1"])


def test_vary_changes_fields_of_components():
    demo = get_recipe("phi3-demo", [])
    varied = vary(demo, seed=3, optimizer={"lr": 1e-3})
    assert (varied.seed, varied.optimizer.lr, varied.optimizer.beta1) == (3, 1e-3, demo.optimizer.beta1)


def test_narrow_phi3s_alone_draw_by_fan_in():
    """What was measured: docs/how-to/train.md."""
    for name in RECIPES:
        narrow = name.startswith("phi3-") and name.endswith("-demo")
        assert get_recipe(name, []).initializer == ("fan_in" if narrow else "published"), name
