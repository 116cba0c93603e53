"""Collective operations of compiled programs, as XLA prints them."""

import pytest

from trimask.scripts.collectives import sent_bytes

NUM_DEVICES = 5


def sent(*exchanges: str) -> float:
    lines = [f"  %exchange.{number} = {text}" for number, text in enumerate(exchanges)]
    return sent_bytes("\n".join(["ENTRY %main {", "  %a = f32[7,9]{1,0} parameter(0)", *lines, "}"]), NUM_DEVICES)


@pytest.mark.parametrize(
    ("exchange", "expected"),
    [
        # A device lacks two thirds of 6 × 5 numbers.
        ("f32[6,5]{1,0} all-gather(%a), channel_id=1, replica_groups={{0,2,4},{1,3,5}}, dimensions={0}", 4 * 20),
        # Two arrays; all sums are made, and passed on.
        ("(f32[4]{0}, pred[]) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%add", 2 * 17 / 2),
        # The result on each device has 3 × 2 numbers, and each of the three others receives as many.
        ("bf16[3,2]{1,0} reduce-scatter(%a), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add", 2 * 6 * 3),
        ("(f32[4,2]{1,0}, f32[4,2]{1,0}) all-to-all(%a, %b), replica_groups={{0,2},{1,3}}", 4 * 16 / 2),
        ("s32[3]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}", 4 * 3),
    ],
)
def test_each_kind_sends_what_a_ring_does(exchange, expected):
    assert sent(exchange) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[4,2]<=[2,2,2]T(0,2,1)", 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", 2),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0','axis_2'}", 8),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", 4),
        ("{}", NUM_DEVICES),
    ],
)
def test_groups_are_read_in_every_notation(groups, size):
    exchange = f"u8[3]{{0}} reduce-scatter(%a), channel_id=1, replica_groups={groups}, dimensions={{0}}, to_apply=%add"
    assert sent(exchange) == 3 * (size - 1)


@pytest.mark.parametrize(
    ("asynchronous", "synchronous"),
    [
        (
            "(f32[2,5]{1,0}, f32[6,5]{1,0:T(8,128)}) all-gather-start(%a), replica_groups={{0,1,2}}",
            "f32[6,5]{1,0} all-gather(%a), replica_groups={{0,1,2}}",
        ),
        (
            "((f32[2], s8[3]), (f32[6], s8[9])) all-gather-start(%a, /*index=1*/%b), replica_groups={{0,1,2}}",
            "(f32[6], s8[9]) all-gather(%a, %b), replica_groups={{0,1,2}}",
        ),
        (
            "(f32[6]{0}, f32[9]{0}) all-reduce-start(%a, %b), replica_groups={}, to_apply=%add",
            "(f32[6]{0}, f32[9]{0}) all-reduce(%a, %b), replica_groups={}, to_apply=%add",
        ),
        (
            "((f32[6]{0}), f32[2]{0}) reduce-scatter-start(%a), replica_groups={{0,1,2}}, to_apply=%add",
            "f32[2]{0} reduce-scatter(%a), replica_groups={{0,1,2}}, to_apply=%add",
        ),
        (
            "(f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1}}",
            "f32[6]{0} collective-permute(%a), source_target_pairs={{0,1}}",
        ),
    ],
)
def test_an_exchange_that_others_overlap_counts_once(asynchronous, synchronous):
    kind = synchronous.split("(%")[0].split()[-1]
    done = f"f32[6]{{0}} {kind}-done(%exchange.0)"
    assert sent(asynchronous, done) == sent(synchronous) > 0
