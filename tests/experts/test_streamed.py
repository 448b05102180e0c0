"""Streamed banks equal resident ones whose gradients are given to the same optimizer, row by row."""

from types import SimpleNamespace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from experts.resident import ResidentBank
from experts.store import PROJECTIONS
from experts.streamed import StreamedExperts, StreamSettings, export_name
from kernels.adamw import AdamW, clip_factors, sum_of_squares, update_rows
from kernels.reference import Routing, inverse, route
from model import PragnosiaForCausalLM
from model.presets import preset_config
from training.weights import fill, initial_weights

LAYERS, EXPERTS, WIDTH, EXPERT_WIDTH, TOKENS, ACTIVE = 3, 6, 32, 24, 20, 2
CONFIG = SimpleNamespace(
    num_experts=EXPERTS, hidden_size=WIDTH, moe_intermediate_size=EXPERT_WIDTH, num_hidden_layers=LAYERS
)
SOURCE = initial_weights(0, 0.2)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def settings(**changes) -> StreamSettings:
    defaults = {
        "page_size": 2, "num_slots": 2, "state": "fp32", "accumulate": False, "fetch_all": True,
        "max_norm": 0.5, "adamw": AdamW(1e-2, 0.9, 0.95, 1e-8, 0.1), "seed": 0,
    }  # fmt: skip
    return StreamSettings(**(defaults | changes))


class Streamed:
    """A chain of streamed banks."""

    def __init__(self, device="cpu", dtype=torch.float32, **changes):
        self.experts = StreamedExperts(CONFIG, settings(**changes), torch.device(device), dtype)
        self.banks = [self.experts.build_bank(CONFIG) for _ in range(LAYERS)]
        self.experts.fill(SOURCE)
        self.boundary = True
        self.experts.attach(SimpleNamespace(is_gradient_accumulation_boundary=lambda: self.boundary))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.experts.tensors()}

    def backward(self, loss, boundary):
        loss.backward()


class Resident:
    """The same with parameters, updated after backward by the optimizer's specification."""

    def __init__(self, device="cpu", dtype=torch.float32, **changes):
        self.settings = settings(**changes)
        self.banks = [ResidentBank(CONFIG).to(device, dtype) for _ in range(LAYERS)]
        self.state = []
        for layer, bank in enumerate(self.banks):
            for name in PROJECTIONS:
                parameter = getattr(bank, name)
                parameter.data.copy_(SOURCE(export_name(layer, name), parameter.shape, None))
            moments = torch.zeros(2, EXPERTS, 3 * WIDTH * EXPERT_WIDTH)
            state = {"exp_avg": moments[0], "exp_avg_sq": moments[1]}
            self.state.append({"updates": torch.zeros(EXPERTS, 1, dtype=torch.int32), **state})

    def weights(self) -> dict[str, torch.Tensor]:
        return {
            export_name(layer, name): getattr(bank, name).detach().cpu().clone()
            for layer, bank in enumerate(self.banks)
            for name in PROJECTIONS
        }

    def backward(self, loss, boundary):
        loss.backward()
        if not boundary:
            return
        s = self.settings
        for bank, state in zip(self.banks, self.state, strict=True):
            parameters = [getattr(bank, name) for name in PROJECTIONS]
            rows = torch.cat([p.detach().flatten(1) for p in parameters], 1).cpu()
            grads = torch.cat([p.grad.flatten(1) for p in parameters], 1).cpu()
            factors = clip_factors(sum_of_squares(grads), s.max_norm)
            update_rows(state | {"weight": rows}, grads, factors, s.adamw, 0)
            parts = rows.split([p[0].numel() for p in parameters], 1)
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data.copy_(part.view(parameter.shape))
                parameter.grad = None


def batch(step: int, device, dtype, bias=None):
    """Tokens and, a layer, router logits; some experts get nothing in some layers and steps."""
    generator = torch.Generator().manual_seed(step)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    logits = torch.randn(LAYERS, TOKENS, EXPERTS, generator=generator)
    logits[step % LAYERS, :, [step % EXPERTS, (step + 1) % EXPERTS]] -= 50
    return hidden.to(device, dtype).requires_grad_(), logits.to(device).requires_grad_()


def forward(model, hidden, logits):
    for bank, layer_logits in zip(model.banks, logits, strict=True):
        routing, _ = route(layer_logits, ACTIVE)
        hidden = hidden + bank(hidden, routing)
    return hidden


def train(model, steps=3, accumulation=1, device="cpu", dtype=torch.float32) -> list[torch.Tensor]:
    """Output, and gradients of hidden states and logits, of every microbatch."""
    seen = []
    for step in range(steps):
        for micro in range(accumulation):
            model.boundary = micro == accumulation - 1
            hidden, logits = batch(step * accumulation + micro, device, dtype)
            output = forward(model, hidden, logits)
            model.backward(output.float().pow(2).sum(), model.boundary)
            seen += [output.detach().cpu(), hidden.grad.cpu(), logits.grad.cpu()]
    return seen


