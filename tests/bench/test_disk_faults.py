"""The measurement of a disk that fails, with a few hundred requests."""

from bench import disk_faults
from bench.disk_faults import Disk, run


def test_nothing_hangs_and_nothing_acknowledged_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_faults, "_HANGING_SECONDS", 0.5)
    disk = Disk(tmp_path / "states", monkeypatch)
    report = run(disk, 400, period=20)
    assert report.faults.keys() == {"none", *disk.faults}
    assert report.hanging == 0 and not report.lost
    assert report.answers["complete done"] == 340 and report.answers["chat 200"] == 20
    assert report.answers["save 200"] >= 10
    assert {kind for kind in report.answers if kind.startswith("save")} == {"save 200", "save 503"}
