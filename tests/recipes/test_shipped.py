"""What all shipped recipes have in common: their heads, their names, and a smoke configs for every row."""

import re

import pytest

from fastcifar import locations
from fastcifar.config import CombineRecipe, Recipe, find_recipe, load_recipe, recipes_folder, shipped_recipes, to_toml
from fastcifar.errors import UserError
from fastcifar.ladder.rows import catalogue

FILES = {p.relative_to(recipes_folder()).with_suffix("").as_posix(): p for p in shipped_recipes()}
TOP = [name for name in FILES if "/" not in name]
ROWS = [name for name in TOP if name != "smoke"]
BEYOND = [name for name in FILES if name.startswith("beyond/")]
SMOKE_CONFIGS = [name for name in FILES if name.startswith("smoke/")]


def head(name):
    """Return the lines of the head comment."""
    lines = FILES[name].read_text().splitlines()
    return lines[: next(i for i, text in enumerate(lines) if not text.startswith("#"))]


@pytest.mark.parametrize("name", FILES)
def test_loads_and_survives_a_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    copy = tmp_path / "copy.toml"
    copy.write_text(to_toml(recipe))
    assert load_recipe(copy) == recipe
    assert recipe.title


def test_names_are_distinct():
    names = [recipe.name for recipe in catalogue().values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ROWS)
def test_the_head_of_a_row_tells_what_it_must(name):
    lines, recipe = head(name), load_recipe(name)
    assert 4 <= len(lines) <= 6
    last = f"{recipe.published.last:.2f} last epoch" if recipe.published.last else "last epoch not published"
    assert f"# published: {recipe.published.best:.2f} best ({last})" in lines
    assert sum(line.startswith("# ours: ") for line in lines) == 1
    verb = "ladder --only" if isinstance(recipe, CombineRecipe) else "run"
    assert lines[-1] == f"# run: fastcifar {verb} {name}"


@pytest.mark.parametrize("name", BEYOND)
def test_the_head_beyond_names_its_target(name):
    lines, recipe = head(name), load_recipe(name)
    assert sum(line.startswith("# ours: ") for line in lines) == 1
    if recipe.model_dump().get("target"):
        metrics = [float(f) for f in re.findall(r"# target: ([\d.]+)", "\n".join(lines))]
        assert metrics == [pytest.approx(recipe.target, abs=0.011)]


@pytest.mark.parametrize("name", FILES)
def test_the_command_in_the_head_finds_this_recipe(name):
    command = next(line for line in head(name) if line.startswith("# run: "))
    assert find_recipe(command.split()[-1]) == FILES[name]


def test_every_row_has_a_smoke_config_and_nothing_else_has():
    assert {name.removeprefix("smoke/") for name in SMOKE_CONFIGS} == set(ROWS)


# What a smoke config may change: what makes it small. Everything else is the row's.
SMALL = {
    "data": {"source", "subset", "test_subset"},
    "train": {"epochs", "batch_size"},
    "model": {"widen", "depth", "alpha"},
}


@pytest.mark.parametrize("name", ROWS)
def test_a_smoke_config_differs_from_its_row_only_in_size(name):
    row, small = load_recipe(name), load_recipe(f"smoke/{name}")
    assert small.name == f"smoke-{name}"
    if isinstance(row, CombineRecipe):
        assert small.combine.members == [f"smoke-{member}" for member in row.combine.members]
        assert small.combine.model_dump(exclude={"members"}) == row.combine.model_dump(exclude={"members"})
        return
    assert isinstance(row, Recipe)
    skip = {"name", "title", "stage", "published", "target"} | set(SMALL)
    assert small.model_dump(exclude=skip) == row.model_dump(exclude=skip)
    for section, keys in SMALL.items():
        assert getattr(small, section).model_dump(exclude=keys) == getattr(row, section).model_dump(exclude=keys)
    assert small.data.source == "cifar10-or-synthetic"


@pytest.mark.parametrize("name", [n for n, recipe in catalogue().items() if isinstance(recipe, CombineRecipe)])
def test_members_of_combinations_exist_and_record_what_is_needed(name):
    recipes = {r.name: r for r in catalogue().values()}
    combine = load_recipe(name).combine
    for member in combine.members:
        if combine.how == "stacking" and combine.protocol == "published":
            assert recipes[member].eval.train_logits
        if combine.protocol == "honest":
            assert recipes[member].data.holdout == 5000


