"""Files of weights: equal arrays give equal bytes, files are shared, and what is not expected is refused."""

import hashlib

import numpy as np
import pytest
from safetensors.numpy import save

from trimask.tokenizers.storage.weights import WeightFile, write_weights

ARRAYS = {"b.0": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.float32(2.5).reshape(1)}
SHAPES = {name: array.shape for name, array in ARRAYS.items()}


def test_weights_come_back_and_their_bytes_depend_on_nothing_else(tmp_path):
    first = write_weights(tmp_path / "one.safetensors", ARRAYS)
    again = write_weights(tmp_path / "two.safetensors", dict(reversed(ARRAYS.items())))
    assert first.sha256 == again.sha256 and first.path.read_bytes() == again.path.read_bytes()
    found = first.read(SHAPES)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


def test_folders_share_one_file_or_have_a_copy(tmp_path, monkeypatch):
    weights = write_weights(tmp_path / "one.safetensors", ARRAYS)
    weights.save(tmp_path / "two.safetensors")
    assert (tmp_path / "two.safetensors").samefile(weights.path)
    weights.save(weights.path)
    assert weights.read(SHAPES)

    def refuse(*_):
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    weights.save(tmp_path / "three.safetensors")
    assert not (tmp_path / "three.safetensors").samefile(weights.path)
    assert WeightFile(tmp_path / "three.safetensors", weights.sha256).read(SHAPES)
    # What is replaced is the file of one folder alone.
    write_weights(tmp_path / "two.safetensors", {"a": np.zeros(1)})
    assert weights.read(SHAPES) and {path.name for path in tmp_path.iterdir()} == {
        f"{name}.safetensors" for name in ("one", "two", "three")
    }


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"a": ARRAYS["a"]}, r"holds other weights than its configuration says: b\.0"),
        (ARRAYS | {"c": np.zeros(1, np.float32)}, "holds other weights than its configuration says: c"),
        (ARRAYS | {"a": np.zeros(2, np.float32)}, r"a must be float32 of shape \(1,\), got float32 of \(2,\)"),
        (ARRAYS | {"a": np.zeros(1)}, r"a must be float32 of shape \(1,\), got float64 of \(1,\)"),
        (ARRAYS | {"a": np.array([np.inf], np.float32)}, "a holds NaN or infinite numbers"),
    ],
)
def test_other_weights_are_refused(tmp_path, arrays, said):
    path = tmp_path / "w.safetensors"
    path.write_bytes(save(arrays))
    with pytest.raises(ValueError, match=said):
        WeightFile(path, hashlib.sha256(path.read_bytes()).hexdigest()).read(SHAPES)


def test_a_damaged_a_foreign_and_a_huge_file_are_refused(tmp_path, monkeypatch):
    weights = write_weights(tmp_path / "w.safetensors", ARRAYS)
    content = bytearray(weights.path.read_bytes())
    content[-1] ^= 1
    weights.path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or edited: its SHA-256 is"):
        weights.read(SHAPES)
    weights.path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not a file of weights"):
        WeightFile(weights.path, hashlib.sha256(b"no weights").hexdigest()).read(SHAPES)
    monkeypatch.setattr("trimask.tokenizers.storage.weights.MAX_WEIGHT_BYTES", 9)
    with pytest.raises(ValueError, match="10 bytes, at most 9 are allowed"):
        weights.read(SHAPES)
    with pytest.raises(FileNotFoundError, match="no such file"):
        WeightFile(tmp_path / "gone.safetensors", "0").read(SHAPES)
