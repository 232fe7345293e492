"""Results that were changed by hand: what no small model gives."""

import dataclasses
from typing import Any

from rgexport.validate.bisect.sites import site_report
from rgexport.validate.bisect.suspects import Suspect
from rgexport.validate.positions import Choice
from rgexport.validate.result import Result

HOSTILE = """</script><script>alert(1)</script>"><img src=x onerror='alert(2)'>{{ 7*7 }}&amp;"""


def without_torch(result: Result) -> Result:
    """What a reference file alone tells."""
    source = dataclasses.replace(result.source, found=False, path=None)
    assert result.reference is not None
    file = dataclasses.replace(result.reference, layers=None)
    nothing: dict[str, Any] = dict.fromkeys(
        ("twin", "original", "sites", "weights", "layers", "suspects", "speed")
    )
    return dataclasses.replace(result, source=source, reference=file, **nothing)


def ambiguous(result: Result) -> Result:
    first = dataclasses.replace(result.checks[0], value=0.25, margin=0.04, limit=0.27)
    return dataclasses.replace(result, checks=[first, *result.checks[1:]])


def with_site_beyond(result: Result) -> Result:
    assert result.sites is not None
    errors = list(result.sites.errors)
    place = next(i for i, e in enumerate(errors) if e.layer == 1 and e.op == "rg_lru_scan")
    errors[place] = dataclasses.replace(errors[place], rms=0.5, excess=7.25)
    return dataclasses.replace(result, sites=site_report(errors))


def hostile(result: Result) -> Result:
    """Markup in all that comes from outside."""
    assert result.original is not None and result.sites and result.reference and result.layers
    site = dataclasses.replace(result.sites.errors[0], site=HOSTILE, op=HOSTILE, excess=9.0)
    prompt = dataclasses.replace(result.reference.prompts[0], name=HOSTILE)
    choice = Choice(token=3, probability=0.5, text=HOSTILE)
    place = dataclasses.replace(
        result.original.worst[0],
        context=HOSTILE,
        next_text=HOSTILE,
        reference=[choice],
        candidate=[choice],
    )
    return dataclasses.replace(
        result,
        artifact=dataclasses.replace(
            result.artifact, name=HOSTILE, path=HOSTILE, files={HOSTILE: "0" * 64}
        ),
        source=dataclasses.replace(
            result.source, path=HOSTILE, config_differences=(f"window: {HOSTILE}",)
        ),
        text=dataclasses.replace(result.text, name=HOSTILE),
        original=dataclasses.replace(result.original, worst=[place]),
        checks=[dataclasses.replace(result.checks[0], name=HOSTILE, reason=HOSTILE)],
        sites=site_report([site]),
        layers=[dataclasses.replace(result.layers[0], part=HOSTILE)],
        suspects=[Suspect(layer=None, site=HOSTILE, evidence=HOSTILE)],
        reference=dataclasses.replace(
            result.reference,
            path=HOSTILE,
            model=HOSTILE,
            prompts=[prompt],
            computed={HOSTILE: HOSTILE},
            config_differences=(HOSTILE,),
        ),
        environment={**result.environment, "cpu": HOSTILE},
    )
