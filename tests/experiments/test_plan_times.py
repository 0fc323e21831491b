"""Reading a program's text: how often each part runs, what it moves, how long."""

import types

import numpy as np
import pytest

from experiments.planning import published, roofline, traffic
from experiments.planning import topology as topologies

pytestmark = pytest.mark.once

HLO = """HloModule jit_step

%fused (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %n = f32[8,4]{1,0} negate(%p), backend_config={"estimated_cycles":"1000"}
}

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y)
}

%begin (q: f32[8,4]) -> f32[64,4] {
  %q = f32[8,4]{1,0} parameter(0)
  ROOT %all-gather.7 = f32[64,4]{1,0} all-gather(%q), channel_id=3, dimensions={0}
}

%inner_body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %e = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %f = f32[8,4]{1,0} fusion(%e), calls=%fused, backend_config={"estimated_cycles":"5"}
  %w = (f32[64,4]{1,0}, u32[]) fusion(%e), calls=%begin
  ROOT %r = (s32[], f32[8,4]{1,0}) tuple(%c, %f)
}

%inner_condition (t: (s32[], f32[8,4])) -> pred[] {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(6)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %g = bf16[2,8]{1,0:T(8,128)(2,1)} all-reduce(%h), channel_id=1, to_apply=%sum
  ROOT %while.1 = (s32[], f32[8,4]{1,0}) while(%t), condition=%inner_condition, body=%inner_body
}

%condition (t: (s32[], f32[8,4])) -> pred[] {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %u = pred[] get-tuple-element(%t), index=0
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %while.2 = (s32[], f32[8,4]{1,0}) while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %s = (f32[8]{0}, f32[64]{0}) all-gather-start(%a), channel_id=9, dimensions={0}
  %d = f32[64]{0} all-gather-done(%s)
  %k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %out = f32[8,4]{1,0} copy(%a), backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501


def test_hlo_by_hand():
    found = traffic.read(HLO)
    # the fusion's own estimate, 5 in each of 6 x 10 trips, not those inside it
    assert found.cycles == 5 * 60 + 7 and found.opaque == 1
    assert found.bytes_by_kind() == {
        "all-gather": 60 * 64 * 4 * 4 + 64 * 4,
        "all-reduce": 10 * 2 * 8 * 2,
    }
    with pytest.raises(ValueError, match="has no ENTRY"):
        traffic.read("HloModule nothing")


MOVES = """HloModule jit_step

