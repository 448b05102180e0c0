"""The ring against a plain model: whatever is announced, taken, changed and cancelled, a slot holds the newest."""

import itertools
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.ring import SlotRing, make_slot
from experts.store import BankStore, Page, RowLayout, quantities, runs

EXPERTS, LAYERS = 6, 2
QUANTITIES = {
    "int8": ("weight", "exp_avg", "exp_avg_scale", "updates"),
    "bf16": ("weight", "exp_avg", "exp_avg_sq", "updates"),
    "fp32": ("weight", "exp_avg", "exp_avg_sq", "master"),
}


def make_stores(on_gpu: bool, state: str = "int8") -> list[BankStore]:
    """On a GPU page-locked, so that copies run beside computation, and long, so that they take a while."""
    layout = RowLayout(24, 1000 if on_gpu else 20)
    stores = [
        BankStore(EXPERTS, layout, quantities(state, torch.bfloat16, layout.slice_size), on_gpu)
        for _ in range(LAYERS)
    ]
    for layer, store in enumerate(stores):
        for array in store.arrays.values():
            array.copy_((torch.arange(EXPERTS) + layer * EXPERTS)[:, None].expand_as(array))
    return stores


def make_ring(stores, num_slots=3, page_size=3, device="cpu") -> SlotRing:
    slots = [make_slot(page_size, stores[0], torch.device(device)) for _ in range(num_slots)]
    return SlotRing(stores, slots, None)


@given(st.sets(st.integers(0, 20), min_size=1))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_runs_are_the_fewest_copies(chosen):
    experts = tuple(sorted(chosen))
    seen = []
    for here, there in runs(experts):
        assert list(experts[here]) == list(range(there.start, there.stop))
        assert here.start == len(seen) and there.start - 1 not in seen
        seen += range(there.start, there.stop)
    assert tuple(seen) == experts


@st.composite
def rounds(draw) -> tuple[str, list[dict]]:
    """The state that is kept, and rounds.

    A round has pages that share no expert: how many of them are taken, which are changed, how many are held at
    once, and whether the next round is announced before this one is over (which no change may precede).
    """
    drawn, state = [], draw(st.sampled_from(list(QUANTITIES)))
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 3))
        pages = []
        for layer in draw(st.permutations(range(LAYERS))):
            experts = sorted(draw(st.sets(st.integers(0, EXPERTS - 1))))
            names = draw(st.sampled_from([QUANTITIES[state], ("weight",), ("weight", "updates")]))
            light = draw(st.booleans()) and names == ("weight",)
            pages += [
                Page(layer, tuple(experts[i : i + size]), names, light) for i in range(0, len(experts), size)
            ]
        drawn.append(
            {
                "pages": pages,
                "changed": draw(st.sampled_from([(), (), ("weight",), "all"])),
                "taken": draw(st.integers(0, len(pages))),
                "held": draw(st.integers(0, 2)),
                "early": draw(st.booleans()),
            }
        )
    return state, drawn


def play(state: str, schedule: list[dict], num_slots: int, device: str, sleeps=None) -> None:
    """Run a schedule and compare each slot with the model, at the end for a GPU never waits on the way.

    sleeps: cycles by which the computation lags behind, one draw a page.
    """
    stores = make_stores(device == "cuda", state)
    newest = [{name: array.clone() for name, array in store.arrays.items()} for store in stores]
    ring, written, seen = make_ring(stores, num_slots, device=device), 100, []
    announced: deque[Page] = deque()

    def release(page, slot, changed):
        nonlocal written
        for name in changed:
            written = (written + 1) % 127  # what int8 holds
            slot.buffers[name][: len(page.experts)].fill_(written)
            newest[page.layer][name][list(page.experts)] = written
        ring.release(slot, changed)

    for number, turn in enumerate(schedule):
        if not announced:
            announced.extend(turn["pages"])
            ring.announce(turn["pages"])
        held = deque()
        for index, page in enumerate(turn["pages"][: turn["taken"]]):
            last = index == len(turn["pages"]) - 1
            assert ring.is_next(page)
            slot = ring.take(page)
            assert announced.popleft() == page
            if last and turn["early"] and not turn["changed"] and number + 1 < len(schedule):
                announced.extend(schedule[number + 1]["pages"])
                ring.announce(schedule[number + 1]["pages"])
            if sleeps is not None:
                torch.cuda._sleep(sleeps())
            for name in page.quantities:
                found = slot.buffers[name][: len(page.experts)].clone()
                seen.append((found, newest[page.layer][name][list(page.experts)], page))
            changed = page.quantities if turn["changed"] == "all" else turn["changed"]
            changed = () if page.is_light else changed
            held.append((page, slot, changed))
            while len(held) > min(turn["held"], num_slots - 1):
                release(*held.popleft())
        while held:
            release(*held.popleft())
        if announced and announced[0] in turn["pages"][turn["taken"] :]:
            ring.cancel()
            announced.clear()
            assert not ring.is_next(turn["pages"][-1])
    ring.synchronize()
    for found, expected, page in seen:
        assert torch.equal(found.cpu(), expected), page
    for store, expected in zip(stores, newest, strict=True):
        for name, array in store.arrays.items():
            assert torch.equal(array, expected[name]), name


