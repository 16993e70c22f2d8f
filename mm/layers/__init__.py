"""`BranchedLinear`, what each linear layer is for, and how layers of a model are found and replaced."""
