"""The study of the data pipeline's speed."""

from trimask.diffusion.studies.batch_speed import Arguments, main, measure


def test_every_dataset_is_measured_alone(prepared, capsys):
    speeds = measure(Arguments(data=prepared.folder, tokens=240, packed_length=24, seconds=0.05))
    assert [speed.dataset for speed in speeds] == ["drawn", "spoken", "sums"]
    assert all(speed.tokens_per_second > 0 and 0.5 < speed.filled <= 1 for speed in speeds)
    main([str(prepared.folder), "--seconds", "0.01"])
    assert "rows 100.00% full" in capsys.readouterr().out
