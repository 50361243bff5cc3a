import dataclasses
import json
import os
import subprocess
import sys

import pytest

from vlmtune.configs.load import load_config
from vlmtune.configs.stages import is_finished, is_stale, load_stage, read_recipe, stage_config
from vlmtune.core.errors import ConfigError
from vlmtune.sft.output import RUN_FILE

STAGES = [
    {"name": "one", "train_modules": "visual_tokenizer", "learning_rate": 1e-4},
    {"name": "two", "train_modules": "visual_tokenizer|vte", "learning_rate": 5e-5},
    {"name": "three", "learning_rate": 2e-5},
]


@pytest.fixture
def recipe(tmp_path):
    """`recipe(*argv, key=value, stages=[...])` is a recipe file with these keys, read."""

    def read(*argv, stage="one", **keys):
        path = tmp_path / "recipe.json"
        common = {"model_path": "start", "data_path": "a.json", "output_dir": str(tmp_path / "out")}
        path.write_text(json.dumps({**common, "stages": STAGES, **keys}))
        return read_recipe([str(path), "--stage", stage, *argv])

    return read


@pytest.fixture
def finish(tmp_path):
    """`finish(stage, time)` leaves what a finished run of that stage leaves, at a time in s."""

    def write(stage, time=1000):
        folder = tmp_path / "out" / stage
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "vlmtune_run.json"):
            (folder / name).write_text("{}")
            os.utime(folder / name, (time, time))
        return folder

    return write


@pytest.fixture
def stop(tmp_path):
    """`stop(stage, step, time)` leaves a complete checkpoint of that stage."""

    def write(stage, step, time=1000):
        folder = tmp_path / "out" / stage / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text("{}")
        os.utime(folder / "trainer_state.json", (time, time))
        return folder

    return write


def failure(action, *arguments, **keys):
    with pytest.raises(ConfigError) as caught:
        action(*arguments, **keys)
    return caught.value


# -- reading ---------------------------------------------------------------------------------------


def test_a_config_without_stages_is_no_recipe(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"seed": 1}')
    assert read_recipe([str(path), "--stage", "3"]) is None
    assert read_recipe(["--stage", "3"]) is None


def test_reading_and_resolving_a_stage_imports_no_host_library(recipe, tmp_path):
    recipe()
    script = (
        "import sys; from vlmtune.configs.stages import load_stage, read_recipe; "
        f"load_stage(read_recipe([{str(tmp_path / 'recipe.json')!r}, '--stage', 'one']), 'one'); "
        "print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_yaml_holds_a_recipe_too(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 1\nstages:\n- name: a\n  learning_rate: 1e-4\n- name: b\n")
    found = read_recipe([str(path), "--stage", "all"])
    assert (found.names, found.requested) == (["a", "b"], "all")


@pytest.mark.parametrize(
    ("stages", "what"),
    [
        ([], "is not a list of stages"),
        ({"one": {}}, "is not a list of stages"),
        (["one"], "entry 1 is not an object with a name"),
        ([{"name": "a"}, {"seed": 1}], "entry 2 is not an object with a name"),
        ([{"name": 1}], "entry 1 is not an object with a name"),
        ([{"name": "a"}, {"name": "a"}], 'two stages are named "a"'),
        ([{"name": "all"}], '"all" cannot name a stage'),
        ([{"name": ".."}], '".." cannot name a stage'),
        ([{"name": "a/b"}], '"a/b" cannot name a stage'),
        ([{"name": "a b"}], '"a b" cannot name a stage'),
        ([{"name": ""}], '"" cannot name a stage'),
    ],
)
def test_stages_are_a_list_of_named_objects(recipe, tmp_path, stages, what):
    error = failure(recipe, stages=stages)
    assert error.where == f"file {tmp_path}/recipe.json, stages"
    assert error.what == what


def test_a_stage_must_be_asked_for(tmp_path, recipe):
    recipe()
    error = failure(read_recipe, [str(tmp_path / "recipe.json")])
    assert error.where == "command line, stage"
    assert error.what == "a recipe is trained stage by stage, and none is named"
    assert error.fix == "add --stage one or --stage two or --stage three or --stage all"


