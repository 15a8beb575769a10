"""The PTX machine itself: programs of a few lines whose numbers are known, and laws that they break."""

import ml_dtypes
import numpy as np
import pytest
from ptx_cases import kernel, result

from experiments.ptx_machine import Descriptor, Pointer, Schedule, laws

OWN_PLACE = "mul.wide.u32 %rd9, %r0, 4; add.s64 %rd8, %rd0, %rd9;"
OUT = OWN_PLACE + " st.global.b32 [%rd8], %r1;"
F = lambda value: "0f" + np.float32(value).tobytes()[::-1].hex().upper()
BITS = lambda value: int(np.float32(value).view(np.uint32))

# Statements that leave %r1, and what it is. %r2 is 7, %r3 is -7, %r4 is 0x80000000, %r5 is 1.5.
RESULTS = {
    "add": ("add.s32 %r1, %r2, -9;", -2),
    "wraps": ("add.s32 %r1, %r4, %r4;", 0),
    "division-rounds-to-zero": ("div.s32 %r1, %r3, 2;", -3),
    "remainder-has-the-sign-of-the-dividend": ("rem.s32 %r1, %r3, 4;", -3),
    "unsigned-division": ("div.u32 %r1, %r3, 2;", 0x7FFFFFFC),
    "high-half": ("mul.hi.s32 %r1, %r3, 1431655766;", -3),
    "wide": ("mul.wide.s32 %rd5, %r3, 3; cvt.u32.u64 %r1, %rd5;", -21),
    "mad": ("mad.lo.s32 %r1, %r2, %r3, 50;", 1),
    "arithmetic-shift": ("shr.s32 %r1, %r3, 1;", -4),
    "logical-shift": ("shr.u32 %r1, %r4, 31;", 1),
    "shift-by-all-bits": ("mov.b32 %r6, 32; shl.b32 %r1, %r2, %r6;", 0),
    "field": ("bfe.u32 %r1, %r3, 4, 3;", 7),
    "signed-field": ("bfe.s32 %r1, %r2, 2, 1;", -1),
    "bytes": ("mov.b32 %r6, 0x11223344; mov.b32 %r7, 0x55667788; prmt.b32 %r1, %r6, %r7, 0x5410;", 0x77883344),
    "signs-of-bytes": ("mov.b32 %r7, 0x55667788; prmt.b32 %r1, %r7, 0, 0x8088;", -0x770001 & 0xFFFFFFFF),
    "select": ("setp.lt.s32 %p1, %r3, 0; selp.b32 %r1, 5, 6, %p1;", 5),
    "unordered": ("setp.neu.f32 %p1, 0f7FC00000, 0f7FC00000; selp.b32 %r1, 5, 6, %p1;", 5),
    "compare-and": ("setp.eq.s32 %p2, 1, 1; setp.eq.and.b32 %p1, 2, 2, %p2; selp.b32 %r1, 5, 6, %p1;", 5),
    "compare-or-not": ("setp.eq.s32 %p2, 1, 1; setp.lt.or.s32 %p1, 3, 2, !%p2; selp.b32 %r1, 5, 6, %p1;", 6),
    "compare-xor": ("setp.eq.s32 %p2, 1, 1; setp.eq.xor.s32 %p1, 2, 2, %p2; selp.b32 %r1, 5, 6, %p1;", 6),
    "ordered": ("setp.ne.f32 %p1, 0f7FC00000, %r5; selp.b32 %r1, 5, 6, %p1;", 6),
    "guard": ("mov.b32 %r1, 1; setp.eq.s32 %p1, %r2, 7; @!%p1 mov.b32 %r1, 2;", 1),
    "fma": (f"fma.rn.f32 %r1, %r5, %r5, {F(-0.25)};", BITS(2.0)),
    "minimum-leaves-nan-out": ("min.f32 %r1, 0f7FC00000, %r5;", BITS(1.5)),
    "minimum-keeps-nan": ("min.NaN.f32 %r1, 0f7FC00000, %r5;", BITS(np.nan)),
    "to-even": (f"cvt.rni.f32.f32 %r1, {F(2.5)};", BITS(2.0)),
    "to-zero": (f"cvt.rzi.s32.f32 %r1, {F(-2.7)};", -2),
    "lower-byte": ("mov.b16 %rs1, 0x12fe; cvt.s16.s8 %rs2, %rs1; cvt.s32.s16 %r1, %rs2;", -2),
    "into-a-wider-register": ("cvt.s8.s32 %rs1, 0x1fe; cvt.s32.s16 %r1, %rs1;", -2),
    "power": (f"ex2.approx.ftz.f32 %r1, {F(-3)};", BITS(0.125)),
    "two-halves": (f"cvt.rn.bf16x2.f32 %r1, {F(1)}, {F(-2)};", 0x3F80C000),
    "rounds-to-even": (f"cvt.rn.bf16.f32 %rs1, {F(1 + 2**-8)}; cvt.f32.bf16 %r1, %rs1;", BITS(1.0)),
    "unpack": ("mov.b32 {%rs1, %rs2}, %r3; mov.b32 %r1, {%rs2, %rs1};", 0xFFF9FFFF),
    "local-names": ("mov.b32 %r1, 1; { .reg .b32 a; mov.b32 a, 4; add.s32 %r1, a, %r1; }", 5),
}


