"""What a person sees of the findings: one page, and a summary in the terminal."""
