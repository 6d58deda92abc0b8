"""The time model: reading machine code and Triton's, issuing instructions, and the arithmetic; on small texts, nothing is compiled."""

import itertools
import json
import types

import pytest

from dpt.kernels import launch
from dpt.kernels.tools import issue, library, loops, predict, predicted, sass, time_model, trips
from dpt.kernels.tools.cards import CARDS, Card

FREE = 0x000FE20000000000  # control: stall 1, no scoreboard


def control(stall=1, sets=7, releases=7, waits=0):
    return (stall | 1 << 4 | sets << 5 | releases << 8 | waits << 11) << 41


def disassembly(*rows):
    """What nvdisasm would write of instructions, (text, control), labels and lines of source."""
    found = []
    for row in rows:
        if isinstance(row, str):
            found.append(row)
        else:
            found += [f"        /*0000*/                   {row[0]} ;      /* 0x0000000000000001 */", f"      /* 0x{row[1]:016x} */"]
    return "\n".join(found)


def code(*rows):
    return sass.parse(disassembly(*rows))


def test_instructions_are_read_with_what_they_wait_for():
    """By hand, from the layout of the control word; a real word (stall 4, no scoreboards) too."""
    first, second, third = code(
        '	//## File "/somewhere/kernels/attention.py", line 193',
        ("@!P0 LDG.E.128 R4, desc[UR4][R2.64]", control(stall=2, sets=3, releases=1)),
        ("FADD R4, R4, R5", control(stall=5, waits=0b1000)),
        ("UISETP.GT.AND UP0, UPT, UR25, 0x2, UPT", 0x000FC8000BF04270),
    )
    assert (first.name, first.kind, first.predicated, first.line) == ("LDG.E.128", "LDG", True, "attention.py:193")
    assert (first.stall, first.sets, first.releases, first.waits) == (2, 3, 1, 0)
    assert (second.stall, second.sets, second.waits, second.predicated) == (5, sass.NONE, 8, False)
    assert (third.stall, third.sets, third.releases, third.waits) == (4, sass.NONE, sass.NONE, 0)


LOOPS = (
    '	//## File "/k/outer.py", line 10',
    ("MOV R1, R2", FREE),
    ".L_outer:",
    ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], R8", FREE),
    ("@!P0 BRA `(.L_spin)", FREE),
    ".L_back:",
    '	//## File "/k/inner.py", line 3',
    ".L_inner:",
    ("FADD R1, R1, R2", FREE),
    ("@P1 BRA `(.L_inner)", FREE),
    '	//## File "/k/outer.py", line 10',
    ("@P2 BRA `(.L_outer)", FREE),
    ("EXIT", FREE),
    ".L_spin:",
    ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], R8", FREE),
    ("@!P0 BRA `(.L_spin)", FREE),
    ("BRA `(.L_back)", FREE),
    ".L_end:",
    ("BRA `(.L_end)", FREE),
)


def test_loops_are_found_and_waits_are_none():
    """A wait for a copy is compiled to a spin behind the code, which branches back into it: neither is a loop; nor is the trap at the end,
    which nobody reaches."""
    reached, (outer,) = sass.loops(code(*LOOPS))
    (inner,) = outer.inner
    assert (outer.line, inner.line) == ("outer.py:10", "inner.py:3")
    assert sorted(inner.members) == [3, 4] and sorted(outer.members) == [1, 2, 3, 4, 5, 9] and max(reached) == 9


def a_loop(name, moves):
    turn = [(text, FREE) for text in ["LDG.E R4, desc[UR4][R2.64]", "STG.E desc[UR4][R6.64], R4"] * moves]
    return (f".L_{name}:", '	//## File "/k/kernel.py", line 12', *turn, (f"@P1 BRA `(.L_{name})", FREE))


def triton_loops(count):
    of_line = [trips.For(line="kernel.py:12", counter="%i", bounds=("%a", "%b", "%c")) for _ in range(count)]
    return trips.For(inner=of_line)


