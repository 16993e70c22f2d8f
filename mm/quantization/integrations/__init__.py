"""SVDQuant inside diffusers and transformers, and readers of Nunchaku's files."""
