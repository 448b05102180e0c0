"""Exported directories, read back by the code of others and by ours."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from experts.placement import ordinary_placement
from model import PragnosiaConfig, PragnosiaForCausalLM
from model.components import CacheConfig, MemoryConfig
from training.checkpoint import load_config, load_model
from training.config import UserError
from training.export import export_model, from_qwen3_moe, probe_logits, to_qwen3_moe, verify_export
from training.weights import directory_weights, fill, initial_weights

SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "no renormalisation, another rotary base": {"norm_topk_prob": False, "rope_theta": 1e6},
}
PLACEMENTS = [("resident", None), ("zero3", 2)]
MEMORY = asdict(
    MemoryConfig(hidden_size=32, memory_size=16, head_dim=8, num_memory_layers=1, dropout=0.0, window=3)
)
CACHE = asdict(CacheConfig(hidden_size=32, num_heads=4, num_latents=3, coprocessor="lora"))
CPU = torch.device("cpu")
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8], [9, 7, 9, 3, 2, 3, 8, 4]])


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": 1, **{f"w{number}": number for number in range(2, 40)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def small_model(
    placement: str = "resident", page_size: int | None = None, **overrides
) -> PragnosiaForCausalLM:
    fields = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "num_experts": 4}
    fields |= {"moe_intermediate_size": 16, "pad_token_id": 0, "eos_token_id": 1}
    model = PragnosiaForCausalLM(
        PragnosiaConfig(**{**fields, **overrides}), ordinary_placement(placement, page_size).build_bank
    )
    fill(model, initial_weights(5, 0.3))
    for layer in model.model.layers:
        if layer.memory is not None:
            torch.nn.init.normal_(layer.memory.out_proj.weight, generator=torch.Generator().manual_seed(5))
    return model.eval()


def exported(model, tokenizer, directory: Path, export_format: str = "pragnosia") -> Path:
    export_model(model, tokenizer, directory, export_format=export_format, write=True)
    return directory


def assert_equal_logits(found, expected, tolerance: float = 1e-5) -> None:
    found, expected = found.float(), expected.float()
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("placement", "page_size"), PLACEMENTS)
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES.keys())
def test_qwen3_moe_format_loads_in_transformers(tokenizer, tmp_path, placement, page_size, overrides):
    model = small_model(placement, page_size, **overrides)
    directory = exported(model, tokenizer, tmp_path / "m", "qwen3_moe")
    for theirs in (
        Qwen3MoeForCausalLM.from_pretrained(directory),
        AutoModelForCausalLM.from_pretrained(directory),
    ):
        assert type(theirs) is Qwen3MoeForCausalLM
        assert_equal_logits(theirs(IDS).logits, model(IDS).logits)
    assert AutoTokenizer.from_pretrained(directory)("w5 w6").input_ids == [5, 6]
    found = theirs.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    assert torch.equal(found, model.generate(IDS[:1], max_new_tokens=5, do_sample=False))
    assert not list(directory.glob("*.py"))


@pytest.mark.parametrize(("placement", "page_size"), PLACEMENTS)
@pytest.mark.parametrize("overrides", SHAPES.values(), ids=SHAPES.keys())
def test_a_qwen3_moe_of_transformers_is_a_start(tokenizer, tmp_path, placement, page_size, overrides):
    torch.manual_seed(1)
    theirs = Qwen3MoeForCausalLM(to_qwen3_moe(small_model(initializer_range=0.3, **overrides).config)).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = from_qwen3_moe(tmp_path)
    model = PragnosiaForCausalLM(config, ordinary_placement(placement, page_size).build_bank).eval()
    fill(model, directory_weights(tmp_path))
    assert_equal_logits(model(IDS).logits, theirs(IDS).logits)

    loaded, beside = load_model(tmp_path, CPU, torch.float32)
    assert_equal_logits(loaded(IDS).logits, theirs(IDS).logits)
    assert beside("w7 w8").input_ids == [7, 8]


def test_a_published_configuration(tmp_path):
    """The fields as Qwen3-30B-A3B has them on the hub, with the rotary base at the top."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load_config(tmp_path)
    assert (ours.rope_theta, ours.num_experts, ours.head_dim, ours.eos_token_id) == (1e6, 128, 128, 151645)
    assert 30.4e9 < ours.num_params() < 30.6e9
    assert 3.2e9 < ours.active_params() < 3.4e9


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"mlp_only_layers": [0]}, "dense layers"),
        ({"decoder_sparse_step": 2}, "dense layers"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding"),
        ({"attention_bias": True}, "biases"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear rotary"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_experts_per_tok": 9}, "--num-active-experts"),
    ],
)
def test_what_the_architecture_has_not_is_named(tmp_path, fields, word):
    base = {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
    Qwen3MoeConfig(**{**base, **fields}).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load_config(tmp_path)
    assert word in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("memory", [None, MEMORY], ids=["base", "memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("placement", "page_size"), PLACEMENTS)
def test_our_format_loads_inside_the_repository(tokenizer, tmp_path, placement, page_size, dtype, memory):
    model = small_model(placement, page_size, memory=memory).to(dtype)
    directory = exported(model, tokenizer, tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert type(loaded) is PragnosiaForCausalLM and loaded.dtype == dtype
    expected = small_model(memory=memory).to(dtype)(IDS).logits
    assert torch.equal(loaded(IDS).logits, expected)
    again, beside = load_model(directory, CPU, dtype)
    assert torch.equal(again(IDS).logits, expected)
    assert beside("w5").input_ids == [5] and not again.training
    assert loaded.generation_config.eos_token_id == 1 and loaded.generation_config.pad_token_id == 0


OUTSIDE = """
import json, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
exports, repository, ids_as_json = sys.argv[1:]
assert repository not in sys.path, sys.path
for directory in sorted(path for path in Path(exports).iterdir() if path.is_dir()):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    ids = tokenizer(["w3 w14 w15 w9", "w9 w7"], padding=True, padding_side="left", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=6, do_sample=False, use_cache=True)
    no_cache = model.generate(**ids, max_new_tokens=6, do_sample=False, use_cache=False)
    model.train().gradient_checkpointing_enable()
    loss = model(ids.input_ids, labels=ids.input_ids).loss
    loss.backward()
    given = torch.tensor(json.loads(ids_as_json))
    torch.save({
        "logits": model.eval()(given).logits.detach(),
        "augmented": model(given, augment=model.cache is not None).logits.detach(),
        "answer": answer, "no_cache": no_cache, "loss": loss.detach(),
        "modules": [name for name in ("model", "experts", "kernels", "training") if name in sys.modules],
        "config": AutoConfig.from_pretrained(directory, trust_remote_code=True).num_params(),
    }, f"{directory}.pt")
"""

OVERRIDES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "step routing and memory": {"routing": "step", "expert_pool": 3, "memory": MEMORY},
    "cache": {"cache": CACHE},
}


@pytest.fixture(scope="module")
def read_outside(tokenizer, tmp_path_factory) -> Path:
    """A directory of exports, each with what a process outside the repository found in it."""
    exports = tmp_path_factory.mktemp("exports")
    for name, overrides in OVERRIDES.items():
        exported(small_model(**overrides), tokenizer, exports / name)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(elsewhere / "hf"), "HF_HUB_OFFLINE": "1"}
    repository = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", OUTSIDE, str(exports), repository, json.dumps(IDS.tolist())]
    result = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return exports


@pytest.mark.parametrize("name", OVERRIDES)
def test_our_format_loads_outside_the_repository(read_outside, name):
    model = small_model(**OVERRIDES[name])
    found = torch.load(read_outside / f"{name}.pt")
    assert found["modules"] == []
    assert_equal_logits(found["logits"], model(IDS).logits)
    assert_equal_logits(found["augmented"], model(IDS, augment=model.cache is not None).logits)
    prompt = torch.tensor([[3, 14, 15, 9], [0, 0, 9, 7]])
    answer = model.generate(prompt, attention_mask=(prompt > 0).long(), max_new_tokens=6, do_sample=False)
    assert torch.equal(found["answer"], answer) and torch.equal(found["no_cache"], answer)
    assert found["loss"].item() == pytest.approx(model.train()(prompt, labels=prompt).loss.item(), rel=1e-5)
    assert found["config"] == model.config.num_params()


def test_head_size_follows_from_the_width_where_the_file_has_none(tmp_path):
    Qwen3MoeConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields.pop("head_dim", None)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert load_config(tmp_path).head_dim == 16


def test_the_code_written_is_all_that_the_model_imports(tokenizer, tmp_path):
    directory = exported(small_model(), tokenizer, tmp_path / "m")
    written = {path.stem for path in directory.glob("*.py")}
    for path in directory.glob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].startswith("."):
                assert words[1][1:] in written, f"{path.name}: {line}"
            elif words[:1] in (["from"], ["import"]):
                assert words[1].split(".")[0] not in ("model", "experts", "kernels", "training", "data"), line


def test_an_export_survives_a_second_export(tokenizer, tmp_path):
    """Ours, loaded, as Qwen3-MoE; that, loaded, as ours: the same weights and settings."""
    first = exported(small_model(rope_theta=5e5), tokenizer, tmp_path / "first")
    model, _ = load_model(first, CPU, torch.float32)
    second = exported(model, tokenizer, tmp_path / "second", "qwen3_moe")
    model, _ = load_model(second, CPU, torch.float32)
    third = exported(model, tokenizer, tmp_path / "third")
    for name in ("model-00001-of-00001.safetensors", "causal_lm.py", "tokenizer.json"):
        assert (first / name).read_bytes() == (third / name).read_bytes()
    assert settings(first) == settings(third)


def settings(directory: Path) -> dict:
    return {name: value for name, value in load_config(directory).to_dict().items() if name[0] != "_"}


def test_ranks_that_do_not_write_leave_the_disk_alone(tokenizer, tmp_path):
    export_model(small_model(), tokenizer, tmp_path / "m", export_format="pragnosia", write=False)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("export_format", ["pragnosia", "qwen3_moe"])
def test_verification_accepts_a_true_copy_and_nothing_else(tokenizer, tmp_path, export_format):
    model = small_model()
    directory = exported(model, tokenizer, tmp_path / "m", export_format)
    expected = probe_logits(model, CPU)
    verify_export(directory, expected, torch.float32, CPU)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.o_proj.weight"] *= 1.01
    save_file(tensors, file)
    with pytest.raises(UserError, match="differ"):
        verify_export(directory, expected, torch.float32, CPU)
    tensors["model.layers.1.self_attn.o_proj.weight"][:] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match="differ"):
        verify_export(directory, expected, torch.float32, CPU)


def test_verification_on_another_device_allows_tokens_that_chose_another_expert(tokenizer, tmp_path):
    model = small_model()
    directory = exported(model, tokenizer, tmp_path / "m", "pragnosia")
    expected = probe_logits(model, CPU)
    gpu = torch.device("cuda")
    for tokens, agrees in ((7, True), (9, False)):
        few = expected.clone()
        few[:, :tokens] *= 1.5
        with pytest.raises(UserError, match="differ"):
            verify_export(directory, few, torch.float32, CPU, CPU)
        with contextlib.nullcontext() if agrees else pytest.raises(UserError, match="differ"):
            verify_export(directory, few, torch.float32, CPU, gpu)


def test_the_probe_leaves_the_mode_alone():
    model = small_model().train()
    assert probe_logits(model, CPU).shape == (1, 16, 40) and model.training
    assert probe_logits(model.eval(), CPU).dtype == torch.float32 and not model.training


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "config.json"), ("{", "config.json"), ('{"model_type": "llama"}', "llama"), ("{}", "nameless")],
)
def test_a_directory_of_another_architecture(tmp_path, content, word):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=word):
        load_config(tmp_path)