@pytest.mark.parametrize(
    ("moves", "count", "turns"),
    [
        ((4, 1), 1, [4]),
        ((1, 4, 1), 2, [1, 4]),
        ((4, 1), 2, [1, 1]),  # two of Triton's: neither is a remainder
        ((4, 1, 6, 2), 2, [4, 3]),
        ((1, 1), 2, [1, 1]),
    ],
)
def test_a_loop_for_the_remainder_is_no_loop_of_its_own(moves, count, turns):
    """By hand: ptxas makes four turns at once, and what remains one by one."""
    text = code(*itertools.chain(*(a_loop(f"l{place}", size) for place, size in enumerate(moves))), ("EXIT", FREE))
    _, found = sass.loops(text)
    matched = list(loops._matched("kernel", text, found, triton_loops(count), []))
    assert [times for _, _, times in matched] == turns and len({id(path[-1]) for _, path, _ in matched}) == count


@pytest.mark.parametrize("moves", [(4, 3), (1, 4), (1, 1)])
def test_a_loop_more_than_tritons_that_is_no_remainder_is_an_error(moves):
    text = code(*itertools.chain(*(a_loop(f"l{place}", size) for place, size in enumerate(moves))), ("EXIT", FREE))
    with pytest.raises(ValueError, match="kernel: the machine code has a loop of kernel.py:12 more"):
        list(loops._matched("kernel", text, sass.loops(text)[1], triton_loops(1), []))


TTGIR = """\
#loc = loc("/k/kernel.py":9:0)
module {
  tt.func public @f(%x: !tt.ptr<bf16> loc("x"(#l)), %rows: i32 loc("rows"(#l)), %depth: i32 {tt.d = 16 : i32} loc("depth"(#l))) {
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %c64_i32 = arith.constant 64 : i32 loc(#loc1)
    %tile = ttng.async_tma_copy_global_to_local %d[%c0_i32] %b : !tt.tensordesc<64x32> -> !ttg.memdesc<64x32xbf16, #s> loc(#loc1)
    %program = tt.get_program_id x : i32 loc(#loc1)
    %more = arith.muli %program, %c64_i32 : i32 loc(#loc1)
    %stop = arith.minsi %more, %rows : i32 loc(#loc1)
    %out:2 = scf.for %i = %c0_i32 to %stop step %c64_i32 iter_args(%a = %z) -> (tensor<64x32xf32>) : i32 {
      %last = arith.addi %i, %depth : i32 loc(#loc1)
      %in = scf.for %j = %i to %last step %c1_i32 iter_args(%e = %z) -> (tensor<64x32xf32>) : i32 {
        %p = ttg.async_copy_global_to_local %q, %r mask %m : tensor<32x8x!tt.ptr<bf16>, #b> -> <32x8xbf16, #s> loc(#loc1)
        %w = ttng.warp_group_dot %g, %h, %e : !ttg.memdesc<64x16xbf16, #s> * !ttg.memdesc<16x32xbf16, #s> -> tensor<64x32xf32> loc(#loc1)
        tt.store %q, %w : tensor<64x32x!tt.ptr<f32>, #b> loc(#loc1)
        scf.yield %w : tensor<64x32xf32> loc(#loc5)
      } loc(#loc5)
      scf.yield %in : tensor<64x32xf32> loc(#loc4)
    } loc(#loc4)
    tt.return loc(#loc1)
  } loc(#loc)
} loc(#loc)
#loc1 = loc("/k/kernel.py":20:4)
#loc2 = loc("/k/kernel.py":12:8)
#loc3 = loc("/k/parts.py":30:8)
#loc4 = loc("out"(#loc2))
#loc5 = loc(callsite(#loc3 at #loc1))
"""


