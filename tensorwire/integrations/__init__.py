"""Integrations with other libraries, one file or package each."""
