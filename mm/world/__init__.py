"""The procedural world: scenes, renderer, captions, questions, edits and the judge. Imports no other part of mm."""