def test_bounds_bytes_and_products_are_read():
    """By hand: 64x16 times 16x32 products, 32x8 bfloat16 copied, 64x32 float32 stored; a callee's loop is of its own file."""
    outside, scalars = trips.read(TTGIR)
    _, outer, inner = trips.walk(outside)
    assert (outer.line, inner.line) == ("kernel.py:12", "parts.py:30")
    assert (outside.copied, outer.copied, inner.copied) == (64 * 32 * 2, 0, 32 * 8 * 2)
    assert (inner.stored, inner.flops, outer.flops) == (64 * 32 * 4, 2 * 64 * 16 * 32, 0)
    assert "%last" in scalars and "%tile" not in scalars


@pytest.mark.parametrize(("program", "turns"), [(2, 2), (9, 4), (0, 0)])
def test_turns_follow_from_the_launch(program, turns):
    """By hand: 250 rows in steps of 64, to 64 times the program; the inner loop turns `depth` times in each."""
    outside, scalars = trips.read(TTGIR)
    _, outer, inner = trips.walk(outside)
    made = trips.Bounds("kernel", scalars, {"rows": 250, "depth": 5}, (10, 1, 1), (program, 0, 0))
    path = [(loop.counter, loop.bounds) for loop in (outer, inner)]
    assert made.turns(path[:1]) == turns and made.turns(path) == 5 * turns and made.turns([]) == 1


def test_a_bound_that_nobody_knows_is_an_error_with_the_kernels_name():
    """A loop over what was loaded, and one over an argument that is no number."""
    outside, scalars = trips.read(TTGIR)
    loop = outside.inner[0]
    with pytest.raises(ValueError, match=r"kernel: .* argument 'rows'"):
        trips.Bounds("kernel", scalars, {}, (1, 1, 1), (0, 0, 0)).turns([(loop.counter, loop.bounds)])
    with pytest.raises(ValueError, match="kernel: .* %loaded"):
        trips.Bounds("kernel", scalars, {}, (1, 1, 1), (0, 0, 0)).turns([("%i", ("%c0_i32", "%loaded", "%c1_i32"))])


@pytest.mark.parametrize(
    ("operation", "operands", "value"),
    [
        ("divsi", (-7, 2), -3),
        ("remsi", (-7, 2), -1),
        ("ceildivsi", (7, 2), 4),
        ("fptosi", (-1.5,), -1),
        ("select", (0, 3, 4), 4),
        ("cmpi", ("slt", 3, 4), True),
    ],
)
def test_operations_are_the_machines(operation, operands, value):
    """Division rounds to zero, as C's."""
    scalars = {"%x": [operation, *map(str, operands)]}
    assert trips.Bounds("kernel", scalars, {}, (), ()).value("%x", {}) == value


RATES = issue.Rates(tensor=1024, warp_tensor=512)


def cycles(rows, **options):
    return issue.cycles(code(*rows), RATES, **{"warps": 4, "ctas": 1, **options})


def test_one_warp_is_bound_by_its_stalls_and_many_by_the_front():
    """Eight additions that wait four cycles each take 32; of eight warps, the scheduler's front a cycle each: 64."""
    rows = [("FADD R1, R1, R2", control(stall=4))] * 8
    assert cycles(rows) == 32
    assert cycles(rows, warps=32) == pytest.approx(64, abs=4)
    assert cycles(rows, ctas=8) == cycles(rows, warps=32)


def test_pipes_are_kept():
    """A special function keeps its pipe for eight cycles, an integer operation for two, a wide load from shared memory for sixteen."""
    several = {"warps": 32, "turns": 6, "measured": 3}
    for name, kept in (
        ("MUFU.EX2 R1, R1", 8),
        ("LOP3.LUT R1, R1, R2, RZ, 0x3c, !PT", 2),
        ("LDS.128 R4, [R1]", 16),
        ("FFMA R1, R1, R1, R1", 1),
    ):
        assert cycles([(name, FREE)] * 4, **several) == pytest.approx(4 * 8 * kept, rel=0.05), name