def test_a_later_file_of_extends_wins_and_titles_stay_behind(tmp_path):
    lenet5 = (recipes_folder() / "lenet5.toml").as_posix()
    (tmp_path / "a.toml").write_text(f'title = "A"\nextends = "{lenet5}"\n')
    (tmp_path / "_b.toml").write_text('title = "B"\ntrain = { epochs = 3 }\noptimizer = { lr = 0.5 }\n')
    (tmp_path / "c.toml").write_text('extends = ["a.toml", "_b.toml"]\noptimizer = { lr = 0.25 }\n')
    recipe = load_recipe(tmp_path / "c.toml")
    assert (recipe.name, recipe.title, recipe.published) == ("c", "", None)
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.optimizer.lr) == (3, 128, 0.25)


def test_parts_are_not_recipes():
    assert not [name for name in FILES if name.split("/")[-1].startswith("_")]


def test_augment_settings_survive_an_override_of_another_key():
    recipe = load_recipe("aug-aa", ["data.loader.name=torchvision", "augment.where=loader"])
    assert [op.name for op in recipe.augment.ops] == ["crop", "flip", "autoaugment"]
    assert recipe.augment.where == "loader"


@pytest.mark.parametrize("name", ["speed94", "speed94.toml", "recipes/beyond/speed94.toml", "beyond/speed94"])
def test_the_folder_may_be_left_out(name):
    assert find_recipe(name).resolve() == FILES["beyond/speed94"]


def test_a_row_is_found_before_its_smoke_config():
    assert find_recipe("wrn-asam") == FILES["wrn-asam"]


def test_a_folder_does_not_hide_a_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").mkdir()
    (tmp_path / "runs").mkdir()
    assert find_recipe("smoke") == FILES["smoke"]
    with pytest.raises(UserError, match="runs: is a folder"):
        find_recipe("runs")


@pytest.fixture
def two_folders(tmp_path, monkeypatch):
    """Shipped recipes of which two have one name."""
    for folder in ("one", "two"):
        (tmp_path / "shipped" / folder).mkdir(parents=True)
        (tmp_path / "shipped" / folder / "same.toml").write_text("")
    monkeypatch.setattr("fastcifar.config.load.recipes_folder", lambda: tmp_path / "shipped")
    return tmp_path


def test_a_name_in_two_folders_is_refused(two_folders):
    with pytest.raises(UserError, match="same: could be one/same or two/same; write the folder too"):
        find_recipe("same")
    (two_folders / "mine.toml").write_text('extends = "same"\n')
    with pytest.raises(UserError, match=r"mine\.toml: extends: same: could be one/same or two/same"):
        load_recipe(two_folders / "mine.toml")


@pytest.mark.parametrize("base", ["wrn-asam", "wrn-asam.toml", "recipes/wrn-asam.toml", "speed94"])
def test_a_shipped_recipe_is_extended_from_anywhere(base, tmp_path):
    (tmp_path / "mine.toml").write_text(f'extends = "{base}"\ntrain = {{ epochs = 3 }}\n')
    shipped = load_recipe(base, ["train.epochs=3"])
    keys = {"name", "title", "published", "target"}
    assert load_recipe(tmp_path / "mine.toml").model_dump(exclude=keys) == shipped.model_dump(exclude=keys)


def test_a_file_beside_the_recipe_comes_before_a_shipped_one(tmp_path):
    (tmp_path / "lenet5.toml").write_text('extends = "lenet5"\ntrain = { epochs = 7 }\n')
    (tmp_path / "mine.toml").write_text('extends = "lenet5.toml"\n')
    assert load_recipe(tmp_path / "mine.toml").train.epochs == 7


def test_a_base_that_is_nowhere_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "mine.toml").write_text('extends = "wrn-asm"\n')
    with pytest.raises(UserError, match=r'no shipped recipe of that name.*did you mean "wrn-asam"'):
        load_recipe(tmp_path / "mine.toml")


def test_a_clone_carried_without_its_history_is_still_one(tmp_path, monkeypatch):
    """And a wheel in a folder that is some other repository is not one."""
    monkeypatch.setattr(locations, "package", lambda: tmp_path / "fastcifar")
    (tmp_path / ".git").mkdir()
    assert locations.clone() is None
    assert locations.recipes_folder() == tmp_path / "fastcifar" / "recipes"
    (tmp_path / "tools").mkdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "tools" / "setup.sh").touch()
    assert locations.clone() == tmp_path
    assert locations.recipes_folder() == tmp_path / "recipes"