@given(rounds(), st.integers(2, 5))
@settings(deadline=None, max_examples=300, derandomize=True)
def test_a_slot_holds_the_newest(schedule, num_slots):
    play(*schedule, num_slots, "cpu")


@pytest.mark.gpu
@given(rounds(), st.integers(2, 5), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100, derandomize=True)
def test_a_slot_holds_the_newest_while_the_gpu_lags(schedule, num_slots, random):
    play(*schedule, num_slots, "cuda", lambda: random.choice([0, 1000, 1_000_000]))


@pytest.mark.gpu
@given(rounds(), st.integers(2, 5), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_a_slot_holds_the_newest_where_another_stream_computes(schedule, num_slots, random):
    with torch.cuda.stream(torch.cuda.Stream()):
        play(*schedule, num_slots, "cuda", lambda: random.choice([0, 1000, 1_000_000]))


@pytest.mark.parametrize(("state", "parts"), [("int8", 2), ("bf16", 3), ("fp32", 7)])
def test_light_pages_share_the_memory_of_a_slot(state, parts):
    ring = make_ring(make_stores(False, state), num_slots=2, page_size=2)
    (slot, other) = ring.idle
    assert len(slot.parts) == parts
    places = sorted((b.data_ptr(), b.data_ptr() + b.nbytes) for b in slot.buffers.values())
    assert all(a[1] == b[0] for a, b in itertools.pairwise(places))
    spans = sorted((p.weight_RP.data_ptr(), p.weight_RP.data_ptr() + p.weight_RP.nbytes) for p in slot.parts)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert places[0][0] <= spans[0][0] and spans[-1][1] <= places[-1][1]

    light = [Page(layer, (e,), ("weight",), True) for layer in range(LAYERS) for e in range(EXPERTS)]
    heavy = Page(0, (0,), QUANTITIES[state])
    ring.announce([*light[: parts + 1], heavy])  # one more than a slot has parts: the second is cut too
    assert (len(ring.travelling), len(ring.idle), len(ring.idle_parts)) == (parts + 1, 0, parts - 1)
    for page in light[:parts]:
        ring.release(ring.take(page))
    assert ring.travelling[-1].page == heavy  # the first slot is whole again
    last = ring.take(light[parts])
    assert last.whole is other and ring.take(heavy) is slot


def test_uploads_run_ahead_as_far_as_slots_allow():
    ring = make_ring(make_stores(False), num_slots=3)
    pages = [Page(0, (expert,), ("weight",)) for expert in range(EXPERTS)]
    ring.announce(pages)
    assert (len(ring.travelling), len(ring.announced), len(ring.idle)) == (3, 3, 0)
    slot = ring.take(pages[0])
    assert (len(ring.travelling), len(ring.announced), len(ring.idle)) == (2, 3, 0)
    ring.release(slot)
    assert (len(ring.travelling), len(ring.announced), len(ring.idle)) == (3, 2, 0)
    ring.cancel()
    assert (len(ring.travelling), len(ring.announced), len(ring.idle)) == (0, 0, 3)


def test_pages_are_taken_in_the_announced_order():
    ring = make_ring(make_stores(False))
    first, second = (Page(0, (expert,), ("weight",)) for expert in range(2))
    ring.announce([first, second])
    assert ring.is_next(first) and not ring.is_next(second)
    with pytest.raises(AssertionError, match="order"):
        ring.take(second)


def test_what_is_announced_takes_the_place_of_other_pages():
    ring = make_ring(make_stores(False))
    pages = [Page(0, (expert,), ("weight",)) for expert in range(EXPERTS)]
    ring.announce(pages)
    ring.take(pages[0])
    ring.announce(pages[1:2])  # the next anyway: what follows stays
    assert [slot.page for slot in ring.travelling] + list(ring.announced) == pages[1:]
    ring.announce(pages[4:])
    assert [slot.page for slot in ring.travelling] + list(ring.announced) == pages[4:]
    ring.announce([])
    assert ring.is_next(pages[4])


def test_a_page_is_the_same_only_with_the_same_quantities():
    """Backward must not take for its own what forward fetched without the optimizer state."""
    ring = make_ring(make_stores(False))
    ring.announce([Page(0, (0, 1), ("weight",))])
    assert not ring.is_next(Page(0, (0, 1), ("weight", "exp_avg")))
    assert not ring.is_next(Page(1, (0, 1), ("weight",)))
    assert ring.is_next(Page(0, (0, 1), ("weight",)))


@pytest.mark.gpu
def test_uploads_run_beside_computation():
    """A page announced while the compute stream sleeps has arrived before the stream wakes up."""
    ring = make_ring(make_stores(True), device="cuda")
    page = Page(0, (0, 1, 2), ("weight",))
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    asleep = torch.cuda.Event()
    asleep.record()
    ring.announce([page])
    ring.travelling[0].uploaded.synchronize()
    assert not asleep.query(), "the upload waited for the computation"
    torch.cuda.synchronize()
