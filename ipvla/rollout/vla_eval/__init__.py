"""A policy as a model server of vla-evaluation-harness, by its protocol."""
