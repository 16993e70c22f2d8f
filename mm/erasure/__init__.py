"""Concept erasure: patches that keep a model from drawing an object, a style or an attribute."""
