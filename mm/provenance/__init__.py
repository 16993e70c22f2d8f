"""Provenance: fingerprints in an autoencoder's decoder, and what a picture says of where it comes from."""
