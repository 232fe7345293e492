"""Results that were changed by hand: what no small model gives."""

import dataclasses
import math

from rgexport.validate.bisect.site_report import site_report
from rgexport.validate.bisect.suspects import Suspect
from rgexport.validate.measure import TokenChoice

HOSTILE = """</script><script>alert(1)</script>"><img src=x onerror='alert(2)'>{{ 7*7 }}&amp;"""


def changed(value, changes):
    """A copy of a dataclass; `changes` are paths such as `artifact.name` → new values."""
    for path, new in changes.items():
        field, _, rest = path.partition(".")
        inner = changed(getattr(value, field), {rest: new}) if rest else new
        value = dataclasses.replace(value, **{field: inner})
    return value


def with_first_check(result, **fields: float):
    return changed(result, {"checks": [changed(result.checks[0], fields), *result.checks[1:]]})


def with_nan(result):
    logits = {"dequantized.logits.max": math.nan, "dequantized.logits.relative_max": math.inf}
    return changed(with_first_check(result, value=math.nan), logits)


def ambiguous(result):
    return with_first_check(result, value=0.25, margin=0.04, limit=0.27)


def of_a_file_alone(result):
    """The result of a reference file alone."""
    missing = ("original", "sites", "weights", "layers", "suspects")
    source = {"source.found": False, "source.path": None}
    return changed(result, dict.fromkeys(missing) | source)


def without_bisect(result):
    """The result of an artifact and its original, as most users see it."""
    return changed(result, dict.fromkeys(("sites", "layers", "suspects", "reference")))


def with_site_beyond(result):
    errors = list(result.sites.errors)
    place = next(i for i, e in enumerate(errors) if e.layer == 1 and e.op == "rg_lru_scan")
    errors[place] = dataclasses.replace(errors[place], rms=0.5, excess=7.25)
    return changed(result, {"sites": site_report(errors)})


def hostile(result):
    """Markup in all that comes from outside."""
    assert result.sites and result.reference and result.layers
    choice = TokenChoice(token=3, probability=0.5, text=HOSTILE)
    place = {"context": HOSTILE, "next_text": HOSTILE, "reference": [choice], "candidate": [choice]}
    site = {"site": HOSTILE, "op": HOSTILE, "excess": 9.0}
    outside = "artifact.name artifact.path source.path text.name reference.path reference.model"
    changes = {
        **dict.fromkeys(outside.split(), HOSTILE),
        "artifact.files": {HOSTILE: "0" * 64},
        "source.config_differences": (f"window: {HOSTILE}",),
        "original.worst": [changed(result.original.worst[0], place)],
        "checks": [changed(result.checks[0], {"name": HOSTILE, "reason": HOSTILE})],
        "sites": site_report([changed(result.sites.errors[0], site)]),
        "layers": [changed(result.layers[0], {"part": HOSTILE})],
        "suspects": [Suspect(layer=None, site=HOSTILE, evidence=HOSTILE)],
        "reference.prompts": [changed(result.reference.prompts[0], {"name": HOSTILE})],
        "reference.computed": {HOSTILE: HOSTILE},
        "reference.config_differences": (HOSTILE,),
        "environment": {**result.environment, "cpu": HOSTILE},
    }
    return changed(result, changes)
