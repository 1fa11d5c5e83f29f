"""The reference federated-learning loop: small enough to read from top to bottom, and to copy."""
