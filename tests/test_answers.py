"""File names of answers."""

import pytest

from trimask.scripts.output.answers import file_stem
from trimask.tokenizers.storage.files import require_plain_name


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("a handwritten seven", "a-handwritten-seven"),
        ("Größe: 3/4 \\ ..", "grosse-3-4"),
        ("Þórr é̂ ½", "þorr-e-1-2"),
        ("../../etc/passwd", "etc-passwd"),
        ("47+__=85", "47-85"),
        ("数字\n", "数字"),
        ("а́дрес/Й", "а́дрес-й"),
        ("हिन्दी में", "हिन्दी-में"),
        ("\u202egnp.exe", "gnp-exe"),
        ("🎉", "party-popper"),
        ("🙂 🙃", "slightly-smiling-face-upside-down-face"),
        ("\x07", "untitled"),
        ("七" * 300, "七" * 40),
        ("", "untitled"),
        ("x" * 300, "x" * 60),
    ],
)
def test_file_stems_are_short_plain_and_never_empty(prompt, stem):
    assert file_stem(prompt) == stem
    assert require_plain_name(f"{stem}.png", "test", ".png") == f"{stem}.png"


def test_colliding_file_stems_are_numbered():
    taken: set[str] = set()
    for _ in range(3):
        taken.add(file_stem("One!", taken.__contains__))
    assert taken == {"one", "one-2", "one-3"}
