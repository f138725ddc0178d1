"""The run description: precedence, messages that name the key, and the file that documents every key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.paths import REPOSITORY
from tvilfm.config import (
    FIDELITY_SWITCHES,
    Config,
    default_description,
    known_keys,
    load_config,
    load_run,
    run_folder,
    to_yaml,
)

FILE = REPOSITORY / "ray_config.yaml"


def value_of(config: Config, dotted: str) -> Any:
    node: Any = config
    for part in dotted.split("."):
        node = getattr(node, part)
    return node


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def test_overrides_beat_the_file_which_beats_the_preset_which_beats_defaults(tmp_path: Path) -> None:
    assert load_config().optim.keep_unused_tokens is True
    assert load_config(overrides=["fidelity=published"]).optim.keep_unused_tokens is False
    path = write(tmp_path, "fidelity: published\noptim: {keep_unused_tokens: true, lr: 0.5}\n")
    assert load_config(path).optim.keep_unused_tokens is True
    assert load_config(path).optim.lr == 0.5
    config = load_config(path, ["optim.keep_unused_tokens=false", "optim.lr=0.25"])
    assert config.optim.keep_unused_tokens is False
    assert config.optim.lr == 0.25
    assert config.optim.text_lr == 3.5e-4


def test_a_null_switch_in_the_file_means_what_fidelity_says(tmp_path: Path) -> None:
    path = write(tmp_path, "loss: {wrt_numerics: null}\n")
    assert load_config(path, ["fidelity=published"]).loss.wrt_numerics == "published"
    assert load_config(path).loss.wrt_numerics == "corrected"


# Spelled out again, from METHOD 3 and 4: a wrong preset must not pass by agreeing with itself.
PUBLISHED = {
    "loss.wrt_numerics": "published",
    "optim.lr": 3.5e-4,
    "optim.text_lr": 3.5e-4,
    "optim.keep_unused_tokens": False,
    "optim.text_weight_decay": None,
    "optim.text_bias_weight_decay": 5e-4,
    "train.base.select": "test",
    "train.base.select_by": "rank1",
    "train.base.use_val": True,
    "train.base.eval_every": 2,
    "train.base.eval_from": 80,
    "train.text.select": "test",
    "train.text.select_by": "rank1",
    "train.text.use_val": True,
    "train.text.eval_every": 2,
    "train.text.eval_from": 1,
    "train.text.freeze_batch_norm": False,
    "train.text.freeze_gem": False,
    "evaluate.witness_draw": "released",
}
REGDB = {"optim.lr": 2e-3, "optim.text_lr": 1e-5, "optim.text_bias_weight_decay": 0.0, "train.text.eval_from": 80}
CORRECTED = {
    "loss.wrt_numerics": "corrected",
    "optim.lr": 3.5e-4,
    "optim.text_lr": 3.5e-4,
    "optim.keep_unused_tokens": True,
    "optim.text_weight_decay": 4e-5,
    "optim.text_bias_weight_decay": 0.0,
    "train.base.select": "val",
    "train.base.select_by": "mAP",
    "train.base.use_val": False,
    "train.base.eval_every": 5,
    "train.base.eval_from": 1,
    "train.text.select": "val",
    "train.text.select_by": "mAP",
    "train.text.use_val": False,
    "train.text.eval_every": 1,
    "train.text.eval_from": 1,
    "train.text.freeze_batch_norm": True,
    "train.text.freeze_gem": True,
    "evaluate.witness_draw": "seeded",
}


@pytest.mark.parametrize("path", [None, FILE])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["fidelity=published"], PUBLISHED),
        (["fidelity=published", "data.name=regdb", "data.root=/data"], PUBLISHED | REGDB),
        (["fidelity=corrected"], CORRECTED),
        (["data.name=regdb", "data.root=/data"], CORRECTED),
    ],
)
def test_the_preset_sets_every_switch(path: Path | None, overrides: list[str], expected: dict[str, object]) -> None:
    assert set(FIDELITY_SWITCHES) == set(expected)
    config = load_config(path, overrides)
    assert {key: value_of(config, key) for key in expected} == expected


def test_a_folder_without_a_description_has_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_config(FILE, size="tiny")
    monkeypatch.chdir(tmp_path)
    assert load_config(default_description(), size="tiny") == expected
    (tmp_path / "ray_config.yaml").write_text("run: {name: own}")
    assert load_config(default_description()).run.name == "own"


def test_a_run_is_read_from_its_folder_wherever_it_was_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(FILE, ["run.dir=elsewhere", "train.p=4", "run.name=first"], size="small")
    moved = tmp_path / "kept" / "second"
    moved.mkdir(parents=True)
    (moved / "config.yaml").write_text(to_yaml(config))
    monkeypatch.chdir(tmp_path)
    found = load_run(Path("kept/second/"), ["train.k=3"])
    assert found.run.path == Path("kept/second") and (found.train.p, found.train.k) == (4, 3)
    assert found.stages_path == Path("kept/second/stages")
    monkeypatch.chdir(moved)
    assert load_run(Path(".")).run.path == moved


def test_the_first_argument_may_be_the_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert run_folder([str(tmp_path), "train.p=4"]) == tmp_path
    assert run_folder(["train.p=4"]) is None and run_folder([]) is None
    with pytest.raises(ValueError, match=r"expected section\.key=value or the folder of a run"):
        run_folder([str(tmp_path / "absent")])


def test_a_switch_that_is_set_stays_as_it_is_set() -> None:
    config = load_config(FILE, ["fidelity=published", "data.name=regdb", "data.root=/data", "optim.lr=0.1"])
    assert (config.optim.lr, config.optim.text_lr) == (0.1, 1e-5)


def test_the_papers_constants_are_the_defaults() -> None:
    config = load_config(FILE)
    assert (config.train.p, config.train.k, config.data.pad) == (8, 4, 10)
    assert (config.data.height, config.data.width) == (288, 144)
    assert (config.optim.lr, config.optim.weight_decay) == (3.5e-4, 5e-4)
    assert (config.optim.head_lr_factor, config.optim.text_bias_lr_factor) == (2, 2)
    assert (config.train.base.epochs, config.train.text.epochs) == (120, 20)
    assert (config.train.base.warmup_epochs, config.train.base.milestones) == (10, (40, 60, 100))
    assert (config.loss.id_weight, config.loss.wrt_weight, config.train.text.llm_probability) == (1, 1, 0.5)
    text = config.model.text
    assert (config.model.backbone, text.width, text.layers, text.heads) == ("resnet50", 512, 12, 8)


def test_the_file_resolves_to_the_defaults() -> None:
    assert load_config(FILE) == load_config()


@pytest.mark.parametrize(
    ("override", "named", "near"),
    [
        ("optim.weight_deca=1", "optim.weight_deca", "optim.weight_decay"),
        ("data.heigth=3", "data.heigth", "data.height"),
        ("train.text.epoch=3", "train.text.epoch", "train.text.epochs"),
        ("fidelty=published", "fidelty", "fidelity"),
        ("p=4", "p", "train.p"),
        ("lr=1", "lr", "optim.lr"),
        ("train.epochs=2", "train.epochs", "train.text.epochs"),
        pytest.param("train.bas.epochs=3", "train.bas", "train.base"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest_neighbour(override: str, named: str, near: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(overrides=[override])
    message = str(caught.value)
    assert message.startswith(f"{named}: expected a known key")
    assert f"Did you mean {near}" in message


def test_autocast_is_switched_off_as_the_file_says() -> None:
    assert load_config(overrides=["train.autocast=off"]).train.autocast == "off"


@pytest.mark.parametrize("section", ["loss", "optim", "train", "train.base"])
def test_a_value_where_a_section_belongs_is_refused(section: str) -> None:
    with pytest.raises(ValueError, match=f"^{section}: "):
        load_config(overrides=[f"{section}=3"])


@pytest.mark.parametrize(("text", "override"), [("- 1\n- 2\n", "train.p=4"), ("{}", "train.p=[1")])
def test_yaml_that_is_no_mapping_or_no_value_is_refused(tmp_path: Path, text: str, override: str) -> None:
    with pytest.raises(ValueError):
        load_config(write(tmp_path, text), [override])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.k=1", "train.k"),
        ("optim.lr=0", "optim.lr"),
        ("train.text.llm_probability=1.5", "train.text.llm_probability"),
        ("train.base.epochs=0", "train.base.epochs"),
        ("data.height=wide", "data.height"),
        ("loss.wrt_numerics=exact", "loss.wrt_numerics"),
        ("run.name=../elsewhere", "run.name"),
        ("evaluate.ensemble.text=-1", "evaluate.ensemble.text"),
        ("cluster.gpus_per_worker=-0.5", "cluster.gpus_per_worker"),
        ("evaluate.text_sources=[witness, oracle]", "evaluate.text_sources.1"),
    ],
)
def test_a_value_out_of_bounds_names_the_dotted_key_and_the_value(override: str, key: str) -> None:
    value = yaml.safe_load(override.split("=")[1])
    with pytest.raises(ValueError) as caught:
        load_config(overrides=[override])
    assert str(caught.value).startswith(f"{key}: ")
    assert repr(value[-1] if isinstance(value, list) else value) in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.p=6", "train.k=3", "cluster.train_workers=4"],
            r"cluster\.train_workers: expected a divisor of train\.p x train\.k = 18, got 4",
        ),
        (
            ["caption.source=finetuned", "caption.train.batch=4", "cluster.train_workers=8"],
            r"cluster\.train_workers: expected at most caption\.train\.batch = 4 while captioners are .* got 8",
        ),
        (["data.name=sysu_mm01"], r"data\.root: expected the folder of sysu_mm01, got null"),
        (
            ["train.text.cache_views=2", "train.text.freeze_batch_norm=false"],
            r"train\.text\.cache_views: expected 0 .* got 2",
        ),
        (
            ["train.text.cache_views=2", "train.text.freeze_gem=false", "loss.filter_text=false"],
            r"train\.text\.cache_views: expected 0 while train\.text\.freeze_gem is false, got 2",
        ),
        (["fidelity=published", "train.text.use_val=false"], r"train\.text\.use_val: expected the same"),
        (["model.text.heads=5"], r"model\.text\.heads: expected a divisor of width 512, got 5"),
        (["evaluate.text_sources=[own]"], r"evaluate\.default_text_source: expected one of \['own'\], got witness"),
        (
            ["evaluate.rerank.method=k_reciprocal", "evaluate.ensemble.temperature=0.1"],
            r"evaluate\.ensemble\.temperature: expected null with rerank\.method=k_reciprocal, got 0\.1",
        ),
        (["evaluate.text_noise=[typos-1, typos-1]"], r"evaluate\.text_noise: expected each kind once"),
        (["evaluate.text_noise=[misspelt]"], r"evaluate\.text_noise: expected no-colours, .*, got misspelt"),
        (
            ["evaluate.text_noise=[wrong-1]", "data.name=llcm", "data.root=x"],
            r"evaluate\.text_noise: expected kinds that work on captions for data\.name=llcm",
        ),
        (["evaluate.protocols=[]"], r"evaluate\.protocols: expected at least one, got none"),
        (["train.base.use_val=true"], r"select: expected last or test when use_val is true, got val"),
        pytest.param(["train.base.use_val=true"], r"train\.base\.select: "),
    ],
)
def test_sections_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(overrides=overrides)


def test_using_the_validation_identities_is_allowed_with_the_last_checkpoint() -> None:
    assert load_config(overrides=["train.base.use_val=true", "train.base.select=last"]).train.base.use_val


def test_broken_input_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--config: expected a YAML file, got .*nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match="expected YAML"):
        load_config(write(tmp_path, "train: [1"))
    with pytest.raises(ValueError, match=r"expected section\.key=value, got 'train\.p'"):
        load_config(overrides=["train.p"])
    with pytest.raises(
        ValueError,
        match=r"--size: expected one of \['large', .* 'tiny'\], got huge",
    ):
        load_config(FILE, size="huge")


def test_every_key_of_the_schema_is_in_the_file_and_back() -> None:
    values = yaml.safe_load(FILE.read_text())
    values.pop("sizes")
    assert set(leaves(values)) == set(known_keys())


def test_every_key_in_the_file_has_a_trailing_comment() -> None:
    lines = FILE.read_text().split("\nsizes:")[0].splitlines()
    bare = [line for line in lines if re.match(r"\s*[\w]+:\s*[^\s#]", line) and not re.search(r"\S\s+# \S", line)]
    assert bare == []
    assert sum(bool(re.match(r"\s*\w+:\s*[^\s#]", line)) for line in lines) == len(known_keys())


def test_every_key_has_a_description() -> None:
    assert [key for key, description in known_keys().items() if not description] == []


@pytest.mark.parametrize("size", list(yaml.safe_load(FILE.read_text())["sizes"]))
@pytest.mark.parametrize("fidelity", ["published", "corrected"])
def test_size_recipes_resolve(size: str, fidelity: str) -> None:
    # Cached features contradict published fidelity by design; the recipe's cache is switched off there.
    overrides = [f"fidelity={fidelity}", "data.root=/data"] + ["train.text.cache_views=0"] * (fidelity == "published")
    config = load_config(FILE, overrides, size=size)
    recipe = leaves(yaml.safe_load(FILE.read_text())["sizes"][size])
    recipe.pop("train.text.cache_views", None)
    recipe.pop("evaluate.text_noise", None)  # null stands for a selection
    for key, value in recipe.items():
        assert value_of(config, key) == (tuple(value) if isinstance(value, list) else value), key


@pytest.mark.parametrize("name", ["sysu_mm01", "regdb", "llcm"])
def test_the_recipe_of_a_dataset_and_published_are_the_released_script(name: str) -> None:
    config = load_config(FILE, ["fidelity=published", "data.root=/data"], size=name)
    expected = PUBLISHED | (REGDB if name == "regdb" else {}) | {"data.name": name, "train.text.epochs": 120}
    assert {key: value_of(config, key) for key in expected} == expected
    assert all(protocol.startswith(name) for protocol in config.evaluate.protocols)


def test_a_size_beats_the_file_and_an_override_beats_the_size() -> None:
    assert load_config(FILE, size="tiny").train.p == 4
    assert load_config(FILE, ["train.p=2"], size="tiny").train.p == 2
    assert load_config(FILE, size="tiny").optim.weight_decay == load_config(FILE).optim.weight_decay


@pytest.mark.parametrize("fidelity", ["published", "corrected"])
@pytest.mark.parametrize("size", [None, "tiny"])
def test_the_resolved_yaml_reloads_to_the_same_config(tmp_path: Path, fidelity: str, size: str | None) -> None:
    overrides = [f"fidelity={fidelity}", "run.seed=7", "train.base.milestones=[1, 2]", "optim.text_lr=1e-5"]
    overrides += ["train.text.cache_views=0"] * (fidelity == "published")
    config = load_config(FILE, overrides, size=size)
    path = write(tmp_path, to_yaml(config))
    assert load_config(path) == config
    assert set(leaves(yaml.safe_load(path.read_text()))) == set(known_keys())


def test_derived_paths_follow_the_run() -> None:
    config = load_config(overrides=["run.name=a", "run.dir=/x", "data.synthetic.seed=3"])
    assert config.run.path == Path("/x/a")
    assert config.stages_path == Path("/x/a/stages")
    assert config.data_root == Path("/x/data/synthetic-small-3")
    config = load_config(overrides=["run.stages_dir=/s", "data.root=/d"])
    assert (config.stages_path, config.data_root) == (Path("/s"), Path("/d"))


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load_config().train.p = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("fidelity=[a]", "fidelity"),
        ("=3", "override"),
        ("optim..lr=1", "override"),
        ("optim.text_weight_decay=-1", "optim.text_weight_decay"),
        ("loss={id_weight: 0, wrt_weight: 0}", "loss.id_weight"),
        ("evaluate.ensemble={infrared: 0, text: 0, fusion: 0}", "evaluate.ensemble.fusion"),
        ("run.name=..", "run.name"),
        ("optim.lr=.inf", "optim.lr"),
        ("evaluate.protocols=[regdb/infrared-visible]", "evaluate.protocols"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(override: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: "):
        load_config(overrides=[override])


def test_noise_is_off_and_null_is_what_the_dataset_allows(tmp_path: Path) -> None:
    assert load_config(FILE).evaluate.text_noise == ()
    synthetic = load_config(FILE, ["evaluate.text_noise=null"]).evaluate
    regdb = load_config(FILE, ["evaluate.text_noise=null", "data.name=regdb", "data.root=/data"]).evaluate
    assert regdb.text_noise and set(regdb.text_noise) < set(synthetic.text_noise)
    assert synthetic.reads_attributes and not regdb.reads_attributes
    (tmp_path / "earlier.yaml").write_text("evaluate: {batch: 3}\n")  # a run of a version without the key
    assert load_config(tmp_path / "earlier.yaml").evaluate.text_noise == ()


def test_each_dataset_brings_its_own_protocols() -> None:
    config = load_config(overrides=["data.name=regdb", "data.root=/x"])
    assert config.evaluate.protocols == ("regdb/infrared-visible", "regdb/visible-infrared")


def test_keys_of_a_store_have_no_place_in_the_description() -> None:
    key = "cluster.storage"
    with pytest.raises(ValueError, match=f"{key}: expected a URI without keys, got one with") as caught:
        load_config(overrides=[f"{key}=s3://AKIA:secret@bucket/x?scheme=http"])
    assert "secret" not in str(caught.value)
    load_config(overrides=[f"{key}=gs://anonymous@bucket/x"])


@pytest.mark.parametrize("key", ["run.mlflow_uri", "caption.rephrase.url"])
@pytest.mark.parametrize(
    "url", ["https://me:s3cret@host/v1", "https://host/v1?api_key=s3cret", "postgresql://u:s3cret@h/d"]
)
def test_a_secret_in_a_url_is_refused_without_being_shown(key: str, url: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: expected a URL without a password or token") as caught:
        load_config(overrides=[f"{key}={url}"])
    assert "s3cret" not in str(caught.value)
    load_config(overrides=[f"{key}=https://me@host/v1?timeout=3", "run.mlflow_uri=sqlite:////tmp/a@b/m.db"])


def test_gpus_are_not_shared_by_training_workers() -> None:
    with pytest.raises(ValueError, match=r"gpus_per_worker: expected 0 or at least 1 with 2 training workers"):
        load_config(overrides=["cluster.train_workers=2", "cluster.gpus_per_worker=0.5"])
    load_config(overrides=["cluster.gpus_per_worker=0.5"])


def test_a_run_of_an_earlier_version_opens_unless_it_uses_a_removed_key(tmp_path: Path) -> None:
    description = yaml.safe_load(to_yaml(load_config()))
    description["gallery"] |= {"uri": None, "partitions": None, "sub_vectors": 128, "probes": 32}
    description["serve"]["audit"] = None
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(description))
    assert load_config(file) == load_config()
    description["gallery"]["uri"] = "s3://bucket/gallery"
    file.write_text(yaml.safe_dump(description))
    with pytest.raises(
        ValueError, match=r"gallery.uri: expected a known key, got an unknown one. Did you mean gallery.url"
    ):
        load_config(file)


@pytest.mark.parametrize("name", ["20260501", "0042", "2026-05-01", "1e5", "yes", "1.30", "on", "0x1F", "null_1"])
def test_a_name_is_taken_as_typed(name: str) -> None:
    assert load_config(None, [f"run.name={name}"]).run.name == name
    assert load_config(None, [f"run.name='{name}'"]).run.name == name
    assert load_config(None, [f"run.dir={name}"]).run.dir == Path(name)


@pytest.mark.parametrize("text", ["a photo of # one", "a: b", "[person]", "%d", "- x", ""])
def test_a_prompt_is_taken_as_typed(text: str) -> None:
    assert load_config(None, [f"caption.visible.prompt={text}"]).caption.visible.prompt == text
    assert (
        load_config(None, ["data.root=null"]).data.root is None and load_config(None, ["data.root="]).data.root is None
    )


@pytest.mark.parametrize(
    ("text", "expected"), [("010", 10), ("08", 8), ("10", 10), ("1_0", 10), ("0x8", None), ("1:08", None)]
)
def test_a_number_is_decimal_or_refused(text: str, expected: int | None, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"data: {{split: {text}}}")
    for arguments in ((None, [f"data.split={text}"]), (path, [])):
        if expected is None:
            with pytest.raises(ValueError, match=r"^data\.split: .* got '"):
                load_config(*arguments)
        else:
            assert load_config(*arguments).data.split == expected
    assert load_config(None, ["train.base.milestones=[040,060]"]).train.base.milestones == (40, 60)


def test_home_is_expanded_in_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    path = tmp_path / "config.yaml"
    path.write_text("gallery: {url: ~/gallery}")
    config = load_config(
        path, ["run.dir=~/runs", "data.name=folder", "data.root=~/x", "caption.visible.model=~/models/a"]
    )
    assert (config.run.dir, config.data.root) == (Path("/home/somebody/runs"), Path("/home/somebody/x"))
    assert config.gallery.url == "/home/somebody/gallery" and config.caption.visible.model == "/home/somebody/models/a"
    assert load_config(None, ["run.dir=~"]).run.dir == Path("/home/somebody")
    assert load_config(None, ["run.dir=a~/b"]).run.dir == Path("a~/b")
