"""What is done with finished evaluations: comparing them, and rows for notebooks."""
