"""Model families as descriptions: TOML files made of building blocks, and the few blocks there are."""
