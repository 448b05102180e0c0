"""The kernels of cache attention equal their plain PyTorch twin: in Triton's interpreter and on a GPU.

Run as a program with TRITON_INTERPRET=1 this file makes every check in the interpreter: in fp32, fp16 and fp64.
On a GPU the kernels compute in bf16 and fp16, so there the same checks allow for these.
"""

import functools
import math
import re
import subprocess

import pytest
import torch
from torch.utils import deterministic

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import cache_attention as reference  # noqa: E402
from kernels import cache_attention_triton as kernels  # noqa: E402
from kernels.cache_attention import BLOCK, TILE  # noqa: E402
from tests.kernels.gpu_code import SHARED, interpreted, run_checks  # noqa: E402

LEAVES = ("q", "k", "v", "memory_k", "memory_v", "gate")


def inputs(
    B=2, H=2, G=1, S=70, L=70, M=70, C=16, *, device, shared=False, gate="bgM", valid=None, chosen=0,
    window=0, dtype=torch.float32,
) -> dict:  # fmt: skip
    """Arguments of `attend`; capital letters of `gate` and `valid` are whole dimensions, others are 1.

    On a GPU bf16 takes the place of fp32. chosen: read so many blocks.
    """
    if device == "cuda" and dtype == torch.float32:
        dtype = torch.bfloat16
    sizes = {"B": B, "G": G, "M": M, "b": 1, "g": 1}
    rows = 1 if shared else B
    shapes = {"q": (B, H, S, C), "k": (B, G, L, C), "v": (B, G, L, C)}
    shapes |= {"memory_k": (rows, G, M, C), "memory_v": (rows, G, M, C)}
    result = {name: torch.randn(shape).to(device, dtype).requires_grad_() for name, shape in shapes.items()}
    result["gate"] = result["valid"] = result["chosen"] = None
    if gate:
        real = torch.promote_types(dtype, torch.float32)
        result["gate"] = torch.randn([sizes[x] for x in gate]).to(device, real).requires_grad_()
    if valid:
        result["valid"] = torch.rand([sizes[x] for x in valid]).lt(0.6).to(device)
    if chosen:
        found = (result[name] for name in ("q", "memory_k", "gate", "valid"))
        result["chosen"] = reference.retrieve(*found, C**-0.5, chosen, L > 0)
    return {**result, "scale": C**-0.5, "window": window}


