"""Objectives: how the denoiser of each family is trained."""
