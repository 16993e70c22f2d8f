"""The backbone: trunk, velocity decoder, code head, understanding encoder, connector and the text tokenizer.

Import the classes from their modules (`mm.models.trunk`, ...): importing this package costs nothing.
"""
