"""Tables on a terminal."""

from rgexport.tables import Table, render


def test_lines_and_tables():
    rows = [("embedding [x]", "1"), ("linear", "1,000")]
    shown = render(["All of it:", Table("Weights", ("role", "count"), rows, {"count"})])
    assert [line.rstrip() for line in shown.splitlines()] == [
        "All of it:",
        "Weights",
        "role            count",
        "─────────────────────",
        "embedding [x]       1",
        "linear          1,000",
        "",
    ]


def test_long_lines_stay_whole():
    assert render(["x" * 300]) == "x" * 300 + "\n"
