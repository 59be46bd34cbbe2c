"""Download COCO and REFER into the layout that refdet reads."""
