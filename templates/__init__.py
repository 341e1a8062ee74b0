"""Data only: Jinja templates of generated sources, packages and pages."""
