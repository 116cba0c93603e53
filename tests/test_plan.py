"""The table of `trimask plan`, and the numbers that it returns."""

from types import SimpleNamespace

import pytest

from trimask.scripts import plan

WORDS = [
    "trimodal_1b", "--device-kind", "h100", "--row-length", "1024", "--batch-tokens", str(1 << 20), "--accumulate", "2",
    "--mfu", "0.5", "--horizon-tokens", str(10**12), "--mesh.fsdp", "4",
]  # fmt: skip


def planned(monkeypatch, *words):
    tables = []
    monkeypatch.setattr(plan, "table", lambda *shown: tables.append(shown) or "")
    found = plan.main([*WORDS, *words])
    ((title, columns, rows),) = tables
    assert columns == ["", ""]
    return found, title, dict(rows)


def test_the_whole_table(monkeypatch):
    found, title, rows = planned(monkeypatch, "--devices", "8")
    assert title == "trimodal_1b on 8 h100: closed form"
    assert rows == {
        "parameters": "1,072,870,528: blocks 663,552,000, embeddings 409,255,168",
        "training FLOPs of a token": "4.53 G",
        "mesh": "data 2 × fsdp 4 × tensor 1",
        "a step": "1,048,576 tokens: 64 rows of 1,024 per device × 2",
        "memory of a device": "21.34 GB of 80.00 GB",
        "  state (exact)": "4.30 GB",
        "  activations, loss, gradients": "14.87 GB",
        "  copies of weights": "2.17 GB",
        "most rows per device": "336",
        "sent by a device in a step": "13.46 GB: 0.0299 s at 450 GB/s, if nothing overlaps",
        "computing a step": "1.2 s at 50% of 989 TFLOP/s",
        "tokens/s": "874,077",
        "the horizon": "1,000,000,000,000 tokens: 953,674 steps",
        "  takes": "13.24 days, 2,542 device-hours",
    }
    # A step of 8 · ½ · 989 TFLOP/s; state is four numbers of four bytes of a quarter of the parameters, and a little.
    assert found["step_seconds"] == pytest.approx(2**20 * 4.53e9 / (8 * 0.5 * 989e12), rel=1e-2)
    assert found["state"] == pytest.approx(4 * 1_072_870_528, rel=1e-2)
    assert found["rest"] == found["memory"] - found["state"] and found["days"] == pytest.approx(13.24, abs=0.01)
    assert (found["parameters"], found["max_rows"]) == (1_072_870_528, 336)


def test_beyond_eight_devices_the_links_between_hosts_count(monkeypatch):
    _, title, rows = planned(monkeypatch, "--devices", "16")
    assert title == "trimodal_1b on 16 h100: closed form"
    assert rows["mesh"] == "data 4 × fsdp 4 × tensor 1"
    assert rows["a step"] == "1,048,576 tokens: 32 rows of 1,024 per device × 2"
    assert rows["sent by a device in a step"] == "13.78 GB: 0.276 s at 50 GB/s, if nothing overlaps"
    assert rows["  takes"] == "6.62 days, 2,542 device-hours"


def test_rows_that_are_no_whole_number_are_rounded_and_said(monkeypatch, capsys):
    _, _, rows = planned(monkeypatch, "--devices", "8", "--batch-tokens", str(45 * 1024 * 8))
    assert "Note: 22.5 rows for each device and micro-batch; planned with 22." in capsys.readouterr().out
    assert rows["a step"] == "360,448 tokens: 22 rows of 1,024 per device × 2"


@pytest.mark.parametrize("parts", [1, 2])
def test_what_xla_plans_stands_beside_it(monkeypatch, parts):
    """The bytes sent are compared only if no loop hides exchanges."""
    analysis = SimpleNamespace(argument_size_in_bytes=2 * 10**9, temp_size_in_bytes=0)
    compiled = SimpleNamespace(memory_analysis=lambda: analysis, as_text=lambda: "a program")
    tables, asked, told = [], [], []
    monkeypatch.setattr(plan, "table", lambda *shown: tables.append(shown) or "")
    monkeypatch.setattr(plan, "_compiled", lambda config, vocabulary, arguments, rows: asked.append(rows) or compiled)
    monkeypatch.setattr(plan, "sent_bytes", lambda *what: {("a program", 8): 10**9}[what])
    monkeypatch.setattr(plan.jax.config, "update", lambda *what: told.append(what))
    words = ["--devices", "8", "--check", "--accumulate", str(parts)]
    words += ["--model.attention", "plain", "--model.blocks", "unrolled"]
    found = plan.main([*WORDS, *words])
    assert told == [("jax_num_cpu_devices", 8)] and asked == [128 // parts]
    title, columns, lines = tables[1]
    assert title == "compiled for 8 simulated devices" and columns == ["a device", "closed form", "XLA", "ratio"]
    expected = [
        ["state", plan._gb(found["state"]), "2.00 GB", f"{found['state'] / 2e9:.2f}"],
        ["all else in memory", plan._gb(found["rest"]), "0.00 MB", ""],
        ["sent in a step, by CPUs", plan._gb(found["cpu_sent"]), "1.00 GB", f"{found['cpu_sent'] / 1e9:.2f}"],
    ]
    assert lines == (expected if parts == 1 else expected[:2])
    theirs = {"xla_state": 2 * 10**9, "xla_rest": 0} | ({"xla_cpu_sent": 10**9} if parts == 1 else {})
    assert {name: value for name, value in found.items() if name.startswith("xla")} == theirs
    assert found["cpu_sent"] != found["sent"] > 0


def test_small_memories_are_in_megabytes():
    assert (plan._gb(9_999_999), plan._gb(1e7)) == ("10.00 MB", "0.01 GB")
