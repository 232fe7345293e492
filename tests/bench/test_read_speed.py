"""The C program that reads memory."""

import pytest

from bench.read_speed import c_roofline

pytestmark = pytest.mark.full


@pytest.mark.parametrize("huge", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_it_answers_as_often_as_it_is_asked(threads, huge):
    with c_roofline(threads, 1 << 24, huge=huge) as read_speed:
        assert all(1e8 < read_speed() < 1e13 for _ in range(3))


def test_it_reads_the_pages_of_a_file(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 24))
    with c_roofline(2, file=file) as read_speed:
        assert all(1e8 < read_speed() < 1e13 for _ in range(3))


def test_it_ends_with_the_block():
    with c_roofline(1, 1 << 20) as read_speed:
        read_speed()
    with pytest.raises(ValueError, match="closed file"):
        read_speed()
