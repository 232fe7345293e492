"""What people see while they wait."""

import pytest

from rgexport import progress


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "bytes", "0 bytes"),
        (999, "bytes", "999 bytes"),
        (65_536, "bytes", "65.5 kB"),
        (999_999, "bytes", "1000 kB"),
        (1_512_000_000, "bytes", "1.51 GB"),
        (2.3e15, "bytes", "2300 TB"),
        (256_000, "tokens", "256,000 tokens"),
    ],
)
def test_amount(value, unit, text):
    assert progress.amount(value, unit) == text


def test_lines_where_there_is_no_terminal(capsys, monkeypatch):
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.task("Quantizing", 100, "rows") as advance:
        for _ in range(4):
            advance(5)
        advance(80)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Quantizing: 100 rows",
        "Quantizing: 10 % of 100 rows",
        "Quantizing: 20 % of 100 rows",
        "Quantizing: done in 12.0 s",
    ]


def test_no_end_after_a_failure(capsys):
    with pytest.raises(ValueError), progress.task("Quantizing", 0):
        raise ValueError
    assert capsys.readouterr().err == "Quantizing: 0 bytes\n"


def test_bars_nest_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress.task("Outer", 2, "steps") as outer, progress.task("Inner", 10) as inner:
        inner(10)
        outer(2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Outer" in captured.err and "Inner" in captured.err and "100%" in captured.err
    assert progress._display is None


def test_warnings_say_so(capsys):
    progress.warn("this is a base model")
    assert capsys.readouterr().err == "Warning: this is a base model\n"
