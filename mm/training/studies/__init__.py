"""Small, equal-budget studies of design choices: `python -m mm.training.studies.ett`, `... .encoders`."""