def plain(q, k, v, memory_k, memory_v, gate, valid, chosen, scale, window):
    """What one would write: all in the dtype of the inputs, keys in one row."""
    (B, H, S, _), (_, G, M, _), L = q.shape, memory_k.shape, k.shape[2]
    memory = torch.zeros(B, G, S, M, dtype=torch.bool, device=q.device)
    if valid is not None:
        memory = memory | ~valid[:, :, None]
    if chosen is not None:
        fine = chosen.repeat_interleave(TILE, 2)[:, :, :S].repeat_interleave(BLOCK, 3)[..., :M]
        memory = memory | ~fine
    age = torch.arange(L - S, L, device=q.device)[:, None] - torch.arange(L, device=q.device)
    local = (age < 0) | (age >= (window or math.inf))
    off = torch.cat([memory, local.expand(B, G, S, L)], 3).repeat_interleave(H // G, 1)
    keys, values = (torch.cat([x.expand(B, -1, -1, -1), y], 2) for x, y in ((memory_k, k), (memory_v, v)))
    keys, values = (x.repeat_interleave(H // G, 1) for x in (keys, values))
    scores = scale * (q @ keys.transpose(2, 3))
    if gate is not None:
        bias = torch.nn.functional.pad(gate.to(q.dtype).expand(-1, G, -1), (0, L))
        scores = scores + bias.repeat_interleave(H // G, 1)[:, :, None]
    scores = scores.masked_fill(off, -torch.inf)
    return scores.softmax(3) @ values, scores.float().logsumexp(3)


def results(function, arguments: dict) -> dict[str, torch.Tensor]:
    """Output, logsumexp and all gradients, detached."""
    out, lse = function(*arguments.values())
    leaves = {name: x for name in LEAVES if (x := arguments[name]) is not None and x.requires_grad}
    torch.manual_seed(0)
    grads = (torch.randn(x.shape).to(x) for x in (out, lse))
    found = torch.autograd.grad((out, lse), leaves.values(), tuple(grads), allow_unused=True)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, found, strict=True))}


def assert_close_to_fp64(arguments: dict) -> None:
    """As close to fp64 as plain PyTorch in the same dtype is, or within 2x."""

    def double(x):
        if not isinstance(x, torch.Tensor) or x.dtype == torch.bool:
            return x
        return x.detach().double().requires_grad_()

    found, same = results(kernels.attend, arguments), results(plain, arguments)
    exact = results(plain, {name: double(x) for name, x in arguments.items()})
    for name, best in exact.items():
        if best is None or not best.numel():
            continue
        assert found[name].shape == best.shape
        assert found[name].dtype == (same[name].dtype if name != "lse" else arguments["q"].float().dtype)
        error, allowance = ((x[name].double() - best).abs().max() for x in (found, same))
        rounding = 8 * torch.finfo(same[name].dtype).eps * (1 + best.abs().max())
        assert error <= 2 * allowance + rounding, (name, error, allowance)


def check_equal_to_the_twin(device: str) -> None:
    torch.manual_seed(0)
    for case in (
        {"B": 1, "H": 4, "G": 2, "S": 130, "L": 130, "gate": "BGM"},
        # Many rows: of one, how much plain PyTorch is off by is luck, and may be next to nothing.
        {"B": 32, "H": 1, "S": 1, "L": 1, "M": 1, "gate": "BgM"},
        {"H": 1, "S": 7, "L": 65, "M": 129, "shared": True, "gate": "BgM"},
        {"B": 1, "H": 1, "S": 63, "L": 100, "M": 63, "window": 20, "gate": None},
        {"B": 1, "H": 1, "S": 129, "L": 200, "M": 0, "window": 70, "gate": None},
        {"B": 1, "H": 1, "S": 65, "C": 128, "L": 65},
    ):
        assert_close_to_fp64(inputs(device=device, **case))


def check_validity(device: str) -> None:
    """Blocks partly and wholly invalid, by row and for all."""
    torch.manual_seed(1)
    for valid, G in (("BgM", 2), ("bgM", 1)):
        arguments = inputs(device=device, H=G, G=G, M=200, S=20, shared=True, gate="bGM", valid=valid)
        arguments["valid"][:, :, 64:128] = False
        arguments["valid"][0, :, 150:] = False
        assert_close_to_fp64(arguments)


def check_retrieval(device: str) -> None:
    torch.manual_seed(2)
    for local in (True, False):
        sizes = {"B": 1, "G": 1 + local, "S": 130, "L": 130 * local, "M": 200}
        arguments = inputs(device=device, **sizes, chosen=2, valid="bgM", gate=None)
        chosen = arguments["chosen"]
        assert chosen.sum(3).eq(2).all() and chosen[:, :, 0].ne(chosen[:, :, 1]).any()
        assert_close_to_fp64(arguments)


def check_few_queries_of_a_large_bank(device: str) -> None:
    """Read in parts, of which one is all off."""
    torch.manual_seed(3)
    before, kernels.PROGRAMS = kernels.PROGRAMS, 8
    try:
        for gate in ("BGM", "bgM", None):
            sizes = {"B": 2 if gate else 1, "H": 4, "G": 2, "S": 5, "L": 0, "M": 256}
            arguments = inputs(device=device, **sizes, gate=gate, valid="BgM", shared=gate == "bgM")
            arguments["valid"][:, :, 128:] = False
            assert_close_to_fp64(arguments)
    finally:
        kernels.PROGRAMS = before


def check_many_programs_share_an_entry(device: str) -> None:
    """Gradients of memory added up from parts of the queries, and of the rows."""
    torch.manual_seed(4)
    assert_close_to_fp64(inputs(device=device, S=130, L=130, M=9, shared=True, gate="BGM"))


def check_half_precision(device: str) -> None:
    torch.manual_seed(5)
    for C in (64, 128):
        assert_close_to_fp64(
            inputs(device=device, B=1, S=66, L=66, M=70, C=C, valid="bgM", dtype=torch.float16)
        )


def attend_with(rest: tuple, *leaves):
    return kernels.attend(*leaves, *rest)


def check_gradients_in_fp64(device: str) -> None:
    if device == "cuda":  # its dots are not made for fp64
        return
    torch.manual_seed(6)
    for case in (
        {"B": 1, "S": 3, "L": 4, "M": 3, "valid": "BgM", "window": 2},
        {"S": 2, "L": 0, "M": 2},
    ):
        arguments = inputs(device=device, **case, shared=True, gate="BGM", dtype=torch.float64)
        leaves = [arguments[name] for name in LEAVES]

        rest = tuple(arguments.values())[len(LEAVES) :]
        attend = functools.partial(attend_with, rest)
        assert torch.autograd.gradcheck(attend, leaves, fast_mode=True, check_undefined_grad=False)


def check_entries_that_are_off_change_no_bit(device: str) -> None:
    torch.manual_seed(7)
    for off in ("gate", "valid"):
        arguments = inputs(device=device, B=1, H=1, M=100, gate="bgM", valid="BgM")
        if off == "gate":
            arguments["gate"] = torch.full_like(arguments["gate"], -torch.inf).requires_grad_()
            arguments["valid"] = None
        else:
            arguments["valid"].zero_()
        nothing = {name: arguments[name][:, :, :0] for name in ("memory_k", "memory_v")}
        alone = results(kernels.attend, {**arguments, **nothing, "gate": None, "valid": None})
        found = results(kernels.attend, arguments)
        for name in ("out", "lse", "q", "k", "v"):
            assert torch.equal(found[name], alone[name]), (off, name)
        for name in ("memory_k", "memory_v", "gate"):
            assert not found[name].any(), (off, name)


def check_queries_that_see_nothing(device: str) -> None:
    """0 and no gradient, and no NaN anywhere."""
    torch.manual_seed(8)
    for off in ("gate", "valid"):
        arguments = inputs(device=device, L=0, S=20, valid="BgM" if off == "valid" else None, gate="BgM")
        with torch.no_grad():
            nothing = -torch.inf if off == "gate" else False
            arguments[off][0] = nothing
            arguments[off][1, :, :BLOCK] = nothing  # the other row sees something later
        found, twin = (
            results(function, arguments) for function in (kernels.attend, reference.attend_reference)
        )
        assert not found["out"][0].any() and not found["q"][0].any() and found["q"][1].any()
        assert found["lse"][0].eq(-torch.inf).all()
        for name in ("out", "q", "memory_k", "memory_v", "gate"):
            tolerance = 1e-4 if device == "cpu" else 4e-2
            torch.testing.assert_close(found[name], twin[name], rtol=tolerance, atol=tolerance)


def check_everything_is_written(device: str) -> None:
    """Fresh memory is filled with NaN."""
    torch.manual_seed(9)
    torch.use_deterministic_algorithms(True, warn_only=True)
    before, deterministic.fill_uninitialized_memory = deterministic.fill_uninitialized_memory, True
    try:
        assert torch.empty(3, device=device).isnan().all()
        assert_close_to_fp64(inputs(device=device, B=1, S=65, L=90, M=70, valid="BgM"))
        arguments = inputs(device=device, S=0, L=5, M=3)
        for name, value in results(kernels.attend, arguments).items():
            assert not value.any(), name
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = before


def check_strided_inputs(device: str) -> None:
    torch.manual_seed(10)
    arguments = inputs(device=device, G=2, S=9, L=9, M=5, gate="BGM", valid="BgM")
    expected = results(kernels.attend, arguments)
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
            arguments[name] = turned.requires_grad_(name in LEAVES)
    for name, value in results(kernels.attend, arguments).items():
        assert torch.equal(value, expected[name]), name


def check_only_the_gradients_that_are_asked_for(device: str) -> None:
    """A frozen bank, or a frozen model around it."""
    torch.manual_seed(11)
    arguments = inputs(device=device, B=1, S=9, L=9, M=5)
    expected = results(kernels.attend, arguments)
    for wanted in (("q",), ("gate",), ("memory_v",), ("k", "v")):
        own = {name: x.detach() if name in LEAVES else x for name, x in arguments.items()}
        own |= {name: own[name].requires_grad_() for name in wanted}
        for name, value in results(kernels.attend, own).items():
            assert torch.equal(value, expected[name]), name


def check_compiles_as_one_graph(device: str) -> None:
    torch.manual_seed(12)
    arguments = inputs(device=device, B=1, S=9, L=9, M=70, valid="BgM")
    arguments["chosen"] = None

    def objective(*arguments):
        out, lse = kernels.attend(*arguments)
        return out.sin(), lse

    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled = torch.compile(objective, fullgraph=True, backend=backend)
    expected = results(objective, arguments)
    for name, value in results(compiled, arguments).items():
        tolerance = 1e-5 if device == "cpu" else 3e-2
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance)


