"""A configuration says what is wrong with it, and is read back as it was written."""

from __future__ import annotations

import dataclasses

import pytest
from tiny_run import tiny_settings

from zigma.training.settings import Settings, differences, read_settings, settings_from, to_toml

LEAST = {"run": {"folder": "runs/x"}, "data": {"path": "pictures"}}


def merged(**tables: dict) -> dict:
    return {name: {**LEAST.get(name, {}), **tables.get(name, {})} for name in {*LEAST, *tables}}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"runn": {}}, "unknown table 'runn': did you mean 'run'"),
        (merged(run={"stepz": 3}), r"\[run\] has the unknown key 'stepz': did you mean 'steps'"),
        (merged(run={"steps": "many"}), r"\[run\] steps is 'many', expected a whole number"),
        (merged(run={"steps": True}), r"\[run\] steps is True, expected a whole number"),
        (merged(run={"steps": 0}), r"\[run\] steps is 0, expected at least 1"),
        (merged(run={"precision": "bf17"}), r"precision is 'bf17': did you mean 'bf16'"),
        (merged(run={"batch_size": 6, "accumulate": 4}), "batch_size is 6 and accumulate 4, which does not divide it"),
        (merged(run={"ema": 1.0}), "ema is 1.0, expected a decay"),
        (merged(optimizer={"lr": 0}), r"lr is 0, which trains nothing: expected a number above 0"),
        (merged(optimizer={"name": "adam"}), "name is 'adam': did you mean 'adamw'"),
        (merged(data={"size": [1, 2, 3]}), "expected a side in pixels"),
        (merged(data={"size": "big"}), "expected a whole number or a list"),
        (merged(data={"validation": 1.0}), "validation is 1.0, expected a part below 1"),
        (merged(samples={"guidance": float("nan")}), "guidance is nan, expected a number"),
        (merged(run={"seed": -1}), r"\[run\] seed is -1, expected a whole number from 0 to 4294967295"),
        (merged(optimizer={"lr": float("inf")}), "lr is inf, which trains nothing"),
        (merged(data={"size": [64]}), "expected a side in pixels"),
        (merged(samples={"solver": "eulr"}), r"\[samples\] solver is 'eulr': did you mean 'euler'"),
        (merged(adapter={"kind": "lora", "dropout": 1.0}), "adapter dropout 1.0, expected a share from 0 to below 1"),
        (merged(adapter={"kind": "lokr", "factor": 0}), "LoKr factor 0, expected a whole number from 1"),
        (merged(adapter={"kind": "lora", "alpha": -1.0}), "adapter alpha -1.0, expected a number above 0"),
        (merged(adapter={"kind": "lora"}), "kind is 'lora', but .* start_from names no model"),
        (
            merged(adapter={"kind": "lora"}, model={"start_from": "demo"}, optimizer={"name": "muon"}),
            "'muon' moves whole",
        ),
        (merged(model={"start_from": "demo", "preset": "B/2"}), "start_from and preset"),
        (merged(flow={"weighting": "likelihood"}), "'likelihood' is for noise and score"),
        ({"run": LEAST["run"]}, r"\[data\] path is missing"),
        ({"data": LEAST["data"]}, r"\[run\] folder is missing"),
        ({**LEAST, "text": 3}, r"text is 3, expected a table"),
    ],
)
def test_a_mistake_gets_a_sentence(tables, words):
    with pytest.raises(ValueError, match=words):
        settings_from(tables)


def test_what_is_written_is_read_back(tmp_path):
    settings = tiny_settings(tmp_path, data={"size": [64, 32], "categories": ["Food & Drink", 'a "b"']})
    (tmp_path / "settings.toml").write_text(to_toml(settings), encoding="utf-8")
    assert read_settings(tmp_path / "settings.toml") == settings
    assert settings_from(dataclasses.asdict(settings)) == settings


def test_changes_stand_above_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('\ufeff[run]\nfolder = "x"\n[data]\npath = "p"\n', encoding="utf-8")  # an editor's byte order mark
    settings = read_settings(path, {"run.steps": "7", "run.precision": "fp32", "model.config": "{embed_dim = 8}"})
    assert (settings.run.steps, settings.run.precision, settings.model.config) == (7, "fp32", {"embed_dim": 8})
    with pytest.raises(ValueError, match="unknown key 'step'"):
        read_settings(path, {"run.step": "7"})
    path.write_text("[run\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.toml is no TOML .*look at that line"):
        read_settings(path)
    with pytest.raises(FileNotFoundError, match=r"there is no configuration"):
        read_settings(tmp_path / "b.toml")


def test_differences_name_table_and_key():
    before = settings_from(LEAST)
    after = settings_from(merged(run={"steps": 5}, text={"dropout": 0.2}))
    assert differences(before, after) == ["[run] steps: 1000 -> 5", "[text] dropout: 0.1 -> 0.2"]
    assert isinstance(before, Settings) and differences(before, before) == []
