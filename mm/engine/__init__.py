"""Loads any model and runs requests on it: typed requests in, events out."""
