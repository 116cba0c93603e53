"""Names of numeric labels: where they are declared, and which declarations are refused."""

import json

import pytest
from test_tables import write_parquet

from trimask.diffusion.data.readers import label_names as reader
from trimask.diffusion.data.readers.label_names import label_names


def card_of(column, names):
    """A card whose YAML head declares these names."""
    feature = f"  - name: {column}\n    dtype:\n      class_label:\n        names: {names}\n"
    return f"---\ndataset_info:\n  features:\n  - name: file_name\n    dtype: string\n{feature}---\n# Animals\n"


def names_by_card(folder, card):
    (folder / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    return label_names(folder / "metadata.csv", folder, "label")


def names_by_schema(folder, about):
    features = about if isinstance(about, dict) and "info" not in about else None
    if features is None:
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.table({"label": [0]}).replace_schema_metadata({b"huggingface": json.dumps(about).encode()})
        parquet.write_table(table, folder / "metadata.parquet")
    else:
        write_parquet(folder / "metadata.parquet", [{"label": 0}], features)
    return label_names(folder / "metadata.parquet", folder, "label")


def test_names_are_those_of_the_schema_or_of_the_card(tmp_path):
    assert names_by_schema(tmp_path, {"label": {"names": ["cat", "dog"]}}) == ("cat", "dog")
    assert names_by_schema(tmp_path, {"text": {"names": ["cat", "dog"]}}) == ()
    many = ", ".join(f"'{number}': n{number}" for number in reversed(range(11)))
    assert names_by_card(tmp_path, card_of("label", f"{{{many}}}")) == tuple(f"n{number}" for number in range(11))
    assert label_names(tmp_path / "metadata.csv", tmp_path, "other") == ()
    assert names_by_card(tmp_path, "# no head\n") == ()
    with pytest.raises(ValueError, match=r"README\.md: its head is not plain YAML"):
        names_by_card(tmp_path, "---\na: [\n---\n")


@pytest.mark.parametrize("form", ["LF", "CRLF", "CR", "byte order mark", "blanks", "head alone"])
def test_a_card_is_recognised_with_any_line_ends_blanks_or_byte_order_mark(tmp_path, form):
    card = card_of("label", "[cat, dög]").encode()
    if form in ("CRLF", "CR"):
        card = card.replace(b"\n", b"\r\n" if form == "CRLF" else b"\r")
    elif form == "byte order mark":
        card = b"\xef\xbb\xbf" + card
    elif form == "blanks":
        card = b"\n" + card.replace(b"---\n", b"--- \n")
    elif form == "head alone":
        card = card.removesuffix(b"\n# Animals\n")
    assert names_by_card(tmp_path, card) == ("cat", "dög")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("{'0': cat, '2': dog}", "must have the keys 0 to 1, got 0, 2"),
        ("{-1: none, 0: cat}", "must have the keys 0 to 1, got -1, 0"),
        ("{1: cat, 2: dog}", "must have the keys 0 to 1, got 1, 2"),
        ("{0: cat, '0': dog}", "must have the keys 0 to 1, got 0, 0"),
        ("{'00': cat}", "must have the keys 0 to 0, got 00"),
        ("{0.0: cat, true: dog}", "must have the keys 0 to 1, got float, True"),
        ("{a: cat, b: dog}", "must have the keys 0 to 1, got a, b"),
        (f"{{0x{'f' * 900}: cat}}", "must have the keys 0 to 0, got int"),
        ("[yes, no]", "must be text, got bool for 0; quote them"),
        ("[cat, 7]", "must be text, got int for 1; quote them"),
        ("[cat, null]", "must be text, got NoneType for 1; quote them"),
        ("{0: [cat], 1: dog}", "must be text, got list for 0"),
        ("[{a: cat}]", "must be text, got dict for 0"),
        ("[cat, '']", "must be valid text that is not empty, got '' for 1"),
        (r'["\ud800"]', r"must be valid text that is not empty, got '\\ud800' for 0"),
        ("catdog", "must be a list, or a mapping of numbers, got str"),
        ("5", "must be a list, or a mapping of numbers, got int"),
        ("[]", "are empty"),
        ("{}", "are empty"),
    ],
)
def test_names_that_are_not_a_list_of_texts_are_refused_by_file_and_column(tmp_path, names, reason):
    with pytest.raises(ValueError, match=rf"README\.md: names of 'label' {reason}"):
        names_by_card(tmp_path, card_of("label", names))


def in_features(text):
    return f"---\ndataset_info:\n  features: {text}\n---\n"


def in_label(text):
    return in_features(f"[{{name: label, dtype: {text}}}]")


