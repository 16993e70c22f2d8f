"""Training: stages, their losses and the loop they share. Nothing here is needed to draw."""