%sliced (stack: bf16[32,8,128], i: s32[]) -> bf16[8,128] {
  %stack = bf16[32,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %ds = bf16[1,8,128]{2,1,0} dynamic-slice(%stack, %i, %i, %i), dynamic_slice_sizes={1,8,128}
  ROOT %b = bf16[8,128]{1,0} bitcast(%ds)
}

%updated (stack: bf16[32,8,128], new: bf16[1,8,128], i: s32[]) -> bf16[32,8,128] {
  %stack = bf16[32,8,128]{2,1,0} parameter(0)
  %new = bf16[1,8,128]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %dus = bf16[32,8,128]{2,1,0} dynamic-update-slice(%stack, %new, %i, %i, %i)
}

%start (p: bf16[4,128]) -> (bf16[4,128], bf16[16,128]) {
  %p = bf16[4,128]{1,0} parameter(0)
  %ag = bf16[16,128]{1,0} all-gather(%p), channel_id=3, replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %t = (bf16[4,128]{1,0}, bf16[16,128]{1,0}) tuple(%p, %ag)
}

%async_collective_fusion.1 (p: bf16[4,128], x: f32[8]) -> (bf16[4,128], f32[8]) {
  %p = bf16[4,128]{1,0} parameter(0)
  %x = f32[8]{0} parameter(1)
  %ag = bf16[16,128]{1,0} all-gather(%p), channel_id=3, replica_groups=[4,4]<=[16], dimensions={0}
  %n = f32[8]{0} negate(%x)
  ROOT %t = (bf16[4,128]{1,0}, f32[8]{0}) tuple(%p, %n)
}

ENTRY %main (s: bf16[32,8,128], p: bf16[4,128], x: f32[8]) -> f32[8] {
  %s = bf16[32,8,128]{2,1,0} parameter(0)
  %p = bf16[4,128]{1,0} parameter(1)
  %x = f32[8]{0} parameter(2)
  %i = s32[]{:S(6)} constant(3)
  %a = bf16[8,128]{1,0} fusion(%s, %i), kind=kLoop, calls=%sliced
  %v = bf16[8,128]{1,0:S(1)} copy(%a)
  %u = bf16[32,8,128]{2,1,0} fusion(%s, %a, %i), kind=kLoop, calls=%updated
  %async-collective-start = (bf16[4,128]{1,0}, bf16[16,128]{1,0}) fusion(%p), kind=kCustom, calls=%start
  %q = bf16[4,128]{1,0} get-tuple-element(%async-collective-start), index=0
  %f = (bf16[4,128]{1,0}, f32[8]{0}) fusion(%q, %x), kind=kCustom, calls=%async_collective_fusion.1
  %h = (bf16[8,128]{1,0:S(5)}, bf16[8,128]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %hd = bf16[8,128]{1,0:S(5)} copy-done(%h)
  ROOT %o = f32[8]{0} get-tuple-element(%f), index=1
}
"""  # noqa: E501


def test_what_a_program_moves_by_hand():
    found = traffic.read(MOVES)
    layer, all_of_it = 8 * 128 * 2, 16 * 128 * 2
    # the slice read and written; read once more to the chip's own memory; updated: read
    # and written; negated: read and written; sent to the host: read; gathered: written
    assert found.hbm == 2 * layer + layer + 2 * layer + 2 * 32 + layer + all_of_it
    assert found.host == layer
    # one transfer, though three instructions take part in it
    (gathered,) = found.collectives
    assert gathered == ("all-gather", "bf16[16,128]", all_of_it, 1, (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
        ("replica_groups={}", ()),
        ("replica_groups=[4,2]<=[2,2,2]T(2,1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("source_target_pairs={{3,0},{0,1}}", (3, 0)),
    ],
)
def test_groups(text, group):
    assert traffic.group_of(text) == group


def test_links_by_hand():
    square = [(x, y) for x in range(16) for y in range(16)]
    assert roofline.links(square, (16, 16), 16) == 4  # both ways along both dimensions
    assert roofline.links(square[:16], (16, 16), 16) == 2
    assert roofline.links(square[:4], (16, 16), 16) == 1  # a line, not a ring
    # every fourth column, with all its rows
    spread = [(x, y) for x in range(0, 16, 4) for y in range(16)]
    assert roofline.links(spread, (16, 16), 16) == 3
    cube = [(x, y, z) for x in range(4) for y in range(4) for z in range(8)]
    assert roofline.links(cube, (4, 4, 8), 4) == 6


def test_seconds_of_transfers_by_hand():
    topology = topologies.parse("v5e:4x4")
    chips = [types.SimpleNamespace(coords=(i // 4, i % 4)) for i in range(16)]
    link, rows = 50e9, (0, 1, 2, 3)  # one link: a line of four
    cases = {
        ("all-gather", ()): 15 / 16 / (2 * link),
        ("all-gather", rows): 3 / 4 / link,
        ("all-reduce", rows): 2 * 3 / 4 / link,
        ("reduce-scatter", rows): 3 / link,
        ("all-to-all", rows): 3 / 4 / link,
        ("collective-permute", (0, 1)): 1 / (2 * link),
    }
    for (kind, group), each in cases.items():
        one = traffic.Collective(kind, "", 10**9, 7, group)
        found = roofline.transfer_seconds([one, one], chips, topology)
        np.testing.assert_allclose(found, 2 * 7e9 * each)


def test_a_step_is_its_longest_term_or_their_sum():
    times = roofline.Times(products=3.0, recomputed=1.0, hbm=2.0, transfers=0.5)
    assert times.together == 4.0 and times.apart == 6.5


def test_published_runs_have_the_published_utilisation():
    """From the shapes alone: 6 operations per weight, 12 per token pair and width."""
    for run in published.RUNS:
        config, topology = run.config(), topologies.parse(run.topology)
        fields = config.model.published
        width, hidden = fields.hidden_size, fields.intermediate_size
        shared = width * fields.num_key_value_heads // fields.num_attention_heads
        layer = width * (2 * width + 2 * shared + 3 * hidden)
        (length,) = config.data.lengths
        each = 6 * (fields.num_hidden_layers * layer + width * fields.vocab_size)
        each += 12 * fields.num_hidden_layers * width * length
        mfu = each * run.pace / topology.chip.flops
        assert mfu == pytest.approx(run.mfu, rel=0.025), run.name
        assert config.data.batch_size % topology.chips == 0
