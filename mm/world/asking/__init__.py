"""A user's words as queries and intents: what is asked of a picture, which questions answer it, what a turn wants."""
