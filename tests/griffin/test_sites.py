"""The sites that are written down against those that the step model has."""

import pytest

from rgexport.export.trace import trace
from rgexport.griffin.sites import sites
from tests.models import ODD_CONFIGS


@pytest.mark.parametrize("name", ["regular", "hawk", "attention_only"])
def test_sites_are_those_of_the_step_model(name: str) -> None:
    config = ODD_CONFIGS[name]
    assert sites(config) == tuple(node.site for node in trace(config).nodes)
