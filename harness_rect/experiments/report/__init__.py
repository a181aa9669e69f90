"""One self-contained HTML page of a folder of results: read (reading), drawn (figures), written (page)."""