def test_a_scoreboard_is_waited_for_and_other_warps_fill_the_wait():
    """What needs a load waits its latency; the loads of two CTAs overlap."""
    rows = [("LDG.E R1, desc[UR4][R2.64]", control(sets=0)), ("FADD R1, R1, R2", control(waits=1))]
    alone = cycles(rows)
    assert alone == pytest.approx(issue.GLOBAL, abs=10)
    assert cycles(rows, ctas=2) < 1.1 * alone


def test_a_barrier_holds_the_cta_and_no_other():
    """One warp's load is waited for by the CTA's other warp, which does not need it."""
    rows = [("LDG.E R1, desc[UR4][R2.64]", control(sets=0)), ("BAR.SYNC.DEFER_BLOCKING 0x0", control(waits=1)), ("FADD R1, R1, R2", FREE)]
    assert cycles(rows, warps=8) >= issue.GLOBAL + issue.BARRIER
    assert cycles(rows, ctas=2) == pytest.approx(cycles(rows), abs=10)


PRODUCT = [
    ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", FREE),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x0", FREE),
    *[("FADD R1, R1, R2", control(stall=4))] * 25,
]


def test_products_are_queued_and_waited_for_and_a_second_cta_hides_behind_them():
    """By hand: 64x128x16 is 64 cycles of the tensor core; alone it is waited for before 100 cycles of additions; two CTAs take turns."""
    loop = {"turns": 12, "measured": 4}
    alone = cycles(PRODUCT, **loop)
    assert alone == pytest.approx(64 + issue.TENSOR_DRAIN + 100, abs=5)
    assert cycles(PRODUCT, ctas=2, **loop) < 1.2 * alone
    assert cycles(PRODUCT, ctas=4, **loop) == pytest.approx(4 * 64, rel=0.05)
    asynchronous = [PRODUCT[0], ("WARPGROUP.DEPBAR.LE gsb0, 0x1", FREE), *PRODUCT[2:]]
    assert cycles(asynchronous, **loop) == pytest.approx(102, abs=5)


def test_copies_are_waited_for_by_the_stages():
    """A copy asked for in a turn is there `stages - 1` turns later: with more stages a turn waits for less of its latency."""
    rows = [("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR7], R8", FREE), ("UTMALDG.2D [UR8], [UR6]", FREE)]
    loop = {"turns": 20, "measured": 8}
    assert cycles(rows, stages=2, **loop) == pytest.approx(issue.COPY, rel=0.05)
    assert cycles(rows, stages=5, **loop) == pytest.approx(issue.COPY / 4, rel=0.05)


@pytest.mark.parametrize(
    ("name", "flops"), [("HGMMA.64x256x16.F32.BF16", 64 * 256 * 16 * 2 / 4), ("HMMA.16816.F32.BF16", 16 * 8 * 16 * 2), ("FFMA", 0)]
)
def test_flops_of_a_warps_instruction(name, flops):
    assert issue.tensor_flops(code((f"{name} R0, R1, R2", FREE))[0]) == flops


@pytest.mark.parametrize(
    ("name", "size"), [("LDG.E.128", 16), ("LDG.E.U16", 2), ("STS", 4), ("LDSM.16.M88.4", 16), ("LDGSTS.E.BYPASS.128", 16), ("LDS.U8", 1)]
)
def test_widths(name, size):
    assert issue.width(code((f"{name} R0, [R1]", FREE))[0]) == size


CARD = Card("made up", multiprocessors=100, clock=1.0, tensor=1000, warp_tensor=1000, l2=10, memory=1.0)
REGION = {"loops": [], "unrolled": 1, "instructions": 100, "special": 0, "barriers": 0, "waits": 0, "flops": 0, "copied": 0, "stored": 0}
LOOP = {**REGION, "loops": [["%k", "%c0", "%depth", "%c64"]], "flops": 100_000, "cycles": {"1": 200, "2": 400}}
FACTS = {
    "kernel": "kernel",
    "warps": 4,
    "ctas": 2,
    "scalars": {"%c0": ["constant", "0"], "%c64": ["constant", "64"], "%depth": ["argument", "depth"]},
    "regions": [{**REGION, "cycles": {"1": 1000, "2": 1500}}, LOOP],
}


