"""An ahead-of-time compiler for language models: a model in, a standalone Python package out."""

__version__ = "0.1.0"
