"""The specification of cache attention: against torch's own attention under a mask, and by its properties."""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import cache_attention as subject
from kernels.cache_attention import BLOCK, TILE, cache_attention

CPU = torch.device("cpu")
NAMES = ("q", "k", "v", "memory_k", "memory_v", "gate")


def inputs(
    B=2, H=4, G=2, S=9, L=9, M=7, C=16, shared=False, gate="BGM", valid="BM", dtype=torch.float64
) -> dict:
    """Arguments of `cache_attention`; capital letters of `gate` and `valid` are whole dimensions, others are 1."""
    sizes = {"B": B, "G": G, "M": M, "b": 1, "g": 1}
    rows = 1 if shared else B
    shapes = {"q": (B, H, S, C), "k": (B, G, L, C), "v": (B, G, L, C)}
    shapes |= {"memory_k": (rows, G, M, C), "memory_v": (rows, G, M, C)}
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    if not L:
        tensors["k"] = tensors["v"] = None
    real = torch.promote_types(dtype, torch.float32)
    tensors["gate"] = torch.randn([sizes[x] for x in gate], dtype=real) if gate else None
    for tensor in tensors.values():
        if tensor is not None:
            tensor.requires_grad_()
    tensors["valid"] = torch.rand([sizes[x] for x in valid]) < 0.7 if valid else None
    return tensors


