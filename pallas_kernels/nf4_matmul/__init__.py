"""x · Wᵀ with W packed."""
