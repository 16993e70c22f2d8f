"""4-bit weights with an SVD branch (SVDQuant) for any model: `mm.quantize`, `mm.SVDQuantConfig`."""