@pytest.mark.parametrize("statements, expected", RESULTS.values(), ids=RESULTS)
def test_arithmetic(statements, expected):
    start = f"mov.b32 %r2, 7; mov.b32 %r3, -7; mov.b32 %r4, 0x80000000; mov.b32 %r5, {F(1.5)};"
    found = result(kernel(start + statements + OUT, 1))
    assert (found == expected & 0xFFFFFFFF).all(), hex(found[0])


def test_lanes_exchange_values():
    found = result(kernel("shfl.sync.bfly.b32 %r1, %r0, 5, 31, -1;" + OUT, 1))
    np.testing.assert_array_equal(found, np.arange(128) ^ 5)
    found = result(kernel("shfl.sync.idx.b32 %r1, %r0, 3, 31, -1;" + OUT, 1))
    np.testing.assert_array_equal(found, np.arange(128) // 32 * 32 + 3)


def test_a_loop():
    """The sum of 1 to 10."""
    loop = "mov.b32 %r1, 0; mov.b32 %r2, 0; $L: add.s32 %r2, %r2, 1; add.s32 %r1, %r1, %r2;"
    found = result(kernel(loop + "setp.lt.s32 %p1, %r2, 10; @%p1 bra $L;" + OUT, 1))
    assert (found == 55).all()


SHARED = "mov.b64 %rd4, __dynamic_shmem__0; mul.wide.u32 %rd5, %r0, 4; add.s64 %rd6, %rd4, %rd5;"
NEIGHBOUR = "xor.b32 %r2, %r0, 64; mul.wide.u32 %rd5, %r2, 4; add.s64 %rd7, %rd4, %rd5; ld.shared.b32 %r1, [%rd7];"


def exchange(between):
    return kernel(SHARED + "st.shared.b32 [%rd6], %r0;" + between + NEIGHBOUR + OUT, 1)


@pytest.mark.parametrize("apart", [False, True], ids=["lockstep", "apart"])
def test_warps_exchange_values_in_shared_memory(apart):
    schedule = Schedule(apart=apart)
    np.testing.assert_array_equal(result(exchange("bar.sync 0;"), schedule=schedule), np.arange(128) ^ 64)
    with pytest.raises(laws.DataRace, match=r"kernel small, PTX line 9: .*look for a bar\.sync"):
        result(exchange(""), schedule=schedule)


def test_a_barrier_of_memory_orders_what_was_written():
    """All threads arrive; the first warp initialises, and a barrier of the block tells the others."""
    setup = "setp.eq.s32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [%rd4+4096], 128; bar.sync 0;"
    meet = "mbarrier.arrive.release.cta.shared::cta.b64 _, [%rd4+4096], 1;"
    wait = "mov.b32 %r9, 0; mbarrier.try_wait.parity.shared.b64 %p2, [%rd4+4096], %r9, 1000;"
    store = "st.shared.b32 [%rd6], %r0;"
    found = result(kernel(SHARED + setup + store + meet + wait + NEIGHBOUR + OUT, 1), schedule=Schedule(3, apart=True))
    np.testing.assert_array_equal(found, np.arange(128) ^ 64)
    with pytest.raises(laws.DataRace):
        result(kernel(SHARED + setup + store + meet + NEIGHBOUR + OUT, 1), schedule=Schedule(3, apart=True))
    with pytest.raises(laws.NotDrained):
        result(kernel(SHARED + setup + "@%p1 " + meet + "mov.b32 %r1, 0;" + OUT, 1))
    with pytest.raises(laws.Deadlock):
        result(kernel(SHARED + setup + wait + "mov.b32 %r1, 0;" + OUT, 1))


def test_transposed_matrices():
    """A matrix of 8 x 8 that is stored and loaded transposed is transposed."""
    row = "mov.b64 %rd4, __dynamic_shmem__0; mul.wide.u32 %rd5, %r0, 16; add.s64 %rd6, %rd4, %rd5;"
    move = """stmatrix.sync.aligned.m8n8.x1.shared.b16 [%rd6], {%r0};
        ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r1}, [%rd6];"""
    found = result(kernel(row + move + OUT, 1, threads=32), size=32).view(np.uint16)
    stored = np.arange(32, dtype=np.uint32).view(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(found.reshape(8, 8), stored.T)


# --------------------------------------------------------------------------------------------------- the async proxy

ELECT = "setp.eq.s32 %p1, %r0, 0; mov.b64 %rd4, __dynamic_shmem__0;"
BARRIER = "@%p1 mbarrier.init.shared.b64 [%rd4+8192], 1; fence.mbarrier_init.release.cluster; bar.sync 0;"
TMA = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
FIND = "mov.b64 %rd10, small_param_2; cvta.param.u64 %rd11, %rd10;"
LOAD = f"{FIND} @%p1 {TMA} [%rd4], [%rd11, {{0, 1}}], [%rd4+8192];"
EXPECT = "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%rd4+8192], {};"
WAIT = "mov.b32 %r9, 0; mbarrier.try_wait.parity.shared.b64 %p2, [%rd4+8192], %r9, 1000;"
READ = "mul.wide.u32 %rd5, %r0, 4; add.s64 %rd6, %rd4, %rd5; ld.shared.b32 %r1, [%rd6];"
PLACE = "mul.wide.u32 %rd9, %r0, 4; add.s64 %rd8, %rd1, %rd9; st.global.b32 [%rd8], %r1;"


def loaded(text, swizzle=16, schedule=None):
    words = Descriptor(Pointer(0), 4, (6, 32), (32, 1), (4, 32), swizzle)
    array = np.arange(6 * 32, dtype=np.uint32)
    return result(kernel(text, 2, more=[words]), array, schedule=schedule).reshape(4, 32)


COPY = ELECT + BARRIER + EXPECT.format(512) + LOAD + WAIT + READ + PLACE


@pytest.mark.parametrize("late", [False, True], ids=["any-time", "late"])
def test_a_box_of_an_array(late):
    """Four rows from the second on."""
    array = np.arange(192).reshape(6, 32)
    np.testing.assert_array_equal(loaded(COPY, schedule=Schedule(late=late)), array[1:5])


def test_beyond_an_array_are_zeros():
    text = COPY.replace("{0, 1}", "{-2, 4}")
    expected = np.zeros((4, 32))
    expected[:2, 2:] = np.arange(192).reshape(6, 32)[4:, :30]
    np.testing.assert_array_equal(loaded(text), expected)


def test_swizzle_of_128_bytes():
    """In row r, the 16 bytes number c are at place c ^ r."""
    expected = np.arange(192).reshape(6, 32)[1:5].reshape(4, 8, 4).copy()
    for row in range(4):
        expected[row] = expected[row][np.arange(8) ^ row]
    np.testing.assert_array_equal(loaded(COPY, swizzle=128), expected.reshape(4, 32))


BROKEN_COPIES = {
    "no-wait": (COPY.replace(WAIT, ""), laws.NotDelivered),
    "too-few-bytes": (COPY.replace("], 512;", "], 256;"), laws.TransactionBytes),
    "too-many-bytes": (COPY.replace("], 512;", "], 516;"), laws.Deadlock),
    "no-fence-of-the-barrier": (COPY.replace("fence.mbarrier_init.release.cluster;", ""), laws.MissingProxyFence),
    "misaligned": (COPY.replace("bytes [%rd4],", "bytes [%rd4+64],"), laws.BadAddress),
    "no-barrier-there": (COPY.replace("{0, 1}], [%rd4+8192]", "{0, 1}], [%rd4+8200]"), laws.BadAddress),
}


@pytest.mark.parametrize("text, law", BROKEN_COPIES.values(), ids=BROKEN_COPIES)
def test_a_copy_breaks_a_law(text, law):
    with pytest.raises(law):
        loaded(text)


STORE = f"""{SHARED} setp.eq.s32 %p1, %r0, 0; st.shared.b32 [%rd6], %r0;
    fence.proxy.async; bar.sync 0; @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%rd4], 512;
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;"""


def test_a_bulk_store():
    np.testing.assert_array_equal(result(kernel(STORE, 1)), np.arange(128))


@pytest.mark.parametrize(
    "missing, law",
    [
        ("fence.proxy.async;", laws.MissingProxyFence),
        ("bar.sync 0;", laws.DataRace),
        ("cp.async.bulk.wait_group 0;", laws.NotDrained),
        ("cp.async.bulk.commit_group;", laws.NotDrained),
    ],
)
def test_a_bulk_store_lacks_something(missing, law):
    with pytest.raises(law):
        result(kernel(STORE.replace(missing, ""), 1))


TOUCHES = {
    "load": (1, "ld.global.b32 %r1, [%rd0];"),
    "copy": (1, COPY),
    "store": (0, OUT),
    "bulk-store": (0, STORE),
}


@pytest.mark.parametrize("inputs, text", TOUCHES.values(), ids=TOUCHES)
def test_a_kernel_that_starts_early_waits_before_it_touches_memory(inputs, text):
    array = np.arange(192, dtype=np.uint32)
    more = [Descriptor(Pointer(0), 4, (6, 32), (32, 1), (4, 32), 16)] * inputs
    run = lambda text: result(kernel(text, inputs + 1, more=more), *[array] * inputs)
    run("griddepcontrol.wait; griddepcontrol.launch_dependents;" + text)
    with pytest.raises(laws.TooEarly):
        run(text + "griddepcontrol.wait;")


def test_what_goes_no_further_than_the_l2_may_be_fetched_before_that():
    """Whatever the place in the array; but there has to be one."""
    prefetch = f"{FIND} cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd11, {{0, 100}}]; griddepcontrol.wait;"
    np.testing.assert_array_equal(loaded(prefetch + COPY), np.arange(192).reshape(6, 32)[1:5])
    with pytest.raises(laws.BadAddress):
        loaded(prefetch.replace("[%rd11", "[%rd1") + COPY)


# ------------------------------------------------------------------------------------------------------- products

ZEROS = " ".join(f"mov.b32 %r{16 + i}, 0;" for i in range(4))
ONES = " ".join(f"mov.b32 %r{24 + i}, 0x3F803F80;" for i in range(4))
DESCRIPTOR = """cvt.u32.u64 %r2, %rd4; shr.u32 %r2, %r2, 4; cvt.u64.u32 %rd12, %r2;
    or.b64 %rd12, %rd12, 0x4000004000010000;"""
MULTIPLY = """{ .reg .pred p; setp.ne.b32 p, 1, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
    {%r16,%r17,%r18,%r19}, {%r24,%r25,%r26,%r27}, %rd12, p, 1, 1, 0; }"""
FETCH = COPY.removesuffix(READ + PLACE)
PRODUCT = f"""{FETCH} {ZEROS} {ONES} {DESCRIPTOR}
    wgmma.fence.sync.aligned; {MULTIPLY} wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    mul.wide.u32 %rd9, %r0, 16; add.s64 %rd8, %rd1, %rd9; st.global.v4.b32 [%rd8], {{%r16, %r17, %r18, %r19}};"""


def multiplied(text, right, apart=False):
    """Ones [64, 16] times right [8, 16] transposed; in the order of the threads' sums."""
    tile = Descriptor(Pointer(0), 2, (8, 64), (64, 1), (8, 64), 128)
    array = np.zeros((8, 64), ml_dtypes.bfloat16)
    array[:, :16] = right
    text = text.replace("], 512;", "], 1024;").replace("{0, 1}", "{0, 0}")
    return result(kernel(text, 2, more=[tile]), array, size=512, schedule=Schedule(apart=apart)).view(np.float32)


@pytest.mark.parametrize("apart", [False, True], ids=["lockstep", "apart"])
def test_a_product(apart):
    """Thread t has columns 2 (t % 4) and the next, of rows t / 4 % 8 and 8 further down."""
    right = np.arange(128).reshape(8, 16) % 11
    found = multiplied(PRODUCT, right, apart).reshape(32, 4, 2, 2)  # row, pair of columns, upper or lower, column
    sums = right.sum(axis=1).reshape(4, 2)
    np.testing.assert_array_equal(found, np.broadcast_to(sums[None, :, None], found.shape))


@pytest.mark.parametrize(
    "change, law",
    [
        (("wgmma.fence.sync.aligned;", ""), laws.RegisterInFlight),
        (("wgmma.wait_group.sync.aligned 0;", ""), laws.RegisterInFlight),
        (
            ("wgmma.commit_group.sync.aligned;", "mov.b32 %r24, 0; wgmma.commit_group.sync.aligned;"),
            laws.RegisterInFlight,
        ),
        (("0x4000004000010000", "0x0000004000010000"), laws.UnknownInstruction),
    ],
    ids=["no-fence", "no-wait", "an-operand-is-overwritten", "no-swizzle"],
)
def test_a_product_breaks_a_law(change, law):
    with pytest.raises(law):
        multiplied(PRODUCT.replace(*change), np.ones((8, 16)))


# --------------------------------------------------------------------------------------------------------- clusters

PEERS = "mov.u32 %r10, %cluster_ctarank; xor.b32 %r11, %r10, 1;"
MEET = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
REMOTE = """cvt.u32.u64 %r12, %rd4; add.s32 %r12, %r12, 8192;
    @%p1 mapa.shared::cluster.u32 %r13, %r12, %r11; @%p1 mbarrier.arrive.shared::cluster.b64 _, [%r13];"""
SHARE = f"""{ELECT} {PEERS} {BARRIER} {MEET} {EXPECT.format(512)} mov.b16 %rs1, 3;
    setp.eq.s32 %p3, %r10, 0; and.pred %p4, %p1, %p3;
    {FIND} @%p4 {TMA}.multicast::cluster [%rd4], [%rd11, {{0, 1}}], [%rd4+8192], %rs1;
    {WAIT} {READ} shl.b32 %r14, %r10, 7; add.s32 %r14, %r14, %r0;
    mul.wide.u32 %rd9, %r14, 4; add.s64 %rd8, %rd1, %rd9; st.global.b32 [%rd8], %r1;"""


def shared_by_two(text, seed=0):
    words = Descriptor(Pointer(0), 4, (6, 32), (32, 1), (4, 32), 16)
    array = np.arange(6 * 32, dtype=np.uint32)
    made = kernel(text, 2, blocks=2, cluster=2, more=[words])
    return result(made, array, size=256, schedule=Schedule(seed, apart=bool(seed % 2), late=seed < 2)).reshape(2, 4, 32)


@pytest.mark.parametrize("seed", range(4))
def test_one_copy_for_two_blocks(seed):
    """The first block fetches; its bytes land in both, and complete the barrier of each."""
    found = shared_by_two(SHARE, seed)
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(192).reshape(6, 32)[1:5], found.shape))


