"""Errors, whole-or-nothing files, paths, lazy imports, settings inside PNG files. Imports nothing else of mm."""
