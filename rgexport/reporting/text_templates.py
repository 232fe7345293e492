"""Fills facts into text templates of a package: Markdown, or functions as ONNX's text."""

from typing import Any


def render_text(package: str, template: str, **facts: Any) -> str:
    """Fills facts into a template, a file of the folder `templates` in `package`."""
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 - no HTML
        loader=jinja2.PackageLoader(package),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(facts)