def predicted_of(grid=(100,), moved=0, facts=FACTS, depth=640):
    return time_model.predict(time_model.Launch("x", "key", {"depth": depth}, grid, moved), {"key": facts}, CARD)


def test_a_launch_waits_for_the_program_with_most_to_do():
    """By hand: of 7 tiles the first of 3 programs has 3, the others 2; each tile costs the loop's 200 cycles, with their SLACK."""
    scalars = {"%first": ["get_program_id", "x"], "%all": ["get_num_programs", "x"], "%tiles": ["argument", "depth"]}
    facts = {
        **FACTS,
        "ctas": 1,
        "scalars": scalars,
        "regions": [FACTS["regions"][0], {**LOOP, "loops": [["%t", "%first", "%tiles", "%all"]]}],
    }
    seven, three = (predicted_of(grid=(3,), facts=facts, depth=tiles) for tiles in (7, 3))
    assert seven.microseconds - three.microseconds == pytest.approx(2 * time_model.SLACK * 200 / 1e3)
    assert seven.flops == pytest.approx(7 * 100_000) and three.flops == 3 * 100_000 and seven.idle > three.idle


def test_a_round_by_hand():
    """100 CTAs on 100 multiprocessors: the start, 1000 cycles outside, ten turns of 200, each with its slack; at 1 GHz."""
    made = predicted_of()
    alone = time_model.START + time_model.SLACK * (1000 + 10 * 200)
    assert made.microseconds == pytest.approx(alone / 1e3 + time_model.LAUNCH)
    assert made.idle == 0 and made.flops == 100 * 10 * 100_000 and made.waves == 0.5


def test_rounds_are_those_of_the_fullest():
    """150 CTAs: two on half of the multiprocessors, which all wait for. 500: two full rounds, whose ends hide one in the other, and one of
    a single CTA."""
    two, one = time_model.START + time_model.SLACK * (1500 + 10 * 400), time_model.START + time_model.SLACK * (1000 + 10 * 200)
    made = predicted_of((150,))
    assert made.microseconds == pytest.approx(two / 1e3 + time_model.LAUNCH) and made.idle == 0.25
    hidden = time_model.HIDDEN * (two - time_model.SLACK * 10 * 400)
    assert predicted_of((50, 10)).microseconds == pytest.approx((2 * two - hidden + one) / 1e3 + time_model.LAUNCH)


def limits(**changes):
    return predicted_of(facts={**FACTS, "regions": [FACTS["regions"][0], {**LOOP, **changes}]}, depth=64000).limit


def test_what_limits_is_named():
    """The resource that is in use for most of the time; latency where none is; memory where the tensors take longer."""
    assert limits() == "latency"
    assert limits(flops=200_000) == "tensor cores"
    assert limits(instructions=190) == "issue"
    assert limits(special=24) == "special functions"
    assert limits(copied=16_000) == "L2"
    assert predicted_of(moved=10**9).limit == "memory" and predicted_of(moved=10**9).microseconds == pytest.approx(1000 + time_model.LAUNCH)


def test_bytes_of_the_l2_cache_take_longer_than_the_cycles():
    """By hand: 20000 bytes a turn at 10 bytes a cycle."""
    slow = {**FACTS, "regions": [FACTS["regions"][0], {**LOOP, "copied": 20_000}]}
    extra = 10 * (2000 - time_model.SLACK * 200) + time_model.FILL
    assert predicted_of(facts=slow).microseconds == pytest.approx(predicted_of().microseconds + extra / 1e3)


def test_few_multiprocessors_get_more_of_the_l2_cache():
    """With a tenth of them at work each gets more than its share, up to what its own port takes."""
    slow = {**FACTS, "regions": [FACTS["regions"][0], {**LOOP, "copied": 20_000}]}
    saved = 10 * 2000 * (1 - 1 / time_model.ALONE)
    assert predicted_of((100,), facts=slow).microseconds - predicted_of((10,), facts=slow).microseconds == pytest.approx(saved / 1e3)


