"""Small malicious files are refused at once, with a clear message, by every reader of files of their kind."""

import resource
import time

import numpy as np
import pytest
from hostile.make import FOLDER, contents

from trimask.diffusion.data.readers.pictures import read_picture
from trimask.diffusion.data.readers.sounds import read_sound
from trimask.scripts.output.answers import read_index
from trimask.tokenizers import codec
from trimask.tokenizers.codec import ArrayFile
from trimask.tokenizers.storage.json_text import read_json, read_json_lines
from trimask.tokenizers.text import TextTokenizer

ARRAY = ArrayFile(np.dtype(np.float32), (4, 2))
FILES = contents()
READERS = {
    "json": read_json,
    "jsonl": lambda path: list(read_json_lines(path)),
    "npy": lambda path: codec._read_file(path, ARRAY),
    "png": read_picture,
    "gif": read_picture,
    "wav": lambda path: read_sound(path, 8000),
    "flac": lambda path: read_sound(path, 8000),
    "tokenizer": TextTokenizer.from_file,
}


def read(path):
    ending = path.suffix[1:]
    if ending == "index":
        folder = path.parent / f"{path.stem}-answers"
        folder.mkdir()
        (folder / "index.jsonl").write_bytes(path.read_bytes())
        return read_index(folder)
    return READERS[ending](path)


def test_the_files_are_those_that_the_script_makes():
    there = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix not in (".py", "")}
    assert there == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_at_once_with_its_name(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises((ValueError, OSError)) as refused:
        read(path)
    assert path.name in str(refused.value) or "index.jsonl" in str(refused.value)
    assert not any(ord(letter) < 32 and letter not in "\n\t" for letter in str(refused.value))
    assert time.perf_counter() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
