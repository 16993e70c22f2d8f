"""Methods of merging adapters, one file each."""
