"""The reference federated-learning loop: small enough to be read top to bottom, and to be copied."""