BROKEN_CLUSTERS = {
    "to-one-only": (SHARE.replace("%rs1, 3", "%rs1, 1"), laws.Deadlock),
    "to-a-block-that-is-not-there": (SHARE.replace("%rs1, 3", "%rs1, 7"), laws.BadAddress),
    "the-peer-may-not-have-begun": (SHARE.replace(MEET, ""), (laws.DataRace, laws.BadAddress)),
}


@pytest.mark.parametrize("text, law", BROKEN_CLUSTERS.values(), ids=BROKEN_CLUSTERS)
def test_a_cluster_breaks_a_law(text, law):
    with pytest.raises(law):
        shared_by_two(text)


ARRIVALS = ELECT + PEERS + BARRIER + MEET + REMOTE + WAIT + "mov.b32 %r1, 5;" + OUT


@pytest.mark.parametrize("seed", range(4))
def test_blocks_arrive_at_each_other_s_barriers(seed):
    schedule = Schedule(seed, apart=bool(seed % 2))
    assert (result(kernel(ARRIVALS, 1, blocks=2, cluster=2), schedule=schedule) == 5).all()


def test_a_block_must_not_exit_while_its_peer_arrives():
    with pytest.raises(laws.PeerGone):
        result(kernel(ARRIVALS.replace(WAIT, ""), 1, blocks=2, cluster=2))