@pytest.mark.parametrize(
    "card",
    [
        card_of("label", "null"),
        in_features("null"),
        in_features("[null]"),
        in_label("null"),
        in_label("int64"),
        in_label("{class_label: null}"),
        in_label("{image: {decode: false}}"),
        "---\ndataset_info: null\n---\n",
        "---\ndataset_info: [null]\n---\n",
        "---\nlicense: mit\n---\n",
        "---\nprose between rules\n---\n",
        "---\n---\n",
    ],
)
def test_an_absent_or_null_key_of_a_card_gives_no_names(tmp_path, card):
    assert names_by_card(tmp_path, card) == ()


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (in_features("5"), r"dataset_info\.features must be a list, got int"),
        (in_features("{label: 5}"), r"dataset_info\.features must be a list, got dict"),
        (in_features("[5]"), r"an item of dataset_info\.features must be a mapping, got int"),
        (in_label("5"), "dtype of 'label' must be a mapping, got int"),
        (in_label("{class_label: 5}"), r"dtype of 'label'\.class_label must be a mapping, got int"),
        (in_label("{class_label: [a]}"), r"dtype of 'label'\.class_label must be a mapping, got list"),
        ("---\ndataset_info: 5\n---\n", "dataset_info must be a mapping, got int"),
        ("---\ndataset_info: [false]\n---\n", "dataset_info must be a mapping, got bool"),
        (b"---\na: \xff\n---\n", "cannot be read: not UTF-8 text"),
        ("---\na: 1\na: 2\n---\n", "its head is not plain YAML: a repeated key, or <<: 'a'"),
        (card_of("label", "{0: cat, 0: dog}"), "its head is not plain YAML: a repeated key, or <<: '0'"),
    ],
)
def test_a_value_of_another_type_in_a_card_is_refused_by_file_and_field(tmp_path, card, reason):
    with pytest.raises(ValueError, match=rf"README\.md: {reason}"):
        names_by_card(tmp_path, card)


@pytest.mark.parametrize(
    "about",
    [
        None,
        {"info": None},
        {"info": {"features": None}},
        {"info": {"features": {"label": None}}},
        {"info": {"features": {"label": {"names": None}}}},
    ],
)
def test_an_absent_or_null_key_of_a_schema_gives_no_names(tmp_path, about):
    assert names_by_schema(tmp_path, about) == ()


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        (5, "huggingface must be a mapping, got int"),
        ({"info": 5}, r"huggingface\.info must be a mapping, got int"),
        ({"info": {"features": []}}, r"huggingface\.info\.features must be a mapping, got list"),
        ({"info": {"features": {"label": "x"}}}, r"huggingface\.info\.features\.label must be a mapping, got str"),
        ({"info": {"features": {"label": {"names": 5}}}}, "names of 'label' must be a list, .* got int"),
        ({"info": {"features": {"label": {"names": {"1": "a"}}}}}, "names of 'label' must have the keys 0 to 0, got 1"),
        ({"info": {"features": {"label": {"names": [True]}}}}, "names of 'label' must be text, got bool"),
    ],
)
def test_a_value_of_another_type_in_a_schema_is_refused_by_file_and_field(tmp_path, about, reason):
    with pytest.raises(ValueError, match=rf"metadata\.parquet: {reason}"):
        names_by_schema(tmp_path, about)


class Untouched(list):
    """A value that must not be written out."""

    def __repr__(self):
        raise AssertionError("written out")


@pytest.mark.parametrize("names", [Untouched([1]), [Untouched()], {0: Untouched()}, {"x": Untouched()}])
def test_an_error_never_shows_a_value_that_is_not_a_name(names):
    with pytest.raises(ValueError, match="names "):
        reader._checked(names, "names")


@pytest.mark.parametrize("place", ["names", "merged"])
def test_a_small_card_that_repeats_itself_takes_no_time(tmp_path, place):
    levels = [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, 8)]
    head = "x0: &x0 [a]\n" + "\n".join(levels)
    if place == "merged":
        levels = [f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 10)}]}}" for n in range(1, 8)]
        head = "x0: &x0 {a: b}\n" + "\n".join(levels)
    card = card_of("label", "*x7").replace("---\n", f"---\n{head}\n", 1)
    with pytest.raises(
        ValueError, match="must be text, got list for 0" if place == "names" else "a repeated key, or <<"
    ):
        names_by_card(tmp_path, card)


@pytest.mark.parametrize(("second", "is_one"), [("[cat, dog]", True), ("null", True), ("[dog, cat]", False)])
def test_configurations_of_a_card_agree_on_names(tmp_path, second, is_one):
    items = [f"- features: [{{name: label, dtype: {{class_label: {{names: {n}}}}}}}]\n" for n in ("[cat, dog]", second)]
    card = f"---\ndataset_info:\n{''.join(items)}---\n"
    if is_one:
        assert names_by_card(tmp_path, card) == ("cat", "dog")
    else:
        with pytest.raises(ValueError, match=r"README\.md: names of 'label' differ between configurations"):
            names_by_card(tmp_path, card)


def test_a_card_that_is_too_large_is_refused(tmp_path, monkeypatch):
    card = card_of("label", "[cat, dog]")
    monkeypatch.setattr(reader, "_MAX_CARD_BYTES", len(card))
    assert names_by_card(tmp_path, card) == ("cat", "dog")
    with pytest.raises(ValueError, match=r"README\.md: \d+ bytes, names of labels are looked for in at most"):
        names_by_card(tmp_path, card + "x")
