"""Weights by their exported names: the same whatever the placement, to a directory and back."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.placement import ordinary_placement
from model import PragnosiaConfig, PragnosiaForCausalLM
from training import weights
from training.config import UserError
from training.weights import (
    directory_weights,
    exported_tensors,
    fill,
    initial_weights,
    model_weights,
    qwen3_moe_tensors,
    write_shards,
)

PLACEMENTS = [("resident", None), ("zero3", 1), ("zero3", 2), ("zero3", 8)]
STD = 0.1


def build(placement: str = "resident", page_size: int | None = None, **overrides) -> PragnosiaForCausalLM:
    fields = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    fields["moe_intermediate_size"] = 12
    model = PragnosiaForCausalLM(
        PragnosiaConfig(**{**fields, **overrides}), ordinary_placement(placement, page_size).build_bank
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # what `fill` forgets, no comparison forgives
    return model


def filled(source, *args, **kwargs) -> PragnosiaForCausalLM:
    model = build(*args, **kwargs)
    fill(model, source)
    return model


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    return dict(exported_tensors(filled(initial_weights(7, STD))))


def saved(tensors, directory):
    directory.mkdir()
    write_shards(iter(tensors.items() if isinstance(tensors, dict) else tensors), directory, write=True)
    return directory


@pytest.mark.parametrize(("placement", "page_size"), PLACEMENTS)
def test_a_seed_gives_the_same_weights_in_every_placement(reference, placement, page_size):
    assert_same_tensors(
        dict(exported_tensors(filled(initial_weights(7, STD), placement, page_size))), reference
    )


def test_initial_weights_differ_by_seed_tensor_layer_and_expert(reference):
    other = dict(exported_tensors(filled(initial_weights(8, STD))))
    seen = set()
    for name, tensor in reference.items():
        if "norm" in name:
            assert (tensor == 1).all(), name
            continue
        assert not torch.equal(tensor, other[name]), name
        for matrix in tensor if tensor.dim() == 3 else [tensor]:
            assert matrix.std().item() == pytest.approx(STD, rel=0.25), name
            assert matrix[0, 0].item() not in seen, name
            seen.add(matrix[0, 0].item())


def test_exported_names_are_those_of_a_resident_model(reference):
    state = filled(initial_weights(7, STD)).state_dict()
    del state["lm_head.weight"]  # tied
    assert_same_tensors(reference, state)
    untied = filled(initial_weights(7, STD), "zero3", 2, tie_word_embeddings=False)
    assert "lm_head.weight" in dict(exported_tensors(untied))


@pytest.mark.parametrize(("placement", "page_size"), PLACEMENTS)
@pytest.mark.parametrize(("target", "target_page_size"), PLACEMENTS)
def test_a_directory_loads_into_every_placement(
    reference, tmp_path, placement, page_size, target, target_page_size
):
    source = filled(initial_weights(7, STD), placement, page_size)
    directory = saved(exported_tensors(source), tmp_path / "model")
    loaded = filled(directory_weights(directory), target, target_page_size)
    assert_same_tensors(dict(exported_tensors(loaded)), reference)


@pytest.mark.parametrize(("placement", "page_size"), PLACEMENTS)
def test_one_tensor_an_expert_and_stacked_experts_load_too(reference, tmp_path, placement, page_size):
    separate = saved(qwen3_moe_tensors(iter(reference.items())), tmp_path / "separate")
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in load_file(
        separate / "model-00001-of-00001.safetensors"
    )
    stacked = {name: t for name, t in reference.items() if not name.endswith(("gate_proj", "up_proj"))}
    for layer in (0, 1):
        bank = f"model.layers.{layer}.mlp.experts"
        pair = (reference[f"{bank}.gate_proj"], reference[f"{bank}.up_proj"])
        stacked[f"{bank}.gate_up_proj"] = torch.cat(pair, dim=1)
    for directory in (separate, saved(stacked, tmp_path / "stacked")):
        loaded = filled(directory_weights(directory), placement, page_size)
        assert_same_tensors(dict(exported_tensors(loaded)), reference)


@pytest.mark.parametrize(("placement", "page_size"), PLACEMENTS)
def test_a_model_in_memory_is_a_source(reference, placement, page_size):
    source = model_weights(filled(initial_weights(7, STD)))
    assert_same_tensors(dict(exported_tensors(filled(source, placement, page_size))), reference)


def test_shards_and_their_index(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    directory = saved(reference, tmp_path / "model")
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 2 and files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in reference.values())
    for name, tensor in reference.items():
        assert torch.equal(load_file(directory / index["weight_map"][name])[name], tensor)
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000 or len(tensors) == 1
    assert_same_tensors(dict(exported_tensors(filled(directory_weights(directory)))), reference)


def test_ranks_that_do_not_write_leave_the_disk_alone(reference, tmp_path):
    write_shards(iter(reference.items()), tmp_path, write=False)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def directory(reference, tmp_path):
    return saved(reference, tmp_path / "model")


def rewritten(directory, change) -> None:
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def assert_refused(directory, *words: str) -> None:
    for placement, page_size in (("resident", None), ("zero3", 2)):
        with pytest.raises(UserError) as error:
            filled(directory_weights(directory), placement, page_size)
        for word in (str(directory), *words):
            assert word in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_shard(directory, kept):
    (file,) = directory.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    assert_refused(directory, "truncated", file.name)


def test_no_weights_at_all(tmp_path):
    assert_refused(tmp_path, "safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.gate_proj", "model.layers.1.mlp.experts.up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ],
)  # fmt: skip
def test_a_missing_tensor(directory, name):
    rewritten(directory, lambda tensors: tensors.pop(name))
    assert_refused(directory, name.removesuffix("gate_proj"), "no tensor")


def test_a_missing_expert(reference, tmp_path):
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    tensors = {key: tensor for key, tensor in qwen3_moe_tensors(iter(reference.items())) if key != name}
    assert_refused(saved(tensors, tmp_path / "model"), name)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.norm.weight", [15]),
        ("model.embed_tokens.weight", [33, 16]),
        ("model.layers.0.mlp.gate.weight", [9, 16]),  # a model with more experts
        ("model.layers.0.mlp.experts.up_proj", [8, 11, 16]),
        ("model.layers.0.mlp.experts.down_proj", [8, 17, 12]),
    ],
)
def test_a_tensor_of_another_shape(directory, name, shape):
    rewritten(directory, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    assert_refused(directory, name, ", ".join(map(str, shape[-2:])) + "]", "needs")


def test_fewer_experts_than_the_model_has(directory):
    name = "model.layers.0.mlp.experts.up_proj"
    rewritten(directory, lambda tensors: tensors.update({name: tensors[name][:7]}))
    assert_refused(directory, name, "needs")


def test_one_damaged_shard_of_several(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    directory = saved(reference, tmp_path / "model")
    shutil.copy(directory / "model.safetensors.index.json", directory / "copy.json")
    last = sorted(directory.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-8])
    assert_refused(directory, last.name)
    last.unlink()
    assert_refused(directory)
