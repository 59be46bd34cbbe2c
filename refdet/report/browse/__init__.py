"""``refdet browse``: a local page that shows the regions of stores on their images.

`collection` opens the files; `catalog` is an SQLite database of what can be filtered and sorted, to which `referents`
adds the refs and annotations, and `coverage`, in the background, what takes longer to compute; `queries` selects the
entries of a list, `views` makes the JSON of the page and `thumbnails` its images; `server` answers the requests that
`guard` lets through.
"""
