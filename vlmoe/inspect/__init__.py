"""A look inside: which experts the patches and words hit, what the model reads behind a mask."""