def assert_same(mine, oracle, tolerance):
    for found, expected in zip(mine, oracle, strict=True):
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error < tolerance, error.item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fetch_all", [True, False])
@pytest.mark.parametrize(
    ("page_size", "num_slots", "accumulation"), [(1, 2, 2), (2, 3, 1), (4, 2, 1), (4, 2, 2), (6, 4, 2)]
)
def test_streamed_equals_resident(page_size, num_slots, accumulation, fetch_all, device):
    changes = {"page_size": page_size, "num_slots": num_slots, "fetch_all": fetch_all}
    streamed = Streamed(device, accumulate=accumulation > 1, **changes)
    resident = Resident(device, **changes)
    found = train(streamed, accumulation=accumulation, device=device)
    expected = train(resident, accumulation=accumulation, device=device)
    assert_same(found, expected, 1e-5)
    weights, oracle = streamed.weights(), resident.weights()
    assert_same(weights.values(), [oracle[name] for name in weights], 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_bf16_stays_near_resident_fp32(state, device):
    streamed = Streamed(device, torch.bfloat16, state=state)
    found = train(streamed, device=device, dtype=torch.bfloat16)
    expected = train(Resident(device), device=device)
    # Few large values make the norms: 0.6% to 2.3%, by the batch and by what is rounded.
    assert_same(found[:3], expected[:3], 4e-2 if device == "cuda" else 2e-2)
    assert_same(found[3:], expected[3:], 2e-1)


def rows_of(experts: StreamedExperts, layer: int) -> dict[str, torch.Tensor]:
    """A copy of everything that is kept of a layer."""
    experts.ring.synchronize()
    return {name: array.clone() for name, array in experts.stores[layer].arrays.items()}


def record_pages(experts: StreamedExperts) -> list:
    """A list that grows by each page that is taken."""
    taken, take = [], experts.ring.take

    def recording(page):
        taken.append(page)
        return take(page)

    experts.ring.take = recording
    return taken


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("fetch_all", [True, False])
def test_experts_without_tokens_are_left_as_they_are(fetch_all, state, device):
    """Not a bit of weights, moments and count changes, and backward does not fetch them; the others do change."""
    changes = {"fetch_all": fetch_all, "state": state, "page_size": 2}
    streamed = Streamed(device, torch.bfloat16, **changes)
    train(streamed, steps=2, device=device, dtype=torch.bfloat16)  # no moment is 0 any more
    before, taken = (
        [rows_of(streamed.experts, layer) for layer in range(LAYERS)],
        record_pages(streamed.experts),
    )
    hidden, logits = batch(2, device, torch.bfloat16)
    with torch.no_grad():
        logits[:, :, [0, 3]] -= 50
    output = forward(streamed, hidden, logits)
    fetched = [expert for page in taken for expert in page.experts]
    assert len(fetched) == LAYERS * EXPERTS if fetch_all else not {0, 3} & set(fetched)
    taken.clear()
    output.float().sum().backward()
    assert taken and not {0, 3} & {expert for page in taken for expert in page.experts}
    for layer in range(LAYERS):
        used = {expert for page in taken if page.layer == layer for expert in page.experts}
        assert len(used) >= ACTIVE
        for name, array in rows_of(streamed.experts, layer).items():
            for expert in range(EXPERTS):
                same = torch.equal(array[expert], before[layer][name][expert])
                assert same == (expert not in used), (layer, name, expert)


def routing_to(experts: list[int], device="cpu") -> Routing:
    """Token t goes to experts[t] alone."""
    ids_TK = torch.tensor(experts, device=device)[:, None]
    weights_TK = torch.ones(ids_TK.shape, device=device, requires_grad=True)
    counts_E = torch.bincount(ids_TK.flatten(), minlength=EXPERTS)
    order_N = ids_TK.flatten().argsort(stable=True)
    return Routing(ids_TK, weights_TK, counts_E, order_N, inverse(order_N)[:, None])


class Poison(torch.autograd.Function):
    """The same values; a gradient of NaN for the token given."""

    @staticmethod
    def forward(ctx, hidden_TD, token):
        ctx.token = token
        return hidden_TD.clone()

    @staticmethod
    def backward(ctx, grad_TD):
        grad_TD = grad_TD.clone()
        grad_TD[ctx.token, 0] = float("nan")
        return grad_TD, None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_that_is_not_finite_leaves_out_its_expert_alone(accumulation, state, device):
    streamed = Streamed(device, torch.bfloat16, state=state, accumulate=accumulation > 1)
    (bank, *_), experts = streamed.banks, streamed.experts
    generator = torch.Generator().manual_seed(0)

    def microbatch(number: int, poisoned: int | None, boundary: bool):
        streamed.boundary = boundary
        hidden = torch.randn(12, WIDTH, generator=generator).to(device, torch.bfloat16).requires_grad_()
        output = bank(hidden, routing_to([t % 4 + number for t in range(12)], device))
        (output if poisoned is None else Poison.apply(output, poisoned)).float().pow(2).sum().backward()
        return hidden.grad

    before = rows_of(experts, 0)
    for number in range(accumulation):  # token 1 goes to expert 1, in the second microbatch to expert 2
        poisoned = 1 if number == 0 else None
        grad = microbatch(number, poisoned, number == accumulation - 1)
        finite = grad.isfinite().all(1).tolist()
        assert finite == [token != poisoned for token in range(12)]
    after = rows_of(experts, 0)
    for expert in range(EXPERTS):
        untouched = expert == 1 or expert > 2 + accumulation
        for name, array in after.items():
            if name != "accumulator":
                assert torch.equal(array[expert], before[name][expert]) == untouched, (name, expert)
                assert array.float().isfinite().all()
    assert experts.take_refused() == 1 and experts.take_refused() == 0
    microbatch(0, None, True)  # nothing of the NaN is left: the next update takes all of them
    final = rows_of(experts, 0)
    assert final["updates"][:, 0].tolist()[1] == 1 and experts.take_refused() == 0
    assert final["weight"].isfinite().all() and not torch.equal(final["weight"][1], after["weight"][1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("page_size", "num_slots", "fetch_all"), [(1, 2, True), (1, 2, False), (2, 3, False), (6, 4, True)]
)
def test_other_forwards_do_not_disturb(page_size, num_slots, fetch_all, device):
    """Evaluations anywhere, whole or broken off, and forwards whose backward never comes (a loss of NaN)."""
    changes = {"page_size": page_size, "num_slots": num_slots, "fetch_all": fetch_all, "accumulate": True}
    plain, disturbed = Streamed(device, **changes), Streamed(device, **changes)
    expected = train(plain, steps=4, accumulation=2, device=device)

    def evaluate(number, layers=LAYERS):
        hidden, logits = batch(number, device, torch.float32)
        with torch.no_grad():
            for bank, layer_logits in zip(disturbed.banks[:layers], logits, strict=False):
                hidden = hidden + bank(hidden, route(layer_logits, ACTIVE)[0])
        return hidden

    found = []
    for number in range(8):
        disturbed.boundary = number % 2 == 1
        evaluate(number + 50)
        forward(disturbed, *batch(number + 100, device, torch.float32))
        if number % 3:
            evaluate(number + 60, layers=1 + number % LAYERS)
        hidden, logits = batch(number, device, torch.float32)
        output = forward(disturbed, hidden, logits)
        assert torch.equal(evaluate(7), evaluate(7))
        if number % 4 == 1:
            evaluate(number + 70, layers=1)
        output.pow(2).sum().backward()
        found += [output.detach().cpu(), hidden.grad.cpu(), logits.grad.cpu()]
    assert_same(found, expected, 1e-6)
    weights, oracle = disturbed.weights(), plain.weights()
    assert_same(weights.values(), [oracle[name] for name in weights], 1e-6)


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_each_expert_is_clipped_by_itself(max_norm):
    """The first moment after one update is (1 - β1) times the gradient that was used."""
    streamed = Streamed(max_norm=max_norm)
    resident = Resident()
    norms = []
    for model in (streamed, resident):
        hidden, logits = batch(0, "cpu", torch.float32)
        forward(model, hidden, logits).mul(torch.logspace(-3, 0, TOKENS)[:, None]).pow(2).sum().backward()
    for layer, bank in enumerate(resident.banks):
        grads = torch.cat([getattr(bank, name).grad.flatten(1) for name in PROJECTIONS], 1)
        found = rows_of(streamed.experts, layer)["exp_avg"].norm(dim=1) / 0.1
        expected = grads.norm(dim=1).clamp(max=max_norm or float("inf"))
        assert torch.allclose(found, expected, rtol=1e-4), (layer, found, expected)
        norms += grads.norm(dim=1).tolist()
    assert min(filter(None, norms)) < 0.5 < max(norms)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_accumulated_microbatches_are_one_batch(state, device):
    """The state is rounded alike; only the sums of bf16 accumulators differ, stochastically."""
    whole, parts = (Streamed(device, accumulate=accumulate, state=state) for accumulate in (False, True))
    hidden, logits = batch(0, device, torch.float32)
    forward(whole, hidden, logits).pow(2).sum().backward()
    pieces = [slice(0, 1), slice(1, 2), slice(2, 11), slice(11, TOKENS)]  # single tokens leave experts unused
    for piece in pieces:
        parts.boundary = piece.stop == TOKENS
        before = parts.weights()
        forward(parts, hidden[piece].detach().requires_grad_(), logits[:, piece]).pow(2).sum().backward()
        changed = any(not torch.equal(value, before[name]) for name, value in parts.weights().items())
        assert changed == parts.boundary
    weights, oracle = parts.weights(), whole.weights()
    assert_same(weights.values(), [oracle[name] for name in weights], 1e-5 if state == "fp32" else 3e-2)
    for layer in range(LAYERS):
        found, expected = rows_of(parts.experts, layer), rows_of(whole.experts, layer)
        assert torch.equal(found["updates"], expected["updates"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_keeps_the_input_and_the_routing(dtype):
    """A token: D values of its input, and of each choice an fp32 weight and an int64 place in the order."""
    streamed = Streamed(dtype=dtype)
    hidden, logits = batch(1, "cpu", dtype)
    routing, _ = route(logits[0], ACTIVE)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = streamed.banks[0](hidden, routing)
    assert sum(tensor.nbytes for tensor in kept) == TOKENS * (WIDTH * dtype.itemsize + ACTIVE * (4 + 8))
    assert {hidden.data_ptr(), routing.order_N.data_ptr()} <= {tensor.data_ptr() for tensor in kept}
    assert output.grad_fn is not None


def checkpointed_model(layers: int) -> tuple[PragnosiaForCausalLM, StreamedExperts]:
    config = preset_config("tiny", num_hidden_layers=layers, vocab_size=64)
    experts = StreamedExperts(config, settings(page_size=4), torch.device("cpu"), torch.bfloat16)
    model = PragnosiaForCausalLM(config, experts.build_bank)
    model.placement = experts
    fill(model, initial_weights(0, 0.02))
    model.model.gradient_checkpointing = True
    return model.bfloat16(), experts


def test_with_recompute_a_layer_keeps_its_input_alone():
    """D values a token and the order of the rows; the bank's pages travel no third time."""
    kept_bytes = []
    ids = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))
    for layers in (1, 2):
        model, experts = checkpointed_model(layers)
        taken = record_pages(experts)
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids).loss
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept_bytes.append(sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own))
        assert len(taken) == 2 * layers  # pages of 4 of the 8 experts
        loss.backward()
        assert len(taken) == 4 * layers
        assert all(parameter.grad is not None for parameter in model.parameters())
    a_token = (kept_bytes[1] - kept_bytes[0]) / ids.numel()
    assert a_token == 2 * model.config.hidden_size  # and, where no hook sees it, the order of the rows


