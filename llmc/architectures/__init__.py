"""Model families as descriptions: TOML files made of building blocks, and the few blocks there are.

Importing this package registers the kinds of blocks.
"""

from llmc.architectures import latent

__all__ = ["latent"]
