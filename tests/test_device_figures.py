"""``benchmarks/device.sh``: its programs run on a CPU with tiny sizes, and what they print becomes a page."""

import json
import sys

import pytest

from benchmarks import attention, decoding, device_checks, device_tables


def printed(monkeypatch, capsys, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    code = main()
    return code, capsys.readouterr().out


@pytest.mark.slow
def test_the_checks_are_right_here(monkeypatch, capsys):
    code, text = printed(monkeypatch, capsys, device_checks.main)
    assert code == 0 and text.count("| right |") == 2
    assert "wants an NVIDIA GPU" in text and "there is no kernel for cpu" in text


def test_a_wrong_program_is_told_and_the_exit_code_says_so(monkeypatch, capsys):
    def broken():
        raise RuntimeError("ptxas | exit code 1\nand more")

    monkeypatch.setattr(device_checks, "CHECKS", {"one": lambda: 0.5, "two": lambda: float("nan"), "none": broken,
                                                  "three": lambda: 0})
    code, text = printed(monkeypatch, capsys, device_checks.main)
    assert code == 1 and text.count("| WRONG |") == 2 and text.count("| right |") == 1
    assert "| none | | FAILED: ptxas / exit code 1 |\n" in text


def test_attention_is_timed_by_the_programs_that_there_are(monkeypatch, capsys):
    _, text = printed(monkeypatch, capsys, attention.main, "--small", "--rounds=1")
    assert "without cudnn, which wants an NVIDIA GPU" in text
    assert "| tokens | xla mask | xla causal | xla causal / xla mask |" in text and "| 2 x 32 |" in text


@pytest.mark.slow
def test_decoding_is_timed_for_each_number_of_rows(monkeypatch, capsys):
    _, text = printed(monkeypatch, capsys, decoding.main, "--size=tiny", "--new=2", "--rounds=1", "--batches=2",
                      "--alone")
    rows = [line.split("|")[1:5] for line in text.splitlines() if line.startswith("| 2 ")]
    assert len(rows) == 1 and all(float(cell.replace(",", "")) > 0 for row in rows for cell in row)


def test_figures_become_a_page_that_says_what_was_cut(monkeypatch, capsys, tmp_path):
    for name, output, code in (("tests", "| a | b |\n|---|---|\n| 1 | 2 |", "0"), ("throughput_8b", "half", "124"),
                               ("attention", "", "1"), ("decoding", "began", None)):
        (tmp_path / f"{name}.txt").write_text(output)
        (tmp_path / f"{name}.err.txt").write_text("some words")
        if code is not None:
            (tmp_path / f"{name}.rc.txt").write_text(code)
            (tmp_path / f"{name}.seconds.txt").write_text("7")
    code, text = printed(monkeypatch, capsys, device_tables.main, str(tmp_path), "--collect")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert code == 1 and list(figures) == ["tests", "throughput_8b", "attention", "decoding"]
    assert figures["tests"]["seconds"] == 7 and figures["attention"]["errors"] == "some words"
    assert text.index("| 1 | 2 |") < text.index("Cut at its time limit") < text.index("Failed: exit code 1")
    assert text.endswith("Cut while it ran.\n\n") and "Products" not in text
    monkeypatch.setattr(device_tables, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    assert printed(monkeypatch, capsys, device_tables.main, str(tmp_path))[0] == 0
    assert (tmp_path / "docs" / "device.md").read_text().startswith("# On an accelerator\n")
