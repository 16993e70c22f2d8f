"""Methods of customization, one file each."""
