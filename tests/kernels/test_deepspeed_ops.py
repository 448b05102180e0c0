"""How DeepSpeed's ops are compiled."""

from deepspeed.ops.op_builder import CPUAdamBuilder
from deepspeed.ops.op_builder.builder import OpBuilder

from kernels import deepspeed_ops


def test_deepspeed_compiles_without_debug_information(monkeypatch):
    given = {}
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(
        deepspeed_ops,
        "load_with_debug_information",
        lambda name, sources, flags, **options: given.update(name=name, flags=flags),
    )
    CPUAdamBuilder().load(verbose=False)
    assert given["name"] == "cpu_adam" and "-O3" in given["flags"]
    assert [flag for flag in given["flags"] if flag.startswith("-g")][-1] == "-g0"
