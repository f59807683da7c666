"""The shared parts of experiments: every legal key with its default, named models and tasks. Imports no jax."""
