"""A student cut from its teacher, from the config to its first responses on real engines."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from plad_dist.config_file import load_config
from plad_dist.rundir import RunDir
from tests.catalog import folders_without_entry
from tests.conftest import plad, tiny_config, write_config, write_prompts
from tests.tiny import make_random_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def test_a_student_cut_from_its_teacher_is_warmed_up_and_sampled(tmp_path: Path) -> None:
    write_prompts(tmp_path, 200)
    raw = tiny_config(tmp_path)
    teacher = make_random_model(tmp_path / "teacher", num_hidden_layers=5)
    raw["teacher"] = {"path": str(teacher), "template": raw["teacher"]["template"]}
    raw["student"] = {"from": {"path": str(teacher), "layers": [0, 2, 4]}, "template": raw["student"]["template"]}
    del raw["training"]["teacher"]
    raw["training"]["warmup"] |= {"max_steps": 2, "batch_groups": 8}
    raw["sampling"]["limit"] = 64
    config = write_config(tmp_path, raw)
    for command in (["prepare"], ["train", "--phase", "warmup"], ["sample"]):
        done = plad(command[0], str(config), *command[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]

    settings = load_config(config)
    run = RunDir.of(settings)
    start, warmed_up = run.model("student-init"), run.model("warmup")
    before, after = load_file(teacher / "model.safetensors"), load_file(start / "model.safetensors")
    name = "self_attn.q_proj.weight"
    for new, old in enumerate((0, 2, 4)):
        assert after[f"model.layers.{new}.{name}"].equal(before[f"model.layers.{old}.{name}"])
    trained = load_file(warmed_up / "model.safetensors")
    assert trained.keys() == after.keys()
    assert not trained[f"model.layers.1.{name}"].equal(after[f"model.layers.1.{name}"])
    assert AutoConfig.from_pretrained(warmed_up).num_hidden_layers == 3
    assert set(run.samples("student").read(["role"])["role"].to_pylist()) == {"student"}
    assert folders_without_entry(settings, run) == set()
