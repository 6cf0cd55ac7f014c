"""A student cut from a model: which layers it keeps, and the folder in which the run writes it."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from plad_dist.compat import pretrained
from plad_dist.config import Pretrained, Student
from plad_dist.data import local_files
from plad_dist.data.models import load_model_config, model_fingerprint, model_marker, model_problems
from plad_dist.errors import UserError
from plad_dist.training.cut import model as cut_models
from plad_dist.training.cut import weights
from plad_dist.training.cut.config import check_cut, check_same_layers, chosen_layers, cut_config, depth_of
from plad_dist.training.cut.model import make_cut_model
from plad_dist.training.model.meta import build_without_weights
from tests.tiny import make_random_model


def source_of(path: Path | str, layers: int | list[int]) -> Pretrained:
    source = Student.model_validate({"from": {"path": str(path), "layers": layers}}).pretrained()
    assert source is not None
    return source


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A model of six layers with untied embeddings."""
    return make_random_model(tmp_path / "teacher", num_hidden_layers=6, tie_word_embeddings=False)


@given(st.data())
def test_layers_are_spaced_evenly_and_the_first_two_and_the_last_are_kept(data: st.DataObject) -> None:
    depth = data.draw(st.integers(3, 200))
    count = data.draw(st.integers(3, depth))
    layers = chosen_layers(count, depth)
    assert len(layers) == count
    assert (*layers[:2], layers[-1]) == (0, 1, depth - 1)
    steps = [after - before for before, after in itertools.pairwise(layers[1:])]
    assert min(steps) >= 1
    assert max(steps) - min(steps) <= 1


def test_the_layers_of_common_depths_are_those_of_the_guide() -> None:
    assert chosen_layers(12, 36) == (0, 1, 4, 8, 11, 15, 18, 21, 25, 28, 32, 35)
    assert chosen_layers(32, 32) == tuple(range(32))
    assert chosen_layers((0, 7), 8) == (0, 7)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (7, "student.from.layers: 7: the model has only 6 layers"),
        ([0, 1, 6], "student.from.layers: 6: the model has the layers 0 to 5"),
    ],
)
def test_layers_that_the_model_lacks_are_named(teacher: Path, layers: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_cut(source_of(teacher, layers))


def test_the_model_has_the_chosen_layers_in_their_order_and_all_else_unchanged(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 50_000)
    monkeypatch.setattr(local_files, "CHUNK_BYTES", 1 << 12)
    before = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(teacher / "model.safetensors").items()}
    before["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)  # as old files of LLaMA have it
    save_file(before, teacher / "model.safetensors", metadata={"format": "pt"})
    final = tmp_path / "models/student-init"
    make_cut_model(source_of(teacher, [0, 3, 5]), final)
    assert len(list(final.glob("model-*-of-*.safetensors"))) > 1
    after = {name: tensor for file in final.glob("*.safetensors") for name, tensor in load_file(file).items()}
    expected = {name: tensor for name, tensor in before.items() if ".layers." not in name}
    for new, old in enumerate((0, 3, 5)):
        prefix = f"model.layers.{old}."
        expected |= {
            f"model.layers.{new}.{name.removeprefix(prefix)}": tensor
            for name, tensor in before.items()
            if name.startswith(prefix) and "inv_freq" not in name
        }
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in after)
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    _, loading = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not any(loading.values())
    assert AutoTokenizer.from_pretrained(final).get_vocab() == AutoTokenizer.from_pretrained(teacher).get_vocab()
    assert model_problems(final) == []


