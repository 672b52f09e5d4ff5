"""One module per table or figure of the paper; each says what it needs and where its numbers go."""
