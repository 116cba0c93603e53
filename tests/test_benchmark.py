"""`trimask benchmark sample`: its table, and that it compares the same tokens of the same weights."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from trimask.scripts.benchmark import main

SMALL = ["--sizes", "64x1", "--vocabulary", "50", "--prompt", "4", "--generated", "4", "--block", "2", "--steps", "4"]
QUICK = [*SMALL, "--rows", "1", "2", "--repeats", "1", "--caches", "none", "dual"]

FAKE = '''
"""Stands in for a Python with PyTorch: answers every case with one token, and says what it was given."""
import json, sys
import numpy as np
spec, weights = json.load(open(sys.argv[2])), np.load(sys.argv[3])
json.dump({"spec": spec, "shapes": {n: weights[n].shape for n in weights}}, open("seen.json", "w"))
for case in spec["cases"]:
    for rows in spec["rows"]:
        tokens = [prompt + [9] * spec["generated"] for prompt in spec["prompts"][:rows]]
        print(json.dumps({"case": case, "rows": rows, "seconds": [4.0, 2.0, 3.0], "tokens": tokens}))
'''


def test_every_case_has_its_line_and_numbers_that_fit(tmp_path):
    main(["sample", str(tmp_path / "out"), *QUICK])
    cases = json.loads((tmp_path / "out/sample.json").read_text())["cases"]
    assert [(c["rows"], c["cache"]) for c in cases] == [(r, c) for r in (1, 2) for c in ("none", "dual")]
    for case in cases:
        assert case["evaluations"] == 4 and case["seconds"] > 0
        assert case["tokens_per_second"] == pytest.approx(case["rows"] * 4 / case["seconds"])
    assert (tmp_path / "out/sample.md").read_text().count("| trimask |") == 4


def test_other_code_gets_our_weights_and_prompts_and_is_compared(tmp_path, monkeypatch):
    python = tmp_path / "python"
    (tmp_path / "fake.py").write_text(FAKE)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/fake.py "$@"\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    main(["sample", "out", *QUICK, "--llada", "a", "--fast-dllm", "b", "--python", str(python)])
    cases = json.loads(Path("out/sample.json").read_text())["cases"]
    theirs = [c for c in cases if c["code"] != "trimask"]
    assert [c["code"] for c in theirs] == ["LLaDA"] * 2 + ["Fast-dLLM"] * 4
    assert all(c["seconds"] == 3.0 and 0 <= c["same_tokens"] < 1 for c in theirs)
    ours = {(c["rows"], c["cache"]): c["seconds"] for c in cases if c["code"] == "trimask"}
    assert all(c["speedup"] == pytest.approx(3.0 / ours[c["rows"], c["cache"]]) for c in theirs)
    seen = json.loads(Path("seen.json").read_text())
    assert np.shape(seen["spec"]["prompts"]) == (2, 4)
    vocabulary, shapes = seen["spec"]["vocabulary"], seen["shapes"]
    assert shapes["model.transformer.wte.weight"] == [vocabulary, 64]
    assert shapes["model.transformer.ff_out.weight"] == [vocabulary, 64]
    assert shapes["model.transformer.blocks.0.ff_proj.weight"] == [seen["spec"]["mlp_width"], 64]


def test_an_error_of_the_other_python_is_shown(tmp_path):
    with pytest.raises(RuntimeError, match="failed"):
        main(["sample", str(tmp_path / "out"), *QUICK, "--fast-dllm", "b", "--python", "/bin/false"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--sizes", "100x2"], "width that 64 divides"),
        (["--steps", "5", "--block", "32"], "share the steps evenly"),
        (["--llada", "x"], "needs --fast-dllm"),
        (["--rows", "0"], "at least 1"),
    ],
)
def test_impossible_arguments_end_with_a_message(tmp_path, capsys, words, reason):
    with pytest.raises(SystemExit):
        main(["sample", str(tmp_path / "out"), *words])
    assert reason in " ".join(capsys.readouterr().err.replace("│", " ").split())
