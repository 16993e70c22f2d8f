"""The procedural world: scenes, renderer, captions, questions, edits and the judge. Imports torch and nothing above it."""
