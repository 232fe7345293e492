"""Each trick can be measured and done without."""

import pytest

from bench import system_tricks

pytestmark = pytest.mark.full


@pytest.mark.parametrize("with_it", [True, False])
@pytest.mark.parametrize("name", system_tricks.TRICKS)
def test_a_figure(name, with_it, demo_artifact, monkeypatch):
    monkeypatch.setattr(system_tricks, "STEPS", 2)
    trick = system_tricks.TRICKS[name]
    calls = []
    original = getattr(trick.module, trick.name)

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(trick.module, trick.name, counted)
    assert system_tricks.measured(name, demo_artifact, with_it=with_it) > 0
    assert bool(calls) == with_it
    assert not demo_artifact.with_name(f"{demo_artifact.name}-written").exists()
