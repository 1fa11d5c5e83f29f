"""Puts the decisions, whose number grows, into the menu of the documentation: a hook of mkdocs.yml."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add docs/decisions/*.md to the menu, in the order of their numbers."""
    docs = Path(config.docs_dir)
    pages = sorted(path.relative_to(docs).as_posix() for path in (docs / "decisions").glob("*.md"))
    config.nav = [*(config.nav or []), {"Decisions": pages}]
    return config