def test_a_loop_that_is_unrolled_turns_less():
    halved = {**FACTS, "regions": [FACTS["regions"][0], {**LOOP, "unrolled": 2}]}
    assert predicted_of().microseconds - predicted_of(facts=halved).microseconds == pytest.approx(time_model.SLACK * 5 * 200 / 1e3)


def test_the_libraries_reach_what_is_published():
    """cuBLAS 588 TFLOP/s, cuDNN 444 on an H100; a product of 150 columns wastes what is left of its last tile; the small ones wait."""
    h100 = CARDS["sm_90"]
    for kind, published in (("gemm", 588), ("convolution", 444)):
        made = time_model.predict(time_model.Library("x", kind, 0, 10**13, 1024, 1024), {}, h100)
        assert 10**13 / made.microseconds / 1e6 == pytest.approx(published, rel=0.02)
        uneven = time_model.predict(time_model.Library("x", kind, 0, 10**13, 150, 1024), {}, h100)
        assert uneven.microseconds / made.microseconds == pytest.approx(256 / 150, rel=0.01)
    small = time_model.predict(time_model.Library("x", "gemm", 0, 1000, 128, 768), {}, h100)
    assert small.limit == "latency" and 3 < small.microseconds < 12
    assert time_model.predict(time_model.Library("x", "other", 3 * 10**9), {}, h100).microseconds == pytest.approx(1000, rel=0.01)


def test_pytorchs_calls_are_recorded():
    """A convolution's FLOPs and depth, a product's, an element-wise call's bytes; what only looks is none."""
    import torch

    x = torch.empty(2, 8, 4, 4, dtype=torch.bfloat16, device="meta")
    with library.Recorded() as recorded:
        y = torch.nn.functional.conv2d(x, x.new_empty(16, 8, 3, 3), padding=1)
        y.view(2, 16, 16).transpose(1, 2)
        torch.mm(x.new_empty(5, 6), x.new_empty(6, 7)).add_(1)
    convolution, product, addition = recorded.calls
    assert (convolution.kind, convolution.flops, convolution.columns, convolution.depth) == ("convolution", 2 * 2 * 16 * 16 * 72, 16, 72)
    assert (product.kind, product.flops, product.depth) == ("gemm", 2 * 5 * 6 * 7, 6)
    assert (addition.kind, addition.moved) == ("other", 5 * 7 * 2)


CALL = time_model.Library("aten add", "other", 3 * 10**9)


def module(measured=None):
    return types.SimpleNamespace(forwards=lambda dtype, family: [("one", [CALL, CALL])], measured=lambda family: measured or {})


@pytest.fixture
def committed(tmp_path):
    predicted.write_before(module(), "abc1234", tmp_path)
    predicted.write(module(), tmp_path)
    return tmp_path


def test_the_committed_table_is_held_to_the_model(committed, monkeypatch):
    """It says that it is a prediction; a column of what was measured comes with the first number; and what is not current is told."""
    table = (committed / predicted.TABLE).read_text()
    assert "prediction" in table and "abc1234" in table and "| one | 2.002 | 2.002 | 2 | 2 |" in table and "measured, ms" not in table
    assert not list(predicted.problems(module(), folder=committed))
    (stale,) = predicted.problems(module({"one": 2.5}), folder=committed)
    assert "make compiled-code" in stale
    predicted.write(module({"one": 2.5}), committed)
    assert "measured, ms" in (committed / predicted.TABLE).read_text() and "| 2.500 |" in (committed / predicted.TABLE).read_text()
    monkeypatch.setattr(time_model, "LAUNCH", 2.0)  # the model is corrected: for the code before, too
    assert list(predicted.problems(module({"one": 2.5}), folder=committed))
    predicted.write(module(), committed)
    assert "| one | 2.004 | 2.004 |" in (committed / predicted.TABLE).read_text()


