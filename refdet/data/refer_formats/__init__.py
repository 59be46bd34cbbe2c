"""The formats in which others distribute REFER, and their conversion to REFER's own layout."""
