"""`python tests/hostile/make.py`: writes small hostile files beside this script, each of which its reader must refuse.

The ending of a file says who reads it: .json and .jsonl as such, .png and .gif as pictures, .wav and .flac as sounds,
.npy as an array of a tokenizer, .tokenizer as a tokenizer of text, .index as the list of answers of `generate`.
"""

import json
import struct
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


def contents() -> dict[str, bytes]:
    """Name → content of every file."""
    return {**_json(), **_arrays(), **_pictures(), **_sounds(), **_tokenizers(), **_lists()}


def _json() -> dict[str, bytes]:
    return {
        "deep.json": b"[" * 20_000,
        "deep_objects.json": b'{"a":' * 5_000,
        "duplicate_key.json": b'{"train": 1, "train": 2}',
        "escaped_duplicate.json": b'{"train": 1, "tr\\u0061in": 2}',
        "nan.json": b'{"loss": NaN}',
        "infinity.json": b'{"loss": -Infinity}',
        "too_large.json": b'{"loss": 1e999}',
        "digits.json": b"9" * 6_000,
        "nothing.json": b"",
        "only_mark.json": b"\xef\xbb\xbf",
        "utf16.json": '{"a": 1}'.encode("utf-16"),
        "latin1.json": b'{"a": "\xe9"}',
        "lone_surrogate.json": b'{"a": "\\ud800"}',
        "control.json": b'{"a": "\x1b[2J"}',
        "trailing.json": b'{"a": 1} {"b": 2}',
        "comma.json": b'{"a": 1,}',
        "nul.json": b'{"a": 1}\0',
        "deep.jsonl": b'{"a": 1}\n' + b"[" * 20_000 + b"\n",
        "torn.jsonl": b'{"a": 1}\n{"a": ',
    }


def _npy(descr: object, shape: object, data: bytes = b"", order: object = False, version: bytes = b"\1\0") -> bytes:
    header = repr({"descr": descr, "fortran_order": order, "shape": shape}).encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + data


def _arrays() -> dict[str, bytes]:
    """Damaged .npy files; their reader expects float32 of shape 4 × 2."""
    right = np.arange(8, dtype=np.float32).tobytes()
    flipped = bytearray(_npy("<f4", (4, 2), right))
    flipped[20] ^= 1
    return {
        "huge_shape.npy": _npy("<f4", (1 << 40, 1 << 20), right),
        "overflowing_shape.npy": _npy("<f4", (1 << 62, 8), right),
        "negative_shape.npy": _npy("<f4", (-4, -2), right),
        "other_shape.npy": _npy("<f4", (2, 4), right),
        "other_type.npy": _npy("<f8", (4, 2), right * 2),
        "other_order.npy": _npy("<f4", (4, 2), right, order=True),
        "objects.npy": _npy("|O", (4, 2), b"cos\nsystem\n(S'true'\ntR."),
        "structured.npy": _npy([("a", "<f4"), ("b", "<f4")], (4,), right),
        "cut.npy": _npy("<f4", (4, 2), right[:-1]),
        "longer.npy": _npy("<f4", (4, 2), right + b"\0"),
        "flipped_header.npy": bytes(flipped),
        "call_in_header.npy": _npy("<f4", (4, 2), right).replace(b"False", b"exec("),
        "nan.npy": _npy("<f4", (4, 2), np.full(8, np.nan, np.float32).tobytes()),
        "version_9.npy": _npy("<f4", (4, 2), right, version=b"\x09\0"),
        "zip.npy": b"PK\x03\x04" + bytes(60),
    }


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, data: bytes, *more: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [_chunk(b"IHDR", head), *more, _chunk(b"IDAT", zlib.compress(data, 9)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _pictures() -> dict[str, bytes]:
    bomb = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 24), 9))
    return {
        "huge.png": _png(60_000, 60_000, bytes(100)),
        "largest.png": _png(2**31 - 1, 2**31 - 1, b""),
        "no_pixels.png": _png(0, 0, b""),
        "cut.png": _png(16, 16, bytes(17 * 16))[:-30],
        "text_bomb.png": _png(2, 2, bytes(6), bomb),
        "few_pixels.png": _png(64, 64, bytes(10)),
        "huge.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b";",
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
    }


def _wav(channels: int, rate_hz: int, data_bytes: int, data: bytes) -> bytes:
    form = struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * channels * 2 & 0xFFFFFFFF, channels * 2 & 0xFFFF, 16)
    body = b"WAVE" + b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", data_bytes) + data
    return b"RIFF" + struct.pack("<I", len(body) & 0xFFFFFFFF) + body


def _flac(samples: int, channels: int, rate_hz: int) -> bytes:
    """Header of a FLAC stream that claims this number of samples and has no frame."""
    bits = rate_hz << 44 | (channels - 1) << 41 | 15 << 36 | samples
    info = struct.pack(">HH", 4096, 4096) + bytes(6) + bits.to_bytes(8, "big") + bytes(16)
    return b"fLaC" + b"\x80" + len(info).to_bytes(3, "big") + info


def _sounds() -> dict[str, bytes]:
    return {
        "hours.flac": _flac(3 * 3600 * 96_000, 8, 96_000),
        "no_rate.flac": _flac(1000, 1, 0),
        "no_channels.wav": _wav(0, 8000, 20, bytes(20)),
        "no_rate.wav": _wav(1, 0, 20, bytes(20)),
        "no_samples.wav": _wav(1, 8000, 0, b""),
        "fast.wav": _wav(1, 1, 20_000, bytes(20_000)),
        "noise.wav": b"RIFF" + bytes(range(256)),
        "text.wav": b"not a sound",
    }


def _tokenizers() -> dict[str, bytes]:
    """Tokenizer files for Hugging Face's library, whose Rust code panics on some of them."""

    def model(**fields: object) -> bytes:
        content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
        content |= {"pre_tokenizer": None, "post_processor": None, "decoder": None}
        content["model"] = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
        return json.dumps({**content, **fields}).encode()

    pattern = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
    return {
        "regex.tokenizer": model(pre_tokenizer=pattern),
        "unknown_model.tokenizer": model(model={"type": "Oracle", "vocab": {}}),
        "merge_of_nothing.tokenizer": model(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}),
        "negative_id.tokenizer": model(model={"type": "BPE", "vocab": {"a": -1}, "merges": []}),
        "huge_id.tokenizer": model(model={"type": "BPE", "vocab": {"a": 1 << 40}, "merges": []}),
        "no_model.tokenizer": b'{"version": "1.0"}',
        "deep.tokenizer": b"[" * 20_000,
        "empty.tokenizer": b"",
    }


def _lists() -> dict[str, bytes]:
    def line(**fields: object) -> bytes:
        content = {"file": "a.txt", "to": "text", "prompt": "x"}
        return json.dumps({**content, **fields}).encode() + b"\n"

    return {
        "absolute.index": line(file="/tmp/victim.txt"),
        "outside.index": line(file="../victim.txt"),
        "inside.index": line(file="a/b.txt"),
        "backslash.index": line(file="..\\victim.txt"),
        "nul.index": line(file="a\0.txt"),
        "other_ending.index": line(file="a.py"),
        "no_name.index": line(file=""),
        "number.index": line(file=7),
        "list.index": b"[1, 2]\n",
    }


if __name__ == "__main__":
    for name, content in contents().items():
        (FOLDER / name).write_bytes(content)
