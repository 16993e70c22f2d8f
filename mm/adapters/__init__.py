"""Patches and the adapter files of other programs."""
