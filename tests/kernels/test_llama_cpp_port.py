"""The port to llama.cpp, as far as it shows without llama.cpp."""

import re

from rgexport.kernels.llama_cpp import port


def test_its_version_names_a_release_and_its_sources():
    assert re.fullmatch(r"\d+\.\d+\.\d+\+rgexport\.g[0-9a-f]{8}", port.port_version())
    assert port.port_version().startswith(port.RELEASE)