def check_through_the_dispatcher(device: str) -> None:
    torch.manual_seed(13)
    arguments = inputs(device=device, S=9, L=9, M=70, valid="BgM")
    valid = arguments["valid"][:, 0]
    leaves = [arguments[name] for name in LEAVES]
    outputs = {}
    for choice in ("reference", "triton"):
        reference.use(choice)
        with torch.profiler.profile() as profile:
            outputs[choice] = reference.cache_attention(*leaves, valid, top_k=64)
        names = {event.key for event in profile.key_averages()}
        assert ("pragnosia::cache_attention" in names) == (choice == "triton")
    reference.use("auto")
    tolerance = 1e-5 if device == "cpu" else 3e-2
    torch.testing.assert_close(outputs["triton"], outputs["reference"], rtol=tolerance, atol=tolerance)


def check_the_registered_operation(device: str) -> None:
    arguments = inputs(device=device, S=5, L=5, M=4, valid="BgM")
    *tensors, chosen, scale, window = arguments.values()
    lists = kernels.schedule(chosen, arguments["valid"], 5)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(kernels.attend_op, (*tensors, *lists, scale, window), test_utils=tests)


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


@pytest.mark.slow
def test_interpreter():
    assert interpreted(__file__) == [check.__name__ for check in CHECKS]


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_on_a_gpu(check):
    check("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("C", [64, 128])
def test_sizes_of_use_on_a_gpu(C, dtype):
    torch.manual_seed(0)
    sizes = {"H": 8, "G": 2, "C": C, "dtype": dtype, "device": "cuda", "gate": "bGM"}
    assert_close_to_fp64(inputs(B=1, S=1025, L=1500, M=2047, valid="BgM", **sizes))
    assert_close_to_fp64(inputs(B=2, S=1000, L=1000, M=16, **sizes))
    assert_close_to_fp64(inputs(B=2, S=64, L=0, M=8192, shared=True, **sizes))
    assert_close_to_fp64(inputs(B=1, S=700, L=700, M=4096, chosen=8, **sizes))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [{"L": 900, "valid": "BgM"}, {"L": 0}, {"L": 900, "chosen": 4}])
