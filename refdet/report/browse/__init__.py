"""``refdet browse``: a local page that shows the regions of stores on their images.

`collection` opens the files, `catalog` is an SQLite database of what can be filtered and sorted, `coverage` computes
its slow parts in the background, `queries` and `views` make the lists and JSON of the page, `server` serves them and
`guard` decides which requests are answered.
"""
