"""Rorqual: language models of the DeepSeek-V2 kind, from text to a priced API."""

__version__ = "0.1.0"