@pytest.mark.parametrize(
    ("dtype", "state"),
    [
        (torch.float32, "fp32"),
        (torch.float32, "int8"),
        *((torch.bfloat16, s) for s in ("fp32", "bf16", "int8")),
    ],
)
def test_saved_and_loaded_goes_on_bit_for_bit(tmp_path, dtype, state):
    """Stochastic rounding included, whose bits depend on the updates so far, and on the seed."""

    def model(seed=0):
        return Streamed(dtype=dtype, state=state, accumulate=True, seed=seed)

    whole, first, second, other = model(), model(), model(), model(seed=1)
    for streamed in (whole, other):
        train(streamed, steps=2, accumulation=2, dtype=dtype)
        train(streamed, steps=1, accumulation=2, dtype=dtype)
    train(first, steps=2, accumulation=2, dtype=dtype)
    first.experts.save(tmp_path)
    second.experts.load(tmp_path)
    train(second, steps=1, accumulation=2, dtype=dtype)
    assert whole.experts.passes == second.experts.passes == 6
    for layer in range(LAYERS):
        found, expected = rows_of(second.experts, layer), rows_of(whole.experts, layer)
        for name in found.keys() - {"accumulator"}:
            assert torch.equal(found[name], expected[name]), (layer, name)
    same = torch.equal(*(rows_of(m.experts, 0)["exp_avg"] for m in (whole, other)))
    assert same == (state == "fp32")  # and with it a master copy


def test_a_step_is_half_done_from_its_first_update_to_its_end():
    streamed = Streamed(accumulate=True)
    for boundary in (False, True):
        streamed.boundary = boundary
        hidden, logits = batch(0, "cpu", torch.float32)
        output = forward(streamed, hidden, logits)
        assert not streamed.experts.updating
        output.pow(2).sum().backward()
        assert streamed.experts.updating == boundary
    assert streamed.experts.take_refused() == 0 and not streamed.experts.updating
