"""Published tables as data, and a run's report beside them."""

from lit_merge.published.facts import CHECKPOINTS, METHODS, NOTES, PROTOCOLS, SOURCES, Method, Source
from lit_merge.published.tables import PublishedRow, PublishedTable, find_published, published_tables

__all__ = (
    "CHECKPOINTS",
    "METHODS",
    "NOTES",
    "PROTOCOLS",
    "SOURCES",
    "Method",
    "PublishedRow",
    "PublishedTable",
    "Source",
    "find_published",
    "published_tables",
)