def masked_attention(q, k, v, memory_k, memory_v, gate, valid, window=None):
    """The keys in one row, and torch's attention with the mask written out."""
    (B, H, S, _), (_, G, M, _) = q.shape, memory_k.shape
    L = 0 if k is None else k.shape[2]
    keys, values = (
        torch.cat([part.expand(B, -1, -1, -1) for part in parts if part is not None], 2)
        for parts in ((memory_k, k), (memory_v, v))
    )
    memory = torch.zeros(B, G, S, M, dtype=q.dtype)
    if gate is not None:
        memory = memory + gate[:, :, None].to(q.dtype)
    if valid is not None:
        memory = memory.masked_fill(~valid[:, None, None], -torch.inf)
    local = torch.full((S, L), -torch.inf, dtype=q.dtype)
    for s in range(S):
        for key in range(L):
            age = L - S + s - key
            if age >= 0 and (window is None or age < window):
                local[s, key] = 0
    mask = torch.cat([memory, local.expand(B, G, S, L)], 3).repeat_interleave(H // G, 1)
    keys, values = (x.repeat_interleave(H // G, 1) for x in (keys, values))
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def gradients(function, arguments: dict, **options) -> dict[str, torch.Tensor]:
    """The output, and gradients by name."""
    out = function(*arguments.values(), **options)
    leaves = {name: x for name in NAMES if (x := arguments[name]) is not None}
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).sin()
    grads = torch.autograd.grad((out * weights).sum(), leaves.values())
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({"H": 2, "shared": True, "gate": "bgM", "valid": None}, {"window": 3}),
        ({"S": 3, "shared": True, "gate": "BgM", "valid": "bM"}, {}),
        ({"S": 1, "gate": None}, {"window": 4}),
        ({"S": 5, "L": 0, "gate": "bGM", "valid": None}, {}),
        ({"M": 0, "valid": None, "gate": None}, {}),
    ],
)
def test_equals_torch_under_a_mask(sizes, options):
    torch.manual_seed(0)
    arguments = inputs(**sizes)
    expected = gradients(masked_attention, arguments, **options)
    found = gradients(cache_attention, arguments, **options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("off", ["gate", "valid"])
def test_entries_that_are_off_change_no_bit(off):
    torch.manual_seed(1)
    arguments = inputs(S=40, L=50, M=30, gate="bgM", dtype=torch.float32)
    if off == "gate":
        arguments["gate"] = torch.full((1, 1, 30), -torch.inf, requires_grad=True)
    else:
        arguments["valid"] = torch.zeros(2, 30, dtype=torch.bool)
    found = gradients(cache_attention, arguments)
    nothing = {"memory_k": arguments["memory_k"][:, :, :0], "memory_v": arguments["memory_v"][:, :, :0]}
    alone = gradients(cache_attention, {**arguments, **nothing, "gate": None, "valid": None})
    for name in ("out", "q", "k", "v"):
        assert torch.equal(found[name], alone[name]), name
    for name in ("memory_k", "memory_v", "gate"):
        assert not found[name].any(), name


def test_queries_that_see_nothing_give_0_and_no_gradient():
    torch.manual_seed(2)
    arguments = inputs(L=0, gate="bGM", valid="BM")
    arguments["valid"] = torch.tensor([[False] * 7, [True] * 7])
    with torch.no_grad():
        arguments["gate"][:, 1] = -torch.inf  # the second group of heads
    found = gradients(cache_attention, arguments)
    out, lse = subject.attend(*arguments.values())
    assert not out[0].any() and not out[1, 2:].any() and out[1, :2].all()
    assert lse[0].eq(-torch.inf).all() and lse[1, :2].isfinite().all()
    assert all(value.isfinite().all() for value in found.values())
    assert not found["q"][0].any() and found["q"][1, :2].any()


def test_scale_and_logsumexp():
    torch.manual_seed(3)
    arguments = inputs(H=2, S=1, L=1, valid=None)
    _, lse = subject.attend(*arguments.values(), scale=0.7)
    keys = torch.cat([arguments["memory_k"], arguments["k"]], 2)
    scores = 0.7 * (arguments["q"] @ keys.transpose(2, 3))
    scores = scores + F.pad(arguments["gate"], (0, 1))[:, :, None]
    torch.testing.assert_close(lse, scores.logsumexp(3))


@pytest.mark.parametrize("gate", ["bgM", "BGM"])
def test_usage_is_the_probability_of_each_entry(gate):
    torch.manual_seed(4)
    arguments = inputs(gate=gate)
    one_hot = torch.eye(16, dtype=torch.float64)[:7].expand(2, 2, 7, 16)  # values that tell the probabilities
    arguments["memory_v"], arguments["v"] = one_hot, torch.zeros_like(arguments["v"])
    out_BHSC = cache_attention(*arguments.values())
    probabilities = out_BHSC[..., :7].unflatten(1, (2, 2)).sum((2, 3))  # [B, G, M]
    arguments["memory_v"] = torch.randn_like(one_hot)
    found = subject.usage(*arguments.values())
    torch.testing.assert_close(found, probabilities.detach().sum_to_size(arguments["gate"].shape))


def test_gradients_in_fp64():
    torch.manual_seed(5)
    arguments = inputs(B=1, S=3, L=4, M=3, C=4, gate="bgM", valid=None)
    leaves = [arguments[name] for name in NAMES]
    assert torch.autograd.gradcheck(lambda *x: subject.attend(*x, window=2), leaves)


def test_parts_of_the_keys_merge_to_the_whole():
    torch.manual_seed(6)
    arguments = inputs(L=0, M=6)
    arguments["valid"][0, :3] = False  # the first part has nothing for this row
    whole = subject.attend(*arguments.values())
    parts = []
    for cut in (slice(0, 3), slice(3, 6)):
        own = {name: arguments[name][:, :, cut] for name in ("memory_k", "memory_v", "gate")}
        parts.append(subject.attend(*{**arguments, **own, "valid": arguments["valid"][:, cut]}.values()))
    merged = subject.merge(*(torch.stack(x, 2) for x in zip(*parts, strict=True)), 2)
    for found, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(found, expected)


def choices(arguments: dict, num_blocks: int, causal: bool) -> torch.Tensor:
    """`retrieve`, in loops."""
    q, memory_k, gate, valid = (arguments[name] for name in ("q", "memory_k", "gate", "valid"))
    (B, H, S, C), (_, G, M, _) = q.shape, memory_k.shape
    chosen = torch.zeros(B, G, math.ceil(S / TILE), math.ceil(M / BLOCK), dtype=torch.bool)
    for b, g, tile in torch.cartesian_prod(*(torch.arange(n) for n in chosen.shape[:3])).tolist():
        bounds = []
        for block in range(chosen.shape[3]):
            best = -math.inf
            for h in range(g * H // G, (g + 1) * H // G):
                queries = q[b, h, tile * TILE : (tile + 1) * TILE]
                query = queries[0] if causal else queries.mean(0)
                entries = [m for m in range(block * BLOCK, min(M, block * BLOCK + BLOCK)) if valid[b, m]]
                if entries:
                    gates = gate[b, g, entries]
                    key = (gates.softmax(0)[:, None] * memory_k[b, g, entries]).sum(0)
                    best = max(best, (gates.logsumexp(0) + C**-0.5 * key @ query).item())
            bounds.append(best)
        ranked = sorted(range(len(bounds)), key=lambda block: -bounds[block])
        for block in ranked[:num_blocks]:
            chosen[b, g, tile, block] = bounds[block] > -math.inf
    return chosen


@pytest.mark.parametrize("causal", [True, False])
def test_retrieval_takes_the_blocks_of_the_best_bounds(causal):
    torch.manual_seed(7)
    arguments = inputs(S=TILE + 9, L=0, M=4 * BLOCK - 3)
    arguments["valid"][:, :BLOCK] = False
    q, memory_k, gate, valid = (arguments[name] for name in ("q", "memory_k", "gate", "valid"))
    for number in (1, 2, 4):
        found = subject.retrieve(q, memory_k, gate, valid[:, None], 0.25, number, causal)
        assert torch.equal(found, choices(arguments, number, causal))
        assert not found[..., 0].any() and (found.sum(3) == min(number, 3)).all()


def test_retrieval_reads_what_it_chose():
    torch.manual_seed(8)
    arguments = inputs(B=1, S=TILE + 2, L=TILE + 2, M=3 * BLOCK, valid=None)
    q, memory_k, gate = (arguments[name] for name in ("q", "memory_k", "gate"))
    chosen = subject.retrieve(q, memory_k, gate, None, 0.25, 2, True)
    assert chosen[:, :, 0].ne(chosen[:, :, 1]).any()
    found = gradients(cache_attention, arguments, top_k=BLOCK + 1)
    for tile, rows in enumerate((slice(0, TILE), slice(TILE, None))):
        for g in range(2):
            kept = chosen[0, g, tile].repeat_interleave(BLOCK)
            own = {**arguments, "valid": kept[None]}
            expected = masked_attention(*own.values())[:, 2 * g : 2 * g + 2, rows]
            torch.testing.assert_close(found["out"][:, 2 * g : 2 * g + 2, rows], expected)
    dense = cache_attention(*arguments.values())
    assert torch.equal(cache_attention(*arguments.values(), top_k=3 * BLOCK), dense)
    assert not torch.allclose(found["out"], dense)


def test_retrieval_does_not_leak_the_future():
    torch.manual_seed(9)
    arguments = inputs(S=20, L=20, M=6 * BLOCK)
    later = {**arguments, "q": arguments["q"].clone()}
    later["q"].data[:, :, 1:] = torch.randn(2, 4, 19, 16) * 9
    outputs = [cache_attention(*x.values(), top_k=BLOCK)[:, :, 0] for x in (arguments, later)]
    assert torch.equal(*outputs)


def test_one_graph_under_torch_compile():
    torch.manual_seed(10)
    arguments = inputs(M=2 * BLOCK, dtype=torch.float32)
    compiled = torch.compile(cache_attention, fullgraph=True, backend="aot_eager")
    expected = gradients(cache_attention, arguments, top_k=5)
    for name, value in gradients(compiled, arguments, top_k=5).items():
        torch.testing.assert_close(value, expected[name])


@pytest.fixture
def choice():
    yield
    subject.use("auto")


def test_what_runs_and_why(choice):
    subject.use("reference")
    assert subject.describe(CPU, torch.bfloat16, 64) == "plain PyTorch (kernels are not asked for)"
    subject.use("auto")
    assert "compute capability 8.0" in subject.describe(CPU, torch.bfloat16, 64)
    assert "heads of 16, 32, 64, 128 values" in subject.describe(CPU, torch.bfloat16, 80)
    subject.use("triton")
    with pytest.raises(ValueError, match="no Triton kernels: kernels need an NVIDIA GPU"):
        cache_attention(*inputs().values())


@pytest.mark.gpu
def test_what_runs_on_a_gpu(choice):
    device = torch.device("cuda", 0)
    subject.use("auto")
    assert subject.describe(device, torch.float32, 64) == "plain PyTorch (kernels compute in bf16 and fp16)"
    if torch.cuda.get_device_capability(device) >= (8, 0):
        assert subject.describe(device, torch.bfloat16, 64) == "Triton kernels"
