"""One self-contained page from a folder of results files: read (collect), drawn (figures), written (page)."""
