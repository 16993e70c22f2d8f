"""The backbone: trunk, velocity decoder, code head and the text tokenizer. Nothing about prompts or files.

Import the classes from their modules (`mm.models.trunk`, ...): importing this package costs nothing.
"""
