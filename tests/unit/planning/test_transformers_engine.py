"""Plans of models that transformers generates."""

from __future__ import annotations

from pathlib import Path

from plad_dist.config_file import parse_config
from plad_dist.planning.fit import check_fits
from plad_dist.planning.hardware import Hardware
from plad_dist.planning.plan import plan_run
from tests.tiny import sampling_config
from tests.tiny_generators import make_generator
from tests.unit.planning.configs import H100_NODES


def test_a_model_without_a_context_is_planned_with_the_cache_of_a_batch_at_most(tmp_path: Path) -> None:
    raw = sampling_config(tmp_path, 8)
    raw["student"]["path"] = str(make_generator(tmp_path / "t5", "t5"))
    raw["sampling"]["student"] = {"max_tokens": 16}
    for hardware in (H100_NODES, Hardware(None, 1, 1, 4.0 * 2**30)):
        config = parse_config(raw, "test")
        assert [
            problem.description for problem in check_fits(config, hardware) if "student" in problem.description
        ] == []
        engine = plan_run(config, hardware)["sampling"]["student"]
        assert (engine["devices_per_engine"], engine["smallest_tensor_parallel_size"]) == (1, None)
        assert "CUDA graphs" not in engine["parts_gib"]
    raw["student"]["max_length"] = raw["prompts"]["max_tokens"] = 128
    batch = plan_run(parse_config(raw, "test"), H100_NODES)["sampling"]["student"]
    assert batch["kv_cache_tokens"] < 200 * 128
    assert batch["responses_at_once"] <= 128
