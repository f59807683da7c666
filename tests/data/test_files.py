"""Local files, read as they are written."""

from peft_jax.data.files import read_table


def test_reading_a_table_shows_no_bar(tmp_path, capfd):
    """``datasets`` would draw "Generating train split" on standard error, terminal or not."""
    import datasets

    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(tmp_path / "mine.parquet")
    capfd.readouterr()
    assert [row["text"] for row in read_table(str(tmp_path / "mine.parquet"))] == ["one", "two"]
    assert "Generating" not in capfd.readouterr().err and not datasets.are_progress_bars_disabled()
