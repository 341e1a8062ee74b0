"""The only Jinja environment: templates are data in `templates/`, and a name that is not given is an error."""

from __future__ import annotations

from functools import cache
from typing import Any

import jinja2


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmc.templates", ""),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["repr"] = repr
    return environment


def render(template: str, **values: Any) -> str:
    """The template with its values. Strings that come from a model go in through the `repr` filter."""
    return _environment().get_template(template).render(**values)
