"""Programs in C++ run the kernels: under sanitizers, on Arm, beside oracles."""

import shutil

import pytest

from rgexport.kernels.onnx import library
from tests.kernels.onnx import programs
from tests.kernels.onnx.programs import NO_FAKE_STACK, nightly, output, require_products

HERE = library.kernels().instruction_sets
OPS = library.kernels().ops
WHOLE = "address", "undefined", "thread"
SLOW_TO_COMPILE = "avxvnni", "avx512", "amx"
EMULATOR = "qemu-aarch64"

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(1800),  # with the build, which takes minutes on a busy machine
    programs.needs_compiler,
    pytest.mark.skipif(not OPS, reason=library.kernels().reason),
]


def test_products():
    require_products(programs.native(*HERE) / programs.DRIVER)


def test_a_run_calls_the_runtime_that_made_the_kernel():
    """Of two in one process, each with a domain, runs and refusals of its own."""
    lines = output([programs.two_tables() / "two_tables", library.LIBRARY])
    assert lines == ["1 2 1", "1 0 0", "", "SoftCap: input 0 is missing"]


@pytest.mark.parametrize("sanitizer", ["thread", "undefined"])
def test_the_fastest_is_found(sanitizer):
    assert output([programs.fastest(sanitizer) / "fastest_driver"]) == []


@pytest.mark.parametrize("sanitizer", ["address without slow sets", *nightly(*WHOLE)])
def test_sanitizers_find_nothing(sanitizer):
    """Nor in what no op may run, which ends in an error."""
    left_out = () if sanitizer in WHOLE else SLOW_TO_COMPILE
    folder = programs.sanitized(sanitizer.split()[0], *left_out)
    command = folder / "sanitized_ops", folder / library.LIBRARY.name
    for instruction_set in set(HERE) - {*left_out}:
        lines = output(command, **NO_FAKE_STACK, **{library.CPU: instruction_set})
        assert {tuple(line.split()[:2]) for line in lines} == {(instruction_set, op) for op in OPS}
    (line,) = output([*command, "refusals"], **NO_FAKE_STACK, **{library.CPU: "scalar"})
    assert int(line.split()[2]) > 60


@pytest.mark.parametrize("instruction_set", HERE)
def test_oracles_of_the_fuzzer_take_right_answers_and_reject_wrong_ones(instruction_set):
    command = [programs.judged() / "judged_ops", library.LIBRARY]
    lines = output(command, **{library.CPU: instruction_set})
    assert {tuple(line.split()) for line in lines} == {(instruction_set, op) for op in OPS}


MISSING = [tool for tool in (programs.ARM_COMPILER, EMULATOR) if not shutil.which(tool)]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {' '.join(MISSING)}")
@pytest.mark.parametrize(
    ("processor", "best"), [("cortex-a72", "scalar"), ("neoverse-n1", "neon"), ("max", "i8mm")]
)
def test_whole_library_on_arm(processor, best, monkeypatch):
    """All ops, on a processor that has no more than `best`: one instruction too many ends it."""
    monkeypatch.delenv(library.CPU, raising=False)
    folder = programs.arm()
    if processor == "max":
        require_products(EMULATOR, "-cpu", processor, folder / programs.DRIVER)
    emulator = EMULATOR, "-L", f"/usr/{programs.ARM}", "-cpu", processor
    lines = output([*emulator, folder / "sanitized_ops", folder / library.LIBRARY.name])
    assert {line.split()[0] for line in lines} == {best}