# ------------------------------------------------------------------------------------------------------------- laws

BROKEN = {
    "unknown": ("frobnicate.b32 %r1, %r0;", laws.UnknownInstruction),
    "unknown-form": ("add.sat.s32 %r1, %r0, %r0;", laws.UnknownInstruction),
    "unknown-register": ("mov.u32 %r1, %clock;", laws.UnknownInstruction),
    "width": ("add.s32 %r1, %rd0, 1;", laws.UnknownInstruction),
    "misaligned": ("ld.global.v2.b32 {%r1, %r2}, [%rd0+4];", laws.BadAddress),
    "before-an-array": ("st.global.b32 [%rd0+-4], %r0;", laws.BadAddress),
    "behind-an-array": ("ld.global.b32 %r1, [%rd0+512];", laws.BadAddress),
    "behind-shared-memory": ("mov.b64 %rd4, __dynamic_shmem__0; ld.shared.b32 %r1, [%rd4+16384];", laws.BadAddress),
    "different-values": ("st.global.b32 [%rd0], %r0;", laws.DataRace),
    "a-branch-within-a-warp": ("setp.lt.s32 %p1, %r0, 5; @%p1 bra $L; mov.b32 %r1, 0; $L:", laws.Divergence),
    "too-few-threads": ("bar.sync 1, 160;", laws.Deadlock),
}


@pytest.mark.parametrize("statements, law", BROKEN.values(), ids=BROKEN)
def test_a_program_breaks_a_law(statements, law):
    with pytest.raises(law, match="kernel small, PTX line"):
        result(kernel(statements, 1))


def test_an_array_that_is_only_read_cannot_be_written():
    with pytest.raises(laws.BadAddress, match="only read"):
        result(kernel("mov.b32 %r1, 0;" + OUT, 2), np.zeros(128, np.uint32))


def test_blocks_of_a_grid_are_not_ordered():
    with pytest.raises(laws.DataRace, match="another cluster"):
        result(kernel("mov.u32 %r1, %ctaid.x;" + OUT, 1, blocks=2))


def test_what_nothing_wrote_is_nan():
    assert np.isnan(result(kernel(SHARED + "ld.shared.b32 %r1, [%rd6];" + OUT, 1)).view(np.float32)).all()