def test_200_repeats_are_equal_on_a_gpu(case):
    torch.manual_seed(0)
    arguments = inputs(H=8, G=2, S=900, M=1000, C=64, device="cuda", gate="bGM", **case)
    first = results(kernels.attend, arguments)
    for _ in range(200):
        for name, value in results(kernels.attend, arguments).items():
            assert value is first[name] is None or torch.equal(value, first[name]), name


@pytest.mark.gpu
def test_banks_beyond_2_to_31_values_on_a_gpu():
    B, G, M, C = 5, 64, 65_536, 128
    if torch.cuda.mem_get_info()[0] < 50 * 2**30:
        pytest.skip("needs 50 GB of free GPU memory")
    torch.manual_seed(0)
    q, memory = (torch.randn(B, G, n, C, device="cuda", dtype=torch.bfloat16) for n in (17, M))
    q.requires_grad_(), memory.requires_grad_()
    empty = q.new_empty(B, G, 0, C)

    def last(q, memory):
        rest = None, None, None, C**-0.5, 0
        local = empty[: len(q), : q.shape[1]]
        out, _ = kernels.attend(q, local, local, memory, memory, *rest)
        return out, *torch.autograd.grad(out.float().square().sum(), (q, memory))

    found = last(q, memory)
    cut = (x[-1:, -2:].detach().requires_grad_() for x in (q, memory))
    for whole, part in zip(found, last(*cut), strict=True):
        assert (whole[-1:, -2:] - part).abs().max() <= 0.05 * part.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("case", [{"L": 300, "valid": "BgM"}, {"L": 0}, {"L": 300, "chosen": 2}])
