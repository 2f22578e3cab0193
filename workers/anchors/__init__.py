"""Making anchors from means of subpopulations, top rows or files of vectors."""