def test_the_card_names_the_model_and_the_layers_and_is_restored_if_it_is_missing(
    tmp_path: Path, teacher: Path
) -> None:
    final = tmp_path / "models/student-init"
    make_cut_model(source_of(teacher, 4), final)
    card = (final / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"# 4 of 6 layers of {teacher}" in card
    assert "\n0, 1, 3, 5\n" in card
    (final / "README.md").unlink()  # `run.reuse` takes over no cards
    make_cut_model(source_of(teacher, 4), final)
    assert (final / "README.md").read_text() == card


def test_the_model_is_written_once_and_again_for_other_layers_or_weights(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "models/student-init"
    fingerprints = []
    for layers in (4, [0, 1, 3, 5], [0, 1, 2, 5]):
        make_cut_model(source_of(teacher, layers), final)
        fingerprints.append(model_fingerprint(final))
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    with monkeypatch.context() as patch:
        patch.setattr(cut_models, "copy_weights", lambda *_: pytest.fail("the model is there"))
        make_cut_model(source_of(teacher, [0, 1, 2, 5]), final)
        shutil.move(teacher, tmp_path / "elsewhere")
        make_cut_model(source_of(tmp_path / "elsewhere", [0, 1, 2, 5]), final)
    make_random_model(teacher, seed=1, num_hidden_layers=6, tie_word_embeddings=False)
    make_cut_model(source_of(teacher, [0, 1, 2, 5]), final)
    assert model_fingerprint(final) not in fingerprints
    marker = model_marker(final)
    assert marker is not None
    assert marker["facts"] == {"from": str(teacher), "revision": None, "layers": [0, 1, 2, 5]}


def test_a_failure_while_it_is_written_leaves_nothing_and_the_next_command_writes_it(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, source = tmp_path / "models/student-init", source_of(teacher, 3)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cut_models, "commit_model", fail)
        with pytest.raises(KeyboardInterrupt):
            make_cut_model(source, final)
    assert list(final.parent.iterdir()) == []
    make_cut_model(source, final)
    assert model_problems(final) == []


def test_a_model_with_a_layer_of_its_own_place_is_refused(tmp_path: Path) -> None:
    shape = {"model_type": "gpt2", "n_embd": 32, "n_head": 1, "n_layer": 5, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    check_cut(source_of(tmp_path, 3))
    (tmp_path / "config.json").write_text(json.dumps(shape | {"scale_attn_by_inverse_layer_idx": True}))
    with pytest.raises(
        UserError, match=r"student.from.layers: cannot be cut out of a gpt2 model: layer 4 would differ in attn"
    ):
        check_cut(source_of(tmp_path, 3))
    check_cut(source_of(tmp_path, [0, 1, 2]))  # the first layers keep their places


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model_type": "albert"}, "student.from.path: "),  # one layer, which is repeated
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
            "student.from.path: the model is quantized",
        ),
    ],
)
def test_a_model_without_a_list_of_layers_to_choose_from_is_refused(
    tmp_path: Path, shape: dict[str, Any], message: str
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(shape | sizes | {"num_hidden_layers": 4}))
    with pytest.raises(UserError, match=message):
        check_cut(source_of(tmp_path, 3))


def test_other_layers_than_the_chosen_ones_do_not_pass_the_check(tmp_path: Path) -> None:
    """The config of the cut model is wrong on purpose: full attention where the window was."""
    shape = {
        "model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1,
        "num_hidden_layers": 4, "vocab_size": 320, "head_dim": 32, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = load_model_config(str(tmp_path), Student(path=str(tmp_path)))
    cut = cut_config(config, (0, 1, 2))
    assert cut.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    original = build_without_weights(config, remote=False)
    check_same_layers(original, build_without_weights(cut, remote=False), (0, 1, 2))
    with pytest.raises(UserError, match="layer 3 would differ in "):
        check_same_layers(original, build_without_weights(cut, remote=False), (0, 1, 3))


def test_files_that_lack_a_tensor_are_refused(tmp_path: Path, teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    del tensors["model.layers.5.mlp.up_proj.weight"]
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"they lack model.layers.2.mlp.up_proj.weight"):
        make_cut_model(source_of(teacher, 3), tmp_path / "models/student-init")
    assert list((tmp_path / "models").iterdir()) == []


def test_names_in_the_files_are_those_of_the_library(teacher: Path) -> None:
    """Files of a base model, as those of gpt2, have names without the prefix of the model."""
    model = build_without_weights(load_model_config(str(teacher), Student(path=str(teacher))), remote=False)
    names = pretrained.BuiltModel.of(model).names_in_model(["layers.3.mlp.up_proj.weight", "unknown.weight"])
    assert names == {"layers.3.mlp.up_proj.weight": ("model.layers.3.mlp.up_proj.weight", False)}


def test_the_layers_of_an_encoder_decoder_are_not_cut() -> None:
    with pytest.raises(UserError, match="a t5 model is an encoder-decoder, of which no layers can be cut"):
        depth_of(AutoConfig.for_model("t5"))