def test_a_record_of_other_code_is_told(committed):
    """A specialisation that no forward launches any more, by its key; the table alone would not show it."""
    predicted.ledger.write(predicted.RECORD, {"0123abc": FACTS}, committed)
    (told,) = predicted.problems(module(), folder=committed)
    assert "0123abc" in told


def bucket(shipped):
    return types.SimpleNamespace(kernel="kernel", when={"D": 64}, parent={"D": 64}, shipped=shipped)


@pytest.mark.parametrize(
    ("times", "provenance", "config"),
    [
        ((10.0, 20.0), "chosen by compiling, not measured", {"n": 1}),
        ((10.0, 10.1), "chosen by compiling, not measured", {"n": 2}),  # the table's own is as fast
        ((10.0, 20.0), "measured on an H100", {"n": 2}),
    ],
)
def test_the_fastest_is_chosen_but_never_over_what_was_measured(tmp_path, times, provenance, config):
    entries = [
        {"when": {"D": 64}, "config": {"n": 2}, "provenance": provenance},
        {"when": {}, "config": {"n": 3}, "provenance": provenance},
    ]
    (tmp_path / "sm_90.json").write_text(json.dumps({"kernel": entries}))
    ranked = [({"n": 1}, "", times[:1]), ({"n": 2}, "", times[1:])]
    predict.choose(bucket({"n": 2}), ranked, "sm_90", tmp_path)
    first, last = json.loads((tmp_path / "sm_90.json").read_text())["kernel"]
    assert first["config"] == config and last == entries[1]
    assert first["provenance"].startswith(provenance if provenance.startswith("measured") else predict.PROVENANCE)
    launch.forget_tables()


def test_a_library_has_to_be_faster_by_more_than_the_error():
    """Blind spot: a backend that is taken for a difference which the model cannot see."""
    ours, close, far = (
        ({"backend": "triton"}, "", (10.0, 40.0)),
        ({"backend": "cudnn"}, "", (9.0, 36.0)),
        ({"backend": "cublas"}, "", (7.0, 28.0)),
    )
    assert sorted((close, ours, far), key=predict.score) == [far, ours, close]
    assert predict.score(({"n": 1}, "", (10.0, 40.0))) == predict.score(ours) == pytest.approx(20.0)


def test_no_entry_is_made_for_what_the_table_has(tmp_path):
    """Blind spot: an entry for few rows that is a copy of that for all."""
    content = json.dumps({"kernel": [{"when": {}, "config": {"n": 2}, "provenance": ""}]})
    (tmp_path / "sm_90.json").write_text(content)
    predict.choose(bucket({"n": 2}), [({"n": 1}, "", (10.0,)), ({"n": 2}, "", (10.1,))], "sm_90", tmp_path)
    assert (tmp_path / "sm_90.json").read_text() == content


def test_what_the_gates_refuse_is_not_chosen(tmp_path, monkeypatch):
    """In the shipped tables the fastest may not pass in all cases that the entry serves: the next best is written."""
    entries = [{"when": {"D": 64}, "config": {"n": 3}, "provenance": ""}, {"when": {}, "config": {"n": 3}, "provenance": ""}]
    (tmp_path / "sm_90.json").write_text(json.dumps({"kernel": entries}))

    def refuses(kernel, when, family):
        config = json.loads((tmp_path / "sm_90.json").read_text())[kernel][0]["config"]
        return ["spills"] if config == {"n": 1} else []

    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    monkeypatch.setattr(predict.tune, "entry_problems", refuses)
    predict.choose(bucket({"n": 3}), [({"n": 1}, "", (10.0,)), ({"n": 2}, "", (11.0,)), ({"n": 3}, "", (12.0,))], "sm_90", tmp_path)
    assert json.loads((tmp_path / "sm_90.json").read_text())["kernel"][0]["config"] == {"n": 2}
    launch.forget_tables()