def test_an_unknown_stage_names_the_nearest_and_all(recipe):
    error = failure(recipe, stage="tree")
    assert error.what == 'the recipe has no stage "tree"'
    assert error.fix == 'did you mean "three"? It has one, two, three, all'
    assert failure(recipe, stage="7").fix.startswith("add --stage one or")


def test_an_unknown_or_wrong_key_says_in_which_stage(recipe, tmp_path):
    stages = [{"name": "one"}, {"name": "two", "learnin_rate": 1}]
    error = failure(stage_config, recipe(stages=stages), "two")
    assert error.where == f"file {tmp_path}/recipe.json, stage two"
    assert error.what == 'unknown key "learnin_rate"'
    stages = [{"name": "one", "thinking": "never"}]
    error = failure(stage_config, recipe(stages=stages), "one")
    assert error.where == f"file {tmp_path}/recipe.json, stage one, thinking"


# -- resolving -------------------------------------------------------------------------------------


def test_common_keys_yield_to_the_stage_and_the_stage_to_the_command_line(recipe, tmp_path):
    keys = {"seed": 1, "max_steps": 1, "logging_steps": 1}
    stages = [{"name": "one", "max_steps": 2, "logging_steps": 2}]
    run = stage_config(recipe("--logging_steps", "3", stages=stages, **keys), "one")
    assert run.training == {
        "output_dir": f"{tmp_path}/out/one",
        "seed": 1,
        "max_steps": 2,
        "logging_steps": 3,
    }
    file = f"file {tmp_path}/recipe.json"
    assert run.sources["seed"] == file
    assert run.sources["max_steps"] == f"{file}, stage one"
    assert run.sources["logging_steps"] == "command line"


def test_each_stage_starts_from_the_folder_of_the_one_before(recipe, tmp_path):
    found = recipe()
    runs = [stage_config(found, name) for name in found.names]
    out = f"{tmp_path}/out"
    assert [run.model.model_path for run in runs] == ["start", f"{out}/one", f"{out}/two"]
    folders = [run.training["output_dir"] for run in runs]
    assert folders == [f"{out}/one", f"{out}/two", f"{out}/three"]
    assert [run.model.train_modules for run in runs] == [
        "visual_tokenizer",
        "visual_tokenizer|vte",
        "all",
    ]
    assert [run.notes for run in runs] == [
        [],
        [f"two starts from {out}/one"],
        [f"three starts from {out}/two"],
    ]


def test_model_and_output_folder_of_the_command_line_are_those_of_the_whole_recipe(recipe):
    found = recipe("--model_path=~/m", "--output_dir", "elsewhere")
    runs = [stage_config(found, name) for name in ("one", "two")]
    start = os.path.expanduser("~/m")
    assert [run.model.model_path for run in runs] == [start, "elsewhere/one"]
    assert [run.training["output_dir"] for run in runs] == ["elsewhere/one", "elsewhere/two"]


def test_the_first_stage_may_start_from_the_parts_of_a_new_model(recipe):
    parts = ["--model_path=", "--llm_name_or_path=l", "--vit_name_or_path=v"]
    found = recipe(*parts)
    model = stage_config(found, "one").model
    assert (model.model_path, model.llm_name_or_path, model.vit_name_or_path) == ("", "l", "v")
    second = stage_config(found, "two")
    assert second.model.llm_name_or_path is None
    assert second.model.model_path == stage_config(found, "one").training["output_dir"]


@pytest.mark.parametrize("key", ["model_path", "ovis_pretrained_path"])
def test_a_stage_may_give_its_own_model_and_folder(recipe, key, tmp_path):
    stages = [{"name": "one", "output_dir": "first"}, {"name": "two", key: "m"}, {"name": "three"}]
    found = recipe(stages=stages)
    assert stage_config(found, "one").training["output_dir"] == "first"
    assert stage_config(found, "two").model.model_path == "m"
    assert load_stage(found, "two").model.model_path == "m"  # and needs no finished stage one
    assert stage_config(found, "three").model.model_path == f"{tmp_path}/out/two"
    stages = [{"name": "one", "output_dir": "first"}, {"name": "two"}]
    assert stage_config(recipe(stages=stages), "two").model.model_path == "first"


