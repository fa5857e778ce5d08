"""Counting bytes, kernels and control flow, on HLO that is written by hand."""

from tests import hlo_bytes

HLO = """
HloModule round

%slice (p.0: bf16[4,100,50], p.1: s32[]) -> bf16[100,50] {
  %p.0 = bf16[4,100,50]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,100,50]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero)
  ROOT %flat = bf16[100,50]{1,0} bitcast(%one)
}

%update (p.2: f32[1000,8], p.3: f32[1,8], p.4: s32[]) -> f32[1000,8] {
  %p.2 = f32[1000,8]{1,0} parameter(0)
  %p.3 = f32[1,8]{1,0} parameter(1)
  %p.4 = s32[] parameter(2)
  ROOT %new = f32[1000,8]{1,0} dynamic-update-slice(%p.2, %p.3, %p.4, %p.4)
}

%body (p.5: (bf16[4,100,50], s32[])) -> (bf16[4,100,50], s32[]) {
  %p.5 = (bf16[4,100,50]{2,1,0}, s32[]) parameter(0)
  %weights = bf16[4,100,50]{2,1,0} get-tuple-element(%p.5), index=0
  %turn = s32[] get-tuple-element(%p.5), index=1
  %mine = bf16[100,50]{1,0} fusion(%weights, %turn), kind=kLoop, calls=%slice
  %sum = bf16[100,50]{1,0} all-reduce(%mine), replica_groups={}, to_apply=%add
  ROOT %next = (bf16[4,100,50]{2,1,0}, s32[]) tuple(%weights, %turn)
}

%small (p.6: f32[10]) -> f32[10] {
  %p.6 = f32[10]{0} parameter(0)
  ROOT %copy.1 = f32[10]{0} copy(%p.6)
}

%large (p.7: f32[10]) -> f32[10] {
  %p.7 = f32[10]{0} parameter(0)
  %copy.2 = f32[10]{0} copy(%p.7)
  ROOT %copy.3 = f32[10]{0} copy(%copy.2)
}

ENTRY %main (a: bf16[4,100,50], b: f32[1000,8], c: f32[1,8], d: f32[10]) -> f32[1000,8] {
  %a = bf16[4,100,50]{2,1,0} parameter(0)
  %b = f32[1000,8]{1,0} parameter(1)
  %c = f32[1,8]{1,0} parameter(2)
  %d = f32[10]{0} parameter(3)
  %zero.1 = s32[] constant(0)
  %start = (bf16[4,100,50]{2,1,0}, s32[]) tuple(%a, %zero.1)
  %loop = (bf16[4,100,50]{2,1,0}, s32[]) while(%start), condition=%test, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
  %chosen = f32[10]{0} conditional(%zero.1, %d, %d), branch_computations={%small, %large}
  %kernel = f32[10]{0} custom-call(%d, %c), custom_call_target="mosaic_gpu_v2"
  ROOT %written = f32[1000,8]{1,0} fusion(%b, %c, %zero.1), kind=kLoop, calls=%update
}
"""


def items():
    def kernel_bytes(operands, result):
        assert (operands, result) == (["f32[10]{0}", "f32[1,8]{1,0}"], "f32[10]{0}")
        return 7.0

    return hlo_bytes.Program(*hlo_bytes.parse(HLO), kernel_bytes).items


def bytes_of(kind):
    return [(item.bytes, item.times) for item in items() if item.kind == kind]


def test_what_slices_read_and_updates_write_counts_and_not_their_buffers():
    matrix = 100 * 50 * 2
    assert bytes_of("fusion") == [(matrix + 4 + matrix, 4), (2 * 8 * 4 + 4, 1)]


def test_loops_multiply_and_of_branches_the_larger_counts():
    assert bytes_of("collective") == [(100 * 50 * 2, 4)]
    assert bytes_of("copy") == [(80, 1), (80, 1)]
    assert bytes_of("conditional") == [(0, 1)]
    assert bytes_of("mosaic") == [(7, 1)]
    assert sum(item.kernels * item.times for item in items()) == 4 + 4 + 2 + 1 + 1
    assert "all-reduce" in hlo_bytes.largest(items(), 2)[1]


def test_a_condition_in_a_command_buffer_keeps_nobody_waiting(tmp_path):
    lines = (
        "000: kCommandBuffer [source | sink]",
        "    001: kConditional [source | sink]",
        "        002: kCustomKernel [source | sink] add",
        "003: kConditional [source | sink]",
        "  branch:",
        "    000: kCommandBuffer [source | sink]",
        "        004: kWhile [source | sink]",
        "    005: kWhile [source | sink]",
    )
    file = tmp_path / "module.thunk_sequence_after_thunk_passes.txt"
    file.write_text("\n".join(lines))
    thunks = hlo_bytes.read_thunks(tmp_path)
    assert len(thunks) == 7
    assert hlo_bytes.outside(thunks, "Conditional") == 1
    assert hlo_bytes.outside(thunks, "While") == 1
