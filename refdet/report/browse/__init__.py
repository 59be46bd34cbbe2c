"""``refdet browse``: a local page that shows the regions of stores on their images.

`collection` opens the files, `catalog` holds what is filtered and sorted in SQLite, `coverage` fills in what must be
computed while the page is already shown, `queries` answers the page, `server` serves it and `guard` decides to whom.
"""
