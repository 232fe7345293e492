from pathlib import Path

from bench.verdicts import MARK, Verdict, table, write_docs

FOUND = [
    Verdict("nothing", "onnx int4", "reference", "PASS", kl=0.05),
    Verdict("shuffled", "onnx int4", "reference", "FAIL", "reference.w.noise", 90.0, 6.0),
    Verdict("shuffled", "gguf q4_0", "reference", "FAIL", "reference.w.row", 30.0, 5.0),
    Verdict("shuffled", "onnx int4", "model", "FAIL", "weights.w.max_steps", 12.0, 6.0),
    Verdict("shuffled", "gguf q4_0", "model", "PASS", kl=5.0),
    Verdict("shuffled", "onnx int4", "self-check", "FAIL", "weights.w.max_steps is 6"),
]


def test_a_row_has_what_tells_least() -> None:
    nothing, shuffled = table(FOUND).rows
    assert nothing == ("nothing", "0.05 … 0.05", "PASS", "", "")
    assert shuffled == (
        "shuffled",
        "5 … 6",
        "FAIL, 30 × (row)",
        "FAIL/PASS, 12 × (max_steps)",
        "FAIL",
    )


def test_the_page_gets_a_new_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{MARK}\nold\n{MARK}\n\nafter\n")
    write_docs(page, table(FOUND))
    write_docs(page, table(FOUND))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("| shuffled | 5 … 6 |") == 1 and text.count(MARK) == 2
