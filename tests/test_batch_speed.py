"""The study of the data pipeline's speed."""

from trimask.scripts import study


def test_every_dataset_is_measured_alone(prepared, tmp_path, capsys):
    arguments = ["--data", str(prepared.folder), "--tokens", "240", "--packed-length", "24", "--seconds", "0.05"]
    study.main(["batch-speed", str(tmp_path / "out"), *arguments])
    header, *lines = (tmp_path / "out/speeds.csv").read_text().splitlines()
    assert header == "dataset,tokens_per_second,filled"
    names, rates, filled = zip(*(line.split(",") for line in lines), strict=True)
    assert names == ("drawn", "spoken", "sums")
    assert all(float(rate) > 0 for rate in rates) and all(0.5 < float(share) <= 1 for share in filled)
    assert "100.00%" in capsys.readouterr().out