def test_a_stage_cannot_start_from_one_that_leaves_an_adapter(recipe, tmp_path):
    lora = {"name": "one", "lora_r": 8}
    error = failure(stage_config, recipe(stages=[lora, {"name": "two"}]), "two")
    assert error.where == f"file {tmp_path}/recipe.json, stage two"
    assert error.what == "starts from one, which leaves an adapter and no model"
    adapter = f"{tmp_path}/out/one"
    assert error.fix.endswith(f'to train on its adapter an "adapter_path": "{adapter}"')
    two = {"name": "two", "model_path": "start", "adapter_path": adapter}
    config = stage_config(recipe(stages=[lora, two]), "two")
    assert (config.model.model_path, config.adapter.adapter_path) == ("start", adapter)
    error = failure(load_stage, recipe(stages=[lora, two]), "two")
    assert error.what == f"starts from one, and {adapter} holds no finished model"


def test_a_stage_needs_what_every_run_needs(recipe, tmp_path):
    error = failure(stage_config, recipe(output_dir=None, model_path=None), "one")
    assert error.where == f"file {tmp_path}/recipe.json, stage one"
    assert error.what == "missing: model_path, output_dir"


def test_the_minimum_rate_of_a_stage_wins_over_the_common_one_in_either_form(recipe):
    stages = [{"name": "one", "lr_scheduler_kwargs": {"min_lr_rate": 0.2}}]
    run = stage_config(recipe(stages=stages, min_lr_rate=0.1), "one")
    assert run.training["lr_scheduler_kwargs"] == {"min_lr_rate": 0.2}
    stages = [{"name": "one", "min_lr_rate": 0.2}]
    keys = {"lr_scheduler_kwargs": {"min_lr_rate": 0.1, "a": 1}}
    run = stage_config(recipe(stages=stages, **keys), "one")
    assert run.training["lr_scheduler_kwargs"] == {"min_lr_rate": 0.2, "a": 1}


def test_a_resolved_stage_saves_as_a_config_that_loads_to_the_same_run(recipe, tmp_path):
    run = stage_config(recipe(), "two")
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(run.to_dict()))
    again = load_config([str(saved)])
    assert (again.model, again.data, again.loop) == (run.model, run.data, run.loop)
    assert again.training == run.training


def test_words_train_another_stage_with_the_same_overrides(recipe, tmp_path):
    found = recipe("--bf16", "--max_steps", "-1", stage="all")
    words = found.words("two")
    assert words == [f"{tmp_path}/recipe.json", "--stage", "two", "--bf16", "--max_steps=-1"]
    assert read_recipe(words) == dataclasses.replace(found, requested="two")


# -- as the folders stand --------------------------------------------------------------------------


def test_finished_is_a_folder_with_the_model_and_the_settings_of_its_run(finish):
    folder = finish("one")
    assert (folder / RUN_FILE).exists()
    assert is_finished(folder)
    (folder / "config.json").unlink()
    assert not is_finished(folder)
    assert not is_finished(folder / "absent")
    (finish("two") / RUN_FILE).unlink()
    assert not is_finished(folder.parent / "two")


def test_a_finished_stage_is_not_trained_again_unless_asked(recipe, finish):
    finish("one")
    assert load_stage(recipe(), "one") is None
    run = load_stage(recipe("--overwrite_output_dir"), "one")
    assert "resume_from_checkpoint" not in run.training


def test_a_finished_stage_stays_finished_without_the_one_before_it(recipe, finish):
    finish("two")
    assert load_stage(recipe(), "two") is None


def test_a_stopped_stage_resumes_from_its_newest_complete_checkpoint(recipe, stop, tmp_path):
    assert "resume_from_checkpoint" not in load_stage(recipe(), "one").training
    stop("one", 2)
    stop("one", 10)
    (tmp_path / "out/one/checkpoint-12").mkdir()
    run = load_stage(recipe(), "one")
    assert run.training["resume_from_checkpoint"] is True
    assert run.notes == [f"one resumes from {tmp_path}/out/one/checkpoint-10"]


