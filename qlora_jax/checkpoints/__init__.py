"""qlora-jax."""
