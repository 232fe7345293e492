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


def test_where_a_table_does_not_fit_its_rows_are_lists(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    table = Table("Costs", ("tensor", "error"), [("a" * 20, "0.5 ± 0.1")])
    wide = Table("Costs", ("tensor", "mean error", "share"), [("a" * 20, "0.5 ± 0.1", "1.25 %")])
    assert "error" in render([table]).splitlines()[1], "names may be broken"
    assert render([wide]).splitlines() == [
        "Costs",
        "a" * 20,
        "  mean error: 0.5 ± 0.1",
        "  share: 1.25 %",
        "",
    ]
