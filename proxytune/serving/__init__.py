"""A steered base behind the OpenAI API, and a page to see what steering does."""