def test_cuda_graph(case):
    torch.manual_seed(0)
    arguments = inputs(H=4, G=2, S=300, M=500, C=64, device="cuda", gate="bGM", **case)

    leaves = [arguments[name] for name in LEAVES]

    def step():
        out, lse = kernels.attend(*arguments.values())
        grads = torch.autograd.grad(out.float().square().sum() + lse.sum(), leaves, allow_unused=True)
        return [x for x in (out, lse, *grads) if x is not None]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for leaf in leaves:
                leaf.normal_()
            if arguments["valid"] is not None:
                arguments["valid"].copy_(torch.rand(arguments["valid"].shape).lt(0.5))
        graph.replay()
        assert all(torch.equal(old, new) for old, new in zip(captured, step(), strict=True))


TYPES = {
    **dict.fromkeys(("q", "k", "v", "memory_k", "memory_v", "out", "grad"), "*bf16"),
    **dict.fromkeys(("grad_q", "grad_k", "grad_v", "part_k", "part_v"), "*bf16"),
    **dict.fromkeys(("gate", "lse", "grad_lse", "delta_BHS", "part_gate"), "*fp32"),
    **{"valid": "*u8", "blocks": None, "num_blocks": None, "tiles": None, "num_tiles": None},
}
STACK = 128  # bytes a thread, where registers are spilled
FAMILIES = {80: (80, 86, 89), 90: (90,), 100: (100,), 120: (120,)}  # code for 8.0 is code for all of 8.x


@pytest.mark.slow
@pytest.mark.parametrize("capability", FAMILIES)
def test_compiles_for(capability, tmp_path):
    """Wide heads fit the shared memory and the registers, and the multiplications run on tensor cores.

    Heads of 64 have larger tiles a warp in one kernel, on GPUs with much shared memory; elsewhere they need less.
    """
    names = ("forward", "query", "local", "memory")
    for head_dim, tested in ((128, names), (64, names[: capability in (90, 100)])):
        for name in tested:
            kernel = getattr(kernels, f"{name}_kernel")
            table = name if name in ("forward", "query") else "keys"
            block_S, launch = kernels.tile(table, head_dim, capability)
            constants = {
                "H": 16, "G": 4, "C": head_dim, "FACTOR": 0.1, "SCALE": 0.1, "WINDOW": 0, "REAL": tl.float32,
                "BLOCK_S": block_S, "BLOCK_M": BLOCK, "TILE": TILE,
            }  # fmt: skip
            signature, known, aligned = {}, {}, {}
            for index, argument in enumerate(kernel.arg_names):
                kind = {**TYPES, **constants}.get(argument, "i32")
                if not isinstance(kind, str):
                    known[argument], kind = kind, "constexpr"
                signature[argument] = kind
                if kind.startswith("*") or argument in ("S", "L", "M"):
                    aligned[(index,)] = [["tt.divisibility", 16]]
            source = ASTSource(kernel, signature, known, aligned)
            binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
            ptx = binary.asm["ptx"]
            assert re.search({90: r"wgmma\.mma", 100: r"tcgen05\.mma"}.get(capability, r"mma\.sync"), ptx)
            assert binary.metadata.shared <= min(SHARED[x] for x in FAMILIES[capability]) * 1024
            cubins = [binary.asm["cubin"]]
            for chip in FAMILIES[capability][1:]:
                options = [f"--gpu-name=sm_{chip}", "-lineinfo", "-o", str(tmp_path / "cubin")]
                (tmp_path / "ptx").write_text(ptx)
                subprocess.run([get_ptxas(chip).path, *options, str(tmp_path / "ptx")], check=True)
                cubins.append((tmp_path / "cubin").read_bytes())
            for cubin in cubins:
                (tmp_path / "cubin").write_bytes(cubin)
                command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(tmp_path / "cubin")]
                usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                assert int(re.search(r"STACK:(\d+)", usage)[1]) <= STACK, (name, head_dim, usage)


if __name__ == "__main__":
    run_checks(CHECKS)
