"""What a person sees of an evaluation: the page, pictures, tables in the terminal, the card."""
