"""Corpora as people have them: finding the files, reading their records, turning a record into tokens.

`files` finds and identifies files, here or at any fsspec URL. A module for each format reads records in pieces. `open`
puts them together, `contents` makes tokens of texts, token ids and chats. What the tokens become is `pipeline.layout`.
"""
