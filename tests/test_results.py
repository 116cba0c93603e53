"""RESULTS.md begins with the claims, as the studies' verdicts in docs/results have them.

To take over new verdicts:

    python tests/test_results.py
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from trimask.diffusion.studies.findings import markdown_table
from trimask.diffusion.studies.verdict import FILE, Verdict, load_verdict

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "docs" / "results"
BEGIN, END = "<!-- claims: written by python tests/test_results.py -->\n", "<!-- end of claims -->\n"
TRANSFER = "hyperparameter-transfer-completedp-and-the-sde-rule"
_MOST_CHARACTERS = 260
"""Length of a command, above which it is cut."""
WANTED = {
    "the loss is flat in the batch below the critical batch": TRANSFER,
    "the critical batch predicts that of another horizon": TRANSFER,
    "the exponent γ of the SDE rule's horizon": "",
    "a scaling law predicts larger models": "",
    "a mixture of modalities is predicted": "",
    "activations and updates keep their size (coordinate check)": TRANSFER,
    "the learning rate transfers": TRANSFER,
    "multipliers transfer": TRANSFER,
}
"""Claim that no verdict decides yet → section of RESULTS.md that measured it without a stated rule; empty: none."""


def verdicts() -> Iterator[tuple[str, Verdict]]:
    for path in sorted(STUDIES.rglob(FILE)):
        yield path.parent.relative_to(STUDIES).as_posix(), load_verdict(path.parent)


def table() -> str:
    rows = {
        (claim.claim, claim.effect): [
            f"[{claim.claim}](docs/results/{name}/README.md)",
            f"**{claim.verdict}**" + (f": {claim.more} would decide" if claim.more else ""),
            claim.effect,
            f"`{_cut(verdict.command)}`",
            verdict.date,
        ]
        for name, verdict in reversed(list(verdicts()))
        for claim in reversed(verdict.claims)  # that which several studies found in the same way, of the first of them
    }
    wanted = [
        [claim, f"[without a stated rule, or by a former objective](#{section})" if section else "not yet"]
        for claim, section in WANTED.items()
    ]
    decided = markdown_table(
        ["claim", "verdict", "effect with 95 % interval", "command", "decided"], list(rows.values())[::-1]
    )
    return f"{decided}\n\nClaims without a verdict:\n\n{markdown_table(['claim', 'measured'], wanted)}"


def _cut(command: str) -> str:
    """The command without the end of a long list, which the study's page has."""
    return command if len(command) <= _MOST_CHARACTERS else command[:_MOST_CHARACTERS].rsplit(" ", 1)[0] + " …"


def with_claims(text: str) -> str:
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table() + "\n\n" + END + rest.split(END)[1]


def test_results_have_the_claims_of_all_verdicts():
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert with_claims(text) == text, "python tests/test_results.py takes the verdicts over"


def test_every_line_of_a_study_names_the_commit_that_made_it():
    for name in (name for name, verdict in verdicts() if verdict.claims):
        lines = [json.loads(line) for line in (STUDIES / name / "trials.jsonl").read_text().splitlines()]
        assert lines and all(re.fullmatch("[0-9a-f]{40}", line["commit"]) for line in lines), name


if __name__ == "__main__":
    page = ROOT / "RESULTS.md"
    page.write_text(with_claims(page.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit()
