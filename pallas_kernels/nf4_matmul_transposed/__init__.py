"""dy · W with W packed."""
