"""Customization: adapters for new subjects, styles and edits from a few pictures, and their merging."""