@pytest.mark.parametrize(
    ("flag", "resumes"),
    [
        ("--resume_from_checkpoint=true", True),
        ("--resume_from_checkpoint=auto", True),
        ("--resume_from_checkpoint=false", False),
        ("--resume_from_checkpoint=x/checkpoint-1", "x/checkpoint-1"),
        ("--overwrite_output_dir", None),
    ],
)
def test_the_command_line_decides_about_resuming(recipe, stop, flag, resumes):
    stop("one", 2)
    assert load_stage(recipe(flag), "one").training.get("resume_from_checkpoint") == resumes


@pytest.mark.parametrize("flag", ["--resume_from_checkpoint=true", "--resume_from_checkpoint=auto"])
def test_a_stage_without_a_checkpoint_begins_at_its_start(recipe, flag):
    assert "resume_from_checkpoint" not in load_stage(recipe(flag), "one").training


@pytest.mark.parametrize("unfinished", [False, True])
def test_a_missing_stage_before_is_named_with_its_folder_and_command(
    recipe, stop, tmp_path, unfinished
):
    if unfinished:
        stop("two", 1)
    error = failure(load_stage, recipe("--seed", "3"), "three")
    assert error.where == f"file {tmp_path}/recipe.json, stage three"
    assert error.what == f"starts from two, and {tmp_path}/out/two holds no finished model"
    command = f"vlmtune train {tmp_path}/recipe.json --stage two --seed=3"
    assert error.fix == f"train two first: {command}"


def test_a_stage_is_trained_when_the_one_before_is_finished(recipe, finish):
    folder = finish("one")
    assert load_stage(recipe(), "two").model.model_path == str(folder)


def test_a_stage_older_than_the_one_before_is_not_passed_off_as_finished(recipe, finish, tmp_path):
    finish("one", time=2000)
    finish("two", time=1000)
    error = failure(load_stage, recipe(), "two")
    assert error.where == f"stage two, {tmp_path}/out/two"
    assert error.what == f"is older than the model it starts from, {tmp_path}/out/one"
    assert error.fix.startswith("pass --overwrite_output_dir true to train it again")
    assert load_stage(recipe("--overwrite_output_dir"), "two").model.model_path.endswith("one")
    finish("two", time=2000)
    assert load_stage(recipe(), "two") is None


def test_a_checkpoint_older_than_the_stage_before_is_not_resumed(recipe, finish, stop, tmp_path):
    finish("one", time=2000)
    stop("two", 4, time=1000)
    error = failure(load_stage, recipe(), "two")
    assert error.where == f"stage two, {tmp_path}/out/two/checkpoint-4"
    assert error.what == f"is older than the model it starts from, {tmp_path}/out/one"


@pytest.mark.parametrize(("time", "stale"), [(999, True), (1000, False), (1001, False)])
@pytest.mark.parametrize("left", ["model", "checkpoint"])
def test_a_stage_is_stale_when_older_than_the_model_it_starts_from(
    recipe, finish, stop, time, stale, left
):
    finish("one", time=1000)
    assert not is_stale(recipe(), "two")
    finish("two", time=time) if left == "model" else stop("two", 4, time=time)
    assert is_stale(recipe(), "two") == stale
    assert not is_stale(recipe(), "one")


def test_overwriting_a_stage_never_resumes_what_it_held(recipe, stop):
    stop("one", 2)
    for resume in ("true", "auto"):
        words = ("--overwrite_output_dir", f"--resume_from_checkpoint={resume}")
        assert "resume_from_checkpoint" not in load_stage(recipe(*words), "one").training


def test_two_stages_cannot_share_a_folder(tmp_path):
    common = {"model_path": "m", "data_path": "d", "output_dir": "out"}
    stages = [{"name": "one"}, {"name": "two", "output_dir": "out/one"}]
    path = tmp_path / "shared.json"
    path.write_text(json.dumps({**common, "stages": stages}))
    error = failure(stage_config, read_recipe([str(path), "--stage", "two"]), "two")
    assert error.what == "out/one is the folder of one too"
