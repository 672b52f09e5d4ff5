"""x · Wᵀ with W packed, for few rows."""
