"""The compiler of this machine, for drivers of tests."""

import os
import shutil

import pytest

COMPILER = os.environ.get("CXX") or shutil.which("c++") or "c++"
needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER), reason=f"no {COMPILER}")
