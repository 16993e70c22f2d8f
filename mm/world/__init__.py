"""The procedural world: scenes, renderer, captions, questions, edits and the judge. Imports nothing of mm above it."""
